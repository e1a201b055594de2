"""What is hidden from the model, and what is asked of it.

An objective is a file here and one entry in `OBJECTIVES`. Its builder returns
an `Objective`: pure functions that run inside the jitted step. What asks about
pairs of segments stands beside one of these, in `PAIRS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jaxtyping import Array, Key

from flaxmlm.models.model import Model, Params
from flaxmlm.objectives import (
  masked,
  ngram,
  pairs,
  replaced_token,
  span,
  whole_word,
)
from flaxmlm.objectives.objective import (
  Batch,
  Example,
  Objective,
  Sums,
  as_batch,
  restore_ids,
  special_ids,
)

__all__ = [
  "OBJECTIVES",
  "PAIRS",
  "Batch",
  "Example",
  "Objective",
  "Sums",
  "as_batch",
  "build",
  "init_params",
  "names",
  "restore_ids",
  "special_ids",
]

OBJECTIVES = {
  "masked": masked.build,
  "ngram": ngram.build,
  "replaced_token": replaced_token.build,
  "span": span.build,
  "whole_word": whole_word.build,
}
PAIRS = tuple(pairs.ARRANGE)


def names(options: Mapping[str, Any]) -> tuple[str, str | None]:
  """Returns what hides tokens and what asks about pairs, or None.

  Pairs alone have `masked` beside them, as in the papers.

  >>> names({"name": "sentence_order"})
  ('masked', 'sentence_order')
  >>> names({"name": ("next_sentence", "span")})
  ('span', 'next_sentence')
  """
  given = _as_tuple(options["name"])
  hides = [name for name in given if name in OBJECTIVES] or ["masked"]
  asks = [name for name in given if name in PAIRS] or [None]
  (tokens,), (pair,) = hides, asks
  return tokens, pair


def init_params(
  key: Key[Array, ""], *, model: Model, options: Mapping[str, Any]
) -> Params:
  """Returns the parameters that an objective needs: encoder and all heads.

  Args:
    key: The run's.
    model: See `models.build`.
    options: The `objective` keys.
  """
  tokens, pair = names(options)
  heads = []
  if pair is not None:
    heads = ["pooler", "pair"] if model.pool else ["pair"]
  classes = len(options["labels"]) if pair == "sentence_pair" else 2
  if tokens == "replaced_token":
    own_key, heads_key = jax.random.split(key)
    own = replaced_token.init_params(own_key, model=model, options=options)
    return model.init(heads_key, tuple(heads), classes) | own
  if options["span_boundary"]:
    heads.append("span_boundary")
  return model.init(key, ("mlm", *heads), classes)


def build(
  options: Mapping[str, Any],
  *,
  row_length: int,
  vocab: Mapping[str, Any],
  steps: int,
) -> Objective:
  """Returns the objective, or sum of objectives, of `options.name`.

  Args:
    options: The `objective` keys of the config.
    row_length: L.
    vocab: `size`, the ids of `pad`, `unk`, `cls`, `sep` and `mask`, and those
      of `others`: as a token store has it.
    steps: Of the run, `train.steps`.
  """
  tokens, pair = names(options)
  objective = OBJECTIVES[tokens](
    options, row_length=row_length, vocab=vocab, steps=steps
  )
  if pair is not None:
    objective = pairs.beside(objective, pair, vocab=vocab)
  if options["weights"]:
    weights = dict(
      zip(_as_tuple(options["name"]), options["weights"], strict=True)
    )
    objective = objective._replace(
      shares={
        task: share * weights[pair if task == pair else tokens]
        for task, share in objective.shares.items()
      }
    )
  return objective


def _as_tuple(names: str | Sequence[str]) -> tuple[str, ...]:
  return (names,) if isinstance(names, str) else tuple(names)
