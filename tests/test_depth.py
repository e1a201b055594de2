"""Remat and scan change what is kept and compiled, not what is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxmlm import config, models
from flaxmlm.models import Inputs

pytestmark = pytest.mark.slow

SHAPE = {
  "model.width": 16,
  "model.heads": 2,
  "model.ffn": 24,
  "data.row_length": 16,
}
# A scan over what: all; two groups, each twice the same two layers; all but
# the first and what is left over of a period of two.
FAMILIES = {
  "bert": {"model.layers": 3},
  "albert": {
    "model.layers": 4,
    "model.num_hidden_groups": 2,
    "model.inner_group_num": 2,
  },
  "modernbert": {
    "model.layers": 6,
    "model.global_attn_every_n_layers": 2,
    "model.local_attention": 4,
  },
}


def make_loss(family: str, remat: str, scan: bool):
  """Returns a loss of parameters, and parameters."""
  c = config.check_keys(
    SHAPE
    | FAMILIES[family]
    | {
      "model.family": family,
      "model.remat": remat,
      "model.scan_layers": scan,
    },
    where="test",
  )
  model = models.build(c.model, vocab_size=30, dtype="float32")
  random = np.random.default_rng(0)
  inputs = Inputs(
    ids=jnp.asarray(random.integers(0, 30, (2, 16)), jnp.int32),
    segments=jnp.tile(jnp.repeat(jnp.arange(1, 3), 8), (2, 1)),
    positions=jnp.tile(jnp.arange(8), (2, 2)),
    token_types=jnp.zeros((2, 16), jnp.int32),
  )
  weight = jnp.asarray(random.normal(size=(2, 16, 16)), jnp.float32)
  keys = jax.random.split(jax.random.key(1), 2)

  def loss(params):
    return jnp.sum(model.encode(params, inputs, keys) * weight)

  return loss, model.init(jax.random.key(0))


def gradients(family: str, remat: str, scan: bool):
  loss, params = make_loss(family, remat, scan)
  return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_the_program_is_the_one_asked_for(family, remat, scan):
  loss, params = make_loss(family, remat, scan)
  text = str(jax.make_jaxpr(jax.grad(loss))(params))
  assert (" scan[" in text) == scan
  # Of a checkpoint, what runs again in the backward pass stands in one.
  assert ("remat" in text) == (remat != "none")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_numbers(family):
  plain = gradients(family, "none", False)
  scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(plain[1]))
  for remat, scan in [("none", True), ("dots", False), ("full", True)]:
    # Dropout included: a layer's own is found by its number. Measured: at most
    # 4e-7 of the largest gradient.
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * scale),
      gradients(family, remat, scan),
      plain,
    )
