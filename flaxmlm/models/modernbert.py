"""ModernBERT (Warner et al., 2024).

Pre-norm without biases, rotary positions (Su et al., 2021), a GELU-gated
feed-forward (GeGLU: Shazeer, 2020). One layer in `global_attn_every_n_layers`,
the first of them layer 0, sees the whole document; the others see
`local_attention` / 2 tokens to each side and have a rotary base of their own.
Layer 0 doesn't norm before attention, for the embeddings are normed already.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from flaxmlm.models.attention import attend
from flaxmlm.models.bert import with_defaults
from flaxmlm.models.depth import run_layers
from flaxmlm.models.heads import MaskedLanguageModelHead
from flaxmlm.models.layers import (
  ACTIVATIONS,
  Dtype,
  dense,
  dropout,
  layer_norm,
)
from flaxmlm.models.model import Inputs, Model, assemble
from flaxmlm.models.vocabulary import look_up

Turns = tuple[Float[Array, "B L 1 J"], Float[Array, "B L 1 J"]]
"""Cosine and sine of the J = K/2 angles of each token, for all heads."""


def turns(positions: Int[Array, "B L"], size: int, theta: float) -> Turns:
  """Returns the rotations of heads of a size: position · theta^(-2i/K).

  Looked up in a constant table, for XLA on CPUs computes a cosine anew for each
  layer and head that reads it. A position is below L; others give NaN.
  """
  frequencies = theta ** (-np.arange(0, size, 2, dtype=np.float32) / size)
  angles = (
    np.arange(positions.shape[1], dtype=np.float32)[:, None] * frequencies
  )
  return tuple(
    jnp.asarray(table)
    .at[positions]
    .get(mode="fill", fill_value=jnp.nan)[:, :, None]
    for table in (np.cos(angles), np.sin(angles))
  )


def rotate(x: Float[Array, "B L H K"], by: Turns) -> Float[Array, "B L H K"]:
  """Rotates the pairs (i, i + K/2) of each head."""
  cos, sin = by
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return turned.astype(x.dtype)


class Layer(nn.Module):
  """One encoder layer.

  With a window, the rotation is the near one of two. The first layer is given
  what is normed already.
  """

  options: Mapping[str, Any]
  dtype: Dtype
  window: int | None
  first: bool = False

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "T D"],
    inputs: Inputs,
    far: Turns,
    near: Turns,
    dropout_keys: Key[Array, " B"] | None,
    number: int | Int[Array, ""],
  ) -> Float[Array, "T D"]:
    """Attention and gated feed-forward, each of what is normed, each added.

    `number` counts the layers from 0 and addresses their dropout.
    """
    o = self.options
    B, L = inputs.ids.shape
    D, H = o["width"], o["heads"]
    site = 1 + 3 * number
    by = far if self.window is None else near

    def linear(name: str, features: int, x: Array) -> Array:
      return dense(
        features, o["init_stddev"], self.dtype, use_bias=False, name=name
      )(x)

    def norm(name: str, x: Array) -> Array:
      return layer_norm(o["norm_eps"], self.dtype, use_bias=False, name=name)(x)

    normed = x if self.first else norm("attention_norm", x)
    query, key, value = (
      linear(name, D, normed).reshape(B, L, H, D // H)
      for name in ("query", "key", "value")
    )
    mixed = attend(
      rotate(query, by),
      rotate(key, by),
      value,
      inputs.segments,
      backend=o["attention"],
      window=self.window,
      dropout_keys=dropout_keys,
      dropout_rate=o["attention_dropout"],
      site=site,
    ).reshape(B * L, D)
    mixed = linear("attention_output", D, mixed)
    x = x + dropout(mixed, dropout_keys, o["attention_dropout"], site + 1)
    normed = norm("ffn_norm", x)
    inner = ACTIVATIONS[o["hidden_act"]](
      linear("intermediate", o["ffn"], normed)
    )
    inner *= linear("gate", o["ffn"], normed)
    inner = dropout(inner, dropout_keys, o["dropout"], site + 2)
    return x + linear("output", D, inner)


class Encoder(nn.Module):
  """Normed word embeddings, N layers, a last norm."""

  vocab_size: int
  options: Mapping[str, Any]
  dtype: Dtype

  @nn.compact
  def __call__(
    self, inputs: Inputs, dropout_keys: Key[Array, " B"] | None = None
  ) -> Float[Array, "B L D"]:
    """Returns the hidden states of the last layer, normed."""
    o = self.options
    x = Embeddings(self.vocab_size, o, self.dtype, name="embeddings")(
      inputs, dropout_keys
    )
    size = o["width"] // o["heads"]
    far, near = (
      turns(inputs.positions, size, o[f"{reach}_rope_theta"])
      for reach in ("global", "local")
    )
    every, window = o["global_attn_every_n_layers"], o["local_attention"] // 2
    layers = [
      Layer(
        o,
        self.dtype,
        window if number % every else None,
        first=number == 0,
        name=f"layer_{number}",
      )
      for number in range(o["layers"])
    ]
    x = run_layers(
      layers,
      x,
      inputs,
      far,
      near,
      dropout_keys,
      options=o,
      skip=1,
      period=every,
    )
    x = layer_norm(
      o["norm_eps"], self.dtype, use_bias=False, name="final_norm"
    )(x)
    return x.reshape(*inputs.ids.shape, -1)


class Embeddings(nn.Module):
  """Word embeddings; LayerNorm; dropout."""

  vocab_size: int
  options: Mapping[str, Any]
  dtype: Dtype

  @nn.compact
  def __call__(
    self, inputs: Inputs, dropout_keys: Key[Array, " B"] | None
  ) -> Float[Array, "T D"]:
    """Embeds the rows, flattened to T = B·L tokens."""
    o = self.options
    init = nn.initializers.truncated_normal(o["init_stddev"])
    table = nn.Embed(
      self.vocab_size, o["width"], embedding_init=init, name="word"
    )
    x = layer_norm(o["norm_eps"], self.dtype, use_bias=False, name="norm")(
      look_up(table.embedding, inputs.ids.reshape(-1), self.dtype)
    )
    return dropout(x, dropout_keys, o["dropout"], site=0)


def build(
  options: Mapping[str, Any], *, vocab_size: int, dtype: Dtype
) -> Model:
  """Returns ModernBERT with the dimensions in `options` (the `model` keys)."""
  o = with_defaults(options, segment_types=0)
  D, F, N = o["width"], o["ffn"], o["layers"]
  everywhere = -(-N // o["global_attn_every_n_layers"])

  def flops(row_length: int, slots: int) -> float:
    L, M = row_length, slots
    seen = everywhere * L + (N - everywhere) * min(L, o["local_attention"] + 1)
    multiplies = L * (N * (4 * D * D + 3 * D * F) + 2 * seen * D)
    multiplies += M * (D * D + D * vocab_size)
    return 2.0 * 3.0 * multiplies

  head = MaskedLanguageModelHead(
    vocab_size,
    o["norm_eps"],
    o["init_stddev"],
    dtype,
    transform_bias=False,
    norm_bias=False,
    tied=o["tie_word_embeddings"],
  )
  return assemble(
    Encoder(vocab_size, o, dtype),
    head,
    vocab_size=vocab_size,
    flops=flops,
    token_types=o["segment_types"],
  )
