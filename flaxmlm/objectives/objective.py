"""What an objective is to everything outside this folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8

from flaxmlm.models.model import Inputs, Model, Params

# Bits of `Batch.flags`; above them is the label of a pair.
WORD_START, SENTENCE_START, PAIR_START, LABEL_SHIFT = 1, 2, 4, 3

Sum = Float[Array, ""]
Sums = dict[str, dict[str, Sum | tuple[Sum, Sum]]]
"""Sums over rows, by task: `{"masked": {"nll": …, "weight": …, …}}`."""


class Batch(NamedTuple):
  """Rows as the host sends them.

  Attributes:
    ids: Token ids.
    segments: Number of the document within the row, from 1; 0 is padding.
    positions: Position within the document, from 0.
    flags: Bit 0: the token starts a word. Bit 1: it starts a sentence. Bit 2:
      the second text of a pair, whose label is in the bits above.
    example: Number of the row; with the step it addresses the row's masks.
    other: For each row one of another document, where an objective wants it.
  """

  ids: Int[Array, "B L"]
  segments: Int[Array, "B L"]
  positions: Int[Array, "B L"]
  flags: UInt8[Array, "B L"]
  example: Int[Array, " B"]
  other: Batch | None = None


def as_batch(rows: Any) -> Batch:
  """Returns rows of the host, of arrays of any kind, as a batch."""
  *fields, other = rows
  return Batch(*fields, None if other is None else as_batch(other))


class Pairs(NamedTuple):
  """What is asked of pairs.

  Attributes:
    labels: The class, 0 or 1 but for `sentence_pair`; what it means says the
      objective. -1 where a row has no pair.
    weights: 1, or 0 where a row has no pair.
  """

  labels: Int[Array, " B"]
  weights: Float[Array, " B"]


class Example(NamedTuple):
  """Rows as the model is shown them, and what it is asked.

  Attributes:
    inputs: What the encoder reads.
    slots: Positions in the row that are asked about, ascending.
    targets: The original token at each slot.
    weights: Weight of each slot in the loss; 0 where a slot is not used.
    counts: Numbers a row that are added up and logged by name.
    flags: As of a batch, of the tokens where they are now.
    pairs: See `Pairs`; None if the objective asks nothing of pairs.
    keys: One a row, for what is drawn while the model runs; None if nothing is.
  """

  inputs: Inputs
  slots: Int[Array, "B M"]
  targets: Int[Array, "B M"]
  weights: Float[Array, "B M"]
  counts: Mapping[str, Float[Array, " B"]]
  flags: UInt8[Array, "B L"]
  pairs: Pairs | None = None
  keys: Key[Array, " B"] | None = None


def restore_ids(example: Example) -> Int[np.ndarray, "B L"]:
  """Returns the token ids before anything was hidden, on the host."""
  ids = np.array(example.inputs.ids)
  rows, columns = np.nonzero(np.asarray(example.weights))
  places = np.asarray(example.slots)[rows, columns]
  ids[rows, places] = np.asarray(example.targets)[rows, columns]
  return ids


class Objective(NamedTuple):
  """An objective as pure functions; M, L and the vocabulary are fixed.

  Attributes:
    shares: The tasks by name and the weight of each in the loss. The first one
      asks for the tokens that are hidden.
    slots: M.
    corrupt: `(keys, batch, step) -> Example`: what the model reads and is
      asked, with one PRNG key a row. Each row is drawn from its own key alone:
      so it is the same on any mesh, in any micro-batch, after any restart.
    run: `(model, params, example, dropout_keys) -> (hidden [B L D], sums)`.
      Each task has `nll` (what is minimised), `weight` (what it is divided by),
      `correct`, and what else is worth a mean, as a tuple (sum, weight) where
      its weight is another. They are sums over rows, never means, so that those
      of parts of a batch add up to those of the whole.
      Without dropout keys there is no dropout.
    weigh: `example -> {task: weight}`: each `weight` of `run`, before it runs.
    predict: `(model, params, example) -> logits [B M V]`, without dropout.
    flops: `(model, row_length) -> float`: model FLOPs of one row, forward and
      backward, counted as two a multiply-add.
  """

  shares: dict[str, float]
  slots: int
  corrupt: Callable[[Key[Array, " B"], Batch, Int[Array, ""]], Example]
  run: Callable[..., tuple[Float[Array, "B L D"], Sums]]
  weigh: Callable[[Example], dict[str, Float[Array, ""]]]
  predict: Callable[[Model, Params, Example], Float[Array, "B M V"]]
  flops: Callable[[Model, int], float]


def special_ids(vocab: Mapping[str, Any]) -> list[int]:
  """Returns the ids that are never hidden, asked for or drawn, ascending."""
  named = {vocab[name] for name in ("pad", "unk", "cls", "sep", "mask")}
  return sorted(named | set(vocab.get("others", ())))
