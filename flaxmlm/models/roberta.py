"""RoBERTa (Liu et al., 2019), XLM-R, CamemBERT: BERT with other embeddings.

Positions begin in row 2 of their table: row 1 is padding's (the id of <pad> in
fairseq's dictionaries), row 0 is never read. There is one segment. The head's
activation is always the exact GELU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flaxmlm.models import bert
from flaxmlm.models.heads import Pooler
from flaxmlm.models.layers import Dtype
from flaxmlm.models.model import Model, assemble

FIRST_POSITION = 2


def build(
  options: Mapping[str, Any], *, vocab_size: int, dtype: Dtype
) -> Model:
  """Returns RoBERTa with the dimensions in `options` (the `model` keys).

  `max_positions` counts what a row may use: 512, where Hugging Face's
  `max_position_embeddings` says 514.
  """
  o = bert.with_defaults(options, segment_types=1)
  return assemble(
    bert.Encoder(vocab_size, o, dtype, FIRST_POSITION),
    bert.make_head(o, vocab_size, dtype, activation="gelu"),
    vocab_size=vocab_size,
    pooler=Pooler(o["init_stddev"], dtype),
    flops=bert.make_flops(o, vocab_size),
    token_types=o["segment_types"],
    skips_padding=True,
  )
