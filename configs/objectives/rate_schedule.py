"""The share of hidden tokens falls while training (Yang et al., 2022).

python -m flaxmlm.train --config=configs/objectives/rate_schedule.py \
    --config.data.source='texts/*.txt' --workdir=runs/rate_schedule

Model and data are those of configs/bert_mini.py; see docs/objectives.md.
"""

import os
import runpy

MINI = os.path.join(os.path.dirname(__file__), "..", "bert_mini.py")


def get_config():
  c = runpy.run_path(MINI)["get_config"]()
  c.objective.rate = 0.3
  c.objective.rate_end = 0.15
  return c
