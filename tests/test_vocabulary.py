"""A table that is split over devices is read and scored as a whole one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_training import SPECIALS, L, batch, losses, tiny

from flaxmlm import models, objectives
from flaxmlm.models import vocabulary
from flaxmlm.planning import hlo
from flaxmlm.training import sharding
from flaxmlm.training.step import make_init, make_train_step, row_keys

# Every way to lay out eight devices: data, fsdp, tensor.
MESHES = [
  (8 // fsdp // tensor, fsdp, tensor)
  for fsdp in (1, 2, 4, 8)
  for tensor in (1, 2, 4, 8)
  if fsdp * tensor <= 8
]
WIDE = {"model__heads": 8}  # divides by 8
ELECTRA = {"model__family": "electra", "model__embedding_size": 16}
# Of a parameter's largest entry: float32 sums in another order. The worst
# measured was 1.3e-6. A key's bias has no gradient but rounding.
TOLERANCE, NOTHING = 5e-6, 1e-9
TASKS = {
  "tied": {},
  "untied": {"model__tie_word_embeddings": False},
  "span": {"objective__name": "span", "objective__span_boundary": True},
  "pairs": {"objective__name": ("masked", "sentence_order")},
  "electra": {
    **ELECTRA,
    "model__width": 64,
    "model__heads": 32,
    "objective__name": "replaced_token",
  },
}


def make_mesh(data: int, fsdp: int, tensor: int):
  count = data * fsdp * tensor
  return sharding.make_mesh(
    data=data, fsdp=fsdp, tensor=tensor, devices=jax.devices()[:count]
  )


def keep_gradients() -> optax.GradientTransformation:
  """An optimizer whose state is the last gradient."""
  return optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params: (jax.tree.map(jnp.zeros_like, grads), grads),
  )


def step_of(task: str, V: int, mesh, **changes):
  """Returns `key -> state` and the step of a task."""
  c = tiny(**{**WIDE, **TASKS[task], **changes})
  model = models.build(c.model, vocab_size=V, dtype=c.train.dtype)
  objective = objectives.build(
    c.objective, row_length=L, vocab=SPECIALS | {"size": V}, steps=20
  )
  init_params = functools.partial(
    objectives.init_params, model=model, options=c.objective
  )
  init, places = make_init(init_params, keep_gradients(), mesh)
  train_step = make_train_step(
    model,
    objective,
    keep_gradients(),
    lambda step: 0.0,
    mesh=mesh,
    state_sharding=places,
    microbatches=c.train.microbatches,
  )
  return init, train_step


@functools.cache
def gradients(task: str, V: int, shape=(1, 1, 1), microbatches: int = 1):
  """Returns the gradient of each parameter."""
  mesh = make_mesh(*shape)
  init, train_step = step_of(task, V, mesh, train__microbatches=microbatches)
  rows = sharding.put_rows(mesh, batch(0))
  state, _ = train_step(init(jax.random.key(0)), rows, jax.random.key(1))
  return jax.device_get(state.opt_state)


def check(task: str, V: int, shape, **options):
  got = gradients(task, V, shape, **options)
  want, _ = jax.tree_util.tree_flatten_with_path(gradients(task, V))
  for (path, b), a in zip(want, jax.tree.leaves(got), strict=True):
    np.testing.assert_allclose(
      a,
      b,
      rtol=0,
      atol=TOLERANCE * np.abs(b).max() + NOTHING,
      err_msg=jax.tree_util.keystr(path),
    )


@pytest.mark.parametrize("V", [96, 98, 99])
@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 4, 2), (1, 8, 1), (2, 1, 4)])
def test_what_is_looked_up_is_what_stands_there(V, shape):
  """The gradient too, of tokens that are there a hundred times."""
  random = np.random.default_rng(0)
  table = random.normal(size=(V, 16)).astype(np.float32)
  ids = jnp.asarray(random.integers(0, V, 256) // random.integers(1, 9, 256))
  g = jnp.asarray(random.normal(size=(256, 16)), jnp.float32)
  mesh = make_mesh(*shape)
  split = vocabulary.find_misfit(mesh.shape, (V, 16), vocabulary.SPLITS[0])

  def look(table):
    return vocabulary.look_up(table, ids, "float32")

  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    chosen = vocabulary.find_split(table.shape)
    place = jax.NamedSharding(mesh, chosen)
    found, pullback = jax.jit(
      lambda t: (look(t), jax.vjp(look, t)[1](g)[0]), in_shardings=place
    )(jax.device_put(table, place))
  assert (chosen == vocabulary.SPLITS[0]) == (split is None)
  ids = np.asarray(ids)
  np.testing.assert_array_equal(found, table[ids])
  want = np.zeros((V, 16))
  np.add.at(want, ids, np.asarray(g, np.float64))
  np.testing.assert_allclose(pullback, want, atol=1e-5)


def test_gradients_of_a_split_table():
  check("tied", 96, (2, 2, 2))


@pytest.mark.parametrize(
  ("task", "V"),
  [("tied", 8 * 41)]
  + [
    pytest.param(*given, marks=pytest.mark.slow)
    for given in (("untied", 8 * 41), ("span", 8 * 41), ("electra", 8 * 128))
  ],
)
def test_no_device_holds_the_logits_of_the_vocabulary(task, V):
  """Nor the table, but once each way, to look tokens up."""
  mesh = make_mesh(1, 8, 1)
  init, train_step = step_of(task, V, mesh)
  shapes = jax.eval_shape(init, jax.random.key(0))
  lowered = train_step.lower(shapes, batch(0), jax.random.key(0))
  program = hlo.parse(lowered.compile().as_text())
  E = shapes.params["encoder"]["embeddings"]["word"]["embedding"].shape[1]
  arrays = {
    array.shape
    for body in program.computations.values()
    for instruction in body
    for array in instruction.results
  }
  # A part of the vocabulary, for the 4 slots of each of 8 rows.
  assert (8 * 4, V // 8) in arrays
  # ELECTRA's draw looks at blocks of 128.
  whole = [shape for shape in arrays if V in shape or shape[-2:] == (128, 8)]
  assert set(whole) == {(V, E)}
  table = [
    (collective.kind, collective.bytes)
    for collective in hlo.collectives(program)
    if collective.dtypes == ("f32",)
    and collective.bytes >= V * E * 4 / 8
    and collective.kind != "all-reduce"
  ]
  models = 2 if task == "electra" else 1  # which look up by the same table
  assert table.count(("all-gather", V * E * 4)) == 1
  assert table.count(("reduce-scatter", V * E * 4 // 8)) == models


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_gradients_of_every_parameter_on_every_mesh(task, shape):
  check(task, 96, shape)


@pytest.mark.slow
@pytest.mark.parametrize("V", [98, 99])
@pytest.mark.parametrize("task", ["tied", "untied", "electra"])
def test_gradients_where_the_vocabulary_does_not_divide(task, V):
  check(task, V, (2, 2, 2))


@pytest.mark.slow
def test_gradients_of_micro_batches_of_a_split_table():
  check("tied", 96, (2, 2, 2), microbatches=2)


@pytest.fixture(scope="module")
def one_device() -> np.ndarray:
  return losses(tiny(**WIDE, model__dropout=0.1), 1)


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_losses_are_the_same_on_every_mesh_of_eight(one_device, shape):
  _, fsdp, tensor = shape
  c = tiny(**WIDE, model__dropout=0.1)
  got = losses(c, 8, fsdp=fsdp, tensor=tensor)
  np.testing.assert_allclose(got, one_device, rtol=2e-5)


@pytest.mark.slow
def test_masks_are_the_same_on_every_mesh_of_eight():
  c = tiny()
  objective = objectives.build(
    c.objective, row_length=L, vocab=SPECIALS | {"size": 96}, steps=20
  )
  shown = []
  for shape in [(1, 1, 1), *MESHES]:
    rows = sharding.put_rows(make_mesh(*shape), batch(3))

    @jax.jit
    def corrupt(rows):
      keys, _ = row_keys(jax.random.key(1), jnp.int32(3), rows.example)
      return objective.corrupt(keys, rows, jnp.int32(3))

    shown.append(jax.device_get(corrupt(rows)))
  for other in shown[1:]:
    jax.tree.map(np.testing.assert_array_equal, shown[0], other)
