"""ELECTRA (Clark et al., 2020): BERT with embeddings of a width of their own.

A matrix takes them to the width of the hidden states if that is another. The
MLM head, which is the generator's, has always the exact GELU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flaxmlm.models import bert
from flaxmlm.models.layers import Dtype
from flaxmlm.models.model import Model, assemble

_NARROWED = ("width", "heads", "ffn")


def build(
  options: Mapping[str, Any], *, vocab_size: int, dtype: Dtype
) -> Model:
  """Returns ELECTRA with the dimensions in `options` (the `model` keys)."""
  o = bert.with_defaults(
    options, segment_types=2, embedding_size=options["width"]
  )

  return assemble(
    bert.Encoder(vocab_size, o, dtype),
    bert.make_head(o, vocab_size, dtype, activation="gelu"),
    vocab_size=vocab_size,
    flops=bert.make_flops(o, vocab_size),
    token_types=o["segment_types"],
    narrower=lambda share: build(
      narrow(o, share), vocab_size=vocab_size, dtype=dtype
    ),
  )


def narrow(options: Mapping[str, Any], share: float) -> dict[str, Any]:
  """Returns the options of a generator: a share of the width, all the depth.

  Its embeddings are of the shapes of the model's own (section 3.2 of the
  paper); 1/4 to 1/2 were best (section 3.3).
  """
  sizes = {name: round(options[name] * share) for name in _NARROWED}
  embedding_size = options["embedding_size"] or options["width"]
  return {**options, **sizes, "embedding_size": embedding_size}
