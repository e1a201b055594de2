"""Batches: a pure function of (store, plan, seed, step).

There is no iterator and so no state to save: batch s holds the row uses
s * B, … (s + 1) * B - 1 (a run that goes on from another: so many from where
that one was); use n is the row at place n mod R of epoch n // R, and
an epoch's order is a permutation that is computed, place by place, from (seed,
epoch). Grain's MapDataset (range, shuffle, repeat, mix) would do the same, but
costs 20 to 64 µs a row, as much as reading its tokens, 3 s of import time, and
its epoch e of seed s is the epoch e - 1 of seed s + 1.

A batch's tokens are read by one vectorised gather over the memory map.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from flaxmlm import InputError
from flaxmlm.data.rows import SPECIALS, RowPlan, mix, ragged
from flaxmlm.data.store import WORD_START, TokenStore

# A source's share of the rows is a multiple of 1 / _CYCLE.
_CYCLE = 4096
_FEISTEL_TURNS = 3
_ODD = np.uint64(0x9E3779B97F4A7C15)


class HostBatch(NamedTuple):
  """What the host hands to the device; B rows of L tokens.

  A row holds one piece after another, each wrapped in [CLS] and [SEP], and
  padding at its end.
  """

  ids: np.ndarray  # int32 [B, L]; padding is vocab["pad"]
  segments: np.ndarray  # int32 [B, L]; 1, 2, … for a row's pieces; 0 = padding
  positions: np.ndarray  # int32 [B, L]; from 0 in each piece; 0 in padding
  flags: np.ndarray  # uint8 [B, L]; as in the store
  example: np.ndarray  # int32 [B]; number of the row use, for the mask keys
  other: HostBatch | None = None  # rows of other documents, if asked for


def at(
  store: TokenStore,
  plans: RowPlan | Sequence[RowPlan],
  *,
  seed: int,
  step: int,
  batch_size: int,
  weights: Sequence[float] = (),
  offset: int = 0,
  others: bool = False,
  shard: tuple[int, int] = (0, 1),
) -> HostBatch:
  """Returns the batch of a step, or this host's part of it.

  Without weights each row comes once an epoch, and batches go over the end of
  an epoch without loss. With weights, each plan (one a source) has its own
  epochs, and gives its share of the rows, evenly through the steps.

  Args:
    store: An open store.
    plans: One plan, or one a weight.
    seed: Seed of the order.
    step: Number of the step, from 0.
    batch_size: B of the global batch.
    weights: Relative shares of the plans, rounded to 1/4096, at least that.
    offset: Row use that step 0 begins with; less than 0 if the order begins at
      a later step.
    others: Whether each row is to have one of another document beside it, of
      several sentences, any of them as likely; for a plan of whole sentences
      of two documents at least.
    shard: (index, count): which block of B / count rows to read.

  Returns:
    Rows `index * B / count` on of the global batch. `example` is the
    number of the row use, modulo 2^31: no two uses of a row share it.

  Raises:
    InputError: A plan has no rows; the hosts don't divide the batch.
  """
  plans = (plans,) if isinstance(plans, RowPlan) else tuple(plans)
  index, count = shard
  if batch_size % count:
    raise InputError(
      f"train.batch_size={batch_size} doesn't divide by {count} hosts"
    )
  for source, plan in enumerate(plans):
    if plan.rows == 0:
      raise InputError(
        f"source {source} of data.source has no {plan.split} rows; leave it out"
      )
  size = batch_size // count
  use = (
    offset + step * batch_size + index * size + np.arange(size, dtype=np.int64)
  )
  example = (use % 2**31).astype(np.int32)

  def read(plan: RowPlan, use: np.ndarray, stream: int, example: np.ndarray):
    rows = row_at(plan.rows, use, seed=seed, stream=stream)
    order = mix(np.uint64(seed + (stream << 32)) ^ _ODD)
    key = mix(order ^ use.view(np.uint64)) if others else None
    return _read_with(store, plan, rows, example, key)

  if len(plans) == 1:
    return read(plans[0], use, 0, example)
  source, rank = _source_at(use, tuple(weights))
  where = [np.flatnonzero(source == number) for number in range(len(plans))]
  parts = [
    read(plan, rank[mine], number, example[mine])
    for number, (plan, mine) in enumerate(zip(plans, where, strict=True))
  ]
  places = np.argsort(np.concatenate(where))
  return _join(parts, places)


def in_order(
  store: TokenStore,
  plan: RowPlan,
  *,
  batch_size: int,
  rows: int | None = None,
  others: bool = False,
  shard: tuple[int, int] = (0, 1),
) -> Iterator[HostBatch]:
  """Yields the first rows of a plan in its order, each once: for evaluation.

  The last batch is filled up with rows of padding alone. `example` is the
  row's number in the plan, so that its masks are the same at any batch size.

  Args:
    store: An open store.
    plan: The plan.
    batch_size: B of the global batch.
    rows: How many rows at most; None: all.
    others: As of `at`.
    shard: (index, count): which block of B / count rows of each batch to read.
  """
  index, count = shard
  if batch_size % count:
    raise InputError(
      f"a batch of {batch_size} rows doesn't divide by {count} hosts"
    )
  size = batch_size // count
  end = plan.rows if rows is None else min(rows, plan.rows)
  for first in range(0, end, batch_size):
    numbers = first + index * size + np.arange(size)
    real = numbers[numbers < end]
    # Rows in the order of the text are no fair sample.
    which = row_at(plan.rows, real, seed=0) if len(plan.pairs) else real
    key = mix(real.view(np.uint64)) if others else None
    part = _read_with(store, plan, which, real.astype(np.int32), key)
    missing = numbers[numbers >= end]
    if len(missing):
      fill = _empty(store, plan, missing)
      fill = fill._replace(other=fill) if others else fill
      part = _join([part, fill], np.arange(size))
    yield part


def row_at(
  rows: int, use: np.ndarray, *, seed: int, stream: int = 0
) -> np.ndarray:
  """Returns which of R rows the use number n is; each once in every R uses.

  A generalised Feistel network over the numbers a * y + x with x < a, y < b,
  a * b >= R, walked until it falls below R, which it nearly always does at once
  (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002): a keyed
  permutation, computed at single places.

  Args:
    rows: R, at least 1.
    use: int64 [B], any use numbers from 0.
    seed: Seed of the order.
    stream: Another order of the same seed.
  """
  epoch, place = np.divmod(np.asarray(use, np.int64), rows)
  key = mix(mix(np.uint64(seed + (stream << 32))) ^ epoch.view(np.uint64))
  a = np.uint64(math.isqrt(rows - 1) + 1)
  b = np.uint64(-(-rows // int(a)))
  one = np.uint64(1)  # halves the hash, so that the sums stay under 2^64
  result = place.astype(np.uint64)
  walking = np.arange(len(result))
  while len(walking):
    y, x = np.divmod(result[walking], a)
    turn_key = key[walking]
    for _ in range(_FEISTEL_TURNS):
      x = (x + (mix(y + turn_key) >> one)) % a
      turn_key = turn_key + _ODD
      y = (y + (mix(x + turn_key) >> one)) % b
      turn_key = turn_key + _ODD
    result[walking] = a * y + x
    walking = walking[result[walking] >= rows]
  return result.astype(np.int64)


def _source_at(
  use: np.ndarray, weights: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the source of each use, and its number among that source's uses."""
  sources, ranks, counts = _cycle(weights)
  cycle, place = np.divmod(use, len(sources))
  source = sources[place]
  return source, cycle * counts[source] + ranks[place]


@functools.lru_cache(maxsize=8)
def _cycle(
  weights: tuple[float, ...],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Spreads each source's uses evenly over a cycle.

  Returns:
    Source of each place, its number among that source's uses in the cycle, and
    the uses of each source in a cycle.
  """
  shares = np.array(weights) / np.sum(weights)
  counts = np.maximum(np.rint(shares * _CYCLE), 1).astype(np.int64)
  sources = np.repeat(np.arange(len(counts)), counts)
  ranks = ragged(np.zeros(len(counts), np.int64), counts)
  order = np.argsort((ranks + 0.5) / counts[sources], kind="stable")
  return sources[order], ranks[order], counts


def _join(parts: Sequence[HostBatch], places: np.ndarray) -> HostBatch:
  """Returns the rows of several batches in another order."""
  other = None
  if parts[0].other is not None:
    other = _join([part.other for part in parts], places)
  fields = zip(*(part[:-1] for part in parts), strict=True)
  return HostBatch(*(np.concatenate(f)[places] for f in fields), other)


def _read_with(
  store: TokenStore,
  plan: RowPlan,
  rows: np.ndarray,
  example: np.ndarray,
  key: np.ndarray | None,
) -> HostBatch:
  """Reads rows, and beside each one of another document that a key chooses."""
  part = _read(store, plan, rows, example)
  if key is None:
    return part
  others = _choose_others(store, plan, rows, key)
  return part._replace(other=_read(store, plan, others, example))


def _choose_others(
  store: TokenStore, plan: RowPlan, rows: np.ndarray, key: np.ndarray
) -> np.ndarray:
  """Returns for each row one of another document, each as likely.

  They are of several sentences. Those of a document are neighbours in the plan:
  what is chosen is a number among the rest.
  """
  offsets, pairs = getattr(store, plan.split).offsets, int(plan.pairs[0])
  number = np.searchsorted(offsets, plan.piece_start.take(rows), side="right")
  begin, end = np.searchsorted(
    plan.piece_start[:pairs], [offsets.take(number - 1), offsets.take(number)]
  )
  rest = pairs - (end - begin)
  found = (key % rest.astype(np.uint64)).astype(np.int64)
  return found + np.where(found >= begin, end - begin, 0)


def _read(
  store: TokenStore, plan: RowPlan, rows: np.ndarray, example: np.ndarray
) -> HostBatch:
  """Reads whole rows."""
  B, L = len(rows), plan.row_length
  if B == 0:
    return _empty(store, plan, example)
  split = getattr(store, plan.split)
  # `take` lets other threads run while a disk is waited for; `[rows]` doesn't,
  # if they are few.
  first = plan.row_start.take(rows)
  pieces = plan.row_start.take(rows + 1) - first
  which = ragged(first, pieces)

  # Each row ends in one more "piece", its padding, maybe of no length: then the
  # pieces of the batch cover its B * L slots without a gap.
  ends = np.cumsum(pieces + 1)
  real = np.ones(ends[-1], bool)
  real[ends - 1] = False
  sizes = np.zeros(ends[-1], np.int64)
  sizes[real] = plan.piece_length.take(which) + SPECIALS
  used = np.add.reduceat(sizes, ends - pieces - 1)
  sizes[ends - 1] = L - used
  # The slot of [CLS] reads the token before the piece, and is put right below.
  starts = np.zeros(ends[-1], np.int64)
  starts[real] = plan.piece_start.take(which) - 1
  segments = ragged(np.ones(B, np.int32), pieces + 1)
  segments[ends - 1] = 0

  slot = np.cumsum(sizes) - sizes
  places = np.arange(B * L)
  source = np.repeat(starts - slot, sizes)
  source += places
  ids = split.ids.take(source, mode="clip").astype(np.int32)
  flags = split.flags.take(source, mode="clip")
  positions = np.arange(B * L, dtype=np.int32)
  positions -= np.repeat(slot.astype(np.int32), sizes)

  cls, sep = slot[real], (slot + sizes)[real] - 1
  ids[cls], ids[sep] = store.vocab["cls"], store.vocab["sep"]
  flags[cls] = flags[sep] = WORD_START
  flags[cls + 1] |= WORD_START
  padding = ragged(slot[~real], sizes[~real])
  ids[padding], flags[padding] = store.vocab["pad"], 0
  positions[padding] = 0
  return HostBatch(
    ids.reshape(B, L),
    np.repeat(segments.astype(np.int32), sizes).reshape(B, L),
    positions.reshape(B, L),
    flags.reshape(B, L),
    example,
  )


def _empty(store: TokenStore, plan: RowPlan, example: np.ndarray) -> HostBatch:
  """Returns rows of padding alone."""
  shape = len(example), plan.row_length
  return HostBatch(
    np.full(shape, store.vocab["pad"], np.int32),
    np.zeros(shape, np.int32),
    np.zeros(shape, np.int32),
    np.zeros(shape, np.uint8),
    example.astype(np.int32),
  )
