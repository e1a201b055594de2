"""BERT of a billion parameters (20 layers of 2,048, rows of 1,024), bfloat16.

python -m flaxmlm.train --config=configs/bert_1b.py \
    --config.data.source='gs://BUCKET/texts/*.jsonl.zst' \
    --workdir=gs://BUCKET/runs/1b

For a slice of 256 chips: each 16 of them share one copy of the parameters
(mesh.fsdp), and a chip has 16 rows. Heads are 128 wide, as the matrix unit of a
TPU is. docs/tpu.md has what the compiler says of it:

python -m flaxmlm.plan --config=configs/bert_1b.py --tpu=v5e:16x16

Nothing of this size has been trained here, so no loss is promised. Layers are
normed after the sum, as BERT's are; Shoeybi et al., 2019 (Megatron-LM, section
5.3) say that such a model gets worse with its size, and norm before. Watch
train/grad_norm, or take the dimensions to model.family=modernbert.
"""

from flaxmlm.config import defaults


def get_config():
  c = defaults()
  c.data.row_length = 1_024
  c.tokenizer.vocab_size = 32_768
  c.model.layers = 20
  c.model.width = 2_048
  c.model.heads = 16
  c.model.ffn = 8_192
  c.model.max_positions = 1_024
  c.model.dropout = 0.0
  c.model.attention_dropout = 0.0
  c.model.remat = "full"
  c.optimizer.peak_lr = 1e-4
  c.optimizer.warmup_steps = 10_000
  c.mesh.fsdp = 16
  c.train.steps = 100_000
  c.train.batch_size = 4_096
  c.train.dtype = "bfloat16"
  c.eval.every = 2_500
  c.checkpoint.every = 2_500
  return c
