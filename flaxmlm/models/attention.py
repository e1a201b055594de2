"""Attention within documents."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from flaxmlm.models.layers import dropout


def attend(
  query: Float[Array, "B L H K"],
  key: Float[Array, "B L H K"],
  value: Float[Array, "B L H K"],
  segments: Int[Array, "B L"],
  *,
  window: int | None = None,
  dropout_keys: Key[Array, " B"] | None = None,
  dropout_rate: float = 0.0,
  site: int = 0,
) -> Float[Array, "B L H K"]:
  """Scaled dot-product attention that stops at document borders.

  softmax(q k / sqrt(K)) v over the tokens of the same segment (Vaswani et al.,
  2017, section 3.2.1), softmax in float32. Weights across a border are exactly
  0, so nothing leaks. Padding (segment 0) attends to padding. With a window,
  tokens see only those that are at most so far away.
  """
  scale = query.shape[-1] ** -0.5
  scores = jnp.einsum(
    "blhk,bmhk->bhlm",
    query * jnp.asarray(scale, query.dtype),
    key,
    preferred_element_type=jnp.float32,
  )
  same = segments[:, :, None] == segments[:, None, :]
  if window is not None:
    place = jnp.arange(query.shape[1])
    same &= jnp.abs(place[:, None] - place) <= window
  scores = jnp.where(same[:, None], scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
  weights = dropout(weights, dropout_keys, dropout_rate, site)
  return jnp.einsum("bhlm,bmhk->blhk", weights, value)
