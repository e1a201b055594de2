"""Replaced tokens are told from true ones (ELECTRA; Clark et al., 2020).

python -m flaxmlm.train --config=configs/objectives/replaced_token.py \
    --config.data.source='texts/*.txt' --workdir=runs/replaced_token

Model and data are those of configs/bert_mini.py; see docs/objectives.md.
"""

import os
import runpy

MINI = os.path.join(os.path.dirname(__file__), "..", "bert_mini.py")


def get_config():
  c = runpy.run_path(MINI)["get_config"]()
  c.model.family = "electra"
  c.model.embedding_size = 128
  c.objective.name = "replaced_token"
  c.objective.mask_share = 0.85
  c.objective.random_share = 0.0
  return c
