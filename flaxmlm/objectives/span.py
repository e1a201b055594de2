"""Spans of whole words (Joshi et al., 2019, SpanBERT, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Bool, Int, Key

from flaxmlm.objectives import hiding
from flaxmlm.objectives.objective import Batch, Objective
from flaxmlm.objectives.words import count_too_long, find_words, pick_words

P, LONGEST = 0.2, 10
_TAILS = [P * (1 - P) ** (n - 1) for n in range(1, LONGEST + 1)]
SHARES = tuple(share / sum(_TAILS) for share in _TAILS)
"""Geometric with p = 0.2 among lengths of up to 10 words: 3.8 on average."""


def build(options: Mapping[str, Any], **given: Any) -> Objective:
  """Returns the objective; `options` are the `objective` keys."""
  return hiding.make(pick, options, **given)


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
  return hiding.Picked(
    spans, {"words_too_long": count_too_long(words, budgets)}
  )
