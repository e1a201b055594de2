"""Layers that several architectures share; all work on flat tokens [T, D]."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

Dtype = str


def dense(
  features: int, stddev: float, dtype: Dtype, *, name: str | None = None
) -> nn.Dense:
  """Returns BERT's linear layer: truncated-normal kernel, zero bias.

  The normal is cut at two standard deviations and not rescaled, as in
  google-research/bert (`create_initializer`).
  """
  return nn.Dense(
    features,
    dtype=dtype,
    kernel_init=nn.initializers.truncated_normal(stddev),
    name=name,
  )


def layer_norm(eps: float, dtype: Dtype, *, name: str | None = None):
  """Returns a LayerNorm with float32 statistics."""
  return nn.LayerNorm(
    epsilon=eps, dtype=dtype, use_fast_variance=False, name=name
  )


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """The exact (erf) GELU of Hendrycks and Gimpel, 2016, section 2."""
  return jax.nn.gelu(x, approximate=False)


def dropout(
  x: Float[Array, "..."],
  keys: Key[Array, " B"] | None,
  rate: float,
  site: int,
) -> Float[Array, "..."]:
  """Drops entries of each row by that row's own key.

  A row's dropout is the same in any batch, micro-batch or mesh. One random
  byte an entry: the rate is rounded to 1/256, the scale is exact for it.

  Args:
    x: Rows [B ...], or flat tokens [B·L ...]; the leading axis divides by B.
    keys: A key for each row; None keeps everything.
    rate: Share to drop.
    site: Number of the place within the model; each place draws for itself.
  """
  kept = round((1 - rate) * 256)
  if keys is None or kept == 256:
    return x
  rows = x.reshape(keys.shape[0], -1, *x.shape[1:])
  bits = jax.vmap(
    lambda key: jax.random.bits(
      jax.random.fold_in(key, site), rows.shape[1:], "uint8"
    )
  )(keys)
  rows = jnp.where(bits < kept, rows * (256 / kept), 0)
  return rows.reshape(x.shape).astype(x.dtype)
