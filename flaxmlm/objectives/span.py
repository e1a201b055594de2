"""Spans of whole words (Joshi et al., 2019, SpanBERT, sections 3.1 and 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from flaxmlm.models.model import Model, Params
from flaxmlm.objectives import hiding
from flaxmlm.objectives.objective import Batch, Example, Objective, Sums
from flaxmlm.objectives.words import count_left_out, find_words, pick_words

P, LONGEST = 0.2, 10
_TAILS = [P * (1 - P) ** (n - 1) for n in range(1, LONGEST + 1)]
SHARES = tuple(share / sum(_TAILS) for share in _TAILS)
"""Geometric with p = 0.2 among lengths of up to 10 words: 3.8 on average."""


def build(options: Mapping[str, Any], **given: Any) -> Objective:
  """Returns the objective; `options` are the `objective` keys."""
  objective = hiding.make("span", pick, options, **given)
  if not options["span_boundary"]:
    return objective

  def run(
    model: Model,
    params: Params,
    example: Example,
    dropout_keys: Key[Array, " B"] | None,
  ) -> tuple[Float[Array, "B L D"], Sums]:
    hidden, sums = objective.run(model, params, example, dropout_keys)
    first, last = find_ends(example)
    left, right = (
      jnp.take_along_axis(hidden, place[..., None], axis=1)
      for place in (first - 1, last + 1)
    )
    logits = model.fill(params, left, right, example.slots - first)
    temperature = options["temperature"]
    boundary = hiding.add_up(logits, example, temperature=temperature)
    return hidden, sums | {"span_boundary": boundary}

  def weigh(example: Example) -> dict[str, Float[Array, ""]]:
    weights = objective.weigh(example)
    return weights | {"span_boundary": weights["span"]}

  return objective._replace(
    shares=objective.shares | {"span_boundary": 1.0},
    run=run,
    weigh=weigh,
    flops=lambda model, row_length: (
      objective.flops(model, row_length) + model.flops(0, objective.slots)
    ),
  )


def find_ends(
  example: Example,
) -> tuple[Int[Array, "B M"], Int[Array, "B M"]]:
  """Returns the first and the last place of each slot's run of hidden tokens.

  Two spans that touch are one: what stands around is never hidden. At slots
  that aren't used, anything within a row.
  """
  slots, used = example.slots, example.weights > 0
  same = (slots[:, 1:] == slots[:, :-1] + 1) & used[:, 1:]
  begins = jnp.pad(~same, ((0, 0), (1, 0)), constant_values=True)
  ends = jnp.pad(~same, ((0, 0), (0, 1)), constant_values=True)
  first = jax.lax.cummax(jnp.where(begins, slots, 0), axis=1)
  last = jax.lax.cummin(
    jnp.where(ends, slots, example.inputs.ids.shape[1]), axis=1, reverse=True
  )
  return jnp.where(used, first, 1), jnp.where(used, last, 1)


def pick(
  keys: Key[Array, " B"],
  batch: Batch,
  maskable: Bool[Array, "B L"],
  budgets: Int[Array, " B"],
) -> hiding.Picked:
  """Chooses spans at words in random order, shorter ones where they must be.

  All tokens of a span are masked, or all replaced, or all kept.
  """
  words = find_words(batch, maskable)
  spans = pick_words(keys, words, budgets, SHARES)
  return hiding.Picked(spans, count_left_out(words, budgets))
