"""Batches: a pure function of (seed, step), every row once an epoch."""

import glob
import math
import os
from collections import Counter

import numpy as np
import pytest
from test_store import VOCAB, contents, make_documents, make_store

from flaxmlm import InputError
from flaxmlm.data import batches, rows


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  folder = tmp_path_factory.mktemp("batches")
  return make_store(folder, make_documents(150, sources=3), fraction=0.3)


def slow_row(split, plan, row):
  """A row, token by token."""
  ids, segments, positions, flags = [], [], [], []
  pieces = range(plan.row_start[row], plan.row_start[row + 1])
  for number, piece in enumerate(pieces, 1):
    start, length = plan.piece_start[piece], plan.piece_length[piece]
    content = split.flags[start : start + length].tolist()
    content[0] |= 1
    ids += [VOCAB["cls"], *split.ids[start : start + length], VOCAB["sep"]]
    flags += [1, *content, 1]
    segments += [number] * (length + 2)
    positions += range(length + 2)
  missing = plan.row_length - len(ids)
  ids += [VOCAB["pad"]] * missing
  return ids, *(x + [0] * missing for x in (segments, positions, flags))


@pytest.mark.parametrize("L", [3, 17, 64])
def test_batches_are_what_a_loop_over_tokens_makes(made, L):
  plan = rows.plan(made.train.offsets, L)
  batch = batches.at(made, plan, seed=5, step=3, batch_size=16)
  use = 3 * 16 + np.arange(16)
  chosen = batches.row_at(plan.rows, use, seed=5)
  for i, row in enumerate(chosen):
    expected = slow_row(made.train, plan, row)
    for field, values in zip(batch[:4], expected, strict=True):
      assert field[i].tolist() == values
  assert batch.example.tolist() == use.tolist()


def pieces_of(batch):
  """Returns the pieces of a batch, without specials."""
  result = []
  for ids, segments in zip(batch.ids, batch.segments, strict=True):
    for number in range(1, segments.max() + 1):
      piece = ids[segments == number].tolist()
      assert piece[0] == VOCAB["cls"]
      assert piece[-1] == VOCAB["sep"]
      result.append(tuple(piece[1:-1]))
  return result


def test_every_document_once_an_epoch(made):
  L = 24
  plan = rows.load(made, "train", L)
  read = Counter()
  # The epoch may end inside a batch; what is after it isn't of this epoch.
  for step in range(math.ceil(plan.rows / 8)):
    batch = batches.at(made, plan, seed=1, step=step, batch_size=8)
    here = batch.example < plan.rows
    read.update(pieces_of(batches.HostBatch(*(x[here] for x in batch[:5]))))
  expected = Counter(
    tuple(ids[i : i + L - 2])
    for _, ids, _ in contents(made.train)
    for i in range(0, len(ids), L - 2)
  )
  assert read == expected


@pytest.mark.parametrize("number", [1, 2, 3, 10, 97, 1000])
def test_each_epoch_is_another_permutation(number):
  epochs = batches.row_at(number, np.arange(5 * number), seed=3)
  epochs = epochs.reshape(5, number)
  assert np.array_equal(np.sort(epochs), np.tile(np.arange(number), (5, 1)))
  if number >= 97:
    shared = np.mean(epochs[:-1] == epochs[1:])
    assert shared < 5 / number + 0.05
    # Not the next seed's first epoch in disguise.
    other = batches.row_at(number, np.arange(number), seed=4)
    assert not np.array_equal(epochs[1], other)


@pytest.mark.parametrize("number", [5, 12])
def test_every_place_is_equally_likely(number):
  draws = 2000
  places = np.stack(
    [
      batches.row_at(number, np.arange(number), seed=seed)
      for seed in range(draws)
    ]
  )
  counts = np.stack([np.bincount(p, minlength=number) for p in places.T])
  expected = draws / number
  chi2 = ((counts - expected) ** 2 / expected).sum()
  freedom = (number - 1) ** 2
  assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom)


def test_the_order_never_changes():
  # A resumed run needs the same rows from any version of NumPy.
  use = np.array([0, 1, 2, 99_999, 100_000, 12_345_678_901])
  assert batches.row_at(100_000, use, seed=7).tolist() == [
    39435,
    53203,
    23290,
    13643,
    80911,
    76208,
  ]


@pytest.mark.parametrize("weights", [(), (3.0, 1.0, 2.0)])
def test_hosts_read_parts_of_one_batch(made, weights):
  sources = range(3) if weights else [None]
  plans = [rows.load(made, "train", 32, source=s) for s in sources]

  def read(**shard):
    return batches.at(
      made, plans, seed=2, step=9, batch_size=12, weights=weights, **shard
    )

  parts = [read(shard=(i, 4)) for i in range(4)]
  parts = [part[:5] for part in parts]
  for whole, *split in zip(read()[:5], *parts, strict=True):
    assert np.array_equal(whole, np.concatenate(split))


def test_weights_are_shares_of_the_rows(made):
  plans = [rows.load(made, "train", 32, source=s) for s in range(3)]
  texts = [set(), set(), set()]
  for source, ids, _ in contents(made.train):
    texts[source] |= {tuple(ids[i : i + 30]) for i in range(0, len(ids), 30)}
  weights = (5.0, 1.0, 2.0)
  counts = np.zeros(3)
  for step in range(16):
    batch = batches.at(
      made, plans, seed=0, step=step, batch_size=16, weights=weights
    )
    here = np.zeros(3)
    for i in range(16):
      row = pieces_of(batches.HostBatch(*(x[i : i + 1] for x in batch[:5])))
      here += [texts[source].issuperset(row) for source in range(3)]
    # Evenly through the steps, not only in the long run.
    assert np.all(np.abs(here - [10, 2, 4]) <= 1)
    counts += here
  assert np.all(np.abs(counts - [160, 32, 64]) <= 1)


def test_with_weights_each_source_has_epochs_of_its_own(made):
  weights = (1.0, 3.0)
  source, rank = batches._source_at(np.arange(20_000), weights)
  for number in range(2):
    ranks = rank[source == number]
    assert np.array_equal(ranks, np.arange(len(ranks)))


def test_in_order_reads_each_row_once_and_fills_up(made):
  plan = rows.load(made, "validation", 16)
  assert plan.rows % 8
  read = list(batches.in_order(made, plan, batch_size=8))
  assert all(batch.ids.shape == (8, 16) for batch in read)
  whole = [
    np.concatenate(field)
    for field in zip(*(batch[:5] for batch in read), strict=True)
  ]
  assert whole[4].tolist() == list(range(len(read) * 8))
  for row in range(plan.rows):
    expected = slow_row(made.validation, plan, row)
    assert [field[row].tolist() for field in whole[:4]] == list(expected)
  assert not whole[1][plan.rows :].any()
  assert (whole[0][plan.rows :] == VOCAB["pad"]).all()


def test_in_order_by_hosts(made):
  plan = rows.load(made, "validation", 16)
  whole = batches.in_order(made, plan, batch_size=8, rows=13)
  halves = [
    batches.in_order(made, plan, batch_size=8, rows=13, shard=(i, 2))
    for i in range(2)
  ]
  number = 0
  for batch, first, second in zip(whole, *halves, strict=True):
    for field, a, b in zip(batch[:5], first[:5], second[:5], strict=True):
      assert np.array_equal(field, np.concatenate([a, b]))
    number += int((batch.segments.max(1) > 0).sum())
  assert number == 13


def test_a_kept_plan_is_the_plan(made):
  again = rows.load(made, "train", 48)
  assert rows.load(made, "train", 48)[:2] == again[:2]
  for kept, new in zip(
    rows.load(made, "train", 48)[2:], again[2:], strict=True
  ):
    assert np.array_equal(kept, new)


def test_a_damaged_plan_is_made_again(made):
  want = rows.load(made, "train", 40)
  kept = glob.glob(os.path.join(made.folder, "rows", "train-40-*"))[0]
  for size in (0, 100):
    os.truncate(os.path.join(kept, "row_start.npy"), size)
    np.testing.assert_array_equal(
      rows.load(made, "train", 40).row_start, want.row_start
    )


def test_a_source_without_rows_is_refused(made):
  plans = [rows.load(made, "train", 32, source=s) for s in (0, 3)]
  with pytest.raises(InputError, match="source 1 of data.source has no train"):
    batches.at(made, plans, seed=0, step=0, batch_size=4, weights=(1.0, 1.0))


def test_hosts_that_do_not_divide_the_batch_are_refused(made):
  plan = rows.load(made, "train", 32)
  with pytest.raises(InputError, match="train.batch_size=10"):
    batches.at(made, plan, seed=0, step=0, batch_size=10, shard=(0, 4))
