"""What it costs to look for numbers that aren't finite, in each step.

  python -m benchmarks.skips [--quick] [--json]

BERT 4 x 256, 32 rows of 128, in float32: whole steps as they are, and with all
of the update written whatever it is, in turns of one run. And what the guard
takes of the host's time a step, and of the device's a line of metrics.
"""

from __future__ import annotations

import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import report
from benchmarks.train_step import SHAPES, make_step
from flaxmlm.training import incidents, memory, step


def main() -> None:
  args = report.parser(__doc__).parse_args()
  memory.use_huge_pages()
  turns = 4 if args.quick else 40
  checked, unchecked = both = Steps(), Steps(checked=False)
  seconds = []
  for turn in range(turns):  # each is as often the first
    order = both if turn % 2 else both[::-1]
    took = {steps: steps() for steps in order}
    seconds.append((took[checked], took[unchecked]))
  walls = [(a.wall, b.wall) for a, b in seconds]
  cores = sorted(a.cpu / b.cpu for a, b in seconds)
  few = len(cores) // 4
  figures = {
    "turns": turns,
    "step_ms": 1e3 * statistics.median(a for a, _ in walls),
    "unchecked_step_ms": 1e3 * statistics.median(b for _, b in walls),
    "wall_ratio": statistics.median(a / b for a, b in walls),
    "cpu_ratio": statistics.median(cores),
    "cpu_ratio_quartiles": [cores[few], cores[-1 - few]],
    "guard_us_a_step": 1e6 * time_guard(100 if args.quick else 10_000),
    "largest_ms_a_line": 1e3 * checked.time_largest(),
  }
  print(figures)
  report.finish(args, "skips", figures, packages=["flaxmlm", "jax"])


class Seconds(NamedTuple):
  """What a step took; other programs have less to do with the second."""

  wall: float
  cpu: float  # of all cores


class Steps:
  """A train step, and the state that it goes on from."""

  def __init__(self, *, checked: bool = True):
    choose = step._choose
    if not checked:
      step._choose = lambda fine, new, old: new
    try:
      self._step, arguments, _ = make_step(SHAPES["bert_4x256_L128"])
      self._state, *self._rest = arguments()
      self()
    finally:
      step._choose = choose
    self()

  def __call__(self) -> Seconds:
    """Makes a step."""
    start, cpu = time.perf_counter(), time.process_time()
    self._state, sums = self._step(self._state, *self._rest)
    jax.block_until_ready((self._state, sums))
    return Seconds(time.perf_counter() - start, time.process_time() - cpu)

  def time_largest(self) -> float:
    """Median of the seconds that `Guard.measure` takes."""
    guard, params, seconds = make_guard(), self._state.params, []
    for _ in range(10):
      start = time.perf_counter()
      guard.measure(1, params)
      seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def make_guard() -> incidents.Guard:
  return incidents.Guard(limit=3, shares={"masked": 1.0}, tell=print)


def time_guard(steps: int) -> float:
  """Mean of the host's seconds a step, where sums have come already."""
  guard = make_guard()
  each = [make_sums(number) for number in range(steps)]
  jax.block_until_ready(each)
  start = time.perf_counter()
  for number, sums in enumerate(each):
    guard.note(number, sums)
  guard.settle()
  return (time.perf_counter() - start) / steps


def make_sums(number: int) -> dict[str, Any]:
  """Sums as of a step; the loss goes up and down, and never jumps."""
  values = {
    "masked": {"nll": 60.0 + number % 7, "weight": 10.0},
    "step": {"skipped": 0.0, "grad_norm": 1.0},
  }
  return jax.tree.map(jnp.float32, values)


if __name__ == "__main__":
  main()
