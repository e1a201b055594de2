"""Words, n-grams and spans against their definitions in plain Python."""

import functools

import jax
import numpy as np
import pytest
from test_masked import SPECIALS, L, V, rows

from flaxmlm import config, objectives
from flaxmlm.objectives import Batch, ngram, span, words

WORDS = ("whole_word", "ngram", "span")
SHARES = {"whole_word": (1.0,), "ngram": ngram.SHARES, "span": span.SHARES}


@functools.partial(jax.jit, static_argnums=4)
def run(keys, batch, maskable, budgets, shares):
  found = words.find_words(batch, maskable)
  spans = words.pick_words(keys, found, budgets, shares)
  return spans, words.count_left_out(found, budgets)


def pick(*args):
  """Spans, and how many words are left out, of whole rows."""
  return jax.device_get(run(*args))


def with_words(batch: Batch, seed: int = 0) -> Batch:
  """The rows, with words of 1 to 5 tokens."""
  random = np.random.default_rng(seed)
  starts = random.random(batch.ids.shape) < 0.4
  border = np.isin(batch.ids, [SPECIALS["cls"], SPECIALS["sep"]])
  starts |= border | np.roll(border, 1, axis=1)
  return batch._replace(flags=starts.astype(np.uint8))


def is_maskable(batch: Batch) -> np.ndarray:
  special = np.isin(batch.ids, list(SPECIALS.values()))
  return (batch.segments > 0) & ~special


def list_words(flags, maskable) -> list[tuple[list[int], int]]:
  """Returns the places of each word that is all maskable, and its run."""
  found, run = [], 0
  starts = np.flatnonzero(flags & 1)
  for word in np.split(np.arange(len(flags)), starts):
    if len(word) and maskable[word].all():
      run += not found or found[-1][0][-1] != word[0] - 1
      found.append((word.tolist(), run))
  return found


def choose(found, order, lengths, budget) -> dict[int, int]:
  """The definition: the number of each chosen place's span."""
  taken, chosen, left, number = set(), {}, budget, 0
  for first in order:
    best = 0
    for n in range(1, lengths[first] + 1):
      there = range(first, first + n)
      if (
        first + n <= len(found)
        and all(found[w][1] == found[first][1] for w in there)
        and not taken & set(there)
        and sum(len(found[w][0]) for w in there) <= left
      ):
        best = n
    if best:
      number += 1
      for w in range(first, first + best):
        taken.add(w)
        left -= len(found[w][0])
        chosen |= dict.fromkeys(found[w][0], number)
  return chosen


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize("rate", [0.01, 0.15, 0.9])
def test_spans_are_those_of_the_definition(name, rate):
  batch = with_words(rows(60))
  maskable = is_maskable(batch)
  budgets = np.array(
    [max(1, round(rate * n)) if n else 0 for n in maskable.sum(1)], np.int32
  )
  keys = jax.random.split(jax.random.key(1), 60)
  got, left = pick(keys, batch, maskable, budgets, SHARES[name])
  for row in range(60):
    found = list_words(batch.flags[row], maskable[row])
    order_key, length_key = jax.random.split(keys[row])
    bits = np.asarray(jax.random.bits(order_key, (L,), "uint32"))[: len(found)]
    drawn = np.asarray(jax.random.uniform(length_key, (L,)))
    ends = np.cumsum(SHARES[name])[:-1].astype(np.float32)
    lengths = 1 + np.searchsorted(ends, drawn, side="right")
    order = np.argsort(bits >> 1, kind="stable")
    want = choose(found, order, lengths, budgets[row])
    assert {p: n for p, n in enumerate(got[row].tolist()) if n} == want
    too_long = sum(len(w) > budgets[row] for w, _ in found)
    assert left["words_too_long"][row] == too_long
    starts = np.flatnonzero(batch.flags[row] & 1)
    whole = [maskable[row][w] for w in np.split(np.arange(L), starts) if len(w)]
    broken = sum(w.any() and not w.all() for w in whole)
    assert left["words_with_unknown"][row] == broken


def make(name: str, **options):
  objective = objectives.build(
    config.defaults().objective.to_dict() | {"name": name} | options,
    row_length=L,
    vocab=SPECIALS | {"size": V},
    steps=100,
  )
  return jax.jit(objective.corrupt)


@pytest.mark.parametrize("name", WORDS)
def test_no_word_is_hidden_in_part_and_the_budget_is_kept(name):
  batch = with_words(rows(300))
  keys = jax.random.split(jax.random.key(2), 300)
  example = jax.device_get(make(name)(keys, batch, 0))
  maskable, full = is_maskable(batch), 0
  for row in range(300):
    slots = set(example.slots[row][example.weights[row] > 0].tolist())
    found = list_words(batch.flags[row], maskable[row])
    for word, _ in found:
      assert slots >= set(word) or not slots & set(word)
    budget = max(1, round(0.15 * maskable[row].sum())) if found else 0
    assert len(slots) <= budget
    full += len(slots) == budget
  assert full > 250


def test_a_span_is_masked_replaced_or_kept_as_a_whole():
  batch = with_words(rows(3000))
  keys = jax.random.split(jax.random.key(3), 3000)
  maskable = is_maskable(batch)
  example = jax.device_get(make("span")(keys, batch, 0))
  budgets = np.array(
    [max(1, round(0.15 * n)) if n else 0 for n in maskable.sum(1)], np.int32
  )
  pick_keys = jax.vmap(jax.random.split)(keys)[:, 0]
  spans, _ = pick(pick_keys, batch, maskable, budgets, span.SHARES)
  counts = np.zeros(3)
  for row in range(3000):
    for number in range(1, spans[row].max() + 1):
      where = spans[row] == number
      shown, original = example.inputs.ids[row][where], batch.ids[row][where]
      masked = shown == SPECIALS["mask"]
      assert masked.all() or not masked.any()
      kinds = [masked.all(), not masked.any() and (shown != original).any()]
      counts[kinds.index(True) if any(kinds) else 2] += 1
  shares = counts / counts.sum()
  # A random token is the original one by chance, rarely.
  assert np.abs(shares - [0.8, 0.1, 0.1]).max() < 0.02


def test_a_rate_that_changes_does_so_in_exact_stairs():
  batch = with_words(rows(50))
  keys = jax.random.split(jax.random.key(4), 50)
  maskable = is_maskable(batch).sum(1)
  corrupt = make("masked", rate=0.3, rate_end=0.1)
  for step, rate in (
    (0, 0.3),
    (33, 0.3 - 0.2 / 3),
    (66, 0.3 - 0.4 / 3),
    (99, 0.1),
  ):
    example = jax.device_get(corrupt(keys, batch, step))
    want = [max(1, round(rate * n)) if n else 0 for n in maskable]
    assert example.weights.sum(1).tolist() == want


@pytest.mark.parametrize(
  ("name", "mean", "published"),
  [
    ("ngram", 18 / 11, [6 / 11, 3 / 11, 2 / 11]),
    # Joshi et al.: a mean of 3.8, so lengths beyond 10 are drawn anew.
    ("span", 3.8, [0.2 * 0.8**n / (1 - 0.8**10) for n in range(10)]),
  ],
)
def test_lengths_are_those_of_the_paper(name, mean, published):
  lengths = np.arange(1, len(published) + 1)
  assert abs(lengths @ published - mean) < 0.005
  n = 30_000
  batch = Batch(
    *(np.full((n, L), value, np.int32) for value in (10, 1, 0)),
    np.ones((n, L), np.uint8),
    np.arange(n),
  )
  keys = jax.random.split(jax.random.key(5), n)
  budget = np.full(n, 10, np.int32)
  got, _ = pick(keys, batch, batch.segments > 0, budget, SHARES[name])
  # The first span of a row is as long as was drawn, if the row goes on so far.
  first = np.argmax(got == 1, axis=1)
  seen = (got == 1).sum(1)[first <= L - 10]
  counts = np.bincount(seen, minlength=len(published) + 1)[1:]
  expected = len(seen) * np.array(published)
  freedom = len(published) - 1
  chi2 = ((counts - expected) ** 2 / expected).sum()
  assert abs(chi2 - freedom) < 5 * (2 * freedom) ** 0.5


def test_every_word_is_as_likely_and_none_for_its_neighbours():
  n = 40_000
  batch = Batch(
    *(np.full((n, L), value, np.int32) for value in (10, 1, 0)),
    np.ones((n, L), np.uint8),
    np.arange(n),
  )
  keys = jax.random.split(jax.random.key(6), n)
  budget = np.full(n, 10, np.int32)
  got = pick(keys, batch, batch.segments > 0, budget, (1.0,))[0] > 0
  share = 10 / L
  spread = np.sqrt(n * share * (1 - share))
  assert np.abs(got.sum(0) - n * share).max() < 5 * spread
  # Two neighbours together as often as any two: 10 · 9 / (64 · 63).
  both = (got[:, 1:] & got[:, :-1]).sum()
  want = n * (L - 1) * share * 9 / (L - 1)
  assert abs(both - want) < 5 * np.sqrt(want)


@pytest.mark.parametrize("name", WORDS)
def test_odd_rows(name):
  """A row that is one long word, an empty one, padding alone."""
  batch = rows(4)
  ids, segments = batch.ids.copy(), batch.segments.copy()
  flags = np.zeros((4, L), np.uint8)
  ids[1], segments[1] = 10, 1
  ids[1, [0, -1]] = SPECIALS["cls"], SPECIALS["sep"]
  ids[2, 2:], segments[2, 2:] = SPECIALS["pad"], 0
  ids[2, :2], segments[2, :2] = [SPECIALS["cls"], SPECIALS["sep"]], 1
  flags[1, [0, 1, -1]] = 1
  odd = batch._replace(ids=ids, segments=segments, flags=flags)
  keys = jax.random.split(jax.random.key(7), 4)
  example = jax.device_get(make(name)(keys, odd, 0))
  assert example.weights[:3].sum() == 0
  assert example.counts["words_too_long"].tolist()[:3] == [0, 1, 0]
  np.testing.assert_array_equal(example.inputs.ids[:3], ids[:3])
  whole = jax.device_get(make(name, rate=1.0)(keys, odd, 0))
  assert whole.weights[1].sum() == L - 2
