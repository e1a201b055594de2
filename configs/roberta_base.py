"""RoBERTa-base (12 layers of 768, rows of 512; Liu et al., 2019), bfloat16.

python -m flaxmlm.train --config=configs/roberta_base.py \
    --config.data.source='texts/*.jsonl.zst' --workdir=runs/roberta

The model of the paper's table 9: 124.7 million parameters. The length is that
of its table 3, as much training as BERT had: 125,000 batches of 2,048 rows at
7e-4, 131 billion tokens, 7.9e19 FLOPs. (The published model went on to 500,000
batches of 8,192 at 6e-4, over 160 GB of text.) The warm-up is a twentieth, as
there; masks are new in every epoch, as they always are here. Dimensions and
vocabulary are compared with transformers' in a test; the optimizer's figures
have not been checked against the paper again.

At half of the device's peak that is 44 hours on an H100 and 28 hours on eight
TPU v5e; neither has been run yet, so no loss is promised here. A batch goes
through in 32 parts of 64 rows: fewer (train.microbatches) where there is
memory.

Byte-level BPE, the published vocabulary's kind, is read but not trained here:
SentencePiece's BPE of the same size stands in for it. RoBERTa's own, where
vocab.json and merges.txt are in a folder: --config.tokenizer.path=FOLDER.
"""

from flaxmlm.config import defaults


def get_config():
  c = defaults()
  c.data.row_length = 512
  c.tokenizer.kind = "bpe"
  c.tokenizer.vocab_size = 50_265
  c.model.family = "roberta"
  c.model.layers = 12
  c.model.width = 768
  c.model.heads = 12
  c.model.ffn = 3072
  c.model.max_positions = 512
  c.model.norm_eps = 1e-5
  c.model.dropout = 0.1
  c.model.attention_dropout = 0.1
  c.optimizer.peak_lr = 7e-4
  c.optimizer.weight_decay = 0.01
  c.optimizer.b2 = 0.98
  c.optimizer.eps = 1e-6
  c.optimizer.clip_norm = None
  c.optimizer.warmup_steps = 6_000
  c.train.steps = 125_000
  c.train.batch_size = 2_048
  c.train.microbatches = 32
  c.train.dtype = "bfloat16"
  c.eval.every = 2_500
  c.checkpoint.every = 2_500
  return c
