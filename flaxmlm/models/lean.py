"""The same layers with fewer bytes to and from memory, for `layers.is_lean`.

A TPU waits for its memory where a CPU waits for its products. Each function
here keeps less for the backward pass than the plain one, or spares a scatter or
a copy, at the price of some arithmetic; tests/test_lean.py holds each against
the plain one. docs/tpu.md has what each saves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flaxmlm.models.layers import gelu, is_lean


class Weights(nn.Module):
  """The parameters of a linear layer, by the names that `dense` gives them."""

  features: int
  stddev: float

  @nn.compact
  def __call__(self, width: int) -> tuple[Array, Array]:
    """Returns kernel [width features] and bias [features], float32."""
    init = nn.initializers.truncated_normal(self.stddev)
    kernel = self.param("kernel", init, (width, self.features))
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    return kernel, bias


@jax.custom_vjp
def feed_forward(
  x: Float[Array, "*T D"],
  kernel_in: Float[Array, "D F"],
  bias_in: Float[Array, " F"],
  kernel_out: Float[Array, "F D"],
  bias_out: Float[Array, " D"],
) -> Float[Array, "*T D"]:
  """BERT's feed-forward with the exact GELU.

  x and what enters the GELU are kept; what leaves it, which is as large, is
  computed again, within the product that reads it: the barrier keeps the
  compiler from taking the one of the forward pass. The gradients of the kernels
  come out of their products in float32.
  """
  return _feed_forward(x, kernel_in, bias_in, kernel_out, bias_out)[0]


def _feed_forward(
  x: Array, kernel_in: Array, bias_in: Array, kernel_out: Array, bias_out: Array
) -> tuple[Array, tuple[Array, ...]]:
  dtype = x.dtype
  inner = x @ kernel_in.astype(dtype) + bias_in.astype(dtype)
  y = gelu(inner) @ kernel_out.astype(dtype) + bias_out.astype(dtype)
  return y, (x, inner, kernel_in, kernel_out)


def _feed_forward_backward(
  kept: tuple[Array, ...], g: Array
) -> tuple[Array, ...]:
  x, inner, kernel_in, kernel_out = kept
  dtype = x.dtype
  inner = jax.lax.optimization_barrier(inner)
  tokens = tuple(range(x.ndim - 1))
  product = functools.partial(
    jnp.tensordot,
    axes=(tokens, tokens),
    preferred_element_type=jnp.float32,
  )
  outer, pullback = jax.vjp(gelu, inner)
  (dinner,) = pullback(g @ kernel_out.astype(dtype).T)
  return (
    dinner @ kernel_in.astype(dtype).T,
    product(x, dinner),
    dinner.astype(jnp.float32).sum(axis=tokens),
    product(outer, g),
    g.astype(jnp.float32).sum(axis=tokens),
  )


feed_forward.defvjp(_feed_forward, _feed_forward_backward)


def self_attention(
  x: Float[Array, "B L D"],
  query: tuple[Array, Array],
  key: tuple[Array, Array],
  value: tuple[Array, Array],
  output: tuple[Array, Array],
  *,
  heads: int,
  attend: Callable[[Array, Array, Array], Array],
) -> Float[Array, "B L D"]:
  """Attention among four linear layers, each a kernel [D D] and a bias [D].

  The key's bias adds the same to all scores of a query, which softmax takes
  away again: it is left out, and has no gradient. The weights of a query add up
  to 1, so the value's bias b comes out of the mixture as it is: it is added
  there, as b @ output, and its gradient takes no pass over the tokens.

  Args:
    x: What attends to itself.
    query: Of the queries; so are the next two of theirs.
    key: See above.
    value: See above.
    output: On what is mixed.
    heads: H.
    attend: `(query, key, value) -> mixed`, all [B L H K]; without dropout.
  """
  mixed = attend(
    split_heads(x, *query, heads=heads),
    split_heads(x, key[0], None, heads=heads),
    split_heads(x, value[0], None, heads=heads),
  )
  kernel, bias = output
  return join_heads(mixed, kernel, bias + value[1] @ kernel)


def split_heads(
  x: Float[Array, "B L D"],
  kernel: Float[Array, "D D"],
  bias: Float[Array, " D"] | None,
  *,
  heads: int,
) -> Float[Array, "B L H K"]:
  """A linear layer whose result is laid out as attention's kernel reads it.

  The product itself writes [B H K L]: what it is turned into here, the kernel
  turns back, so nothing is moved.
  """
  D = x.shape[-1]
  K = D // heads
  kernel = kernel.astype(x.dtype).reshape(D, heads, K)
  y = jnp.einsum("dhk,bld->bhkl", kernel, x)
  if bias is not None:
    y += bias.astype(x.dtype).reshape(heads, K, 1)
  return jnp.transpose(y, (0, 3, 1, 2))


def join_heads(
  x: Float[Array, "B L H K"],
  kernel: Float[Array, "D D"],
  bias: Float[Array, " D"],
) -> Float[Array, "B L D"]:
  """A linear layer on what attention's kernel writes, heads first."""
  H, K = x.shape[2:]
  kernel = kernel.astype(x.dtype).reshape(H, K, -1)
  y = jnp.einsum("bhlk,hkd->bld", jnp.swapaxes(x, 1, 2), kernel)
  return y + bias.astype(x.dtype)


def take(
  x: Float[Array, "B L D"], slots: Int[Array, "B M"]
) -> Float[Array, "B M D"]:
  """Returns the hidden states at the slots of each row.

  Where bytes are to be spared, by a product with ones and zeros, whose gradient
  is a product too, and no scatter.
  """
  if not is_lean(x.dtype.name):
    return jnp.take_along_axis(x, slots[..., None], axis=1)
  chosen = jax.nn.one_hot(slots, x.shape[1], dtype=x.dtype)
  return jnp.einsum("bml,bld->bmd", chosen, x)
