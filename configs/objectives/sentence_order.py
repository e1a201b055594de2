"""N-grams are hidden, and the order of two segments is asked for (ALBERT).

python -m flaxmlm.train --config=configs/objectives/sentence_order.py \
    --config.data.source='texts/*.txt' --workdir=runs/sentence_order

Model and data are those of configs/bert_mini.py; see docs/objectives.md.
"""

import os
import runpy

MINI = os.path.join(os.path.dirname(__file__), "..", "bert_mini.py")


def get_config():
  c = runpy.run_path(MINI)["get_config"]()
  c.objective.name = ("ngram", "sentence_order")
  return c
