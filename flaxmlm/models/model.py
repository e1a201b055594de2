"""What a model is to everything outside this folder.

Dimension key: B batch, L row length, M prediction slots, D width, H heads,
K head size, F feed-forward, V vocabulary, N layers, T = B·L flat tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int, Key

Params = dict[str, Any]


class Inputs(NamedTuple):
  """What an encoder reads.

  Attributes:
    ids: Token ids.
    segments: Number of the document within the row, from 1; 0 is padding.
      Attention stays within equal numbers.
    positions: Position of the token within its document, from 0.
    token_types: BERT's segment A or B (0 or 1) for pairs.
  """

  ids: Int[Array, "B L"]
  segments: Int[Array, "B L"]
  positions: Int[Array, "B L"]
  token_types: Int[Array, "B L"]


class Model(NamedTuple):
  """A model as pure functions over one tree of float32 parameters.

  Attributes:
    init: `key -> params`, `{"encoder": …, "mlm": …}`.
    encode: `(params, inputs, dropout_keys) -> hidden [B L D]`. One dropout key
      a row makes a row's dropout the same in any batch; None means none.
    predict: `(params, hidden [B M D]) -> logits [B M V]`, in compute dtype.
    flops: `(row_length, slots) -> float`: model FLOPs of one row, forward and
      backward, counted as two a multiply-add.
  """

  init: Callable[[Key[Array, ""]], Params]
  encode: Callable[
    [Params, Inputs, Key[Array, " B"] | None], Float[Array, "B L D"]
  ]
  predict: Callable[[Params, Float[Array, "B M D"]], Float[Array, "B M V"]]
  flops: Callable[[int, int], float]


def count_parameters(params: Params) -> int:
  """Returns the number of scalars in a tree (of arrays or their shapes)."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))
