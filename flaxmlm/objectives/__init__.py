"""What is hidden from the model, and what is asked of it.

An objective is a file here and one entry in `OBJECTIVES`. Its builder returns
an `Objective`, two pure functions that run inside the jitted step:

`corrupt(keys, batch, step) -> Example` takes a batch as the host sent it, one
PRNG key a row and the step, and returns what the model reads and what it is
asked, in static shapes. It draws for each row from that row's key alone: so a
row is corrupted alike on any mesh, in any micro-batch and after any restart.

`loss(model, params, example, dropout_keys) -> Sums` runs the model and returns
sums over the rows, never means: `nll` (what is minimised), `weight` (what it
is divided by) and whatever else is worth adding up. Sums of parts of a batch
add up to those of the whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flaxmlm.objectives import masked, ngram, span, whole_word
from flaxmlm.objectives.objective import (
  Batch,
  Example,
  Objective,
  Sums,
  special_ids,
)

__all__ = [
  "OBJECTIVES",
  "Batch",
  "Example",
  "Objective",
  "Sums",
  "build",
  "special_ids",
]

OBJECTIVES = {
  "masked": masked.build,
  "ngram": ngram.build,
  "span": span.build,
  "whole_word": whole_word.build,
}


def build(
  options, *, row_length: int, vocab: Mapping[str, Any], steps: int
) -> Objective:
  """Returns the objective of `options.name`.

  Args:
    options: The `objective` keys of the config.
    row_length: L.
    vocab: `size`, the ids of `pad`, `unk`, `cls`, `sep` and `mask`, and those
      of `others`: as a token store has it.
    steps: Of the run, `train.steps`.
  """
  return OBJECTIVES[options["name"]](
    options, row_length=row_length, vocab=vocab, steps=steps
  )
