"""What a model is to everything outside this folder.

Dimension key: B batch, L row length, M prediction slots, D width, H heads,
K head size, F feed-forward, V vocabulary, C classes, N layers, T = B·L flat
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from flaxmlm.models.heads import DiscriminatorHead, PairHead, SpanBoundaryHead

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
    init: `(key, heads=("mlm",), classes=2) -> params`, `{"encoder": …, "mlm":
      …}`: the encoder and the heads named: "mlm", "pooler", "pair" (of so many
      classes), "discriminator", "span_boundary".
    encode: `(params, inputs, dropout_keys) -> hidden [B L D]`. One dropout key
      a row makes a row's dropout the same in any batch; None means none.
    predict: `(params, hidden [B M D]) -> logits [B M V]`, in compute dtype.
    flops: `(row_length, slots) -> float`: model FLOPs of one row, forward and
      backward, counted as two a multiply-add.
    token_types: How many values `Inputs.token_types` may take; 0 if the model
      doesn't look at them.
    skips_padding: Whether padding has no position of its own: tokens are
      counted from 0 over what isn't [PAD], which itself stands at -1 (RoBERTa).
    pool: `(params, hidden [B L D]) -> [B D]`; None in a family without pooler.
    classify: `(params, hidden [B L D]) -> logits [B C]` of the head "pair",
      from what the pooler makes of [CLS], if there is one.
    fill: `(params, left [B M D], right [B M D], places [B M]) -> logits
      [B M V]` of the head "span_boundary"; see there.
    detect: `(params, hidden [B L D]) -> logits [B L]` of the "discriminator".
    narrower: `share -> Model`: ELECTRA's generator, as deep, with that share of
      the width and with embeddings of this model's shapes; else None.
  """

  init: Callable[..., Params]
  encode: Callable[
    [Params, Inputs, Key[Array, " B"] | None], Float[Array, "B L D"]
  ]
  predict: Callable[[Params, Float[Array, "B M D"]], Float[Array, "B M V"]]
  flops: Callable[[int, int], float]
  token_types: int
  skips_padding: bool
  pool: Callable[[Params, Float[Array, "B L D"]], Float[Array, "B D"]] | None
  classify: Callable[[Params, Float[Array, "B L D"]], Float[Array, "B C"]]
  fill: Callable[..., Float[Array, "B M V"]]
  detect: Callable[[Params, Float[Array, "B L D"]], Float[Array, "B L"]]
  narrower: Callable[[float], Model] | None


def assemble(
  encoder: nn.Module,
  head: nn.Module,
  *,
  vocab_size: int,
  flops: Callable[[int, int], float],
  token_types: int,
  skips_padding: bool = False,
  pooler: nn.Module | None = None,
  narrower: Callable[[float], Model] | None = None,
) -> Model:
  """Returns the model of two Flax modules.

  Args:
    encoder: `(inputs, dropout_keys) -> hidden [B L D]`, whose embeddings are
      at `embeddings/word/embedding` and whose `options` are a FrozenDict.
    head: `(hidden [T D], table [V E]) -> logits [T V]`.
    vocab_size: V.
    flops: See `Model`; so are the others.
    token_types: See `Model`.
    skips_padding: See `Model`.
    pooler: `(hidden [B L D]) -> [B D]`.
    narrower: See `Model`.
  """
  o = encoder.options
  discriminator = DiscriminatorHead(
    o["init_stddev"], encoder.dtype, o["hidden_act"]
  )
  boundary = SpanBoundaryHead(
    vocab_size, o["norm_eps"], o["init_stddev"], encoder.dtype
  )

  def pair_head(classes: int) -> PairHead:
    return PairHead(classes, o["init_stddev"], encoder.dtype)

  def init(
    key: Key[Array, ""], heads: Sequence[str] = ("mlm",), classes: int = 2
  ) -> Params:
    encoder_key, mlm_key = jax.random.split(key)
    pooler_key = jax.random.fold_in(mlm_key, 1)
    row = jnp.zeros((1, 1), jnp.int32)
    inputs = Inputs(row, row, row, row)
    # No parameter hangs on the backend, and a row of one is too short for most.
    plain = encoder.clone(options=encoder.options.copy({"attention": "xla"}))
    hidden, variables = plain.init_with_output(encoder_key, inputs, None)
    params = {"encoder": variables["params"]}
    if "mlm" in heads:
      variables = head.init(mlm_key, hidden.reshape(1, -1), _table(params))
      params["mlm"] = variables["params"]
    if "pooler" in heads:
      params["pooler"] = pooler.init(pooler_key, hidden)["params"]
    if "pair" in heads:
      pair_key = jax.random.fold_in(mlm_key, 2)
      variables = pair_head(classes).init(pair_key, hidden[:, 0])
      params["pair"] = variables["params"]
    if "span_boundary" in heads:
      key, flat = jax.random.fold_in(mlm_key, 4), hidden[0]
      variables = boundary.init(
        key, flat, flat, jnp.zeros(1, jnp.int32), _table(params)
      )
      params["span_boundary"] = variables["params"]
    if "discriminator" in heads:
      key = jax.random.fold_in(mlm_key, 3)
      params["discriminator"] = discriminator.init(key, hidden[0])["params"]
    return params

  def encode(
    params: Params,
    inputs: Inputs,
    dropout_keys: Key[Array, " B"] | None = None,
  ) -> Float[Array, "B L D"]:
    return encoder.apply({"params": params["encoder"]}, inputs, dropout_keys)

  def predict(
    params: Params, hidden: Float[Array, "B M D"]
  ) -> Float[Array, "B M V"]:
    flat = hidden.reshape(-1, hidden.shape[-1])
    logits = head.apply({"params": params["mlm"]}, flat, _table(params))
    return logits.reshape(*hidden.shape[:-1], vocab_size)

  def pool(
    params: Params, hidden: Float[Array, "B L D"]
  ) -> Float[Array, "B D"]:
    return pooler.apply({"params": params["pooler"]}, hidden)

  def classify(
    params: Params, hidden: Float[Array, "B L D"]
  ) -> Float[Array, "B C"]:
    pooled = pool(params, hidden) if pooler else hidden[:, 0]
    classes = params["pair"]["dense"]["bias"].shape[0]
    return pair_head(classes).apply({"params": params["pair"]}, pooled)

  def fill(
    params: Params,
    left: Float[Array, "B M D"],
    right: Float[Array, "B M D"],
    places: Int[Array, "B M"],
  ) -> Float[Array, "B M V"]:
    sides = (x.reshape(-1, x.shape[-1]) for x in (left, right))
    variables = {"params": params["span_boundary"]}
    logits = boundary.apply(
      variables, *sides, places.reshape(-1), _table(params)
    )
    return logits.reshape(*places.shape, vocab_size)

  def detect(
    params: Params, hidden: Float[Array, "B L D"]
  ) -> Float[Array, "B L"]:
    flat = hidden.reshape(-1, hidden.shape[-1])
    logits = discriminator.apply({"params": params["discriminator"]}, flat)
    return logits.reshape(hidden.shape[:2])

  return Model(
    # Not compiled, it takes seconds.
    jax.jit(init, static_argnames=("heads", "classes")),
    encode,
    predict,
    flops,
    token_types,
    skips_padding,
    pool if pooler else None,
    classify,
    fill,
    detect,
    narrower,
  )


def _table(params: Params) -> Float[Array, "V E"]:
  return params["encoder"]["embeddings"]["word"]["embedding"]


def count_parameters(params: Params) -> int:
  """Returns the number of scalars in a tree (of arrays or their shapes)."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))
