"""What all objectives that hide tokens share: how many, what stands instead.

Such an objective is a choice of tokens; the rest is here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from flaxmlm.models.lean import take
from flaxmlm.models.model import Inputs, Model, Params
from flaxmlm.models.vocabulary import find_best
from flaxmlm.objectives.cross_entropy import cross_entropy
from flaxmlm.objectives.objective import (
  Batch,
  Example,
  Objective,
  Sums,
  special_ids,
)

# A rate that changes does so in so many stairs of equal length, fewer in a
# short run. Each has a table of budgets: no device can round them otherwise.
STAIRS = 100


class Picked(NamedTuple):
  """What is chosen of each row.

  Attributes:
    unit: Number of the unit that each token is of, from 1; 0 if it isn't
      chosen. A unit shares one draw of what stands in place of its tokens.
    counts: Numbers a row that are added up and logged by name.
  """

  unit: Int[Array, "B L"]
  counts: dict[str, Float[Array, " B"]] = {}


Pick = Callable[
  [Key[Array, " B"], Batch, Bool[Array, "B L"], Int[Array, " B"]], Picked
]
"""`(keys, batch, maskable, budgets) -> Picked`: as many tokens as the budget of
each row, or fewer."""


def make(
  name: str,
  pick: Pick,
  options: Mapping[str, Any],
  *,
  row_length: int,
  vocab: Mapping[str, Any],
  steps: int,
) -> Objective:
  """Returns the objective that hides what `pick` chooses.

  Args:
    name: Of the task.
    pick: See `Pick`.
    options: The `objective` keys.
    row_length: L.
    vocab: See `objectives.build`.
    steps: Of the run, over which the rate changes.
  """
  tables, width = make_tables(row_length, options, steps=steps)
  # Every row has at least [CLS] and [SEP].
  M = int(tables[:, max(row_length - 2, 0)].max())
  forbidden = jnp.asarray(special_ids(vocab), jnp.int32)

  def corrupt(
    keys: Key[Array, " B"], batch: Batch, step: Int[Array, ""]
  ) -> Example:
    keys = jax.vmap(jax.random.split)(keys)
    pick_keys, replace_keys = keys[:, 0], keys[:, 1]
    maskable = (batch.segments > 0) & ~jnp.isin(batch.ids, forbidden)
    stair = jnp.minimum(step // width, len(tables) - 1)
    budgets = jnp.asarray(tables)[stair, maskable.sum(axis=1)]
    unit, counts = pick(pick_keys, batch, maskable, budgets)
    slots, weights = find_slots(unit > 0, M)
    units = jnp.take_along_axis(unit, slots, axis=1)
    targets = jnp.take_along_axis(batch.ids, slots, axis=1)
    replaced = replace(
      replace_keys,
      targets,
      units,
      mask_share=options["mask_share"],
      random_share=options["random_share"],
      mask=vocab["mask"],
      forbidden=forbidden,
      vocab_size=vocab["size"],
    )
    rows = jnp.arange(batch.ids.shape[0])[:, None]
    where = jnp.where(weights > 0, slots, row_length)
    ids = batch.ids.at[rows, where].set(replaced, mode="drop")
    inputs = Inputs(
      ids, batch.segments, batch.positions, jnp.zeros_like(batch.ids)
    )
    return Example(inputs, slots, targets, weights, counts, batch.flags)

  def run(
    model: Model,
    params: Params,
    example: Example,
    dropout_keys: Key[Array, " B"] | None,
  ) -> tuple[Float[Array, "B L D"], Sums]:
    hidden = model.encode(params, example.inputs, dropout_keys)
    logits = predict_slots(model, params, hidden, example)
    tokens = add_up(logits, example, temperature=options["temperature"])
    counts = {k: jnp.sum(n) for k, n in example.counts.items()}
    return hidden, {name: tokens, "counts": counts}

  def predict(
    model: Model, params: Params, example: Example
  ) -> Float[Array, "B M V"]:
    hidden = model.encode(params, example.inputs, None)
    return predict_slots(model, params, hidden, example)

  return Objective(
    shares={name: 1.0},
    slots=M,
    corrupt=corrupt,
    run=run,
    weigh=lambda example: {name: jnp.sum(example.weights)},
    predict=predict,
    flops=lambda model, row_length: model.flops(row_length, M),
  )


def make_tables(
  row_length: int, options: Mapping[str, Any], *, steps: int
) -> tuple[Int[np.ndarray, "R L1"], int]:
  """Returns how many tokens to hide of 0 … L maskable ones, a row a stair.

  And how many steps a stair has. There is one for a rate that doesn't change;
  else the first has `rate` and the last `rate_end`.
  """
  first, last = options["rate"], options["rate_end"]
  if last is None or last == first:
    return budgets(row_length, first)[None], steps
  width = -(-steps // STAIRS)
  share = np.linspace(0.0, 1.0, (steps - 1) // width + 1)
  if options["rate_schedule"] == "cosine":
    share = 0.5 - 0.5 * np.cos(math.pi * share)
  rates = first + (last - first) * share
  tables = [budgets(row_length, rate) for rate in rates.tolist()]
  return np.stack(tables), width


def budgets(most: int, rate: float) -> Int[np.ndarray, " L1"]:
  """Returns the number of tokens to predict for 0 … `most` maskable ones.

  round(rate × maskable), at least one, as in google-research/bert
  (`create_masked_lm_predictions`); 0 for an empty row. Python rounds halves to
  even. A table, so that float32 on a device can't round otherwise.

  >>> budgets(10, 0.15).tolist()
  [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2]
  """
  counts = [max(1, round(rate * n)) for n in range(1, most + 1)]
  return np.asarray([0, *counts], np.int32)


def find_slots(
  picked: Bool[Array, "B L"], num_slots: int
) -> tuple[Int[Array, "B M"], Float[Array, "B M"]]:
  """Returns the places that are picked, ascending, and their weights.

  Slots beyond them point at place 0 and have weight 0.
  """
  L = picked.shape[1]
  places = jnp.sort(jnp.where(picked, jnp.arange(L), L), axis=1)[:, :num_slots]
  used = places < L
  return jnp.where(used, places, 0), used.astype(jnp.float32)


def replace(
  keys: Key[Array, " B"],
  targets: Int[Array, "B M"],
  units: Int[Array, "B M"],
  *,
  mask_share: float,
  random_share: float,
  mask: int,
  forbidden: Int[Array, " S"],
  vocab_size: int,
) -> Int[Array, "B M"]:
  """Returns what stands in place of each target: [MASK], a random token, it.

  80 %, 10 % and 10 % in Devlin et al., 2018, drawn once a unit. Random tokens
  are uniform over the vocabulary without the special tokens, each drawn by
  itself. `forbidden` is ascending.
  """
  M = targets.shape[1]

  def draw(key: Key[Array, ""]) -> tuple[Array, Array]:
    kind_key, token_key = jax.random.split(key)
    kind = jax.random.uniform(kind_key, (M,))
    ordinary = vocab_size - forbidden.shape[0]
    return kind, jax.random.randint(token_key, (M,), 0, ordinary)

  kind, token = jax.vmap(draw)(keys)
  # A slot that isn't used has unit 0 or that of another; nobody reads it.
  kind = jnp.take_along_axis(kind, jnp.clip(units - 1, 0, M - 1), axis=1)
  # The n-th ordinary token comes after the special ones that have fewer than n
  # ordinary ones before them.
  before = forbidden - jnp.arange(forbidden.shape[0])
  token = token + jnp.searchsorted(
    before, token, side="right", method="compare_all"
  )
  by_chance = jnp.where(kind < mask_share + random_share, token, targets)
  return jnp.where(kind < mask_share, mask, by_chance)


def number(picked: Bool[Array, "B L"]) -> Int[Array, "B L"]:
  """Returns units of a token each, from 1."""
  return jnp.cumsum(picked, axis=1) * picked


def predict_slots(
  model: Model,
  params: Params,
  hidden: Float[Array, "B L D"],
  example: Example,
) -> Float[Array, "B M V"]:
  """Returns the logits at the slots: no others are ever computed."""
  return model.predict(params, take(hidden, example.slots))


def add_up(
  logits: Float[Array, "B M V"], example: Example, *, temperature: float
) -> dict[str, Float[Array, ""]]:
  """Returns Σ nll·w of logits / temperature, Σ w and Σ correct·w, float32."""
  # Flat again, as the model computed them: of slots that don't fill the tiles
  # of a TPU, [B M V] would be a copy.
  logits = logits.reshape(-1, logits.shape[-1])
  targets, weights = example.targets.reshape(-1), example.weights.reshape(-1)
  nll = cross_entropy(logits / temperature, targets)
  correct = find_best(logits) == targets
  return {
    "nll": jnp.sum(nll * weights),
    "weight": jnp.sum(weights),
    "correct": jnp.sum(correct * weights),
  }
