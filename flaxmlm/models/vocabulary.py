"""The table of word embeddings, read and scored where it is split over devices.

Its rows, one a token of the vocabulary, may be split over the mesh axes `fsdp`
and `tensor` (training/sharding.py). Left to itself, XLA gathers the table for
each use. Here it is gathered once to look tokens up, and never to score them:
each device scores its own part of the vocabulary, for the rows of all that
share the table, and no device holds logits over the whole of it.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

AXES = ("fsdp", "tensor")


def split_axes(size: int) -> tuple[str, ...]:
  """Returns the axes of the mesh in use that so many tokens are split over.

  Empty without a mesh, or where they don't divide the vocabulary.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = tuple(
    name
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    if name in AXES and kind == AxisType.Auto and mesh.shape[name] > 1
  )
  ways = math.prod(mesh.shape[name] for name in axes)
  return axes if size % ways == 0 else ()


def row_axes() -> tuple[str, ...]:
  """Returns the axes that rows are split over, as far as XLA splits them."""
  mesh = jax.sharding.get_abstract_mesh()
  return tuple(
    name
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    if name in ("data", "fsdp") and kind == AxisType.Auto
  )


def look_up(
  table: Float[Array, "V E"], ids: Int[Array, " T"], dtype: str
) -> Float[Array, "T E"]:
  """Returns the embeddings of tokens.

  Where the table is split over `fsdp` it is gathered as `dtype`, and what comes
  back in the backward pass is the sum over devices of each one's own part.

  Args:
    table: Float32.
    ids: Flat tokens.
    dtype: Compute dtype of the model.
  """
  if "fsdp" not in split_axes(table.shape[0]):
    return table[ids]

  def gather(part: Array, ids: Array) -> Array:
    whole = jax.lax.all_gather(part, "fsdp", axis=0, tiled=True)
    # A frequent token's gradient is a sum of thousands: not in bfloat16.
    return whole.astype(jnp.float32)[ids]

  rows = row_axes()
  return jax.shard_map(
    gather,
    in_specs=(P("fsdp"), P(rows)),
    out_specs=P(rows),
    axis_names=set(rows),
    check_vma=False,
  )(table.astype(dtype), ids)


def score(
  x: Float[Array, "T E"], table: Float[Array, "V E"], bias: Float[Array, " V"]
) -> Float[Array, "T V"]:
  """Returns logits over the vocabulary, split over devices as the table is."""
  axes = split_axes(table.shape[0])
  rows = tuple(name for name in row_axes() if name not in AXES) or None
  if axes:
    # Of the tokens that are asked for alone.
    x = jax.lax.with_sharding_constraint(x, P(rows, None))
  logits = jnp.einsum("td,vd->tv", x, table.astype(x.dtype))
  if axes:
    logits = jax.lax.with_sharding_constraint(logits, P(rows, axes))
  return logits + bias.astype(x.dtype)
