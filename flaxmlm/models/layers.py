"""Layers that several architectures share; all work on flat tokens [T, D]."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

Dtype = str


def dense(
  features: int,
  stddev: float,
  dtype: Dtype,
  *,
  use_bias: bool = True,
  name: str | None = None,
) -> nn.Dense:
  """Returns BERT's linear layer: truncated-normal kernel, zero bias.

  The normal is cut at two standard deviations and not rescaled, as in
  google-research/bert (`create_initializer`).
  """
  return nn.Dense(
    features,
    use_bias=use_bias,
    dtype=dtype,
    kernel_init=nn.initializers.truncated_normal(stddev),
    name=name,
  )


def layer_norm(
  eps: float, dtype: Dtype, *, use_bias: bool = True, name: str | None = None
) -> nn.LayerNorm:
  """Returns a LayerNorm with float32 statistics."""
  return nn.LayerNorm(
    epsilon=eps,
    use_bias=use_bias,
    dtype=dtype,
    use_fast_variance=False,
    name=name,
  )


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
  "relu": jax.nn.relu,
  "silu": jax.nn.silu,
}
"""By Hugging Face's names: `gelu` is the exact one (erf), `gelu_new` the one by
tanh; both of Hendrycks and Gimpel, 2016, section 2."""


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
