"""What the makers say of their chips."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from flaxmlm import InputError
from flaxmlm.training.metrics import PEAK_FLOPS


class Chip(NamedTuple):
  """One chip.

  Attributes:
    kind: As JAX names it, and `metrics.PEAK_FLOPS`.
    memory: Bytes of HBM.
    bandwidth: Bytes/s to and from HBM.
    network: Bytes/s out of the chip over all its links together.
    clock: Cycles a second of those that the compiler estimates; None if it
      estimates none.
  """

  kind: str
  memory: float
  bandwidth: float
  network: float
  clock: float | None = None

  @property
  def peak(self) -> float:
    """Dense FLOP/s in bfloat16."""
    return dict(PEAK_FLOPS)[self.kind]


_GIB = 2**30
# docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e: HBM; the network from the
# all-reduce bandwidth of a pod by its chips (v4, v5e, v6e), or half of what
# goes both ways (v5p). The clock is the one at which the matrix units of a chip
# (v4, v5p: 8, v5e: 4, of 128 x 128) reach its peak.
TPUS = {
  "v4": Chip("TPU v4", 32 * _GIB, 1.2e12, 268e9, 1.05e9),
  "v5e": Chip("TPU v5e", 16 * _GIB, 819e9, 200e9, 1.5e9),
  "v5p": Chip("TPU v5p", 95 * _GIB, 2.765e12, 600e9, 1.75e9),
  "v6e": Chip("TPU v6", 32 * _GIB, 1.64e12, 400e9, 1.75e9),
}
# NVIDIA's data sheets, of the SXM form: HBM; half of NVLink, which is said for
# both ways.
GPUS = {
  "a100": Chip("A100", 80e9, 2.039e12, 300e9),
  "h100": Chip("H100", 80e9, 3.35e12, 450e9),
  "h200": Chip("H200", 141e9, 4.8e12, 450e9),
}


class Slice(NamedTuple):
  """Chips that are to be planned for: "v5e:16x16", "h100x8".

  Attributes:
    name: Of one slice, as libtpu names it.
    chip: What they are.
    count: How many, in all slices together.
    slices: So many, joined by the network of the data centre.
  """

  name: str
  chip: Chip
  count: int
  slices: int = 1


def parse_tpu(text: str) -> Slice:
  """Returns the slice of a topology's name.

  Raises:
    InputError: There is no such kind, or it has another number of dimensions.

  >>> parse_tpu("v5e:16x16").count
  256
  >>> parse_tpu("2xv5e:16x16").count
  512
  """
  several = re.fullmatch(r"([1-9]\d*)x(v.*)", text)
  slices, name = (int(several[1]), several[2]) if several else (1, text)
  kind, _, shape = name.partition(":")
  if kind not in TPUS:
    raise InputError(
      f"--tpu={text}: knows {', '.join(TPUS)}; write v5e:4x4 or v4:2x2x2"
    )
  if not re.fullmatch(r"\d+(x\d+)+", shape):
    raise InputError(
      f"--tpu={text}: wants KIND:AxB or KIND:AxBxC; several: 2xKIND:AxB"
    )
  sizes = [int(size) for size in shape.split("x")]
  dimensions = 2 if kind in ("v5e", "v6e") else 3
  if len(sizes) != dimensions:
    raise InputError(
      f"--tpu={text}: a slice of {kind} has {dimensions} dimensions"
    )
  return Slice(name, TPUS[kind], slices * math.prod(sizes), slices)


def parse_gpu(text: str) -> Slice:
  """Returns the GPUs of a name with their number.

  Raises:
    InputError: There is no such kind, or no number.

  >>> parse_gpu("h100x8").chip.kind
  'H100'
  """
  match = re.fullmatch(r"([a-z]+\d+)x(\d+)", text)
  if match is None or match[1] not in GPUS:
    raise InputError(f"--gpu={text}: wants one of {', '.join(GPUS)}, as h100x8")
  return Slice(text, GPUS[match[1]], int(match[2]))
