"""Every attention backend against the formula, and against leaks."""

import os
import shutil
import subprocess
import sys
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flaxmlm import InputError, config, models
from flaxmlm.models import Inputs, attention, row_attention
from flaxmlm.training import sharding


def packed(B: int, L: int, *, seed: int = 0) -> np.ndarray:
  """Rows of a few documents, whose last tenth is padding."""
  random = np.random.default_rng(seed)
  starts = random.integers(0, L, (B, 1, 4))
  segments = 1 + (np.arange(L)[:, None] >= starts).sum(-1)
  segments[:, L - L // 10 :] = 0
  return segments


def tensors(B: int, L: int, H: int = 2, K: int = 8) -> list[jax.Array]:
  keys = jax.random.split(jax.random.key(0), 3)
  return [jax.random.normal(key, (B, L, H, K)) for key in keys]


def brute_force(query, key, value, segments, window=None) -> np.ndarray:
  """The formula in float64, token by token, over the tokens that it sees."""
  q, k, v = (np.asarray(x, np.float64) for x in (query, key, value))
  B, L, H, K = q.shape
  mixed = np.zeros_like(q)
  for b in range(B):
    for i in range(L):
      seen = segments[b] == segments[b, i]
      if window is not None:
        seen = seen & (np.abs(np.arange(L) - i) <= window)
      scores = np.einsum("hk,mhk->hm", q[b, i], k[b, seen]) / np.sqrt(K)
      weights = np.exp(scores - scores.max(-1, keepdims=True))
      weights /= weights.sum(-1, keepdims=True)
      mixed[b, i] = np.einsum("hm,mhk->hk", weights, v[b, seen])
  return mixed


def dense(query, key, value, segments, window=None) -> jax.Array:
  """The formula with every score of the row, for autodiff."""
  L, K = query.shape[1], query.shape[3]
  seen = segments[:, None, :, None] == segments[:, None, None, :]
  if window is not None:
    seen &= np.abs(np.arange(L)[:, None] - np.arange(L)) <= window
  scores = jnp.einsum("blhk,bmhk->bhlm", query, key) / np.sqrt(K)
  weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
  return jnp.einsum("bhlm,bmhk->blhk", weights, value)


def gradients(attend, qkv, segments):
  weights = jax.random.normal(jax.random.key(9), qkv[0].shape)
  grad = jax.grad(
    lambda qkv: jnp.sum(attend(*qkv, jnp.asarray(segments)) * weights)
  )
  return jax.jit(grad)(qkv)


def assert_close(got, want, atol):
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, atol=atol)


# Whole rows, a window, one that isn't a block's length, rows that aren't whole
# blocks, a window longer than the row.
@pytest.mark.parametrize(
  ("L", "window"),
  [(50, None), (200, 32), (203, 3), (203, 50), (97, 40), (20, 64)],
)
def test_xla_is_the_formula(L, window):
  qkv, segments = tensors(2, L), packed(2, L)
  got = attention.xla(*qkv, jnp.asarray(segments), window=window)
  want = brute_force(*qkv, segments, window)
  np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize(("L", "window"), [(50, None), (203, 50)])
def test_xla_has_the_gradient_of_the_formula(L, window):
  qkv, segments = tensors(2, L), packed(2, L)
  got = gradients(partial(attention.xla, window=window), qkv, segments)
  want = gradients(partial(dense, window=window), qkv, segments)
  assert_close(got, want, atol=5e-6)


def test_local_attention_does_work_by_the_window():
  def flops(L):
    attend = jax.jit(partial(attention.xla, window=32))
    shapes = jax.eval_shape(lambda: tensors(1, L, K=64))
    segments = jax.ShapeDtypeStruct((1, L), jnp.int32)
    return attend.lower(*shapes, segments).cost_analysis()["flops"]

  # With every score, a row of 4 times the length costs 16 times as much.
  assert flops(2048) / flops(512) < 4.1


def dropped(qkv, segments, keys, window):
  return attention.xla(
    *qkv,
    segments,
    window=window,
    dropout_keys=keys,
    dropout_rate=0.25,
    site=3,
  )


@pytest.mark.parametrize("window", [None, 32])
def test_a_rows_dropout_is_the_same_in_any_batch(window):
  qkv, segments = tensors(4, 160), jnp.asarray(packed(4, 160))
  keys = jax.random.split(jax.random.key(1), 4)
  attend = jax.jit(partial(dropped, window=window))
  whole = attend(qkv, segments, keys)
  part = attend([x[1:3] for x in qkv], segments[1:3], keys[1:3])
  np.testing.assert_array_equal(whole[1:3], part)


@pytest.mark.slow
def test_local_dropout_is_the_same_on_any_mesh():
  qkv, segments = tensors(4, 160), jnp.asarray(packed(4, 160))
  keys = jax.random.split(jax.random.key(1), 4)
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  place = NamedSharding(mesh, P(("data", "fsdp"), None, "tensor"))
  rows = sharding.batch_sharding(mesh)
  attend = partial(dropped, window=32)
  there = jax.jit(attend, in_shardings=([place] * 3, rows, rows))
  np.testing.assert_allclose(
    there(qkv, segments, keys),
    jax.jit(attend)(qkv, segments, keys),
    atol=1e-6,
  )


def test_local_dropout_has_the_rate():
  query, key, value = tensors(4, 160, H=8)
  keys = jax.random.split(jax.random.key(1), 4)
  segments = jnp.ones((4, 160), jnp.int32)
  # Equal weights: each token's sum of what is kept, over what there was.
  kept = dropped(
    [jnp.zeros_like(query), key, jnp.ones_like(value)], segments, keys, 32
  )[:, 32:-32, :, 0]
  # A sum over 65 weights, each kept with 3/4, has this deviation of its mean.
  deviation = np.sqrt(0.25 / 0.75 / 65)
  assert abs(kept.mean() - 1) < 5 * deviation / np.sqrt(kept.size / 65)
  assert abs(kept.std() / deviation - 1) < 0.05


interpreted = partial(attention.splash, interpret=True)


# Rows that aren't whole blocks; a window inside a block and across two.
@pytest.mark.parametrize(
  ("L", "window"),
  [
    (512, 64),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in [(512, None), (600, 200), (600, None)]
    ),
  ],
)
def test_splash_is_xla(L, window):
  qkv, segments = tensors(2, L), packed(2, L)
  attend = partial(interpreted, window=window)
  plain = partial(attention.xla, window=window)
  np.testing.assert_allclose(
    jax.jit(attend)(*qkv, jnp.asarray(segments)),
    jax.jit(plain)(*qkv, jnp.asarray(segments)),
    atol=2e-6,
  )
  got = gradients(attend, qkv, segments)
  assert_close(got, gradients(plain, qkv, segments), atol=5e-6)


@pytest.mark.parametrize(
  ("data", "fsdp", "tensor"),
  [
    (2, 2, 2),
    pytest.param(8, 1, 1, marks=pytest.mark.slow),
    pytest.param(1, 4, 2, marks=pytest.mark.slow),
  ],
)
@pytest.mark.slow
def test_splash_is_the_same_on_any_mesh(data, fsdp, tensor):
  qkv, segments = tensors(8, 512), packed(8, 512)
  mesh = sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor)
  place = NamedSharding(mesh, P(("data", "fsdp"), None, "tensor"))

  def attend(*args):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return interpreted(*args, window=64)

  here = gradients(partial(interpreted, window=64), qkv, segments)
  there = gradients(attend, jax.device_put(qkv, place), segments)
  assert all(x.sharding.is_equivalent_to(place, 4) for x in there)
  assert_close(there, here, atol=1e-6)


@pytest.mark.parametrize("L", [512, 1024])
@pytest.mark.parametrize("window", [None, 64])
def test_splash_is_lowered_for_a_tpu(L, window):
  shape = jax.ShapeDtypeStruct((2, L, 12, 64), jnp.bfloat16)
  segments = jax.ShapeDtypeStruct((2, L), jnp.int32)
  grad = jax.grad(
    lambda *args: jnp.sum(attention.splash(*args, window=window)),
    argnums=(0, 1, 2),
  )
  exported = jax.export.export(jax.jit(grad), platforms=["tpu"])
  text = exported(shape, shape, shape, segments).mlir_module()
  # One kernel forward, one backward; no scores outside of them.
  assert text.count("@tpu_custom_call") == 2
  assert f"{L}x{L}" not in text


@pytest.mark.parametrize(
  "attend",
  [
    attention.xla,
    partial(attention.xla, window=64),
    interpreted,
    partial(interpreted, window=64),
  ],
)
def test_no_backend_leaks_between_documents_or_from_padding(attend):
  attend = jax.jit(attend)
  qkv, segments = tensors(2, 512), packed(2, 512)
  before = np.asarray(attend(*qkv, jnp.asarray(segments)))
  for segment in np.unique(segments):
    here = segments == segment
    # Large enough to win every softmax that it is in.
    other = [jnp.where(here[..., None, None], 50 * x, x) for x in qkv]
    after = np.asarray(attend(*other, jnp.asarray(segments)))
    np.testing.assert_array_equal(before[~here], after[~here])


V = 50
SHAPE = config.defaults().model.to_dict() | {
  "layers": 3,
  "width": 16,
  "heads": 2,
  "ffn": 24,
  "max_positions": 512,
  "local_attention": 48,
  "norm_eps": 1e-5,
  "init_stddev": 0.2,
}


def encoder(family: str):
  model = models.build(
    SHAPE | {"family": family}, vocab_size=V, dtype="float32"
  )
  return model.encode, model.init(jax.random.key(0))


def batch(B: int, L: int) -> Inputs:
  segments = packed(B, L)
  random = np.random.default_rng(1)
  starts = np.diff(segments, axis=1, prepend=-1) != 0
  place = np.arange(L)
  positions = place - np.maximum.accumulate(np.where(starts, place, 0), axis=1)
  ids = random.integers(0, V, (B, L))
  return Inputs(ids, segments, positions, np.zeros((B, L), np.int64))


def on_a_tpu(monkeypatch):
  """Has attention take what it takes on a TPU, interpreted."""
  monkeypatch.setattr(attention, "platform", lambda: "tpu")
  monkeypatch.setattr(attention, "splash", interpreted)


@pytest.mark.slow
@pytest.mark.parametrize("family", models.MODELS)
def test_no_family_leaks_by_splash(family, monkeypatch):
  on_a_tpu(monkeypatch)
  encode, params = encoder(family)
  encode = jax.jit(encode)
  inputs = batch(2, 512)
  before = np.asarray(encode(params, inputs))
  for segment in np.unique(inputs.segments):
    here = inputs.segments == segment
    ids = np.where(here, (inputs.ids + 7) % V, inputs.ids)
    after = np.asarray(encode(params, inputs._replace(ids=ids)))
    np.testing.assert_array_equal(before[~here], after[~here])
    assert (before[here] != after[here]).any(axis=-1).all()


@pytest.mark.parametrize(
  "family", ["modernbert", pytest.param("bert", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("backend", ["xla", "splash"])
@pytest.mark.slow
def test_a_family_is_the_same_on_a_mesh(family, backend, monkeypatch):
  encode, params = encoder(family)
  inputs = batch(4, 512 if backend == "splash" else 160)
  weights = np.random.default_rng(2).normal(size=(*inputs.ids.shape, 16))

  def loss(params, inputs):
    return jnp.sum(encode(params, inputs, None) * weights)

  want = jax.jit(jax.grad(loss))(params, inputs)
  if backend == "splash":
    on_a_tpu(monkeypatch)
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)

  def loss_there(params, inputs):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return loss(params, inputs)

  places = sharding.tree_sharding(mesh, params)
  there = jax.jit(
    jax.grad(loss_there), in_shardings=(places, sharding.batch_sharding(mesh))
  )
  got = there(params, inputs)
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(g, w, atol=2e-5 * max(1, np.abs(w).max()))


HERE = {
  "length": 512,
  "head_size": 64,
  "dtype": "bfloat16",
  "local": False,
  "drops": False,
}


@pytest.mark.parametrize(
  ("platform", "change", "chosen"),
  [
    ("cpu", {}, "xla"),
    ("tpu", {}, "splash"),
    ("tpu", {"local": True}, "splash"),
    ("tpu", {"length": 511}, "xla"),
    ("tpu", {"drops": True}, "xla"),
    ("gpu", {}, "cudnn"),
    ("gpu", {"length": 8}, "cudnn"),
    ("gpu", {"length": 127}, "xla"),
    ("gpu", {"local": True}, "xla"),
    ("gpu", {"drops": True}, "xla"),
    ("gpu", {"dtype": "float32"}, "xla"),
    ("gpu", {"head_size": 136}, "xla"),
    ("gpu", {"head_size": 20}, "xla"),
  ],
)
def test_auto_takes_the_best_that_can(platform, change, chosen):
  got = attention.choose_backend("auto", platform=platform, **HERE | change)
  assert got == chosen


@pytest.mark.parametrize(
  ("wanted", "platform", "change", "words"),
  [
    ("splash", "cpu", {}, "splash: it runs on a TPU, and this is a cpu"),
    ("splash", "tpu", {"length": 256}, "rows of 256 tokens are shorter"),
    ("splash", "tpu", {"drops": True}, "model.attention_dropout=0"),
    ("cudnn", "cpu", {}, "cudnn: it runs on NVIDIA's GPUs, and this is a cpu"),
    ("cudnn", "gpu", {"dtype": "float32"}, "train.dtype=bfloat16"),
    ("cudnn", "gpu", {"head_size": 20}, "heads of 20"),
    ("cudnn", "gpu", {"drops": True}, "model.attention_dropout=0"),
  ],
)
def test_a_backend_that_cant_is_refused(wanted, platform, change, words):
  with pytest.raises(InputError) as error:
    attention.choose_backend(wanted, platform=platform, **HERE | change)
  assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("backend", ["splash", "cudnn"])
def test_a_model_says_that_its_backend_isnt_here(backend):
  options = SHAPE | {"family": "modernbert", "attention": backend}
  model = models.build(options, vocab_size=V, dtype="bfloat16")
  params = model.init(jax.random.key(0))
  with pytest.raises(InputError, match=f"model.attention={backend}: it runs"):
    jax.jit(model.encode)(params, batch(1, 512), None)


CUDNN = """
import jax, sys
sys.path.insert(0, "tests")
from functools import partial
import jax.numpy as jnp, numpy as np
import test_attention as t
from flaxmlm.models import attention
assert jax.default_backend() == "gpu"
for window in (None, 64):
  qkv = [x.astype(jnp.bfloat16) for x in t.tensors(2, 512, K=64)]
  whole = [x.astype(jnp.float32) for x in qkv]
  segments = t.packed(2, 512)
  for x, y in zip(
    t.gradients(partial(attention.cudnn, window=window), qkv, segments),
    t.gradients(partial(attention.xla, window=window), whole, segments),
  ):
    # Eight bits of mantissa, a few roundings on the way.
    np.testing.assert_allclose(x.astype(jnp.float32), y, atol=0.04)
  attend = partial(attention.cudnn, window=window)
  t.test_no_backend_leaks_between_documents_or_from_padding(
    lambda *args: attend(*[a.astype(jnp.bfloat16) for a in args[:3]], args[3])
  )
"""


@pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="no NVIDIA GPU")
def test_cudnn_is_xla():
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  subprocess.run(
    [sys.executable, "-c", CUDNN],
    cwd=ROOT,
    env=env | {"JAX_PLATFORMS": "cuda"},
    check=True,
  )


@pytest.mark.parametrize(("heads", "width"), [(2, 128), (4, 64), (3, 48)])
def test_the_kernel_of_whole_rows_is_plain_attention(heads, width):
  """Values and gradients, interpreted; heads that fill the lanes or don't."""
  random = np.random.default_rng(0)
  B, L, K = 3, 64, width // heads
  projected = jnp.asarray(random.normal(size=(B, L, 3 * width)), jnp.float32)
  bias = jnp.asarray(random.normal(size=3 * width), jnp.float32)
  ends = np.sort(random.integers(1, L, (B, 2)), axis=1)
  segments = jnp.asarray(
    (np.arange(L) >= ends[:, :1]).astype(np.int32)
    + (np.arange(L) >= ends[:, 1:])
    + 1
  )
  weights = jnp.asarray(random.normal(size=(B, L, width)), jnp.float32)

  def kernel(projected, bias):
    mixed = row_attention.attend(
      projected, bias, segments, heads=heads, interpret=True
    )
    return jnp.sum(mixed * weights), mixed

  def plain(projected, bias):
    parts = jnp.split(projected + bias, 3, axis=2)
    q, k, v = (part.reshape(B, L, heads, K) for part in parts)
    mixed = attention.xla(q, k, v, segments).reshape(B, L, width)
    return jnp.sum(mixed * weights), mixed

  (got, mixed), slopes = jax.value_and_grad(kernel, (0, 1), has_aux=True)(
    projected, bias
  )
  (want, other), others = jax.value_and_grad(plain, (0, 1), has_aux=True)(
    projected, bias
  )
  np.testing.assert_allclose(mixed, other, atol=2e-6)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  for a, b in zip(slopes, others, strict=True):
    scale = float(jnp.abs(b).max())
    np.testing.assert_allclose(a, b, atol=2e-6 * scale)
