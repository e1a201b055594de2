"""Cross-entropy over a vocabulary, the largest arrays of a step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flaxmlm.models.layers import platform


@jax.custom_vjp
def cross_entropy(
  logits: Float[Array, "*N V"], targets: Int[Array, "*N"]
) -> Float[Array, "*N"]:
  """Returns -log softmax(logits) at the targets, in nats, float32.

  The gradient, softmax minus one-hot, is computed anew from the logits and
  their logsumexp: between the passes no second array of logits' size is kept,
  and no scatter is needed.
  """
  return _forward(logits, targets)[0]


def _forward(
  logits: Array, targets: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
  wide = logits.astype(jnp.float32)
  most = wide.max(axis=-1, keepdims=True)
  lse = most + jnp.log(jnp.exp(wide - most).sum(axis=-1, keepdims=True))
  if platform() == "tpu":
    # A gather would have the float32 logits written to memory.
    own = _is_target(logits, targets)
    chosen = jnp.where(own, wide, 0.0).sum(axis=-1, keepdims=True)
  else:
    chosen = jnp.take_along_axis(wide, targets[..., None], axis=-1)
  return (lse - chosen)[..., 0], (logits, lse, targets)


def _is_target(logits: Array, targets: Array) -> Array:
  return _tokens(logits) == targets[..., None]


def _tokens(logits: Array) -> Array:
  return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)


def _backward(kept: tuple[Array, Array, Array], g: Array) -> tuple[Array, None]:
  logits, lse, targets = kept
  softmax = jnp.exp(logits.astype(jnp.float32) - lse)
  gradient = (softmax - _is_target(logits, targets)) * g[..., None]
  return gradient.astype(logits.dtype), None


cross_entropy.defvjp(_forward, _backward)


def is_likeliest(
  logits: Float[Array, "*N V"], targets: Int[Array, "*N"]
) -> Bool[Array, "*N"]:
  """Returns whether `argmax` of the logits would be the target.

  As sums, which XLA adds up in the pass over the logits that `cross_entropy`
  takes: 1 for a target that has the largest logit, less one for each token
  before it that has it too.
  """
  wide = logits.astype(jnp.float32)
  if logits.dtype == jnp.bfloat16:
    # XLA may keep float32 where bfloat16 is asked for: then the largest, found
    # elsewhere, is rounded and they are not, and no target is ever it.
    wide = jax.lax.reduce_precision(wide, exponent_bits=8, mantissa_bits=7)
  largest = wide == wide.max(axis=-1, keepdims=True)
  tokens = _tokens(logits)
  own = targets[..., None]
  votes = (tokens == own).astype(jnp.float32) - (tokens < own)
  return jnp.where(largest, votes, 0.0).sum(axis=-1) == 1.0
