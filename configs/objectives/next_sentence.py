"""Tokens are hidden, and the next sentence is asked for (BERT, 2018).

python -m flaxmlm.train --config=configs/objectives/next_sentence.py \
    --config.data.source='texts/*.txt' --workdir=runs/next_sentence

Model and data are those of configs/bert_mini.py; see docs/objectives.md.
"""

import os
import runpy

MINI = os.path.join(os.path.dirname(__file__), "..", "bert_mini.py")


def get_config():
  c = runpy.run_path(MINI)["get_config"]()
  c.objective.name = ("masked", "next_sentence")
  return c
