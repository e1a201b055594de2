"""Masked language modelling (Devlin et al., 2018, section 3.1, Task 1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from flaxmlm.models.model import Inputs, Model, Params
from flaxmlm.objectives.cross_entropy import cross_entropy
from flaxmlm.objectives.objective import (
  Batch,
  Example,
  Objective,
  Sums,
  special_ids,
)


def build(
  options: Mapping[str, Any],
  *,
  row_length: int,
  vocab: Mapping[str, Any],
) -> Objective:
  """Returns the objective; `options` are the `objective` keys."""
  # Every row has at least [CLS] and [SEP].
  slots = int(budgets(row_length - 2, options["rate"])[-1])
  forbidden = jnp.asarray(special_ids(vocab), jnp.int32)

  def corrupt(keys: Key[Array, " B"], batch: Batch) -> Example:
    keys = jax.vmap(jax.random.split)(keys)
    pick_keys, replace_keys = keys[:, 0], keys[:, 1]
    maskable = (batch.segments > 0) & ~jnp.isin(batch.ids, forbidden)
    picked, weights = pick_slots(
      pick_keys, maskable, rate=options["rate"], num_slots=slots
    )
    targets = jnp.take_along_axis(batch.ids, picked, axis=1)
    replaced = replace(
      replace_keys,
      targets,
      mask_share=options["mask_share"],
      random_share=options["random_share"],
      mask=vocab["mask"],
      forbidden=forbidden,
      vocab_size=vocab["size"],
    )
    rows = jnp.arange(batch.ids.shape[0])[:, None]
    where = jnp.where(weights > 0, picked, row_length)
    ids = batch.ids.at[rows, where].set(replaced, mode="drop")
    inputs = Inputs(
      ids, batch.segments, batch.positions, jnp.zeros_like(batch.ids)
    )
    return Example(inputs, picked, targets, weights)

  return Objective(corrupt, loss, slots)


def budgets(most: int, rate: float) -> np.ndarray:
  """Returns the number of tokens to predict for 0 … `most` maskable ones.

  round(rate × maskable), at least one, as in google-research/bert
  (`create_masked_lm_predictions`); 0 for an empty row. Python rounds halves to
  even. A table, so that float32 on a device can't round otherwise.

  >>> budgets(10, 0.15).tolist()
  [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2]
  """
  counts = [max(1, round(rate * n)) for n in range(1, most + 1)]
  return np.asarray([0, *counts], np.int32)


def pick_slots(
  keys: Key[Array, " B"],
  maskable: Bool[Array, "B L"],
  *,
  rate: float,
  num_slots: int,
) -> tuple[Int[Array, "B M"], Float[Array, "B M"]]:
  """Chooses which tokens of each row are to be predicted.

  Exactly round(rate × maskable) tokens a row, at least one, drawn without
  replacement, in ascending order; slots beyond that have weight 0. `keys`
  holds one key a row, so a row's choice is the same on any mesh and in any
  micro-batch.
  """
  L = maskable.shape[1]
  bits = jax.vmap(lambda key: jax.random.bits(key, (L,), "uint32"))(keys)
  # Lowest first: what may not be picked goes behind everything else. Ties are
  # broken by position, which no one will see in 2**31 values.
  order = jnp.where(maskable, bits >> 1, jnp.uint32(2**31))
  _, ranked = jax.lax.top_k(-order.astype(jnp.int32), num_slots)
  counts = jnp.asarray(budgets(L, rate))[maskable.sum(axis=1)]
  used = jnp.arange(num_slots)[None] < counts[:, None]
  # Unused slots sort to the end and then point at position 0.
  picked = jnp.sort(jnp.where(used, ranked, L), axis=1)
  used = picked < L
  return jnp.where(used, picked, 0), used.astype(jnp.float32)


def replace(
  keys: Key[Array, " B"],
  targets: Int[Array, "B M"],
  *,
  mask_share: float,
  random_share: float,
  mask: int,
  forbidden: Int[Array, " S"],
  vocab_size: int,
) -> Int[Array, "B M"]:
  """Returns what stands in place of each target: [MASK], a random token, it.

  80 %, 10 % and 10 % in Devlin et al., 2018. Random tokens are uniform over
  the vocabulary without the special tokens. `forbidden` is ascending.
  """
  M = targets.shape[1]

  def draw(key: Key[Array, ""]) -> tuple[Array, Array]:
    kind_key, token_key = jax.random.split(key)
    kind = jax.random.uniform(kind_key, (M,))
    ordinary = vocab_size - forbidden.shape[0]
    return kind, jax.random.randint(token_key, (M,), 0, ordinary)

  kind, token = jax.vmap(draw)(keys)
  # The n-th ordinary token comes after the special ones that have fewer than n
  # ordinary ones before them.
  before = forbidden - jnp.arange(forbidden.shape[0])
  token = token + jnp.searchsorted(
    before, token, side="right", method="compare_all"
  )
  by_chance = jnp.where(kind < mask_share + random_share, token, targets)
  return jnp.where(kind < mask_share, mask, by_chance)


def loss(
  model: Model,
  params: Params,
  example: Example,
  dropout_keys: Key[Array, " B"] | None,
) -> Sums:
  """Returns Σ nll·w, Σ w and Σ correct·w over the slots, in float32."""
  hidden = model.encode(params, example.inputs, dropout_keys)
  hidden = jnp.take_along_axis(hidden, example.slots[..., None], axis=1)
  logits = model.predict(params, hidden)
  nll = cross_entropy(logits, example.targets)
  correct = jnp.argmax(logits, axis=-1) == example.targets
  return {
    "nll": jnp.sum(nll * example.weights),
    "weight": jnp.sum(example.weights),
    "correct": jnp.sum(correct * example.weights),
  }
