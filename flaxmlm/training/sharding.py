"""Where each array lives: the mesh, the batch, the parameters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flaxmlm import InputError
from flaxmlm.models.vocabulary import SPLITS, find_misfit

AXES = ("data", "fsdp", "tensor")

# The input's axis if that divides: the sums of a gradient that is split over
# its last axis, in bfloat16, XLA makes on all devices and then cuts.
_INWARD = (P(("tensor", "fsdp"), None), P("tensor", "fsdp"))
_TABLE_BIAS = tuple(P(split[0]) for split in SPLITS)

# The first pattern found in an array's path decides; of several places, the
# first that divides. It holds for parameters and for the optimizer's state,
# whose paths end in the parameter's.
RULES: tuple[tuple[str, P | tuple[P, ...]], ...] = (
  (r"word/embedding$", SPLITS),
  (r"span_boundary/position/embedding$", P()),
  (r"(position|token_type)/embedding$", SPLITS[-1]),
  (r"(query|key|value|intermediate|gate)/kernel$", P("fsdp", "tensor")),
  (r"(query|key|value|intermediate)/bias$", P("tensor")),
  (r"(attention_output|output)/kernel$", _INWARD),
  (r"project/kernel$", P(None, "fsdp")),
  (r"mlm/decoder$", SPLITS),
  (
    r"(mlm/transform|pooler/dense|discriminator/dense)/kernel$",
    P("fsdp", None),
  ),
  (r"(pair/dense|discriminator/prediction)/kernel$", P()),
  (r"span_boundary/dense_\d/kernel$", P(None, "fsdp")),
  (r"(mlm|span_boundary)/bias$", _TABLE_BIAS),
)


def make_mesh(
  *,
  data: int,
  fsdp: int,
  tensor: int,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Returns a mesh; one axis may be -1, the rest.

  Of several TPU slices the axis `data` goes over the network between them,
  outermost, and the others stay within a slice.

  Args:
    data: Devices along the data axis.
    fsdp: Devices that share one copy of the parameters.
    tensor: Devices that share heads, feed-forward and vocabulary.
    devices: The devices; None: all.

  Raises:
    InputError: The axes don't multiply to the number of devices, or the slices
      don't share the axis `data` equally.
  """
  sizes = [data, fsdp, tensor]
  devices = jax.devices() if devices is None else devices
  count = len(devices)
  known = int(np.prod([size for size in sizes if size != -1]))
  sizes = [count // known if size == -1 else size for size in sizes]
  if int(np.prod(sizes)) != count:
    shown = " ".join(f"mesh.{a}={s}" for a, s in zip(AXES, sizes, strict=True))
    raise InputError(f"{shown} doesn't fit {count} devices")
  types = (AxisType.Auto,) * len(AXES)
  slices = 1  # of GPUs a machine has a number of this name too
  if devices[0].platform == "tpu":
    slices = len({getattr(device, "slice_index", 0) for device in devices})
  if sizes[0] % slices:
    raise InputError(
      f"mesh.data={sizes[0]} doesn't divide by {slices} slices: a copy of the"
      " parameters lies within one; take less mesh.fsdp or mesh.tensor"
    )
  if slices == 1:
    grid = mesh_utils.create_device_mesh(
      sizes, devices, allow_split_physical_axes=True
    )
  else:
    grid = mesh_utils.create_hybrid_device_mesh(
      [sizes[0] // slices, *sizes[1:]],
      [slices, 1, 1],
      devices,
      allow_split_physical_axes=True,
    )
  return Mesh(grid, AXES, axis_types=types)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays whose first axis is the batch."""
  return NamedSharding(mesh, P(("data", "fsdp")))


def row_shard(mesh: Mesh) -> tuple[int, int]:
  """Returns which part of a batch this host's devices hold: (index, count).

  The batch is cut into `count` blocks of rows. Hosts that are apart along the
  axis `tensor` alone hold the same block.

  Raises:
    InputError: Hosts share some of their rows and not others.
  """
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  places = batch_sharding(mesh).devices_indices_map((ways,))
  held: dict[int, set[int]] = {}
  for device, (part,) in places.items():
    held.setdefault(device.process_index, set()).add(part.start or 0)
  blocks = sorted({tuple(sorted(rows)) for rows in held.values()})
  if sum(map(len, blocks)) != ways or len(set(map(len, blocks))) != 1:
    shown = " ".join(f"mesh.{a}={mesh.shape[a]}" for a in AXES)
    raise InputError(
      f"{shown} gives hosts some rows in common and others not; let"
      " mesh.tensor divide a host's devices, or be a multiple of them"
    )
  own = tuple(sorted(held[jax.process_index()]))
  return blocks.index(own), len(blocks)


def whole_rows(mesh: Mesh, rows: int) -> int:
  """Returns the number of rows, raised to what the devices can share."""
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  return -(-rows // ways) * ways


def tree_sharding(mesh: Mesh, shapes: Any) -> Any:
  """Returns the sharding of a tree of parameters or optimizer state.

  Args:
    mesh: A mesh of `make_mesh`.
    shapes: A tree of arrays or `jax.ShapeDtypeStruct`s.

  Raises:
    ValueError: A matrix that no rule speaks of.
    InputError: A matrix whose axis doesn't divide by the mesh.
  """

  def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    spec = next((s for rule, s in RULES if re.search(rule, name)), None)
    if spec is None:
      if leaf.ndim > 1:
        raise ValueError(f"training/sharding.py: no rule for matrix {name}")
      spec = P()
    specs = (spec,) if isinstance(spec, P) else spec
    for spec in specs:
      misfit = find_misfit(mesh.shape, leaf.shape, spec)
      if misfit is None:
        return NamedSharding(mesh, spec)
    raise InputError(f"{misfit}, an axis of {name}")

  return jax.tree_util.tree_map_with_path(place, shapes)


def put_rows(mesh: Mesh, rows: Any) -> Any:
  """Puts this host's rows of a batch on its devices; the tree stays as it is.

  They are those of `row_shard`. The global batch has the rows of all hosts.
  """
  sharding = batch_sharding(mesh)
  _, count = row_shard(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(
      sharding, x, (count * x.shape[0], *x.shape[1:])
    ),
    rows,
  )
