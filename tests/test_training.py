"""The step on every mesh, against float64, and to the end."""

import inspect
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxmlm import InputError, config, models, objectives
from flaxmlm.objectives import Batch
from flaxmlm.training import optimizers, sharding
from flaxmlm.training.step import make_init, make_train_step, row_keys

V, L, B = 96, 32, 8
SPECIALS = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}


def tiny(**changes):
  c = config.defaults()
  values = {
    "model.layers": 1,
    "model.width": 32,
    "model.heads": 2,
    "model.ffn": 64,
    "model.max_positions": L,
    "model.dropout": 0.0,
    "model.attention_dropout": 0.0,
    "data.row_length": L,
    "train.batch_size": B,
    "train.steps": 20,
    "optimizer.warmup_steps": 5,
    "optimizer.peak_lr": 1e-2,
    **{name.replace("__", "."): value for name, value in changes.items()},
  }
  return config.check_keys(config.to_flat(c) | values, where="test")


def batch(step: int, B: int = B) -> Batch:
  random = np.random.default_rng(step)
  # Skewed, so that there is something to learn.
  ids = (5 + (V - 5) * random.random((B, L)) ** 3).astype(np.int32)
  ids[:, [0, 12]], ids[:, [11, L - 1]] = SPECIALS["cls"], SPECIALS["sep"]
  segments = np.repeat([[1] * 12 + [2] * (L - 12)], B, 0).astype(np.int32)
  positions = np.repeat([[*range(12), *range(L - 12)]], B, 0).astype(np.int32)
  flags = np.ones((B, L), np.uint8)
  example = np.arange(step * B, step * B + B, dtype=np.int32)
  return Batch(ids, segments, positions, flags, example)


def parts(c, devices: int, *, fsdp: int = 1, tensor: int = 1):
  mesh = sharding.make_mesh(
    data=-1, fsdp=fsdp, tensor=tensor, devices=jax.devices()[:devices]
  )
  model = models.build(c.model, vocab_size=V, dtype=c.train.dtype)
  objective = objectives.build(
    c.objective,
    row_length=L,
    vocab=SPECIALS | {"size": V},
    steps=c.train.steps,
  )
  optimizer = optimizers.make_optimizer(c.optimizer, steps=c.train.steps)
  schedule = optimizers.make_schedule(
    c.optimizer, steps=c.train.steps, peak=c.optimizer.peak_lr
  )
  init, places = make_init(model.init, optimizer, mesh)
  train_step = make_train_step(
    model,
    objective,
    optimizer,
    schedule,
    mesh=mesh,
    state_sharding=places,
    microbatches=c.train.microbatches,
  )
  return mesh, model, objective, init, train_step


def losses(
  c, devices: int, *, steps: int = 20, rows: int = B, **axes
) -> np.ndarray:
  mesh, _, _, init, train_step = parts(c, devices, **axes)
  state, key = init(jax.random.key(0)), jax.random.key(1)
  result = []
  for step in range(steps):
    shown = sharding.put_rows(mesh, batch(step, rows))
    state, sums = train_step(state, shown, key)
    sums = sums["masked"]
    result.append(float(sums["nll"]) / float(sums["weight"]))
  return np.array(result)


@pytest.fixture(scope="session")
def one_device() -> np.ndarray:
  return losses(tiny(model__dropout=0.1, model__attention_dropout=0.1), 1)


@pytest.mark.parametrize(
  ("devices", "microbatches", "axes"),
  [
    (1, 4, {}),
    (2, 2, {}),
    (8, 1, {}),
    pytest.param(1, 2, {}, marks=pytest.mark.slow),
    pytest.param(2, 1, {}, marks=pytest.mark.slow),
    pytest.param(2, 4, {}, marks=pytest.mark.slow),
    pytest.param(2, 2, {"fsdp": 2}, marks=pytest.mark.slow),
    pytest.param(8, 1, {"fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
  ],
)
def test_losses_are_the_same_on_any_mesh(
  one_device, devices, microbatches, axes
):
  c = tiny(
    model__dropout=0.1,
    model__attention_dropout=0.1,
    train__microbatches=microbatches,
  )
  got = losses(c, devices, **axes)
  # Sums in another order: the worst measured over these meshes was 4e-6.
  np.testing.assert_allclose(got, one_device, rtol=2e-5)
  assert one_device[-1] < one_device[0] - 0.1


@pytest.mark.slow
def test_losses_are_the_same_of_micro_batches_on_eight_devices():
  options = {"model__dropout": 0.1, "model__attention_dropout": 0.1}
  want = losses(tiny(**options), 1, rows=32)
  for microbatches in (2, 4):
    c = tiny(**options, train__microbatches=microbatches)
    np.testing.assert_allclose(losses(c, 8, rows=32), want, rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(models.MODELS) - {"bert"}))
def test_every_family_has_the_same_losses_on_any_mesh(family):
  own = {
    "albert": {"model__embedding_size": 16, "model__inner_group_num": 2},
    "electra": {"model__embedding_size": 16},
    "modernbert": {
      "model__layers": 2,
      "model__global_attn_every_n_layers": 2,
      "model__local_attention": 8,
    },
  }
  options = {
    "model__family": family,
    "model__dropout": 0.1,
    "model__attention_dropout": 0.1,
    "optimizer__warmup_steps": 1,
    **own.get(family, {}),
  }
  want = losses(tiny(**options), 1, steps=3)
  c = tiny(**options, train__microbatches=2)
  got = losses(c, 8, steps=3, fsdp=2, tensor=2)
  np.testing.assert_allclose(got, want, rtol=2e-5)


@pytest.mark.slow
def test_muon_is_the_same_on_any_mesh():
  c = tiny(optimizer__name="muon")
  want = losses(c, 1)
  for devices, axes in ((2, {"fsdp": 2}), (4, {"fsdp": 2, "tensor": 2})):
    got = losses(c, devices, **axes)
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_masks_are_the_same_bit_for_bit_on_any_mesh():
  c = tiny()
  shown = []
  for devices in (1, 2, 8):
    mesh, _, objective, _, _ = parts(c, devices)
    rows = sharding.put_rows(mesh, batch(3))

    @jax.jit
    def corrupt(rows, objective=objective):
      keys, _ = row_keys(jax.random.key(1), jnp.int32(3), rows.example)
      return objective.corrupt(keys, rows, jnp.int32(3))

    shown.append(jax.tree.leaves(jax.device_get(corrupt(rows))))
  for other in shown[1:]:
    for a, b in zip(shown[0], other, strict=True):
      np.testing.assert_array_equal(a, b)


def test_gradient_is_that_of_the_formula_in_float64():
  c = tiny(optimizer__clip_norm=None)
  mesh, model, objective, init, _ = parts(c, 1)
  state = init(jax.random.key(0))
  rows = jax.tree.map(jnp.asarray, batch(0))
  keys, _ = row_keys(jax.random.key(1), jnp.int32(0), rows.example)
  example = objective.corrupt(keys, rows, jnp.int32(0))

  def ours(params):
    _, sums = objective.run(model, params, example, None)
    return sums["masked"]["nll"] / sums["masked"]["weight"]

  got = jax.jit(jax.grad(ours))(state.params)
  with jax.enable_x64(True):
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), state.params)
    want = jax.grad(_formula)(params, jax.tree.map(np.asarray, example))
    want = jax.tree.map(np.asarray, want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max() + 1e-8)


def _formula(params, example):
  """Σ -log softmax(logits)[target]·w / Σ w of one BERT layer."""
  e, head = params["encoder"], params["mlm"]
  x = example.inputs

  def norm(x, w):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + 1e-12) * w["scale"] + w["bias"]

  def linear(x, w):
    return x @ w["kernel"] + w["bias"]

  def gelu(x):
    return x * (1 + jax.scipy.special.erf(x / np.sqrt(2))) / 2

  t = e["embeddings"]
  h = norm(
    t["word"]["embedding"][x.ids]
    + t["position"]["embedding"][x.positions]
    + t["token_type"]["embedding"][x.token_types],
    t["norm"],
  )
  w = e["layer_0"]
  q, k, v = (
    linear(h, w[n]).reshape(B, L, 2, 16) for n in ("query", "key", "value")
  )
  scores = jnp.einsum("blhk,bmhk->bhlm", q, k) / 4
  same = x.segments[:, None, :, None] == x.segments[:, None, None, :]
  exp = jnp.exp(scores) * same
  mixed = jnp.einsum("bhlm,bmhk->blhk", exp / exp.sum(-1, keepdims=True), v)
  h = norm(
    h + linear(mixed.reshape(B, L, 32), w["attention_output"]),
    w["attention_norm"],
  )
  inner = gelu(linear(h, w["intermediate"]))
  h = norm(h + linear(inner, w["output"]), w["output_norm"])
  h = h[np.arange(B)[:, None], example.slots]
  h = norm(gelu(linear(h, head["transform"])), head["norm"])
  logits = h @ t["word"]["embedding"].T + head["bias"]
  p = jnp.exp(logits) / jnp.exp(logits).sum(-1, keepdims=True)
  picked = jnp.take_along_axis(p, example.targets[..., None], -1)[..., 0]
  return -(jnp.log(picked) * example.weights).sum() / example.weights.sum()


def test_one_layer_over_fits_eight_rows():
  c = tiny(train__steps=400, optimizer__schedule="constant")
  mesh, _, objective, init, train_step = parts(c, 1)
  state, key = init(jax.random.key(0)), jax.random.key(1)
  rows = sharding.put_rows(mesh, batch(0))
  for _ in range(400):
    # Always the masks of step 0.
    state = state._replace(step=jnp.zeros_like(state.step))
    state, sums = train_step(state, rows, key)
  sums = sums["masked"]
  assert float(sums["correct"]) == float(sums["weight"])


@pytest.mark.parametrize("name", ["adamw", "lamb", "muon"])
def test_optimizers_learn_and_never_decay_norms_and_biases(name):
  c = tiny(
    optimizer__name=name,
    optimizer__weight_decay=0.5,
    optimizer__schedule="constant",
    optimizer__warmup_steps=0,
  )
  optimizer = optimizers.make_optimizer(c.optimizer, steps=20)
  model = models.build(c.model, vocab_size=V, dtype="float32")
  params = jax.tree.map(lambda x: x + 0.5, model.init(jax.random.key(0)))
  zero = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(zero, optimizer.init(params), params)
  decayed = jax.tree.map(lambda u: bool(np.abs(u).max() > 0), updates)
  matrices = jax.tree.map(lambda p: p.ndim > 1, params)
  assert decayed == matrices


def test_schedules_pass_through_their_corners():
  def rates(name, steps, **changes):
    c = tiny(
      optimizer__schedule=name,
      optimizer__warmup_steps=10,
      optimizer__decay_steps=20,
      optimizer__end_lr_ratio=0.1,
      train__steps=100,
      **changes,
    )
    schedule = optimizers.make_schedule(c.optimizer, steps=100, peak=2.0)
    return [round(float(schedule(s)), 5) for s in steps]

  assert rates("linear", [0, 5, 10, 55, 100]) == [0, 1, 2, 1.1, 0.2]
  assert rates("cosine", [0, 10, 55, 100]) == [0, 2, 1.1, 0.2]
  assert rates("constant", [0, 10, 99]) == [0, 2, 2]
  assert rates("wsd", [5, 10, 80, 90, 100]) == [1, 2, 2, 1.1, 0.2]


@dataclass(frozen=True)
class _Chip:
  """A device of a machine of four, whose number JAX calls that of a slice."""

  platform: str
  id: int
  device_kind: str = "one"

  @property
  def slice_index(self) -> int:
    return self.id // 4

  @property
  def process_index(self) -> int:
    return self.id // 4


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_parameters_go_over_several_machines_but_not_slices(platform):
  make_mesh = inspect.unwrap(sharding.make_mesh)  # no type check: no JAX's
  sizes = {"data": 1, "fsdp": 8, "tensor": 1}
  chips = [_Chip(platform, number) for number in range(8)]
  if platform == "tpu":
    with pytest.raises(InputError, match="doesn't divide by 2 slices"):
      make_mesh(**sizes, devices=chips)
    return
  mesh = make_mesh(**sizes, devices=chips)
  assert [chip.id for chip in mesh.devices[0, :, 0]] == list(range(8))


def test_a_matrix_that_no_rule_speaks_of_is_an_error():
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  shapes = {"new": {"kernel": jax.ShapeDtypeStruct((4, 4), jnp.float32)}}
  with pytest.raises(ValueError, match="new/kernel"):
    sharding.tree_sharding(mesh, shapes)


def test_a_table_is_split_over_its_vocabulary_if_that_divides():
  mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)

  def place(*shape):
    table = jax.ShapeDtypeStruct(shape, jnp.float32)
    found = sharding.tree_sharding(mesh, {"word": {"embedding": table}})
    return found["word"]["embedding"].shard_shape(shape)

  assert place(96, 8) == (12, 8)
  assert place(98, 8) == (49, 2)  # by tensor alone, the width by fsdp
  assert place(99, 8) == (99, 2)
  with pytest.raises(InputError, match="mesh.fsdp=4 doesn't divide 6, an axis"):
    place(99, 6)


@pytest.mark.slow
def test_bfloat16_compute_keeps_float32_parameters_and_learns():
  c = tiny(train__dtype="bfloat16")
  got = losses(c, 1)
  mesh, _, _, init, _ = parts(c, 1)
  state = init(jax.random.key(0))
  assert {x.dtype for x in jax.tree.leaves(state.params)} == {
    jnp.dtype("float32")
  }
  np.testing.assert_allclose(got[0], losses(tiny(), 1, steps=1)[0], rtol=1e-2)
  assert got[-1] < got[0] - 0.1
