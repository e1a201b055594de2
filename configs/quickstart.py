"""A small BERT on the texts that come with Python: the whole way in minutes.

python -m flaxmlm.train --config=configs/quickstart.py --workdir=runs/quickstart
"""

from flaxmlm.config import defaults


def get_config():
  c = defaults()
  c.data.source = "embedded"
  c.data.row_length = 64
  c.data.validation_fraction = 0.04
  c.tokenizer.vocab_size = 2048
  c.model.layers = 3
  c.model.width = 128
  c.model.heads = 4
  c.model.ffn = 512
  c.model.max_positions = 64
  c.model.dropout = 0.0
  c.model.attention_dropout = 0.0
  c.objective.rate = 0.2
  c.optimizer.name = "muon"
  c.optimizer.peak_lr = 6e-3
  c.optimizer.muon_peak_lr = 1.2e-2
  c.optimizer.warmup_steps = 100
  c.train.steps = 1200
  c.train.batch_size = 32
  c.eval.every = 300
  c.eval.rows = 512
  c.checkpoint.every = 600
  c.log.every = 25
  return c
