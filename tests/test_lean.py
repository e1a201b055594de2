"""The functions that spare bytes on a TPU, against the plain ones."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxmlm import config, models
from flaxmlm.models import Inputs, attention, layers, lean

T, D, F = 48, 32, 64


def draw(*shape, seed=0):
  random = np.random.default_rng(seed)
  return jnp.asarray(random.normal(size=shape), jnp.float32)


def both(function, plain, *arguments):
  """Values and gradients of a function and of its plain twin."""
  weights = draw(*plain(*arguments).shape, seed=9)

  def total(f):
    return lambda *given: jnp.sum(f(*given).astype(jnp.float32) * weights)

  numbers = tuple(range(len(arguments)))
  return [
    (f(*arguments), *jax.grad(total(f), numbers)(*arguments))
    for f in (function, plain)
  ]


def check(got, want, tolerance):
  for a, b in zip(got, want, strict=True):
    scale = float(jnp.abs(b).max())
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("offset", [0.0, 10.0])
@pytest.mark.parametrize("use_bias", [True, False])
def test_normalize(use_bias, offset):
  norm = nn.LayerNorm(epsilon=1e-12, use_bias=use_bias, use_fast_variance=False)
  x, scale, bias = draw(T, D) + offset, 1 + draw(D, seed=1), draw(D, seed=2)
  parameters = (scale, bias) if use_bias else (scale,)

  def plain(x, *given):
    names = ("scale", "bias")[: len(given)]
    return norm.apply({"params": dict(zip(names, given, strict=True))}, x)

  def spare(x, scale, bias=None):
    return layers.normalize(x, scale, bias, 1e-12)

  # E[x^2] - E[x]^2 loses digits where the mean is large.
  check(*both(spare, plain, x, *parameters), 2e-6 if offset == 0 else 2e-4)


def test_feed_forward():
  def plain(x, kernel_in, bias_in, kernel_out, bias_out):
    return layers.gelu(x @ kernel_in + bias_in) @ kernel_out + bias_out

  arguments = (
    draw(T, D),
    draw(D, F, seed=1),
    draw(F, seed=2),
    draw(F, D, seed=3),
    draw(D, seed=4),
  )
  check(*both(lean.feed_forward, plain, *arguments), 2e-6)


def test_heads_are_split_and_joined_as_dense_layers_would():
  def split(x, kernel, bias):
    return (x @ kernel + bias).reshape(4, 12, 8, 4)

  def spare(x, kernel, bias):
    return lean.split_heads(x, kernel, bias, heads=8)

  def join(x, kernel, bias):
    return x.reshape(4, 12, D) @ kernel + bias

  layer = draw(D, D, seed=1), draw(D, seed=2)
  check(*both(spare, split, draw(4, 12, D), *layer), 2e-6)
  check(*both(lean.join_heads, join, draw(4, 12, 8, 4), *layer), 2e-6)


def test_biases_of_keys_and_values_go_round_attention():
  segments = jnp.asarray([[1] * 5 + [2] * 4 + [0] * 3] * 4)

  def mix(query, key, value):
    return attention.attend(query, key, value, segments, backend="xla")

  def plain(x, *layers):
    query, key, value, output = zip(layers[::2], layers[1::2], strict=True)

    def linear(x, kernel, bias):
      return x @ kernel + bias

    heads = (linear(x, *given) for given in (query, key, value))
    mixed = mix(*(y.reshape(4, 12, 8, 4) for y in heads))
    return linear(mixed.reshape(4, 12, D), *output)

  def spare(x, *layers):
    pairs = zip(layers[::2], layers[1::2], strict=True)
    return lean.self_attention(x, *pairs, heads=8, attend=mix)

  layers = [draw(*s, seed=i) / 4 for i, s in enumerate([(D, D), (D,)] * 4)]
  got, want = both(spare, plain, draw(4, 12, D), *layers)
  assert (got[5] == 0).all()  # of the key's bias: what is left is rounding
  assert jnp.abs(want[5]).max() < 1e-5 * jnp.abs(want[3]).max()
  check(got[:5] + got[6:], want[:5] + want[6:], 2e-6)


def test_slots_are_taken_exactly(monkeypatch):
  monkeypatch.setattr(lean, "is_lean", lambda dtype: True)
  x = draw(4, 12, D).astype(jnp.bfloat16)
  slots = jnp.asarray([[0, 3, 3], [11, 0, 0], [5, 6, 7], [1, 1, 1]])
  want = jnp.take_along_axis(x, slots[..., None], axis=1)
  assert (lean.take(x, slots) == want).all()


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_a_whole_model_is_the_same(family, monkeypatch):
  options = {"model.layers": 2, "model.width": 32, "model.heads": 2}
  options |= {"model.ffn": 64, "model.family": family}
  c = config.check_keys(options, where="test")
  model = models.build(c.model, vocab_size=64, dtype="float32")
  params = model.init(jax.random.key(0))
  ids = jnp.asarray(np.random.default_rng(0).integers(5, 64, (2, 16)))
  ones = jnp.ones_like(ids)
  inputs = Inputs(ids, ones, jnp.cumsum(ones, 1) - 1, 0 * ones)

  def gradients(dtype):
    model = models.build(c.model, vocab_size=64, dtype=dtype)

    def loss(params):
      hidden = model.encode(params, inputs, None).astype(jnp.float32)
      return jnp.sum(hidden * draw(*hidden.shape, seed=3))

    return jax.grad(loss)(params)

  def error(got):
    return sum(
      float(jnp.abs(a - b).sum())
      for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(truth), strict=True)
    )

  truth, plain = gradients("float32"), gradients("bfloat16")
  for module in (layers, lean, models.bert):
    monkeypatch.setattr(module, "is_lean", lambda dtype: True)
  spare = gradients("bfloat16")
  assert jax.tree.structure(spare) == jax.tree.structure(truth)
  # Both round to eight bits, and elsewhere.
  assert 0.5 * error(plain) < error(spare) < 1.5 * error(plain)
