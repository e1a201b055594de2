"""Tokens are hidden, and the label of a pair of texts is asked for.

python -m flaxmlm.train --config=configs/objectives/sentence_pair.py \
    --config.data.source='pairs/*.jsonl' --workdir=runs/sentence_pair

Reads lines like {"text": …, "second": …, "label": "entailment"}. Model and data
are those of configs/bert_mini.py; see docs/objectives.md.
"""

import os
import runpy

MINI = os.path.join(os.path.dirname(__file__), "..", "bert_mini.py")


def get_config():
  c = runpy.run_path(MINI)["get_config"]()
  c.data.pair_field = "second"
  c.objective.name = ("masked", "sentence_pair")
  c.objective.labels = ("entailment", "neutral", "contradiction")
  return c
