"""From what was compiled to seconds: the bounds of a step, and of a run."""

from __future__ import annotations

import collections
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flaxmlm.planning import hlo
from flaxmlm.planning.chips import Chip


class Measured(NamedTuple):
  """What the compiler says of one chip's part of a step.

  Attributes:
    flops: As `cost_analysis` counts them.
    bytes: To and from HBM; see `hlo.costs`.
    cycles: As the compiler estimates them; kernels have none.
    kernel_flops: FLOPs of kernels, as they say themselves.
    memory: Bytes by what they are.
    collectives: Of `merge`.
  """

  flops: float
  bytes: float
  cycles: float
  kernel_flops: float
  memory: dict[str, float]
  collectives: list[dict[str, Any]]


def measure(
  compiled: Any,
  program: hlo.Program,
  chip: Chip,
  *,
  mesh: Mapping[str, int],
  state: Mapping[str, int],
) -> Measured:
  """Reads a compiled step.

  Args:
    compiled: Of `lowered.compile()`.
    program: Its text, parsed.
    chip: It is compiled for.
    mesh: Devices along each axis, in order.
    state: Bytes a chip of what it is given, by name.
  """
  said = compiled.memory_analysis()
  temporary = said.temp_size_in_bytes
  kept = min(hlo.peak(program)["activations"], temporary)
  given = said.argument_size_in_bytes + said.output_size_in_bytes
  given -= said.alias_size_in_bytes
  costs = hlo.costs(program)
  return Measured(
    flops=compiled.cost_analysis()["flops"],
    bytes=sum(cost.bytes for cost in costs),
    cycles=sum(cost.cycles for cost in costs),
    kernel_flops=sum(cost.kernel_flops for cost in costs),
    memory=dict(state)
    | {
      "batch and padding": max(given - sum(state.values()), 0),
      "activations": kept,
      "temporaries": temporary - kept,
      "program": said.generated_code_size_in_bytes,
    },
    collectives=merge(
      [describe(one, mesh, chip) for one in hlo.collectives(program)]
    ),
  )


def extend(
  short: Measured, long: Measured, *, layers: tuple[int, int, int]
) -> Measured:
  """Returns what a model of many layers would be, from two of few.

  All that a layer costs is the same in each.

  Args:
    short: Of a model of `layers[0]` layers.
    long: Of the same with `layers[1]`.
    layers: And how many it is to have.
  """
  first, second, last = layers
  turns = (last - first) / (second - first)

  def line(a: float, b: float) -> float:
    return a + turns * (b - a)

  before, after = (
    {_key(row): row for row in model.collectives} for model in (short, long)
  )
  none = dict.fromkeys(_SUMS, 0)
  collectives = []
  for key, row in (before | after).items():
    old, new = before.get(key, none), after.get(key, none)
    sums = {name: line(old[name], new[name]) for name in _SUMS}
    collectives.append(row | sums)
  return Measured(
    *(line(a, b) for a, b in zip(short[:4], long[:4], strict=True)),
    memory={k: line(short.memory[k], v) for k, v in long.memory.items()},
    collectives=collectives,
  )


def predict(
  measured: Measured,
  chip: Chip,
  *,
  chips: int,
  tokens: int,
  formula: float,
  steps: int,
  price: float | None = None,
) -> dict[str, Any]:
  """Returns what a step takes at the least, and a run.

  The step's time is the longest of three: the compiler's cycles, with kernels
  at the chip's peak; the bytes of HBM at its bandwidth; the collectives at the
  network's. They are taken to overlap, so it is a bound, and no promise.

  Args:
    measured: Of `measure`.
    chip: Of which the slice is made.
    chips: How many.
    tokens: Of the global batch.
    formula: FLOPs a token by the model's formula, `Objective.flops`.
    steps: Of the run.
    price: Of one chip for an hour.
  """
  own = tokens / chips
  pure = formula * own / chip.peak
  compute = pure
  if chip.clock and measured.cycles:
    compute = measured.cycles / chip.clock + measured.kernel_flops / chip.peak
  seconds = {
    "compute": compute,
    "memory": measured.bytes / chip.bandwidth,
    "network": sum(row["seconds"] for row in measured.collectives),
  }
  bound = max(seconds, key=lambda name: seconds[name])
  step = seconds[bound]
  hours = step * steps * chips / 3600
  used = sum(measured.memory.values())
  values = {
    "flops_per_token": measured.flops / own,
    "flops_ratio": measured.flops / own / formula,
    "bytes_per_token": measured.bytes / own,
    "cycles_ratio": compute / pure,
    "memory": {name: int(size) for name, size in measured.memory.items()},
    "memory_total": int(used),
    "memory_of_chip": int(chip.memory),
    "fits": used <= chip.memory,
    "collectives": measured.collectives,
    "seconds": seconds,
    "bound_by": bound,
    "step_seconds": step,
    "tokens_per_second": tokens / step,
    "mfu": formula * tokens / (chip.peak * chips * step),
    "days": step * steps / 86400,
    "chip_hours": hours,
  }
  return values if price is None else values | {"cost": hours * price}


def describe(
  collective: hlo.Collective, mesh: Mapping[str, int], chip: Chip
) -> dict[str, Any]:
  """Returns a collective with the axes of the mesh that it goes over.

  A ring sends each byte of an all-reduce 2 (n - 1) / n times, of a gather or
  scatter (n - 1) / n times. The axes are taken to share the links of the chip
  by the logarithm of their sizes, as the dimensions of a torus do. Nothing is
  known of the network between slices: what goes over it takes no time here.
  """
  between = collective.kind == "send"
  axes = () if between else find_axes(collective.groups, mesh)
  everyone = math.prod(mesh.values())
  n = math.prod(mesh[axis] for axis in axes) if axes else everyone
  turns = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}
  passes = turns.get(collective.kind, (n - 1) / n)
  whole = collective.bytes
  if collective.kind == "reduce-scatter":
    whole *= n  # its result is a part
  share = math.log(n) / math.log(everyone) if everyone > 1 else 1.0
  seconds = whole * passes / (chip.network * share) if n > 1 else 0.0
  if between:
    seconds = 0.0
  return {
    "kind": collective.kind,
    "axes": "slices" if between else "x".join(axes) or "?",
    "dtypes": "+".join(collective.dtypes),
    "count": 1,
    "operands": collective.operands,
    "bytes": collective.bytes,
    "seconds": seconds,
  }


_SUMS = ("count", "operands", "bytes", "seconds")


def _key(row: Mapping[str, Any]) -> tuple[str, str, str]:
  return row["kind"], row["axes"], row["dtypes"]


def merge(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Returns collectives of one kind, axes and dtype as one row."""
  merged: dict[tuple[str, str, str], dict[str, Any]] = {}
  for row in rows:
    into = merged.setdefault(_key(row), dict(row) | dict.fromkeys(_SUMS, 0))
    for name in _SUMS:
      into[name] += row[name]
  return sorted(merged.values(), key=lambda row: -row["bytes"])


def find_axes(
  groups: Sequence[Sequence[int]], mesh: Mapping[str, int]
) -> tuple[str, ...]:
  """Returns the axes along which the members of a group differ.

  Empty if no set of axes makes these groups.

  >>> find_axes([(0, 2), (1, 3)], {"data": 2, "fsdp": 2})
  ('data',)
  """
  names = [name for name, size in mesh.items() if size > 1]
  if not groups:
    return tuple(names)
  wanted = {frozenset(group) for group in groups}
  places = list(itertools.product(*(range(size) for size in mesh.values())))
  order = list(mesh)
  for count in range(1, len(names) + 1):
    for chosen in itertools.combinations(names, count):
      made: dict[tuple[int, ...], set[int]] = collections.defaultdict(set)
      for number, place in enumerate(places):
        rest = tuple(
          p for p, name in zip(place, order, strict=True) if name not in chosen
        )
        made[rest].add(number)
      if {frozenset(group) for group in made.values()} == wanted:
        return chosen
  return ()


def where(costs: Sequence[hlo.Cost], tokens: float) -> list[dict[str, Any]]:
  """Returns bytes and cycles by kind, line and place, largest first.

  All layers are one place, each way of the pass another.

  Args:
    costs: Of one chip.
    tokens: Of one chip.
  """
  sums: dict[tuple[str, ...], list[float]] = collections.defaultdict(
    lambda: [0.0, 0.0]
  )
  for cost in costs:
    both = sums[cost.kind, cost.source, shorten(cost.place)]
    both[0] += cost.bytes
    both[1] += cost.cycles
  return [
    {
      "kind": kind,
      "source": source,
      "place": place,
      "bytes_per_token": moved / tokens,
      "cycles": cycles,
    }
    for (kind, source, place), (moved, cycles) in sorted(
      sums.items(), key=lambda item: -item[1][0]
    )
  ]


def shorten(place: str) -> str:
  """Returns where an operation comes from, for people.

  >>> shorten("jit(train_step)/transpose(jvp(E))/layer_3/output/dot_general")
  'layer/output/dot_general, backward'
  """
  way = ", backward" if "transpose(" in place else ""
  parts = [
    re.sub(r"_\d+$", "", part)
    for part in place.split("/")
    if "(" not in part and part not in ("while", "body", "closed_call")
  ]
  return "/".join(parts[-3:]) + way
