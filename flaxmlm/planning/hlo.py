"""Reads a program that XLA compiled: where its bytes and its cycles are.

`compiled.cost_analysis()` isn't enough. It counts what stays in a TPU's VMEM,
prefetches and once more what is read after them, leaves out that narrow arrays
are padded to whole tiles, and has of each loop a single turn.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import flaxmlm

_PACKAGE = os.path.dirname(flaxmlm.__file__) + os.sep
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_TILES = re.compile(r"\{([\d,]+):T\((\d+),(\d+)\)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
# Names for what is there already.
_FREE = {
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
  *("partition-id", "replica-id", "after-all", "opt-barrier", "iota"),
}
_COLLECTIVES = (
  *("all-reduce", "all-gather", "reduce-scatter", "all-to-all"),
  "collective-permute",
)
# Only moves from HBM to VMEM or back, beside other work.
_MOVES = {
  f"{kind}-start" for kind in ("copy", "slice", "async", "dynamic-slice")
} | {"dynamic-update-slice-start"}


class Array(NamedTuple):
  """An operand or result: its bytes with the padding of its tiles."""

  dtype: str
  shape: tuple[int, ...]
  bytes: int
  in_hbm: bool


class Instruction(NamedTuple):
  """One line of a program.

  Attributes:
    name: Its name.
    kind: Its operation: "fusion", "copy-start", …
    results: Its results; of a move, also the operand that it names once more.
    operands: Names of its operands.
    text: All that stands after the operation's name.
  """

  name: str
  kind: str
  results: tuple[Array, ...]
  operands: tuple[str, ...]
  text: str

  def called(self, attribute: str) -> str | None:
    """Returns the name of a computation that it calls, or None."""
    found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.text)
    return found[1] if found else None

  @property
  def place(self) -> str:
    """Where in the model it comes from: "jvp(…)/layer_0/…", or nothing."""
    found = re.search(r'op_name="([^"]*)"', self.text)
    return found[1] if found else ""

  @property
  def cycles(self) -> int:
    """Cycles as the compiler estimates them; 0 if it doesn't."""
    found = re.search(r'"estimated_cycles":"?(\d+)', self.text)
    return int(found[1]) if found and int(found[1]) < 1e12 else 0

  @property
  def is_kernel(self) -> bool:
    """Whether it is a kernel of Pallas."""
    return 'custom_call_target="tpu_custom_call"' in self.text

  @property
  def frame(self) -> int:
    """Number of its stack frame, see `Program.sources`; 0 if it has none."""
    found = re.search(r"stack_frame_id=(\d+)", self.text)
    return int(found[1]) if found else 0


class Program(NamedTuple):
  """A compiled program.

  Attributes:
    computations: What it is made of, by name.
    entry: The one to begin with.
    sources: "models/bert.py:112" by stack frame: the innermost one within
      this package.
  """

  computations: dict[str, list[Instruction]]
  entry: str
  sources: dict[int, str]


class Cost(NamedTuple):
  """What an instruction costs, in all its turns.

  Attributes:
    kind: What it does, of `KINDS`.
    place: See `Instruction`.
    source: File and line; see `Program`.
    bytes: To and from HBM.
    cycles: As the compiler estimates them.
    kernel_flops: See `Instruction`.
  """

  kind: str
  place: str
  source: str
  bytes: int
  cycles: int
  kernel_flops: float


class Collective(NamedTuple):
  """A collective: its kind, bytes of its result in all turns, who takes part.

  `groups` are the numbers of the devices that exchange with each other, as they
  stand in the mesh; empty for all.
  """

  kind: str
  dtypes: tuple[str, ...]
  bytes: int
  operands: int
  groups: tuple[tuple[int, ...], ...]


KINDS = (
  *("product", "kernel", "collective", "move", "gather", "scatter"),
  *("reduction", "elementwise", "loop"),
)


def parse(text: str) -> Program:
  """Reads `compiled.as_text()`."""
  computations: dict[str, list[Instruction]] = {}
  entry = here = ""
  head, _, _ = text.partition("\n%")
  for line in text.splitlines():
    if not line.startswith(" ") and (match := _COMPUTATION.match(line)):
      here = match[2]
      computations[here] = []
      entry = here if match[1] else entry
    elif here and (match := _INSTRUCTION.match(line.strip())):
      name, result, kind, rest = match.groups()
      operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
      computations[here].append(
        Instruction(name, kind, arrays(result), tuple(operands), rest)
      )
  return Program(computations, entry, _sources(head))


def _sources(head: str) -> dict[int, str]:
  """Reads the tables of files, places and frames before a program."""

  def table(name: str, line: str) -> dict[int, tuple[str, ...]]:
    body = head.partition(f"\n{name}\n")[2].partition("\n\n")[0]
    rows = re.findall(rf"^(\d+) {line}", body, re.MULTILINE)
    return {int(number): tuple(rest) for number, *rest in rows}

  files = table("FileNames", r'"(.*)"')
  places = table("FileLocations", r"\{file_name_id=(\d+).*? line=(\d+)")
  frames = table(
    "StackFrames", r"\{file_location_id=(\d+) parent_frame_id=(\d+)"
  )
  found = {}
  for number in frames:
    frame = number
    while frame in frames:
      place, parent = (int(n) for n in frames[frame])
      file, line = places[place]
      name = files[int(file)][0]
      if name.startswith(_PACKAGE):
        found[number] = f"{name.removeprefix(_PACKAGE)}:{line}"
        break
      frame = parent - 1  # they are written one higher; 1 is none
  return found


def arrays(text: str) -> tuple[Array, ...]:
  """Returns the arrays of a type, a tuple or one.

  >>> arrays("bf16[4,100]{1,0:T(8,128)(2,1)}")[0].bytes  # 8 x 128
  2048
  >>> arrays("(f32[4,8]{1,0:T(8,128)S(1)}, s32[])")[0].in_hbm
  False
  """
  return tuple(
    _array(dtype, dims, layout or "")
    for dtype, dims, layout in _ARRAY.findall(text)
    if dtype in _BYTES
  )


def _array(dtype: str, dims: str, layout: str) -> Array:
  shape = tuple(int(n) for n in dims.split(",") if n)
  padded = list(shape)
  tiles = _TILES.match(layout)
  if tiles:
    order = [int(n) for n in tiles[1].split(",")]
    for axis, tile in zip(order, (int(tiles[3]), int(tiles[2])), strict=False):
      padded[axis] = -(-padded[axis] // tile) * tile
  size = math.prod(padded) * _BYTES[dtype]
  return Array(dtype, shape, size, "S(1)" not in layout)


def costs(program: Program, *, turns: int = 1) -> list[Cost]:
  """Returns what each instruction costs, those of loops by their turns.

  Args:
    program: Of `parse`.
    turns: How often a loop is run of which the compiler doesn't know.
  """
  results = _results(program)
  return [
    _cost(program, results, instruction, times)
    for instruction, times in walk(program, turns=turns)
  ]


def walk(
  program: Program, *, turns: int = 1
) -> Iterator[tuple[Instruction, int]]:
  """Yields what the entry and the loops in it do, and how often."""

  def inside(name: str, times: int) -> Iterator[tuple[Instruction, int]]:
    for instruction in program.computations[name]:
      if instruction.kind in _FREE or instruction.kind.endswith("-done"):
        continue
      body = instruction.called("body")
      if body is None:
        yield instruction, times
        continue
      known = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.text)
      yield from inside(body, times * (int(known[1]) if known else turns))

  yield from inside(program.entry, 1)


def _results(program: Program) -> dict[str, tuple[Array, ...]]:
  return {
    instruction.name: instruction.results
    for body in program.computations.values()
    for instruction in body
  }


def _cost(
  program: Program,
  results: dict[str, tuple[Array, ...]],
  instruction: Instruction,
  times: int,
) -> Cost:
  if instruction.kind in _MOVES:
    # The operand, the result and small change: what moves is the smaller.
    large = [a for a in instruction.results if a.bytes > 4]
    least = min((a.bytes for a in large), default=4)
    moved = least * sum(a.in_hbm for a in large[:2])
    read = []
  else:
    read = [a for name in instruction.operands for a in results.get(name, ())]
    moved = sum(a.bytes for a in (*read, *instruction.results) if a.in_hbm)
  return Cost(
    kind=_kind(program, instruction),
    place=instruction.place,
    source=program.sources.get(instruction.frame, ""),
    bytes=times * moved,
    cycles=times * instruction.cycles,
    kernel_flops=times * _kernel_flops(instruction, read),
  )


def _kernel_flops(instruction: Instruction, read: Sequence[Array]) -> float:
  """Returns the FLOPs of a kernel, as it says itself or of its shapes.

  Attention's forward has two products, its backward in one kernel five; the
  library's kernel says nothing of them.
  """
  if not instruction.is_kernel:
    return 0.0
  said = re.search(r'"flops":"?(\d+)', instruction.text)
  if said:
    return float(said[1])
  products = {"splash_mha_fwd": 2, "splash_mha_dkv": 5}
  for name, count in products.items():
    if name in instruction.name:
      rows = [a.shape for a in read if len(a.shape) == 4]
      B, H, K, L = rows[0] if rows else (0, 0, 0, 0)
      return 2.0 * count * B * H * K * L * L
  return 0.0


def _kind(program: Program, instruction: Instruction) -> str:
  """Returns what an instruction does, of `KINDS`."""
  kind = instruction.kind.removesuffix("-start")
  if kind in _COLLECTIVES:
    return "collective"
  if instruction.kind in _MOVES or kind in ("copy", "transpose"):
    return "move"
  if kind == "custom-call":
    return "kernel" if instruction.is_kernel else "elementwise"
  body = program.computations.get(instruction.called("calls") or "", [])
  inner = {kind, *(inside.kind for inside in body)}
  for found, names in (
    ("collective", set(_COLLECTIVES)),
    ("product", {"dot", "convolution"}),
    ("scatter", {"scatter"}),
    ("gather", {"gather", "dynamic-slice"}),
    ("reduction", {"reduce"}),
  ):
    if inner & names:
      return found
  return "elementwise"


def collectives(program: Program, *, turns: int = 1) -> list[Collective]:
  """Returns the collectives, those inside of fusions too.

  A TPU runs some beside other work, in pieces: they are one. Its reduce-scatter
  is a fusion of an all-reduce and a slice. What it exchanges with other slices
  is of the kind "send".
  """
  times = {
    name: count
    for instruction, count in walk(program, turns=turns)
    for name in (instruction.name, instruction.called("calls"))
  }
  found = []
  pieces = set()
  for computation, body in program.computations.items():
    for instruction in body:
      kind = instruction.kind.removesuffix("-start")
      if _is_between_slices(instruction):
        instruction = instruction._replace(results=instruction.results[:1])
      elif kind not in _COLLECTIVES:
        continue
      if "async_collective_fusion_config" in instruction.text:
        piece = re.search(r"channel_id=\d+", instruction.text)
        if piece and piece[0] in pieces:
          continue
        pieces.add(piece and piece[0])
      given = instruction.results
      if computation.startswith("all-reduce-scatter"):
        kind, given = "reduce-scatter", body[-1].results
      if instruction.kind.endswith("-start") and kind != "all-reduce":
        # The operands stand before; a permute's two numbers of its own after.
        given = tuple(array for array in given if array.shape)
        given = given[len(given) // 2 :]
      count = times.get(instruction.name, times.get(computation, 1))
      found.append(
        Collective(
          kind=kind,
          dtypes=tuple(sorted({array.dtype for array in given})),
          bytes=count * sum(_logical(array) for array in given),
          operands=len(given),
          groups=_groups(instruction.text),
        )
      )
  return found


def _is_between_slices(instruction: Instruction) -> bool:
  return instruction.kind == "send" and "megascale" in instruction.text


def _logical(array: Array) -> int:
  return math.prod(array.shape) * _BYTES[array.dtype]


def _groups(text: str) -> tuple[tuple[int, ...], ...]:
  """Returns who exchanges with whom, of replica_groups in its three forms.

  Of a permutation's pairs, all that are joined by some of them.

  >>> _groups("replica_groups={{0,2},{1,3}}, x")
  ((0, 2), (1, 3))
  >>> _groups("replica_groups=[2,2]<=[2,2]T(1,0), x")
  ((0, 2), (1, 3))
  >>> _groups("replica_groups=mesh['a'=2,'b'=2] {'a'}, x")
  ((0, 2), (1, 3))
  >>> _groups("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}, x")
  ((0, 2), (1, 3))
  >>> _groups("source_target_pairs={{0,2},{2,0},{1,3},{3,1}}, x")
  ((0, 2), (1, 3))
  """
  pairs = re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", text)
  if pairs:
    joined: dict[int, set[int]] = {}
    for pair in re.findall(r"(\d+),(\d+)", pairs[1]):
      one, other = (joined.setdefault(int(n), {int(n)}) for n in pair)
      if one is not other:
        one |= other
        joined |= dict.fromkeys(other, one)
    groups = {id(group): tuple(sorted(group)) for group in joined.values()}
    return tuple(sorted(groups.values()))
  listed = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", text)
  if listed:
    parts = re.findall(r"\{([\d,]+)\}", listed[1])
    return tuple(tuple(int(n) for n in part.split(",")) for part in parts)
  counted = re.search(
    r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text
  )
  named = re.search(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(([\d,]+)\))? \{([^}]*)\}",
    text,
  )
  if counted:
    rows, columns = int(counted[1]), int(counted[2])
    shape = [int(n) for n in counted[3].split(",")]
    order = [int(n) for n in (counted[4] or "").split(",") if n]
  elif named:
    sizes = re.findall(r"'(\w+)'=(\d+)", named[1])
    shape = [int(size) for _, size in sizes]
    own = re.findall(r"'(\w+)'", named[3])
    inner = [n for n, (name, _) in enumerate(sizes) if name in own]
    order = [n for n in range(len(sizes)) if n not in inner] + inner
    columns = math.prod(shape[n] for n in inner)
    rows = math.prod(shape) // columns
  else:
    return ()
  flat = _transposed(shape, order or list(range(len(shape))))
  if named and named[2]:
    devices = [int(n) for n in named[2].split(",")]
    flat = [devices[n] for n in flat]
  return tuple(
    tuple(flat[row * columns : (row + 1) * columns]) for row in range(rows)
  )


def _transposed(shape: Sequence[int], order: Sequence[int]) -> list[int]:
  """Returns 0, 1, … of an array of a shape, read in another order of axes."""
  strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
  flat = [0]
  for axis in order:
    flat = [n + i * strides[axis] for n in flat for i in range(shape[axis])]
  return flat


def peak(program: Program, name: str | None = None) -> dict[str, int]:
  """Returns the bytes alive in HBM at the fullest moment, by what they are.

  "activations" were made by the forward pass, "temporaries" by the rest; what
  comes in and goes out isn't in them. A result lives from its instruction to
  the last one that reads it; results that share memory count twice, so this is
  for the shares of the two, not for their sum.

  Args:
    program: Of `parse`.
    name: Of a computation; None: the entry.
  """
  body = program.computations[name or program.entry]
  ends = _last_reads(body)
  alive = {"activations": 0, "temporaries": 0}
  best = dict(alive)
  leaving: dict[int, list[tuple[str, int]]] = {}
  for number, instruction in enumerate(body):
    inner = dict.fromkeys(alive, 0)
    loop = instruction.called("body")
    if loop is not None:
      inner = peak(program, loop)
    elif not (
      instruction.kind in _FREE
      or instruction.kind in _MOVES
      or instruction.kind.endswith("-done")
    ):
      size = sum(a.bytes for a in instruction.results if a.in_hbm)
      forward = "jvp(" in instruction.place
      forward &= "transpose(" not in instruction.place
      what = "activations" if forward else "temporaries"
      alive[what] += size
      end = ends.get(instruction.name, number)
      leaving.setdefault(end, []).append((what, size))
    now = {kind: alive[kind] + inner[kind] for kind in alive}
    best = max(best, now, key=lambda kinds: sum(kinds.values()))
    for what, size in leaving.pop(number, ()):
      alive[what] -= size
  return best


def _last_reads(body: Sequence[Instruction]) -> dict[str, int]:
  """Returns when each result is read last, through other names for it too."""
  last: dict[str, int] = {}
  origin: dict[str, str] = {}
  for number, instruction in enumerate(body):
    for name in instruction.operands:
      last[name] = number
      while name in origin:
        name = origin[name]
        last[name] = number
    if instruction.operands and instruction.kind in (
      "bitcast",
      "get-tuple-element",
      "tuple",
    ):
      origin[instruction.name] = instruction.operands[0]
  return last
