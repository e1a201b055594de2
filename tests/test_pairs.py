"""Pairs of segments: what they are made of, and that only the text tells them.

Everything is checked on what comes out, token by token, against the rows that
went in.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxmlm import config, objectives
from flaxmlm.data import batches, rows
from flaxmlm.objectives import Batch, as_batch

V, L = 5000, 48
SPECIALS = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
SENTENCE = 2


def pieces(count: int, seed: int) -> Batch:
  """Rows of a piece each, of numbers that are nowhere twice in a row.

  First sentences are short, like headlines, so that a wrong split would show.
  Row 0 is padding alone, row 1 has a single sentence.
  """
  random = np.random.default_rng(seed)
  ids = np.zeros((count, L), np.int32)
  segments, positions = np.zeros_like(ids), np.zeros_like(ids)
  flags = np.zeros((count, L), np.uint8)
  for row in range(1, count):
    room, places = random.integers(8, L - 2), [1]
    while row > 1 and places[-1] < room - 1:
      step = 2 if len(places) == 1 else random.integers(1, 16)
      places.append(places[-1] + int(step))
    places = [p for p in places if p <= room]
    ids[row, 1 : room + 1] = 5 + random.choice(V - 5, room, replace=False)
    ids[row, [0, room + 1]] = SPECIALS["cls"], SPECIALS["sep"]
    segments[row, : room + 2] = 1
    positions[row, : room + 2] = range(room + 2)
    flags[row, : room + 2] = 1
    flags[row, places] |= SENTENCE
  return Batch(ids, segments, positions, flags, np.arange(count))


def make(name, **options):
  objective = objectives.build(
    config.defaults().objective.to_dict() | {"name": name} | options,
    row_length=L,
    vocab=SPECIALS | {"size": V},
    steps=100,
  )

  @jax.jit
  def corrupt(keys, batch):
    return objective.corrupt(keys, batch, jnp.int32(0))

  def run(batch: Batch, seed: int = 0):
    keys = jax.random.split(jax.random.key(seed), len(batch.ids))
    return jax.device_get(corrupt(keys, batch))

  return run


def original(example) -> np.ndarray:
  ids = example.inputs.ids.copy()
  where = np.nonzero(example.weights)
  ids[where[0], example.slots[where]] = example.targets[where]
  return ids


def content(batch: Batch, row: int) -> list[int]:
  return batch.ids[row][batch.segments[row] > 0][1:-1].tolist()


def starts(batch: Batch, row: int) -> set[int]:
  """Where in a piece's content sentences begin."""
  return set((np.flatnonzero(batch.flags[row] & SENTENCE) - 1).tolist())


def parts(example, row: int) -> tuple[list[int], list[int]]:
  """Returns A and B; checks specials, segments, positions, padding."""
  ids = original(example)[row]
  used = int((example.inputs.segments[row] > 0).sum())
  borders = np.flatnonzero(ids == SPECIALS["sep"]).tolist()
  assert ids[0] == SPECIALS["cls"]
  assert borders == [borders[0], used - 1]
  types = [0] * (borders[0] + 1) + [1] * (used - borders[0] - 1)
  padding = [0] * (L - used)
  assert example.inputs.token_types[row].tolist() == types + padding
  assert example.inputs.segments[row].tolist() == [1] * used + padding
  assert example.inputs.positions[row].tolist() == [*range(used), *padding]
  assert ids[used:].tolist() == padding
  assert example.flags[row, used:].tolist() == padding
  return ids[1 : borders[0]].tolist(), ids[borders[0] + 1 : used - 1].tolist()


def test_two_segments_in_order_or_swapped():
  batch = pieces(600, seed=0)
  example = make("sentence_order")(batch)
  assert example.pairs.labels[:2].tolist() == [-1, -1]
  assert example.counts["rows_without_pair"].sum() == 1
  np.testing.assert_array_equal(original(example)[:2], batch.ids[:2])
  for row in range(2, 600):
    a, b = parts(example, row)
    whole = b + a if example.pairs.labels[row] else a + b
    assert whole == content(batch, row)
    split = len(b if example.pairs.labels[row] else a)
    assert split in starts(batch, row) - {0}
  assert abs(example.pairs.labels[2:].mean() - 0.5) < 5 * 0.5 / 598**0.5


def test_the_true_continuation_or_a_part_of_the_other():
  batch, other = pieces(600, seed=0), pieces(600, seed=1)
  example = make("next_sentence")(batch._replace(other=other))
  for row in range(2, 600):
    a, b = parts(example, row)
    first, second = content(batch, row), content(other, row)
    assert first[: len(a)] == a
    assert len(a) in starts(batch, row) - {0}
    if example.pairs.labels[row] == 0:
      assert first[len(a) : len(a) + len(b)] == b
    else:
      place = second.index(b[0])
      assert second[place : place + len(b)] == b
      assert place in starts(other, row) - {0}
      # The shorter of the two second parts decides.
      rest = len(second) - place, len(first) - len(a)
      assert len(b) == min(rest)
      assert example.counts["tokens_cut"][row] == rest[0] - len(b)
  assert abs(example.pairs.labels[2:].mean() - 0.5) < 5 * 0.5 / 598**0.5


def features(example) -> np.ndarray:
  """Lengths of A, B and padding, where B begins, and whether it is the longer.

  A linear classifier of these is asked for the label.
  """
  types, valid = example.inputs.token_types, example.inputs.segments > 0
  b = types.sum(1)
  a = valid.sum(1) - b
  columns = [a, b, a + b, a * b, a * a, b * b, a > b, np.ones_like(a)]
  return np.stack(columns, 1).astype(float)


def test_lengths_and_padding_do_not_tell_the_next_sentence():
  few = pieces(2000, seed=2), pieces(2000, seed=3)
  batch, other = (Batch(*(np.tile(x.T, 10).T for x in b[:5])) for b in few)
  example = make("next_sentence")(batch._replace(other=other))
  good = example.pairs.weights > 0
  x, y = features(example)[good], example.pairs.labels[good]
  half = len(y) // 2
  weights, *_ = np.linalg.lstsq(x[:half], y[:half] - 0.5, rcond=None)
  right = ((x[half:] @ weights > 0) == (y[half:] > 0)).mean()
  assert abs(right - 0.5) < 0.02
  # Nor does whether B ends where its piece did.
  last, mine, theirs = (
    ids[np.arange(len(ids)), (segments > 0).sum(1) - 2]
    for ids, segments in (
      (original(example), example.inputs.segments),
      batch[:2],
      other[:2],
    )
  )
  ends = (last == np.where(example.pairs.labels == 1, theirs, mine))[good]
  assert abs(ends[y == 1].mean() - ends[y == 0].mean()) < 0.02


def test_every_sentence_start_is_as_likely():
  batch = pieces(2, seed=0)
  flags = batch.flags.copy()
  flags[1, [1, 3, 4, 6]] |= SENTENCE
  many = Batch(*(np.repeat(x[1:], 9000, 0) for x in (*batch[:3], flags)), None)
  example = make("sentence_order")(many._replace(example=np.arange(9000)))
  parts(example, 0)
  a, b = features(example)[:, :2].astype(int).T - [[2], [1]]
  counts = np.bincount(np.where(example.pairs.labels == 1, b, a), minlength=7)
  assert counts.sum() == counts[[2, 3, 5]].sum() == 9000
  assert np.abs(counts[[2, 3, 5]] - 3000).max() < 5 * (9000 * 2 / 9) ** 0.5


def test_tokens_are_hidden_in_pairs_as_elsewhere():
  batch = pieces(300, seed=5)
  example = make(("sentence_order", "whole_word"), rate=0.3)(batch)
  for row in range(2, 300):
    hidden = example.weights[row].sum()
    assert hidden == max(1, round(0.3 * len(content(batch, row))))


def test_rows_of_whole_sentences():
  random = np.random.default_rng(0)
  lengths = random.integers(0, 90, 200)
  offsets = np.concatenate([[7], 7 + np.cumsum(lengths)])
  starts = np.flatnonzero(random.random(offsets[-1]) < 0.08)
  starts = starts[starts >= 7]
  plan = rows.plan_sentences(offsets, starts, 23)
  want = []
  for number, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
    cuts = [begin, *(s for s in starts.tolist() if begin < s < end), end]
    backward = int(rows.mix(np.uint64(number))[0]) & 1
    while begin < end:
      if backward:
        fits = [c for c in cuts if end - 20 <= c < end]
        stop = fits[0] if fits else end - 20
        want.append((stop, end - stop))
        end = stop
      else:
        fits = [c for c in cuts if begin < c <= begin + 20]
        stop = fits[-1] if fits else begin + 20
        want.append((begin, stop - begin))
        begin = stop
  want.sort()
  inner = [sum(a < s < a + n for s in starts.tolist()) for a, n in want]
  several = [list(row) for row, count in zip(want, inner, strict=True) if count]
  single = [
    list(row) for row, count in zip(want, inner, strict=True) if not count
  ]
  got = np.stack([plan.piece_start, plan.piece_length], 1)
  assert got.tolist() == several + single
  assert plan.pairs.tolist() == [len(several)]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
  from test_store import make_documents, make_store

  folder = tmp_path_factory.mktemp("pairs")
  return make_store(folder, make_documents(60, sources=1), fraction=0.3)


def test_the_other_row_is_of_another_document_and_any_of_them(store):
  plan = rows.load(store, "train", 24, kind="sentences")
  again = rows.load(store, "train", 24, kind="sentences")
  for a, b in zip(plan[2:5], again[2:5], strict=True):
    np.testing.assert_array_equal(a, b)
  document = np.searchsorted(store.train.offsets, plan.piece_start, "right")
  every = batches.row_at(plan.rows, np.arange(400 * 32), seed=3)
  seen = np.zeros(plan.rows, int)
  first = batches.at(store, plan, seed=3, step=0, batch_size=32, others=True)
  for step in range(400):
    batch = batches.at(
      store, plan, seed=3, step=step, batch_size=32, others=True
    )
    if step == 0:
      for a, b in zip(batch[:5], first[:5], strict=True):
        np.testing.assert_array_equal(a, b)
    key = (
      {
        tuple(
          batches._read(store, plan, np.array([r]), np.array([0])).ids[0]
        ): r
        for r in range(plan.rows)
      }
      if step == 0
      else key
    )
    chosen = np.array([key[tuple(ids)] for ids in batch.other.ids])
    mine = every[step * 32 : step * 32 + 32]
    assert (document[chosen] != document[mine]).all()
    np.add.at(seen, chosen, 1)
  pairs = plan.pairs[0]
  assert 0 < pairs < plan.rows
  assert seen[pairs:].sum() == 0
  expected = seen.sum() / pairs
  chi2 = ((seen[:pairs] - expected) ** 2 / expected).sum()
  assert abs(chi2 - pairs) < 6 * (2 * pairs) ** 0.5


def test_halves_of_a_batch_are_the_batch(store):
  plan = rows.load(store, "train", 24, kind="sentences")
  given = {"seed": 1, "step": 5, "batch_size": 8, "others": True}
  whole = batches.at(store, plan, **given)
  parts = [batches.at(store, plan, **given, shard=(i, 2)) for i in range(2)]
  for name in ("ids", "flags"):
    both = np.concatenate([getattr(p.other, name) for p in parts])
    np.testing.assert_array_equal(getattr(whole.other, name), both)


def test_each_row_once_in_evaluation(store):
  plan = rows.load(store, "validation", 24, kind="sentences")
  found = [
    as_batch(b)
    for b in batches.in_order(store, plan, batch_size=7, others=True)
  ]
  assert all(b.other.ids.shape == b.ids.shape for b in found)
  numbers = np.concatenate([b.example for b in found])[: plan.rows]
  assert sorted(numbers.tolist()) == list(range(plan.rows))
  ids = np.concatenate([b.ids for b in found])[: plan.rows]
  assert sum(map(len, {tuple(r) for r in ids.tolist()})) == ids.size


def test_lengths_do_not_tell_the_order_of_filled_rows():
  """Rows as they are filled, of documents of many sentences."""
  random = np.random.default_rng(0)
  offsets = np.cumsum([0, *random.integers(2000, 4000, 400)])
  lengths = random.geometric(1 / 20, offsets[-1] // 15)
  starts = np.cumsum(lengths)[np.cumsum(lengths) < offsets[-1]]
  plan = rows.plan_sentences(offsets, starts, 80)
  borders = np.union1d(starts, offsets)
  order = random.permutation(int(plan.pairs[0]))
  first, length = plan.piece_start[order], plan.piece_length[order]
  low = np.searchsorted(borders, first, "right")
  high = np.searchsorted(borders, first + length)
  split = borders[random.integers(low, high)]
  a, b = split - first, first + length - split
  label = random.integers(0, 2, len(a))
  shown = np.where(label, b, a), np.where(label, a, b)
  columns = [*shown, shown[0] > shown[1], shown[0] - shown[1], np.ones_like(a)]
  x = np.stack(columns, 1).astype(float)
  half = len(a) // 2
  weights, *_ = np.linalg.lstsq(x[:half], label[:half] - 0.5, rcond=None)
  right = ((x[half:] @ weights > 0) == (label[half:] > 0)).mean()
  assert len(a) > 15_000
  assert abs(right - 0.5) < 0.02
