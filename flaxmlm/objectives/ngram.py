"""N-grams of whole words (Lan et al., 2019, ALBERT, section 4.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Bool, Int, Key

from flaxmlm.objectives import hiding
from flaxmlm.objectives.objective import Batch, Objective
from flaxmlm.objectives.words import count_left_out, find_words, pick_words

LONGEST = 3
SHARES = tuple(
  (1 / n) / sum(1 / k for k in range(1, LONGEST + 1))
  for n in range(1, LONGEST + 1)
)
"""p(n) is proportional to 1 / n, for n up to 3."""


def build(options: Mapping[str, Any], **given: Any) -> Objective:
  """Returns the objective; `options` are the `objective` keys."""
  return hiding.make("ngram", pick, options, **given)


def pick(
  keys: Key[Array, " B"],
  batch: Batch,
  maskable: Bool[Array, "B L"],
  budgets: Int[Array, " B"],
) -> hiding.Picked:
  """Chooses n-grams at words in random order, shorter ones where they must be.

  What stands in place of a token is drawn for each token by itself, as in
  google-research/albert (`create_masked_lm_predictions`).
  """
  words = find_words(batch, maskable)
  spans = pick_words(keys, words, budgets, SHARES)
  return hiding.Picked(hiding.number(spans > 0), count_left_out(words, budgets))
