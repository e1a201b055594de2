"""Every objective is the same on any mesh, in any parts, and in its config."""

import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from test_pairs import SPECIALS, L, V, pieces
from test_training import tiny

from flaxmlm import InputError, config, models, objectives
from flaxmlm.objectives import Batch
from flaxmlm.objectives.objective import LABEL_SHIFT, PAIR_START
from flaxmlm.training import optimizers, sharding
from flaxmlm.training.step import make_init, make_train_step, row_keys

NAMES = (
  "masked",
  "whole_word",
  "ngram",
  "span",
  "replaced_token",
  "next_sentence",
  ("span", "sentence_order"),
  "sentence_pair",
)


def build(name, **changes):
  c = tiny(
    objective__name=name,
    objective__labels=("a", "b", "c"),
    data__pair_field="b",
    data__row_length=L,
    train__batch_size=32,
    model__max_positions=L,
    model__family="electra" if name == "replaced_token" else "bert",
    model__heads=4,
    model__dropout=0.1,
    **changes,
  )
  config.validate(c)
  vocab = SPECIALS | {"size": V}
  return c, objectives.build(c.objective, row_length=L, vocab=vocab, steps=20)


def given(step: int = 0) -> Batch:
  batch = pieces(16, seed=2 * step)._replace(
    other=pieces(16, seed=2 * step + 1)
  )
  labelled = np.arange(2, 16, 2, dtype=np.uint8)
  batch.flags[labelled, 5] |= PAIR_START | labelled % 3 << LABEL_SHIFT
  number = np.arange(16, dtype=np.int32) + 16 * step
  return batch._replace(example=number)


def test_config_and_objectives_know_the_same_names():
  assert set(config.TOKEN_OBJECTIVES) == set(objectives.OBJECTIVES)
  assert set(config.PAIR_OBJECTIVES) == set(objectives.PAIRS)


def make_corrupt(name):
  """Returns a function of a batch; keys come out as numbers."""
  _, objective = build(name)

  @jax.jit
  def corrupt(batch):
    keys, _ = row_keys(jax.random.key(3), jnp.int32(5), batch.example)
    example = objective.corrupt(keys, batch, jnp.int32(5))
    keys = example.keys if example.keys is None else example.keys[:, None]
    data = keys if keys is None else jax.random.key_data(keys)
    return example._replace(keys=data)

  return corrupt


@pytest.mark.parametrize("name", NAMES, ids=str)
def test_draws_are_the_same_on_a_mesh_and_in_parts(name):
  corrupt = make_corrupt(name)
  whole = corrupt(given())
  mesh = sharding.make_mesh(data=4, fsdp=2, tensor=1)
  spread = corrupt(sharding.put_rows(mesh, given()))
  few = corrupt(jax.tree.map(lambda x: x[[3, 11]], given()))
  for a, b, c in zip(*map(jax.tree.leaves, (whole, spread, few)), strict=True):
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(np.asarray(a)[[3, 11]], c)


def draw_as_process(index: int, port: int, out: str) -> None:
  """Saves what a process of two draws for its half of the rows."""
  jax.distributed.initialize(f"localhost:{port}", 2, index)
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  assert mesh.size == 16
  own = slice(8 * index, 8 * index + 8)
  rows = sharding.put_rows(mesh, jax.tree.map(lambda x: x[own], given()))
  found = {}
  for name in NAMES:
    corrupt = jax.jit(
      make_corrupt(name), out_shardings=sharding.batch_sharding(mesh)
    )
    leaves = jax.tree.leaves(corrupt(rows))
    for number, leaf in enumerate(leaves):
      parts = sorted(leaf.addressable_shards, key=lambda s: s.index[0].start)
      found[f"{name} {number}"] = np.concatenate([s.data for s in parts])
  np.savez(out, **found)


@pytest.mark.slow
def test_draws_are_the_same_in_two_processes(tmp_path):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  outs = [str(tmp_path / f"{index}.npz") for index in range(2)]
  code = (
    "import conftest, test_objectives as t; t.draw_as_process({}, {}, {!r})"
  )
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", code.format(index, port, out)],
      cwd=ROOT / "tests",
      stderr=subprocess.PIPE,
      text=True,
    )
    for index, out in enumerate(outs)
  ]
  for process in processes:
    _, error = process.communicate(timeout=500)
    assert process.returncode == 0, error[-3000:]
  halves = [np.load(out) for out in outs]
  for name in NAMES:
    for number, leaf in enumerate(jax.tree.leaves(make_corrupt(name)(given()))):
      both = [half[f"{name} {number}"] for half in halves]
      np.testing.assert_array_equal(np.concatenate(both), leaf)


def losses(name, devices: int, microbatches: int) -> np.ndarray:
  c, objective = build(name, train__microbatches=microbatches)
  mesh = sharding.make_mesh(
    data=-1, fsdp=1, tensor=1, devices=jax.devices()[:devices]
  )
  model = models.build(c.model, vocab_size=V, dtype="float32")
  optimizer = optimizers.make_optimizer(c.optimizer, steps=20)
  init, places = make_init(
    lambda key: objectives.init_params(key, model=model, options=c.objective),
    optimizer,
    mesh,
  )
  step = make_train_step(
    model,
    objective,
    optimizer,
    optimizers.make_schedule(c.optimizer, steps=20, peak=1e-2),
    mesh=mesh,
    state_sharding=places,
    microbatches=microbatches,
  )
  state, result = init(jax.random.key(0)), []
  for number in range(3):
    rows = sharding.put_rows(mesh, given(number))
    state, sums = step(state, rows, jax.random.key(1))
    weights = {task: float(sums[task]["weight"]) for task in objective.shares}
    result.append([float(sums[task]["nll"]) / w for task, w in weights.items()])
    assert all(weights.values())
  return np.array(result)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES[4:], ids=str)
def test_losses_are_the_same_on_any_mesh_and_in_micro_batches(name):
  np.testing.assert_allclose(losses(name, 8, 2), losses(name, 1, 1), rtol=2e-5)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"name": ("span", "masked")}, "more than one that hides tokens"),
    ({"name": ("next_sentence", "sentence_order")}, "more than one that asks"),
    ({"weights": (1, 2)}, r"objective\.weights has 2 numbers"),
    ({"weights": (0,)}, "wants one above 0"),
    ({"name": "whole_words"}, r"objective\.name='whole_words': wants one of"),
  ],
)
def test_names_and_weights_that_do_not_fit_are_refused(changes, message):
  with pytest.raises(InputError, match=message):
    config.validate(tiny(**{f"objective__{k}": v for k, v in changes.items()}))


def test_weights_are_those_of_the_named():
  _, objective = build(
    ("sentence_order", "span"), objective__weights=(0.5, 2.0)
  )
  assert objective.shares == {"span": 2.0, "sentence_order": 0.5}
  _, objective = build("replaced_token", objective__weights=(3.0,))
  assert objective.shares == {"generator": 3.0, "discriminator": 150.0}
