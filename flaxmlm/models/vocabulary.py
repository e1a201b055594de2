"""Tables of embeddings, read and scored where they are split over devices.

A table's rows, one a token of the vocabulary, may be split over the mesh axes
`tensor` and `fsdp`; where they don't divide, its width. Left to itself, XLA
gathers a table for each use, or the rows of the whole batch. Here it is
gathered over `fsdp` once, in compute dtype, to look tokens up. To score them a
table that is split over the vocabulary isn't gathered: each device scores its
own part, for the rows of all that share the table, so that no device holds
logits over the whole of it.

A `shard_map` over some of several axes makes XLA's partitioner abort at a
gather (jaxlib 0.10.1). Those here are over all of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

SPLITS = (P(("tensor", "fsdp"), None), P("tensor", "fsdp"), P(None, "fsdp"))
"""How a table [V E] may lie; the first one that divides is taken."""
ROWS = ("data", "fsdp")
"""Axes of the mesh that rows of a batch are split over."""


def find_misfit(
  mesh: Mapping[str, int], shape: Sequence[int], spec: P
) -> str | None:
  """Returns which axis of a mesh doesn't divide a shape, or None.

  Args:
    mesh: Devices along each axis.
    shape: Of an array.
    spec: The axes that each dimension is split over.
  """
  for size, given in zip(shape, spec, strict=False):
    axes = (given,) if isinstance(given, str) else given or ()
    if size % math.prod(mesh[axis] for axis in axes):
      shown = " x ".join(f"mesh.{axis}={mesh[axis]}" for axis in axes)
      return f"{shown} doesn't divide {size}"
  return None


def find_split(shape: tuple[int, ...], *splits: P) -> P | None:
  """Returns the split of a table over the mesh in use; None: it is whole.

  Args:
    shape: [V E] of the table.
    splits: To choose from; all of `SPLITS` if there are none.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
    return None
  if mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
    return None
  fits = (s for s in splits or SPLITS if not find_misfit(mesh.shape, shape, s))
  return next(fits, None)


def look_up(
  table: Float[Array, "V E"], ids: Int[Array, " T"], dtype: str, *splits: P
) -> Float[Array, "T E"]:
  """Returns the embeddings of tokens, float32.

  Where the table is split, each device gathers over `fsdp` what the others have
  of it, as `dtype`. In the backward pass each adds up the gradients of its own
  tokens in float32, and their sums come back as the table was split.

  Args:
    table: Float32.
    ids: Flat tokens.
    dtype: Compute dtype of the model.
    splits: See `find_split`.
  """
  split = find_split(table.shape, *splits)
  return table[ids] if split is None else _look_up(table, ids, dtype, split)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _look_up(table: Array, ids: Array, dtype: str, split: P) -> Array:
  def look(part: Array, ids: Array) -> Array:
    axis = _fsdp_axis(split)
    part = part.astype(dtype)
    part = jax.lax.all_gather(part, "fsdp", axis=axis, tiled=True)
    if split[0] is None:
      return part[ids].astype(jnp.float32)
    place, own = _places(ids, part.shape[0])
    found = jnp.where(own[:, None], part[place], 0)
    return jax.lax.psum(found, "tensor").astype(jnp.float32)

  return jax.shard_map(
    look, in_specs=(split, P(ROWS)), out_specs=P(ROWS), check_vma=False
  )(table, ids)


def _fsdp_axis(split: P) -> int:
  return 1 if split[1] == "fsdp" else 0


def _places(ids: Array, size: int) -> tuple[Array, Array]:
  """Returns where tokens are in this device's part, and whether they are."""
  place = ids - size * jax.lax.axis_index("tensor")
  own = (place >= 0) & (place < size)
  return jnp.where(own, place, 0), own


def _look_up_forward(
  table: Array, ids: Array, dtype: str, split: P
) -> tuple[Array, tuple[Array, Array]]:
  return _look_up(table, ids, dtype, split), (table, ids)


def _look_up_backward(
  dtype: str, split: P, kept: tuple[Array, Array], g: Array
) -> tuple[Array, None]:
  del dtype
  table, ids = kept
  tensor = jax.sharding.get_abstract_mesh().shape["tensor"]
  size = table.shape[0] // (1 if split[0] is None else tensor)

  def add(ids: Array, g: Array) -> Array:
    if split[0] is not None:
      place, own = _places(ids, size)
      ids = jnp.where(own, place, size)
    # A frequent token's gradient is a sum of thousands: not in bfloat16.
    part = jnp.zeros((size, g.shape[-1]), jnp.float32)
    part = part.at[ids].add(g, mode="drop")
    part = jax.lax.psum_scatter(
      part, "fsdp", scatter_dimension=_fsdp_axis(split), tiled=True
    )
    return jax.lax.psum(part, "data")

  gradient = jax.shard_map(
    add, in_specs=(P(ROWS), P(ROWS)), out_specs=split, check_vma=False
  )(ids, g.astype(jnp.float32))
  return gradient, None


_look_up.defvjp(_look_up_forward, _look_up_backward)


def score(
  x: Float[Array, "T E"], table: Float[Array, "V E"], bias: Float[Array, " V"]
) -> Float[Array, "T V"]:
  """Returns logits over the vocabulary, split over devices as the table is."""
  split = find_split(table.shape)
  place = None if split is None else P(ROWS, split[0])
  if split is not None and "fsdp" in (split[0] or ()):
    # Of the tokens that are asked for alone.
    x = jax.lax.with_sharding_constraint(x, P("data", None))
    place = P("data", split[0])
  logits = jnp.einsum("td,vd->tv", x, table.astype(x.dtype))
  if place is not None:
    logits = jax.lax.with_sharding_constraint(logits, place)
  return logits + bias.astype(x.dtype)
