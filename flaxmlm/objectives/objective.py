"""What an objective is to everything outside this folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int, Key, UInt8

from flaxmlm.models.model import Inputs, Model, Params

Sums = dict[str, Float[Array, ""]]


class Batch(NamedTuple):
  """Rows as the host sends them.

  Attributes:
    ids: Token ids.
    segments: Number of the document within the row, from 1; 0 is padding.
    positions: Position within the document, from 0.
    flags: Bit 0: the token starts a word. Bit 1: it starts a sentence.
    example: Number of the row; with the step it addresses the row's masks.
  """

  ids: Int[Array, "B L"]
  segments: Int[Array, "B L"]
  positions: Int[Array, "B L"]
  flags: UInt8[Array, "B L"]
  example: Int[Array, " B"]


class Example(NamedTuple):
  """Rows as the model is shown them, and what it is asked.

  Attributes:
    inputs: What the encoder reads.
    slots: Positions in the row that are asked about, ascending.
    targets: The original token at each slot.
    weights: Weight of each slot in the loss; 0 where a slot is not used.
    counts: Numbers a row that are added up and logged by name.
  """

  inputs: Inputs
  slots: Int[Array, "B M"]
  targets: Int[Array, "B M"]
  weights: Float[Array, "B M"]
  counts: Mapping[str, Float[Array, " B"]] = {}


class Objective(NamedTuple):
  """See the folder's docstring; `slots` is M."""

  corrupt: Callable[[Key[Array, " B"], Batch, Int[Array, ""]], Example]
  loss: Callable[[Model, Params, Example, Key[Array, " B"] | None], Sums]
  slots: int


def special_ids(vocab: Mapping[str, Any]) -> list[int]:
  """Returns the ids that are never hidden, asked for or drawn, ascending."""
  named = {vocab[name] for name in ("pad", "unk", "cls", "sep", "mask")}
  return sorted(named | set(vocab.get("others", ())))
