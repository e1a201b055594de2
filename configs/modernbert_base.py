"""ModernBERT-base (22 layers of 768; Warner et al., 2024), bfloat16.

python -m flaxmlm.train --config=configs/modernbert_base.py \
    --config.data.source='texts/*.jsonl.zst' --workdir=runs/modernbert

Dimensions and rotary bases of the published config.json, 149.7 million
parameters; rows, masks, optimizer and schedule of the published recipe
(yamls/modernbert/modernbert-base-pretrain.yaml in AnswerDotAI/ModernBERT): a
warm-up of 3 billion tokens and a long stable part at 8e-4. Its weight decay of
1e-5 stands apart from the learning rate, which makes 0.0125 of ours.

Other than published: the length, 12,000 steps, 57 billion tokens, 4.7e19 FLOPs,
where that was 1.7 trillion; the decay, which comes here in the last tenth; the
batch, which grew there at first; AdamW for StableAdamW; a truncated normal of
0.02 for Megatron's init, which is narrower in deeper layers; no dropout, where
the output of attention had 0.1; validation rows with 30 % masked like the
others, where they had 15 %; SentencePiece's BPE for a byte-level one, which is
read but not trained here. And the layers that see everything have their base of
160,000 from the beginning, where it was 10,000 in rows of 1,024: so a later
phase of rows of 8,192 changes nothing but the rows. For such a phase, end this
one before its decay (optimizer.schedule=constant); see docs/continue.md.

At half of the device's peak that is 26 hours on an H100 and 17 hours on eight
TPU v5e; neither has been run yet, so no loss is promised here. A batch goes
through in 96 parts of 48 rows: fewer (train.microbatches) where there is
memory.
"""

from flaxmlm.config import defaults


def get_config():
  c = defaults()
  c.data.row_length = 1_024
  c.tokenizer.kind = "bpe"
  c.tokenizer.vocab_size = 50_368
  c.model.family = "modernbert"
  c.model.layers = 22
  c.model.width = 768
  c.model.heads = 12
  c.model.ffn = 1_152
  c.model.max_positions = 8_192
  c.model.norm_eps = 1e-5
  c.model.global_attn_every_n_layers = 3
  c.model.local_attention = 128
  c.model.global_rope_theta = 160_000.0
  c.model.local_rope_theta = 10_000.0
  c.model.dropout = 0.0
  c.model.attention_dropout = 0.0
  c.objective.rate = 0.3
  c.optimizer.peak_lr = 8e-4
  c.optimizer.weight_decay = 0.0125
  c.optimizer.b2 = 0.98
  c.optimizer.eps = 1e-6
  c.optimizer.clip_norm = None
  c.optimizer.schedule = "wsd"
  c.optimizer.warmup_steps = 636
  c.optimizer.decay_steps = 1_200
  c.train.steps = 12_000
  c.train.batch_size = 4_608
  c.train.microbatches = 96
  c.train.dtype = "bfloat16"
  c.eval.every = 500
  c.checkpoint.every = 500
  return c
