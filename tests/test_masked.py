"""The masked objective against its published definition."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxmlm import objectives
from flaxmlm.objectives import Batch, hiding
from flaxmlm.objectives.cross_entropy import cross_entropy, is_likeliest
from flaxmlm.training.step import row_keys

V, L = 200, 64
SPECIALS = {"pad": 0, "unk": 7, "cls": 3, "sep": 90, "mask": 199}
OPTIONS = {
  "name": "masked",
  "rate": 0.15,
  "mask_share": 0.8,
  "random_share": 0.1,
  "rate_end": None,
  "rate_schedule": "linear",
  "temperature": 1.0,
  "weights": (),
  "span_boundary": False,
}


def rows(count: int, seed: int = 0) -> Batch:
  """Rows of two documents and padding; row 0 is all padding."""
  random = np.random.default_rng(seed)
  ordinary = np.setdiff1d(np.arange(V), list(SPECIALS.values()))
  ids = random.choice(ordinary, (count, L)).astype(np.int32)
  segments = np.ones((count, L), np.int32)
  positions = np.tile(np.arange(L, dtype=np.int32), (count, 1))
  for row in range(count):
    end = random.integers(8, L + 1)
    border = random.integers(3, end - 3)
    segments[row, border:] = 2
    positions[row, border:] -= border
    ids[row, [0, border]] = SPECIALS["cls"]
    ids[row, [border - 1, end - 1]] = SPECIALS["sep"]
    ids[row, random.integers(1, border)] = SPECIALS["unk"]
    ids[row, end:] = SPECIALS["pad"]
    segments[row, end:] = positions[row, end:] = 0
  ids[0], segments[0], positions[0] = SPECIALS["pad"], 0, 0
  flags = np.ones((count, L), np.uint8)
  return Batch(ids, segments, positions, flags, np.arange(count))


@functools.cache
def make_corrupt(rate: float):
  objective = objectives.build(
    OPTIONS | {"rate": rate},
    row_length=L,
    vocab=SPECIALS | {"size": V},
    steps=100,
  )

  @jax.jit
  def run(batch: Batch, step):
    keys, _ = row_keys(jax.random.key(5), step, batch.example)
    return objective.corrupt(keys, batch, step)

  return run


def corrupt(batch: Batch, *, step: int = 0, rate: float = 0.15):
  return jax.device_get(make_corrupt(rate)(batch, step))


@pytest.mark.parametrize("rate", [0.01, 0.15, 0.5, 0.9])
def test_exactly_round_of_the_rate_is_picked(rate):
  batch = rows(300)
  example = corrupt(batch, rate=rate)
  for row in range(300):
    special = np.isin(batch.ids[row], list(SPECIALS.values()))
    maskable = np.flatnonzero((batch.segments[row] > 0) & ~special)
    want = max(1, round(rate * len(maskable))) if len(maskable) else 0
    slots = example.slots[row][example.weights[row] > 0]
    assert len(set(slots)) == len(slots) == want
    assert set(slots) <= set(maskable)
    assert list(slots) == sorted(slots)


def test_putting_targets_back_gives_the_original_rows():
  batch = rows(300)
  example = corrupt(batch)
  ids = example.inputs.ids.copy()
  for row, slot in zip(*np.nonzero(example.weights), strict=True):
    ids[row, example.slots[row, slot]] = example.targets[row, slot]
  np.testing.assert_array_equal(ids, batch.ids)
  assert (ids != example.inputs.ids).sum() > 0


def test_80_10_10_and_uniform_choices():
  batch = rows(24_000)
  example = corrupt(batch)
  used = example.weights > 0
  targets = example.targets[used]
  shown = np.take_along_axis(example.inputs.ids, example.slots, 1)[used]
  n = used.sum()
  assert n > 1e5
  # A random token is the target itself once in V - 5 draws.
  same = 1 / (V - len(SPECIALS))
  for share, count in (
    (0.8, (shown == SPECIALS["mask"]).sum()),
    (0.1 + 0.1 * same, (shown == targets).sum()),
  ):
    assert abs(count - n * share) < 5 * np.sqrt(n * share * (1 - share))
  random = shown[(shown != SPECIALS["mask"]) & (shown != targets)]
  counts = np.bincount(random, minlength=V)
  assert counts[list(SPECIALS.values())].sum() == 0
  ordinary = np.delete(counts, list(SPECIALS.values()))
  expected = ordinary.mean()
  chi2 = ((ordinary - expected) ** 2 / expected).sum()
  freedom = len(ordinary) - 1
  assert abs(chi2 - freedom) < 5 * np.sqrt(2 * freedom)


def test_every_position_is_picked_alike():
  full = rows(1)
  ids = np.full((20_000, L), 10, np.int32)
  ids[:, 0], ids[:, -1] = SPECIALS["cls"], SPECIALS["sep"]
  batch = full._replace(
    ids=ids,
    segments=np.ones_like(ids),
    positions=np.tile(np.arange(L, dtype=np.int32), (len(ids), 1)),
    flags=np.ones(ids.shape, np.uint8),
    example=np.arange(len(ids)),
  )
  example = corrupt(batch)
  counts = np.bincount(example.slots.ravel(), minlength=L)[1:-1]
  share = example.slots.shape[1] / (L - 2)
  spread = np.sqrt(len(ids) * share * (1 - share))
  assert np.abs(counts - len(ids) * share).max() < 5 * spread


def test_a_row_is_masked_alike_in_any_batch():
  batch = rows(64)
  whole = corrupt(batch, step=3)
  part = [5, 63, 17]
  few = corrupt(Batch(*(x[part] for x in batch[:-1])), step=3)
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(few), strict=True):
    np.testing.assert_array_equal(a[part], b)


def test_new_steps_and_new_examples_bring_new_masks():
  batch = rows(64)
  first = corrupt(batch, step=0).slots
  for other in (
    corrupt(batch, step=1).slots,
    corrupt(batch._replace(example=batch.example + 64), step=0).slots,
  ):
    same = (first[1:] == other[1:]).all(axis=1)
    assert same.mean() < 0.2  # short rows have few choices


def test_budget_rounds_as_python_does_in_float64():
  # 0.15 * 10 is 1.5 in float64 and more than that in float32.
  table = hiding.budgets(1000, 0.15)
  assert [int(x) for x in table[1:]] == [
    max(1, round(0.15 * n)) for n in range(1, 1001)
  ]


def test_loss_is_the_cross_entropy_of_the_used_slots():
  example = corrupt(rows(8))
  random = np.random.default_rng(0)
  M = example.slots.shape[1]
  logits = random.normal(size=(8, M, V)).astype(np.float32)
  given = jax.tree.map(jnp.asarray, example)
  sums = hiding.add_up(jnp.asarray(logits), given, temperature=2.0)
  x = logits.astype(np.float64) / 2
  p = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
  nll = correct = 0.0
  for row, slot in zip(*np.nonzero(example.weights), strict=True):
    target = example.targets[row, slot]
    nll -= np.log(p[row, slot, target])
    correct += p[row, slot].argmax() == target
  np.testing.assert_allclose(sums["nll"], nll, rtol=1e-6)
  assert sums["correct"] == correct
  assert sums["weight"] == example.weights.sum()


@pytest.mark.parametrize("device", ["cpu", "tpu"])
def test_cross_entropy_and_its_gradient_are_those_of_float64(
  device, monkeypatch
):
  module = sys.modules[cross_entropy.__module__]
  monkeypatch.setattr(module, "platform", lambda: device)
  random = np.random.default_rng(1)
  logits = 30 * random.normal(size=(3, 5, 17))
  targets = random.integers(0, 17, (3, 5))
  weights = random.random((3, 5))
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  hot = np.eye(17)[targets]

  def loss(x):
    nll = cross_entropy(x, jnp.asarray(targets))
    return jnp.sum(nll * jnp.asarray(weights, jnp.float32))

  got, slope = jax.value_and_grad(loss)(jnp.asarray(logits, jnp.float32))
  want = -(np.log((p * hot).sum(-1)) * weights).sum()
  np.testing.assert_allclose(got, want, rtol=1e-6)
  np.testing.assert_allclose(slope, (p - hot) * weights[..., None], atol=5e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_likeliest_is_argmax_of_ties_too(dtype):
  random = np.random.default_rng(0)
  logits = jnp.asarray(random.integers(-3, 4, (400, 13)), dtype)
  targets = jnp.asarray(random.integers(0, 13, 400))
  want = logits.argmax(axis=-1) == targets
  assert 0 < want.sum() < 400
  assert (is_likeliest(logits, targets) == want).all()


def test_likeliest_may_be_left_unrounded():
  """XLA leaves out a rounding to bfloat16 and back, if it likes."""
  random = np.random.default_rng(0)
  exact = jnp.asarray(random.normal(size=(4000, 5)), jnp.float32)
  rounded = jax.lax.reduce_precision(exact, 8, 7)
  best = np.asarray(rounded).argmax(axis=-1)
  targets = jnp.asarray(np.where(random.random(4000) < 0.5, best, 0))
  got = jax.jit(lambda x: is_likeliest(x.astype(jnp.bfloat16), targets))(exact)
  assert (got == (best == targets)).all()
