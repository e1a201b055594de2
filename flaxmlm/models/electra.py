"""ELECTRA (Clark et al., 2020): BERT with embeddings of a width of their own.

A matrix takes them to the width of the hidden states if that is another. The
head, which is the generator's, has always the exact GELU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flaxmlm.models import bert
from flaxmlm.models.layers import Dtype
from flaxmlm.models.model import Model, assemble


def build(
  options: Mapping[str, Any], *, vocab_size: int, dtype: Dtype
) -> Model:
  """Returns ELECTRA with the dimensions in `options` (the `model` keys)."""
  o = bert.with_defaults(options, segment_types=2)
  return assemble(
    bert.Encoder(vocab_size, o, dtype),
    bert.make_head(o, vocab_size, dtype, activation="gelu"),
    vocab_size=vocab_size,
    flops=bert.make_flops(o, vocab_size),
    token_types=o["segment_types"],
  )
