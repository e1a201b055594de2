"""ALBERT (Lan et al., 2019): factorised embeddings, shared layers.

Embeddings are narrow (128 in all published models) and always go through a
matrix. N layers share the parameters of `num_hidden_groups` groups, each of
`inner_group_num` layers one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float, Key

from flaxmlm.models import bert
from flaxmlm.models.depth import run_layers
from flaxmlm.models.heads import Pooler
from flaxmlm.models.layers import Dtype, dense
from flaxmlm.models.model import Inputs, Model, assemble


class Encoder(nn.Module):
  """Embeddings, a matrix, N times a group of layers."""

  vocab_size: int
  options: Mapping[str, Any]
  dtype: Dtype

  @nn.compact
  def __call__(
    self, inputs: Inputs, dropout_keys: Key[Array, " B"] | None = None
  ) -> Float[Array, "B L D"]:
    """Returns the hidden states of the last layer."""
    o = self.options
    groups, inner = o["num_hidden_groups"], o["inner_group_num"]
    embeddings = bert.Embeddings(
      self.vocab_size, o, self.dtype, name="embeddings"
    )
    project = dense(o["width"], o["init_stddev"], self.dtype, name="project")
    x = project(embeddings(inputs, dropout_keys))
    layers = [
      bert.Layer(o, self.dtype, name=f"layer_{number}")
      for number in range(groups * inner)
    ]
    number = 0
    for group in range(groups):
      # Float division as in the published code, for groups that don't divide N.
      times = sum(
        int(n / (o["layers"] / groups)) == group for n in range(o["layers"])
      )
      x = run_layers(
        layers[group * inner : (group + 1) * inner] * times,
        x,
        inputs,
        dropout_keys,
        options=o,
        first=number,
        period=inner,
      )
      number += times * inner
    return x.reshape(*inputs.ids.shape, -1)


def build(
  options: Mapping[str, Any], *, vocab_size: int, dtype: Dtype
) -> Model:
  """Returns ALBERT with the dimensions in `options` (the `model` keys)."""
  o = bert.with_defaults(options, segment_types=2, embedding_size=128)
  D, E = o["width"], o["embedding_size"]
  all_layers = dict(o.items()) | {"layers": o["layers"] * o["inner_group_num"]}
  counted = bert.make_flops(all_layers, vocab_size)
  return assemble(
    Encoder(vocab_size, o, dtype),
    bert.make_head(o, vocab_size, dtype, activation=o["hidden_act"]),
    vocab_size=vocab_size,
    pooler=Pooler(o["init_stddev"], dtype),
    # The matrix is there even if it is square.
    flops=lambda L, M: counted(L, M) + 6.0 * L * E * D * (E == D),
    token_types=o["segment_types"],
  )
