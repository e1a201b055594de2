"""BERT (Devlin et al., 2018), as google-research/bert has it.

Post-LayerNorm, learned positions, segment embeddings, erf GELU. The pooler is
a head, apart from the encoder. Its relatives are made of the modules here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from flaxmlm.models import lean
from flaxmlm.models.attention import attend
from flaxmlm.models.depth import run_layers
from flaxmlm.models.heads import MaskedLanguageModelHead, Pooler
from flaxmlm.models.layers import (
  ACTIVATIONS,
  Dtype,
  dense,
  dropout,
  is_lean,
  layer_norm,
)
from flaxmlm.models.model import Inputs, Model, assemble
from flaxmlm.models.vocabulary import SPLITS, look_up


class Embeddings(nn.Module):
  """Sum of word, position and segment embeddings; LayerNorm; dropout.

  `first_position` is the row of the position table that position 0 has. With
  no segment types, there is no table of them.
  """

  vocab_size: int
  options: Mapping[str, Any]
  dtype: Dtype
  first_position: int = 0

  @nn.compact
  def __call__(
    self, inputs: Inputs, dropout_keys: Key[Array, " B"] | None
  ) -> Float[Array, "T E"]:
    """Embeds the rows, flattened to T = B·L tokens."""
    o = self.options
    width = o["embedding_size"] or o["width"]
    first = self.first_position

    def embed(name: str, size: int, index: Array) -> Array:
      init = nn.initializers.truncated_normal(o["init_stddev"])
      table = nn.Embed(size, width, embedding_init=init, name=name)
      splits = SPLITS if name == "word" else SPLITS[-1:]
      return look_up(table.embedding, index.reshape(-1), self.dtype, *splits)

    x = embed("word", self.vocab_size, inputs.ids)
    positions = inputs.positions + first
    x += embed("position", o["max_positions"] + first, positions)
    if o["segment_types"]:
      x += embed("token_type", o["segment_types"], inputs.token_types)
    x = layer_norm(o["norm_eps"], self.dtype, name="norm")(x)
    return dropout(x, dropout_keys, o["dropout"], site=0)


class Layer(nn.Module):
  """One encoder layer."""

  options: Mapping[str, Any]
  dtype: Dtype

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "T D"],
    inputs: Inputs,
    dropout_keys: Key[Array, " B"] | None,
    number: int | Int[Array, ""],
  ) -> Float[Array, "T D"]:
    """Attention and feed-forward, each added to its input, then normed.

    `number` counts the layers from 0 and addresses their dropout.
    """
    o = self.options
    B, L = inputs.ids.shape
    H, K = o["heads"], o["width"] // o["heads"]
    site = 1 + 3 * number

    def linear(name: str, features: int, x: Array) -> Array:
      return dense(features, o["init_stddev"], self.dtype, name=name)(x)

    def norm(name: str, x: Array) -> Array:
      return layer_norm(o["norm_eps"], self.dtype, name=name)(x)

    def weights(name: str, features: int) -> tuple[Array, Array]:
      module = lean.Weights(features, o["init_stddev"], name=name)
      return module(o["ffn"] if name == "output" else o["width"])

    def mix(query: Array, key: Array, value: Array) -> Array:
      return attend(
        query,
        key,
        value,
        inputs.segments,
        backend=o["attention"],
        dropout_keys=dropout_keys,
        dropout_rate=o["attention_dropout"],
        site=site,
      )

    def mix_row(names: Sequence[str]) -> Array:
      from flaxmlm.models import row_attention  # half a second, for few

      kernels, biases = zip(*(weights(n, H * K) for n in names), strict=True)
      projected = x @ jnp.concatenate(kernels, axis=1).astype(x.dtype)
      return row_attention.attend(
        projected.reshape(B, L, -1),
        jnp.concatenate(biases),
        inputs.segments,
        heads=H,
      )

    names = ("query", "key", "value")
    row = o["attention"] == "row"
    if is_lean(self.dtype) and not row and not o["attention_dropout"]:
      # Flat, it would be laid out as no product here likes it.
      x = x.reshape(B, L, -1)
      layers = (weights(name, H * K) for name in (*names, "attention_output"))
      mixed = lean.self_attention(x, *layers, heads=H, attend=mix)
    else:
      if row:
        mixed = mix_row(names)
      else:
        heads = (linear(n, H * K, x).reshape(B, L, H, K) for n in names)
        mixed = mix(*heads)
      mixed = linear("attention_output", o["width"], mixed.reshape(B * L, -1))
    mixed = dropout(mixed, dropout_keys, o["dropout"], site + 1)
    x = norm("attention_norm", x + mixed)
    if is_lean(self.dtype) and o["hidden_act"] == "gelu":
      into, out = weights("intermediate", o["ffn"]), weights("output", H * K)
      outer = lean.feed_forward(x, *into, *out)
    else:
      inner = linear("intermediate", o["ffn"], x)
      inner = ACTIVATIONS[o["hidden_act"]](inner)
      outer = linear("output", o["width"], inner)
    outer = dropout(outer, dropout_keys, o["dropout"], site + 2)
    return norm("output_norm", x + outer).reshape(B * L, -1)


class Encoder(nn.Module):
  """Embeddings, as wide as the hidden states by a matrix if need be, N layers.

  `first_position`: see `Embeddings`.
  """

  vocab_size: int
  options: Mapping[str, Any]
  dtype: Dtype
  first_position: int = 0

  @nn.compact
  def __call__(
    self, inputs: Inputs, dropout_keys: Key[Array, " B"] | None = None
  ) -> Float[Array, "B L D"]:
    """Returns the hidden states of the last layer."""
    o = self.options
    embeddings = Embeddings(
      self.vocab_size, o, self.dtype, self.first_position, name="embeddings"
    )
    x = embeddings(inputs, dropout_keys)
    if x.shape[-1] != o["width"]:
      project = dense(o["width"], o["init_stddev"], self.dtype, name="project")
      x = project(x)
    layers = [
      Layer(o, self.dtype, name=f"layer_{number}")
      for number in range(o["layers"])
    ]
    x = run_layers(layers, x, inputs, dropout_keys, options=o)
    return x.reshape(*inputs.ids.shape, -1)


def build(
  options: Mapping[str, Any], *, vocab_size: int, dtype: Dtype
) -> Model:
  """Returns BERT with the dimensions in `options` (the `model` keys)."""
  o = with_defaults(options, segment_types=2)
  return assemble(
    Encoder(vocab_size, o, dtype),
    make_head(o, vocab_size, dtype, activation=o["hidden_act"]),
    vocab_size=vocab_size,
    pooler=Pooler(o["init_stddev"], dtype),
    flops=make_flops(o, vocab_size),
    token_types=o["segment_types"],
  )


def with_defaults(
  options: Mapping[str, Any], **defaults: Any
) -> Mapping[str, Any]:
  """Returns options in which None stands for a family's own value."""
  given = dict(options.items())
  for name, value in defaults.items():
    if given[name] is None:
      given[name] = value
  return nn.FrozenDict(given)


def make_head(
  options: Mapping[str, Any], vocab_size: int, dtype: Dtype, *, activation: str
) -> MaskedLanguageModelHead:
  """Returns the MLM head that goes with the options."""
  return MaskedLanguageModelHead(
    vocab_size,
    options["norm_eps"],
    options["init_stddev"],
    dtype,
    activation=activation,
    tied=options["tie_word_embeddings"],
  )


def make_flops(
  options: Mapping[str, Any], vocab_size: int
) -> Callable[[int, int], float]:
  """Returns `Model.flops` of N layers like `Layer`."""
  D, F = options["width"], options["ffn"]
  E = options["embedding_size"] or D

  def flops(row_length: int, slots: int) -> float:
    L, M = row_length, slots
    layer = L * (4 * D * D + 2 * D * F) + 2 * L * L * D
    multiplies = options["layers"] * layer + M * (D * E + E * vocab_size)
    multiplies += L * E * D * (E != D)
    # Two FLOPs a multiply-add; the backward pass costs twice the forward.
    return 2.0 * 3.0 * multiplies

  return flops
