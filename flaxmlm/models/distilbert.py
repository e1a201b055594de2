"""DistilBERT (Sanh et al., 2019): BERT without segments, half as deep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flaxmlm.models import bert
from flaxmlm.models.layers import Dtype
from flaxmlm.models.model import Model, assemble


def build(
  options: Mapping[str, Any], *, vocab_size: int, dtype: Dtype
) -> Model:
  """Returns DistilBERT with the dimensions in `options` (the `model` keys)."""
  o = bert.with_defaults(options, segment_types=0)
  return assemble(
    bert.Encoder(vocab_size, o, dtype),
    bert.make_head(o, vocab_size, dtype, activation=o["hidden_act"]),
    vocab_size=vocab_size,
    flops=bert.make_flops(o, vocab_size),
    token_types=o["segment_types"],
  )
