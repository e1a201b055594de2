"""Whole words are hidden (google-research/bert, 2019).

python -m flaxmlm.train --config=configs/objectives/whole_word.py \
    --config.data.source='texts/*.txt' --workdir=runs/whole_word

Model and data are those of configs/bert_mini.py; see docs/objectives.md.
"""

import os
import runpy

MINI = os.path.join(os.path.dirname(__file__), "..", "bert_mini.py")


def get_config():
  c = runpy.run_path(MINI)["get_config"]()
  c.objective.name = "whole_word"
  return c
