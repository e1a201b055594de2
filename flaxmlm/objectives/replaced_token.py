"""Replaced token detection (Clark et al., 2020, ELECTRA, section 2).

A small generator fills in hidden tokens, and the model says of every token
whether it is the original one. The generator learns by its own masked language
modelling alone: no gradient goes through what it draws. Both share one table
of embeddings (section 3.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from flaxmlm.models.model import Model, Params
from flaxmlm.objectives import hiding, masked
from flaxmlm.objectives.objective import Batch, Example, Objective, Sums

_BLOCK = 128


def build(options: Mapping[str, Any], **given: Any) -> Objective:
  """Returns the objective; `options` are the `objective` keys."""
  hide = hiding.make("generator", masked.pick_tokens, options, **given)
  share = options["generator_size"]

  def corrupt(
    keys: Key[Array, " B"], batch: Batch, step: Int[Array, ""]
  ) -> Example:
    keys = jax.vmap(jax.random.split)(keys)
    example = hide.corrupt(keys[:, 0], batch, step)
    return example._replace(keys=keys[:, 1])

  def generate(
    model: Model, params: Params, example: Example, dropout_keys: Any
  ) -> Float[Array, "B M V"]:
    own = generator_params(params)
    generator = _generator(model, share)
    hidden = generator.encode(own, example.inputs, dropout_keys)
    return hiding.predict_slots(generator, own, hidden, example)

  def run(
    model: Model,
    params: Params,
    example: Example,
    dropout_keys: Key[Array, " B"] | None,
  ) -> tuple[Float[Array, "B L D"], Sums]:
    # The two models' dropout is drawn apart.
    generator_keys = dropout_keys
    if dropout_keys is not None:
      split = jax.vmap(jax.random.split)(dropout_keys)
      generator_keys, dropout_keys = split[:, 0], split[:, 1]
    logits = generate(model, params, example, generator_keys)
    tokens = hiding.add_up(logits, example, temperature=options["temperature"])
    shown, replaced = replace(example, draw(example.keys, logits))
    hidden = model.encode(params, shown.inputs, dropout_keys)
    scores = model.detect(params, hidden).astype(jnp.float32)
    weights = (example.inputs.segments > 0).astype(jnp.float32)
    nll = optax.sigmoid_binary_cross_entropy(scores, replaced)
    flagged = (scores > 0).astype(jnp.float32)
    found = jnp.sum(flagged * replaced * weights)
    counts = {k: jnp.sum(n) for k, n in example.counts.items()}
    return hidden, {
      "generator": tokens,
      "discriminator": {
        "nll": jnp.sum(nll * weights),
        "weight": jnp.sum(weights),
        "correct": jnp.sum((flagged == replaced) * weights),
        "replaced": jnp.sum(replaced * weights),
        "precision": (found, jnp.sum(flagged * weights)),
        "recall": (found, jnp.sum(replaced * weights)),
      },
      "counts": counts,
    }

  def weigh(example: Example) -> dict[str, Float[Array, ""]]:
    valid = example.inputs.segments > 0
    return hide.weigh(example) | {
      "discriminator": jnp.sum(valid.astype(jnp.float32))
    }

  def flops(model: Model, row_length: int) -> float:
    tokens = _generator(model, share).flops(row_length, hide.slots)
    return tokens + model.flops(row_length, 0)

  return Objective(
    shares={"generator": 1.0, "discriminator": options["discriminator_weight"]},
    slots=hide.slots,
    corrupt=corrupt,
    run=run,
    weigh=weigh,
    predict=lambda model, params, example: generate(
      model, params, example, None
    ),
    flops=flops,
  )


def init_params(
  key: Key[Array, ""], *, model: Model, options: Mapping[str, Any]
) -> Params:
  """Returns the parameters of both models, with one table of embeddings."""
  own_key, generator_key = jax.random.split(key)
  generator = _generator(model, options["generator_size"]).init(generator_key)
  encoder = dict(generator["encoder"])
  del encoder["embeddings"]
  return model.init(own_key, heads=("discriminator",)) | {
    "generator": generator | {"encoder": encoder}
  }


def generator_params(params: Params) -> Params:
  """Returns the generator's parameters, with the table that is shared."""
  own = params["generator"]
  embeddings = params["encoder"]["embeddings"]
  return own | {"encoder": own["encoder"] | {"embeddings": embeddings}}


def draw(
  keys: Key[Array, " B"], logits: Float[Array, "B M V"]
) -> Int[Array, "B M"]:
  """Draws a token a slot from softmax(logits): the largest under Gumbel noise.

  First a block of the vocabulary, by the sums of its probabilities, then a
  token of it: the same distribution, with noise for V / 128 + 128 numbers a
  slot instead of V, which would take as long as a third of the step.

  No gradient goes through it.
  """
  *rows, V = logits.shape
  logits = jax.lax.stop_gradient(logits).astype(jnp.float32)
  # Token t is of block t mod N: sums over any but the last axis are faster.
  N = -(-V // _BLOCK)
  missing = ((0, 0), (0, 0), (0, N * _BLOCK - V))
  logits = jnp.pad(logits, missing, constant_values=-jnp.inf)
  logits = logits.reshape(*rows, _BLOCK, N)
  keys = jax.vmap(jax.random.split)(keys)

  def largest(
    keys: Key[Array, " B"], logits: Float[Array, "B M N"]
  ) -> Int[Array, "B M"]:
    shape = logits.shape[1:]
    noise = jax.vmap(lambda key: jax.random.gumbel(key, shape))(keys)
    return jnp.argmax(logits + noise, axis=-1)

  most = logits.max(axis=(2, 3), keepdims=True)
  sums = jnp.exp(logits - most).sum(axis=2)
  block = largest(keys[:, 0], jnp.log(sums))
  inside = jnp.take_along_axis(logits, block[..., None, None], axis=3)[..., 0]
  return largest(keys[:, 1], inside) * N + block


def replace(
  example: Example, drawn: Int[Array, "B M"]
) -> tuple[Example, Float[Array, "B L"]]:
  """Returns rows with drawn tokens at the slots, and 1 where one is another.

  A drawn token that happens to be the original one counts as original.
  """
  B, L = example.inputs.ids.shape
  rows = jnp.arange(B)[:, None]
  where = jnp.where(example.weights > 0, example.slots, L)
  ids = example.inputs.ids.at[rows, where].set(drawn, mode="drop")
  different = (drawn != example.targets).astype(jnp.float32)
  replaced = jnp.zeros((B, L)).at[rows, where].set(different, mode="drop")
  return example._replace(inputs=example.inputs._replace(ids=ids)), replaced


def _generator(model: Model, share: float) -> Model:
  if model.narrower is None:
    raise ValueError("replaced_token: a family without a generator")
  return model.narrower(share)
