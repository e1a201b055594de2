"""Attention as a TPU kernel that reads the fused projection of a whole row.

A row of some hundred tokens fits into a TPU's VMEM with all its heads. So the
kernel takes one row a grid step, in the very layout that the projection writes,
adds the projection's bias on the way in, and writes what the next layer reads:
nothing is turned or padded, and the scores never leave the chip. For the
backward pass it keeps nothing but what it was given, and computes the
probabilities again.

It has been compiled for TPUs and compared with plain attention step by step,
interpreted on a CPU. It has never run on a TPU, so nothing takes it unless
`model.attention=row` asks for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from flaxmlm import InputError
from flaxmlm.models.layers import platform

# Lanes of a vector register: heads are taken so many columns at a time.
_LANES = 128
_VMEM_BYTES = 64 << 20
_MASKED = -1e9


def attend(
  projected: Float[Array, "B L D3"],
  bias: Float[Array, " D3"],
  segments: Int[Array, "B L"],
  *,
  heads: int,
  interpret: bool = False,
) -> Float[Array, "B L D"]:
  """`attention.attend` of queries, keys and values that lie side by side.

  Under a mesh each device runs it on its own rows, with all their heads.

  Args:
    projected: q, k and v without their bias, D3 = 3 D columns.
    bias: Their bias.
    segments: See `Inputs`.
    heads: H.
    interpret: Run it on any platform, slowly.

  Raises:
    InputError: This is no TPU.
  """
  if not interpret and platform() != "tpu":
    raise InputError(
      f"model.attention=row: it runs on a TPU, and this is a {platform()}; take"
      " auto"
    )
  mesh = jax.sharding.get_abstract_mesh()
  free = tuple(
    name
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    if kind == AxisType.Auto
  )
  run = functools.partial(_attend, heads, interpret)
  if not free:
    return run(projected, bias, segments)
  rows = tuple(name for name in free if name != "tensor")
  return jax.shard_map(
    run,
    in_specs=(P(rows), P(), P(rows)),
    out_specs=P(rows),
    axis_names=set(free),
    check_vma=False,
  )(projected, bias, segments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
  heads: int, interpret: bool, projected: Array, bias: Array, segments: Array
) -> Array:
  return _forward(heads, interpret, projected, bias, segments)[0]


def _forward(
  heads: int, interpret: bool, projected: Array, bias: Array, segments: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
  B, L, D3 = projected.shape
  mixed = _call(
    _mix,
    heads,
    interpret,
    (projected, bias, segments),
    outputs=[(_row(L, D3 // 3), (B, L, D3 // 3), projected.dtype)],
    products=2,
    grid_is="parallel",
  )[0]
  return mixed, (projected, bias, segments)


def _backward(
  heads: int, interpret: bool, kept: tuple[Array, Array, Array], g: Array
) -> tuple[Array, Array, None]:
  projected, bias, segments = kept
  B, L, D3 = projected.shape
  dprojected, dbias = _call(
    _unmix,
    heads,
    interpret,
    (*kept, g),
    outputs=[
      (_row(L, D3), (B, L, D3), projected.dtype),
      (_whole(D3), (1, D3), jnp.float32),
    ],
    products=5,
    grid_is="arbitrary",  # the bias' gradient is added up from row to row
  )
  return dprojected, dbias[0].astype(bias.dtype), None


_attend.defvjp(_forward, _backward)


def _row(length: int, width: int) -> pl.BlockSpec:
  return pl.BlockSpec((1, length, width), lambda row: (row, 0, 0))


def _whole(width: int) -> pl.BlockSpec:
  return pl.BlockSpec((1, width), lambda row: (0, 0))


def _call(
  kernel: Callable[..., None],
  heads: int,
  interpret: bool,
  given: tuple[Array, ...],
  *,
  outputs: list[tuple[pl.BlockSpec, tuple[int, ...], Any]],
  products: int,
  grid_is: str,
) -> tuple[Array, ...]:
  """Runs a kernel over the rows; `products` of L x L x K a head are counted."""
  projected, bias, segments, *more = given
  B, L, D3 = projected.shape
  D = D3 // 3
  inputs = [
    projected,
    bias.astype(jnp.float32)[None],
    segments[:, :, None],
    segments[:, None, :],
    *more,
  ]
  shapes = [jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in outputs]
  moved = sum(x.size * x.dtype.itemsize for x in (*inputs, *shapes))
  return pl.pallas_call(
    functools.partial(kernel, heads=heads),
    grid=(B,),
    in_specs=[_row(L, D3), _whole(D3), _row(L, 1), _row(1, L)]
    + [_row(L, D) for _ in more],
    out_specs=[spec for spec, _, _ in outputs],
    out_shape=shapes,
    interpret=interpret,
    cost_estimate=pl.CostEstimate(
      flops=2 * products * B * L * L * D,
      transcendentals=B * heads * L * L,
      bytes_accessed=moved,
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=(grid_is,), vmem_limit_bytes=_VMEM_BYTES
    ),
    name=f"row_attention{kernel.__name__}",
  )(*inputs)


def _product(a: Array, b: Array, over: tuple[int, int]) -> Array:
  """Product over axis `over[0]` of a and `over[1]` of b, in float32."""
  dimensions = (((over[0],), (over[1],)), ((), ()))
  return jax.lax.dot_general(
    a, b, dimensions, preferred_element_type=jnp.float32
  )


def _probabilities(
  q: Array, k: Array, seen: Array, scale: float
) -> tuple[Array, Array]:
  """Returns e^score, and one over its sums, of one head."""
  scores = jnp.where(seen, _product(q, k, (1, 1)) * scale, _MASKED)
  powers = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
  return powers, 1.0 / powers.sum(axis=-1, keepdims=True)


def _groups(heads: int, width: int) -> list[tuple[slice, int]]:
  """Returns the columns of the heads that fill the lanes together, and K."""
  size = width // heads
  together = (
    max(_LANES // size, 1) if heads % max(_LANES // size, 1) == 0 else 1
  )
  return [
    (slice(first * size, (first + together) * size), size)
    for first in range(0, heads, together)
  ]


def _load(projected: Any, bias: Any, columns: slice, part: int) -> Array:
  """Returns q, k or v (0, 1, 2) of some heads, their bias added."""
  width = projected.shape[2] // 3
  place = slice(part * width + columns.start, part * width + columns.stop)
  x = projected[0, :, place].astype(jnp.float32) + bias[:, place]
  return x.astype(projected.dtype)


def _mix(
  projected: Any, bias: Any, column: Any, row: Any, out: Any, *, heads: int
) -> None:
  seen = column[0] == row[0]  # [L 1] and [1 L]
  for columns, size in _groups(heads, out.shape[2]):
    q, k, v = (_load(projected, bias, columns, part) for part in range(3))
    mixed = []
    for first in range(0, q.shape[1], size):
      one = slice(first, first + size)
      powers, inverse = _probabilities(q[:, one], k[:, one], seen, size**-0.5)
      powers = powers.astype(v.dtype)
      mixed.append(_product(powers, v[:, one], (1, 0)) * inverse)
    out[0, :, columns] = jnp.concatenate(mixed, axis=1).astype(out.dtype)


def _unmix(
  projected: Any,
  bias: Any,
  column: Any,
  row: Any,
  g: Any,
  dprojected: Any,
  dbias: Any,
  *,
  heads: int,
) -> None:
  @pl.when(pl.program_id(0) == 0)
  def _() -> None:
    dbias[...] = jnp.zeros_like(dbias)

  seen = column[0] == row[0]
  width = g.shape[2]
  for columns, size in _groups(heads, width):
    q, k, v = (_load(projected, bias, columns, part) for part in range(3))
    dmixed = g[0, :, columns]
    gradients: tuple[list[Array], ...] = ([], [], [])
    for first in range(0, q.shape[1], size):
      one = slice(first, first + size)
      powers, inverse = _probabilities(q[:, one], k[:, one], seen, size**-0.5)
      p = powers * inverse
      dp = _product(dmixed[:, one], v[:, one], (1, 1))
      ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True)) * size**-0.5
      ds, p = ds.astype(q.dtype), p.astype(q.dtype)
      gradients[0].append(_product(ds, k[:, one], (1, 0)))
      gradients[1].append(_product(ds, q[:, one], (0, 0)))
      gradients[2].append(_product(p, dmixed[:, one], (0, 0)))
    for part, pieces in enumerate(gradients):
      whole = jnp.concatenate(pieces, axis=1)
      place = slice(part * width + columns.start, part * width + columns.stop)
      dprojected[0, :, place] = whole.astype(dprojected.dtype)
      dbias[:, place] += whole.sum(axis=0, keepdims=True)
