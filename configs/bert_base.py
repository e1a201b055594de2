"""BERT-base (12 layers of 768, rows of 512; Devlin et al., 2018), bfloat16.

python -m flaxmlm.train --config=configs/bert_base.py \
    --config.data.source='texts/*.jsonl.zst' --workdir=runs/base

13 billion tokens, 7.7e18 FLOPs. At half of the device's peak that is 4.3 hours
on an H100 and 2.7 hours on eight TPU v5e; neither has been run yet, so no loss
is promised here.
"""

from flaxmlm.config import defaults


def get_config():
  c = defaults()
  c.data.row_length = 512
  c.tokenizer.vocab_size = 32_768
  c.model.dropout = 0.0
  c.model.attention_dropout = 0.0
  c.optimizer.peak_lr = 4e-4
  c.optimizer.warmup_steps = 5000
  c.train.steps = 100_000
  c.train.batch_size = 256
  c.train.dtype = "bfloat16"
  c.eval.every = 2500
  c.checkpoint.every = 2500
  return c
