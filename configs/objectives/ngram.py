"""N-grams of up to three words are hidden (ALBERT; Lan et al., 2019).

python -m flaxmlm.train --config=configs/objectives/ngram.py \
    --config.data.source='texts/*.txt' --workdir=runs/ngram

Model and data are those of configs/bert_mini.py; see docs/objectives.md.
"""

import os
import runpy

MINI = os.path.join(os.path.dirname(__file__), "..", "bert_mini.py")


def get_config():
  c = runpy.run_path(MINI)["get_config"]()
  c.objective.name = "ngram"
  return c
