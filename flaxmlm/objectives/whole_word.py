"""Whole words (google-research/bert, "Whole Word Masking", 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Bool, Int, Key

from flaxmlm.objectives import hiding
from flaxmlm.objectives.objective import Batch, Objective
from flaxmlm.objectives.words import count_left_out, find_words, pick_words


def build(options: Mapping[str, Any], **given: Any) -> Objective:
  """Returns the objective; `options` are the `objective` keys."""
  return hiding.make("whole_word", pick, options, **given)


def pick(
  keys: Key[Array, " B"],
  batch: Batch,
  maskable: Bool[Array, "B L"],
  budgets: Int[Array, " B"],
) -> hiding.Picked:
  """Chooses words in random order, each if it fits what is left of the budget.

  What stands in place of a token is drawn for each token by itself.
  """
  words = find_words(batch, maskable)
  spans = pick_words(keys, words, budgets, (1.0,))
  return hiding.Picked(hiding.number(spans > 0), count_left_out(words, budgets))
