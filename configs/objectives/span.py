"""Spans of up to ten words are hidden (SpanBERT; Joshi et al., 2019).

python -m flaxmlm.train --config=configs/objectives/span.py \
    --config.data.source='texts/*.txt' --workdir=runs/span

Model and data are those of configs/bert_mini.py; see docs/objectives.md.
"""

import os
import runpy

MINI = os.path.join(os.path.dirname(__file__), "..", "bert_mini.py")


def get_config():
  c = runpy.run_path(MINI)["get_config"]()
  c.objective.name = "span"
  c.objective.span_boundary = True
  return c
