"""What remat, scan_layers and bfloat16 are worth: memory, compile time, speed.

  python -m benchmarks.depth [--shape=NAME] [--quick] [--json]

Our whole step, as in `benchmarks.train_step`; bfloat16 is compiled, and run
where the CPU has instructions for it. "temporaries" is what XLA plans
to have at once besides parameters, optimizer state and batch: what grows with
rows and layers, and is what remat is for. "from cache" is the second compile,
out of JAX's persistent cache.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

import jax

from benchmarks import report
from benchmarks.train_step import SHAPES, Shape, has_bfloat16, make_step
from flaxmlm.training import memory

PLAIN = ("float32", "none", False)
CHOICES = (
  PLAIN,
  ("float32", "dots", False),
  ("float32", "full", False),
  ("float32", "none", True),
  ("float32", "dots", True),
  ("float32", "full", True),
  ("bfloat16", "none", False),
  ("bfloat16", "full", False),
)


def main() -> None:
  parser = report.parser(__doc__)
  parser.add_argument(
    "--shape", choices=SHAPES, default="bert_12x768_L512", help="the model"
  )
  args = parser.parse_args()
  memory.use_huge_pages()
  with tempfile.TemporaryDirectory() as folder:
    jax.config.update("jax_compilation_cache_dir", folder)
    rows = []
    for dtype, *choice in CHOICES:
      steps = 1 if args.quick else 3
      if dtype == "bfloat16" and not has_bfloat16():
        steps = 0
      rows.append(measure(SHAPES[args.shape], dtype, *choice, steps=steps))
      print(rows[-1], flush=True)
  report.table(rows)
  report.finish(
    args,
    f"depth-{args.shape}",
    {"shape": SHAPES[args.shape]._asdict(), "results": rows},
    packages=["flaxmlm", "jax", "flax", "optax"],
  )


def measure(
  shape: Shape, dtype: str, remat: str, scan_layers: bool, *, steps: int
) -> dict[str, Any]:
  """Compiles the step twice and runs it."""

  def lower():
    step, arguments, _ = make_step(
      shape, dtype, remat=remat, scan_layers=scan_layers
    )
    given = arguments()
    start = time.perf_counter()
    lowered = step.lower(*given)
    return lowered, given, time.perf_counter() - start

  seconds = []
  for _ in range(2):
    jax.clear_caches()
    lowered, given, traced = lower()
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds.append(traced + time.perf_counter() - start)
  state, *rest = given
  times = []
  for _ in range(steps + 1 if steps else 0):
    start = time.perf_counter()
    state, sums = compiled(state, *rest)
    jax.block_until_ready(sums)
    times.append(time.perf_counter() - start)
  return {
    "dtype": dtype,
    "remat": remat,
    "scan_layers": scan_layers,
    "temporaries MiB": compiled.memory_analysis().temp_size_in_bytes / 2**20,
    "compile s": seconds[0],
    "from cache s": seconds[1],
    "tokens/s": (
      shape.rows * shape.length / statistics.median(times[1:])
      if times
      else None
    ),
  }


if __name__ == "__main__":
  main()
