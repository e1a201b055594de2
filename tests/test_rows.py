"""Rows: every piece once, rows full, plans that depend on lengths alone."""

import numpy as np
import pytest

from flaxmlm import InputError
from flaxmlm.data import rows


def offsets_of(lengths):
  return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def check(plan, offsets, L):
  """Brute force: pieces tile the documents, rows hold what fits."""
  pieces = sorted(
    zip(plan.piece_start.tolist(), plan.piece_length.tolist(), strict=True)
  )
  expected = []
  for start, end in zip(offsets[:-1], offsets[1:], strict=True):
    cuts = [*range(start, end, L - 2), end]
    expected += [(a, b - a) for a, b in zip(cuts, cuts[1:], strict=False)]
  assert pieces == expected
  for first, last in zip(plan.row_start, plan.row_start[1:], strict=False):
    assert last > first
    assert sum(plan.piece_length[first:last] + 2) <= L
  assert plan.row_start[-1] == len(plan.piece_length)


@pytest.mark.parametrize("L", [3, 8, 33, 128])
def test_pieces_tile_the_documents(L):
  lengths = np.random.default_rng(L).integers(0, 200, 500)
  offsets = offsets_of(lengths) + 1000  # as of a source in the middle
  check(rows.plan(offsets, L), offsets, L)


def best_fit_decreasing(sizes, L):
  """Piece by piece, as in the textbook: the number of rows."""
  rooms = []
  for size in sorted(sizes, reverse=True):
    fitting = [i for i, room in enumerate(rooms) if room >= size]
    if fitting:
      rooms[min(fitting, key=lambda i: rooms[i])] -= size
    else:
      rooms.append(L - size)
  return sorted(rooms)


@pytest.mark.parametrize("seed", range(5))
def test_the_histogram_packs_like_best_fit_piece_by_piece(seed):
  random = np.random.default_rng(seed)
  L = int(random.integers(10, 80))
  lengths = random.integers(1, L - 1, 300)
  plan = rows.plan(offsets_of(lengths), L)
  used = np.add.reduceat(plan.piece_length + 2, plan.row_start[:-1])
  assert sorted(L - used) == best_fit_decreasing(lengths + 2, L)


def test_fill_of_documents_of_many_lengths(monkeypatch):
  monkeypatch.setattr(rows, "_BLOCK", 999)
  lengths = np.random.default_rng(0).lognormal(5, 1, 100_000).astype(np.int64)
  for L in (128, 512):
    plan = rows.plan(offsets_of(lengths), L)
    slots = sum(plan.piece_length.tolist()) + 2 * len(plan.piece_length)
    assert plan.fill == slots / (plan.rows * L) > 0.995
    assert rows.predict_fill(offsets_of(lengths), L) == plan.fill


def test_neighbours_in_a_row_are_not_neighbours_in_the_corpus():
  plan = rows.plan(offsets_of([10] * 10_000), 64)
  document = plan.piece_start // 10
  assert np.mean(np.abs(np.diff(document)) < 100) < 0.05


def test_the_first_rows_are_a_fair_sample():
  random = np.random.default_rng(0)
  lengths = random.lognormal(4, 1, 20_000).astype(np.int64) + 1
  plan = rows.plan(offsets_of(lengths), 128)
  pieces = np.diff(plan.row_start)
  error = pieces.std() / np.sqrt(1000)
  assert abs(pieces[:1000].mean() - pieces.mean()) < 4 * error


def test_no_documents_no_rows():
  plan = rows.plan(offsets_of([0, 0]), 16)
  assert plan.rows == 0
  assert plan.fill == 0


def test_a_row_without_room_is_refused():
  with pytest.raises(InputError, match="row_length=2"):
    rows.plan(offsets_of([5]), 2)


def test_the_plan_never_changes():
  # Resuming a run needs the same rows from any version of NumPy.
  plan = rows.plan(offsets_of([3, 9, 1, 4, 4, 4, 12, 2]), 10)
  got = [
    plan.piece_start[a:b].tolist()
    for a, b in zip(plan.row_start, plan.row_start[1:], strict=False)
  ]
  assert got == [[0], [37, 21], [25], [11, 33], [12, 13], [17], [3]]


def test_mix_is_splitmix64():
  # First outputs of SplitMix64 seeded with 1234567, from its reference code.
  gamma = np.uint64(0x9E3779B97F4A7C15)
  states = np.uint64(1234567) + gamma * np.arange(1, 4, dtype=np.uint64)
  assert rows.mix(states).tolist() == [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
  ]
