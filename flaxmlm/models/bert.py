"""BERT (Devlin et al., 2018), as google-research/bert has it.

Post-LayerNorm, learned positions, segment embeddings, erf GELU. The pooler is
no part of the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from flaxmlm.models.attention import attend
from flaxmlm.models.heads import MaskedLanguageModelHead
from flaxmlm.models.layers import Dtype, dense, dropout, gelu, layer_norm
from flaxmlm.models.model import Inputs, Model, Params


class Embeddings(nn.Module):
  """Sum of word, position and segment embeddings; LayerNorm; dropout."""

  vocab_size: int
  options: Mapping[str, Any]
  dtype: Dtype

  @nn.compact
  def __call__(
    self, inputs: Inputs, dropout_keys: Key[Array, " B"] | None
  ) -> Float[Array, "T D"]:
    """Embeds the rows, flattened to T = B·L tokens."""
    o = self.options

    def embed(name: str, size: int, index: Array) -> Array:
      init = nn.initializers.truncated_normal(o["init_stddev"])
      table = nn.Embed(size, o["width"], embedding_init=init, name=name)
      return table(index.reshape(-1))

    x = (
      embed("word", self.vocab_size, inputs.ids)
      + embed("position", o["max_positions"], inputs.positions)
      + embed("token_type", o["segment_types"], inputs.token_types)
    )
    x = layer_norm(o["norm_eps"], self.dtype, name="norm")(x)
    return dropout(x, dropout_keys, o["dropout"], site=0)


class Layer(nn.Module):
  """One encoder layer; `number` counts from 0 and addresses its dropout."""

  options: Mapping[str, Any]
  dtype: Dtype
  number: int

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "T D"],
    inputs: Inputs,
    dropout_keys: Key[Array, " B"] | None,
  ) -> Float[Array, "T D"]:
    """Attention and feed-forward, each added to its input, then normed."""
    o = self.options
    B, L = inputs.ids.shape
    H, K = o["heads"], o["width"] // o["heads"]
    site = 1 + 3 * self.number

    def linear(name: str, features: int, x: Array) -> Array:
      return dense(features, o["init_stddev"], self.dtype, name=name)(x)

    def norm(name: str, x: Array) -> Array:
      return layer_norm(o["norm_eps"], self.dtype, name=name)(x)

    mixed = attend(
      linear("query", o["width"], x).reshape(B, L, H, K),
      linear("key", o["width"], x).reshape(B, L, H, K),
      linear("value", o["width"], x).reshape(B, L, H, K),
      inputs.segments,
      dropout_keys=dropout_keys,
      dropout_rate=o["attention_dropout"],
      site=site,
    ).reshape(B * L, H * K)
    mixed = linear("attention_output", o["width"], mixed)
    mixed = dropout(mixed, dropout_keys, o["dropout"], site + 1)
    x = norm("attention_norm", x + mixed)
    inner = gelu(linear("intermediate", o["ffn"], x))
    outer = linear("output", o["width"], inner)
    outer = dropout(outer, dropout_keys, o["dropout"], site + 2)
    return norm("output_norm", x + outer)


class Encoder(nn.Module):
  """Embeddings and N layers."""

  vocab_size: int
  options: Mapping[str, Any]
  dtype: Dtype

  @nn.compact
  def __call__(
    self, inputs: Inputs, dropout_keys: Key[Array, " B"] | None = None
  ) -> Float[Array, "B L D"]:
    """Returns the hidden states of the last layer."""
    x = Embeddings(
      self.vocab_size, self.options, self.dtype, name="embeddings"
    )(inputs, dropout_keys)
    for number in range(self.options["layers"]):
      layer = Layer(self.options, self.dtype, number, name=f"layer_{number}")
      x = layer(x, inputs, dropout_keys)
    return x.reshape(*inputs.ids.shape, -1)


def build(
  options: Mapping[str, Any], *, vocab_size: int, dtype: Dtype
) -> Model:
  """Returns BERT with the dimensions in `options` (the `model` keys)."""
  options = nn.FrozenDict(options)
  encoder = Encoder(vocab_size, options, dtype)
  head = MaskedLanguageModelHead(
    vocab_size, options["norm_eps"], options["init_stddev"], dtype
  )

  def init(key: Key[Array, ""]) -> Params:
    encoder_key, mlm_key = jax.random.split(key)
    row = jnp.zeros((1, 1), jnp.int32)
    encoder_params = encoder.init(encoder_key, Inputs(row, row, row, row))
    hidden = jnp.zeros((1, options["width"]), dtype)
    table = jnp.zeros((vocab_size, options["width"]), dtype)
    mlm_params = head.init(mlm_key, hidden, table)
    return {"encoder": encoder_params["params"], "mlm": mlm_params["params"]}

  def encode(
    params: Params,
    inputs: Inputs,
    dropout_keys: Key[Array, " B"] | None = None,
  ) -> Float[Array, "B L D"]:
    variables = {"params": params["encoder"]}
    return encoder.apply(variables, inputs, dropout_keys)

  def predict(
    params: Params, hidden: Float[Array, "B M D"]
  ) -> Float[Array, "B M V"]:
    table = params["encoder"]["embeddings"]["word"]["embedding"]
    flat = hidden.reshape(-1, hidden.shape[-1])
    logits = head.apply({"params": params["mlm"]}, flat, table)
    return logits.reshape(*hidden.shape[:-1], vocab_size)

  def flops(row_length: int, slots: int) -> float:
    L, M, D, F = row_length, slots, options["width"], options["ffn"]
    layer = L * (4 * D * D + 2 * D * F) + 2 * L * L * D
    multiplies = options["layers"] * layer + M * (D * D + D * vocab_size)
    # Two FLOPs a multiply-add; the backward pass costs twice the forward.
    return 2.0 * 3.0 * multiplies

  return Model(init, encode, predict, flops)
