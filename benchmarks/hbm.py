"""Bytes that a program moves to and from HBM, read off what XLA compiled.

`cost_analysis` counts what stays in a TPU's VMEM, prefetches and again what is
read after them, and of a loop a single turn.
"""

from __future__ import annotations

import math
import re

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
  r"(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(([^)]*)\)(.*)"
)
# Names for what is there already.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}


def count_bytes(text: str, *, turns: int) -> int:
  """Returns the bytes of operands and results that lie in HBM.

  Args:
    text: `compiled.as_text()`.
    turns: How often the body of each loop is run, at most.
  """
  bodies: dict[str, list[re.Match[str]]] = {}
  entry = here = ""
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      here = match[2]
      bodies[here] = []
      entry = here if match[1] else entry
    elif match := _INSTRUCTION.match(line.strip()):
      bodies[here].append(match)
  results = {m[1]: m[2] for body in bodies.values() for m in body}

  def walk(name: str) -> int:
    total = 0
    for _, result, kind, operands, rest in (m.groups() for m in bodies[name]):
      if kind in _FREE or kind.endswith("-done"):
        continue
      if kind == "while":
        total += turns * walk(re.search(r"body=%?([\w.\-]+)", rest)[1])
        continue
      if kind.endswith("-start"):  # its result names the operand once more
        result = result.split("}, ")[0]
      total += _in_hbm(result)
      for operand in re.findall(r"%([\w.\-]+)", operands):
        total += _in_hbm(results[operand])
    return total

  return walk(entry)


def _in_hbm(shapes: str) -> int:
  """Returns the bytes of arrays whose layout isn't in VMEM, S(1)."""
  return sum(
    _BYTES.get(dtype, 0) * math.prod(int(n) for n in dims.split(",") if n)
    for dtype, dims, layout in _ARRAY.findall(shapes)
    if "S(1)" not in layout
  )
