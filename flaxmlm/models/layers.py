"""Layers that several architectures share; all work on flat tokens [T, D]."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

Dtype = str


def platform() -> str:
  """Returns "cpu", "gpu" or "tpu": what the code being traced is to run on.

  That is what the mesh in use is made of, which may be a description of
  devices that aren't here; without a mesh, JAX's default.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def is_lean(dtype: Dtype) -> bool:
  """Whether what is being traced is to spare bytes: on a TPU, in bfloat16.

  `LayerNorm` and models/lean.py are for that.
  """
  return platform() == "tpu" and dtype == "bfloat16"


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
) -> nn.Module:
  """Returns a LayerNorm with float32 statistics."""
  if is_lean(dtype):
    return LayerNorm(eps, dtype, use_bias, name=name)
  return nn.LayerNorm(
    epsilon=eps,
    use_bias=use_bias,
    dtype=dtype,
    use_fast_variance=False,
    name=name,
  )


class LayerNorm(nn.Module):
  """LayerNorm, by `normalize`."""

  eps: float
  dtype: Dtype
  use_bias: bool = True

  @nn.compact
  def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
    """Returns the normed tokens."""
    width = x.shape[-1]
    scale = self.param("scale", nn.initializers.ones, (width,))
    bias = None
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (width,))
    return normalize(x.astype(self.dtype), scale, bias, self.eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize(
  x: Float[Array, "*T D"],
  scale: Float[Array, " D"],
  bias: Float[Array, " D"] | None,
  eps: float,
) -> Float[Array, "*T D"]:
  """LayerNorm (Ba et al., 2016) that reads x once in either pass.

  The variance is E[x²] - E[x]², in float32. x, as it came, two numbers a token
  and nothing else are kept.
  """
  return _normalize(x, scale, bias, eps)[0]


def _normalize(
  x: Array, scale: Array, bias: Array | None, eps: float
) -> tuple[Array, tuple[Array | None, ...]]:
  wide = x.astype(jnp.float32)
  mean = wide.mean(axis=-1, keepdims=True)
  square = jnp.square(wide).mean(axis=-1, keepdims=True)
  variance = jnp.maximum(square - jnp.square(mean), 0.0)
  rstd = jax.lax.rsqrt(variance + eps)
  y = (wide - mean) * rstd * scale
  if bias is not None:
    y += bias
  return y.astype(x.dtype), (x, mean, rstd, scale, bias)


def _normalize_backward(
  eps: float, kept: tuple[Array | None, ...], g: Array
) -> tuple[Array, Array, Array | None]:
  x, mean, rstd, scale, bias = kept
  normed = (x.astype(jnp.float32) - mean) * rstd
  g = g.astype(jnp.float32)
  scaled = g * scale
  level = scaled.mean(axis=-1, keepdims=True)
  slope = (scaled * normed).mean(axis=-1, keepdims=True)
  dx = rstd * (scaled - level - normed * slope)
  tokens = tuple(range(x.ndim - 1))
  dbias = None if bias is None else g.sum(axis=tokens)
  return dx.astype(x.dtype), (g * normed).sum(axis=tokens), dbias


normalize.defvjp(_normalize, _normalize_backward)


@jax.custom_vjp
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """GELU, x Φ(x) by erf, in float32 (Hendrycks and Gimpel, 2016, section 2).

  `jax.nn.gelu` has erfc, which takes XLA:CPU an exponential more. The gradient
  is computed from x alone, so nothing else is kept for it.
  """
  return _gelu_parts(x)[0].astype(x.dtype)


def _gelu_parts(x: Array) -> tuple[Array, Array, Array]:
  """Returns x Φ(x), Φ(x) and x in float32."""
  x = x.astype(jnp.float32)
  cdf = 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))
  return x * cdf, cdf, x


def _gelu_backward(x: Array, g: Array) -> tuple[Array]:
  # d x Φ(x) / dx = Φ(x) + x φ(x)
  _, cdf, wide = _gelu_parts(x)
  density = jnp.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
  return ((g * (cdf + wide * density)).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "gelu": gelu,
  "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
  "relu": jax.nn.relu,
  "silu": jax.nn.silu,
}
"""By Hugging Face's names: `gelu` is the exact one (erf), `gelu_new` the one by
tanh, of the same paper."""


def dropout(
  x: Float[Array, "..."],
  keys: Key[Array, " B"] | None,
  rate: float,
  site: int | Int[Array, ""],
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
