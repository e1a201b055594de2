"""What it costs to save a state, and to check it before it is restored.

A state of 200 MB on one device; --folder is on the disk that is measured. The
step loop is blocked while the state is copied; all else is in the background.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp

from benchmarks import report
from flaxmlm.storage import manifests, saves
from flaxmlm.training.checkpoints import Saver
from flaxmlm.training.step import State


def main() -> None:
  parser = report.parser(__doc__)
  parser.add_argument("--folder", default=".")
  args = parser.parse_args()
  rows = 2_500 if args.quick else 25_000

  @jax.jit
  def make(step: jax.Array) -> State:
    keys = jax.random.split(jax.random.key(step))
    w, m = (jax.random.normal(key, (rows, 1000)) for key in keys)
    return State(step, {"w": w}, {"w": m})

  shown = []
  with tempfile.TemporaryDirectory(dir=args.folder) as folder:
    saver = Saver(folder, keep=1)
    for step in range(1, 7):
      state = jax.block_until_ready(make(jnp.int32(step)))
      begin = time.perf_counter()
      saver.save(state, None)
      blocked = time.perf_counter() - begin
      saver.wait()
      total = time.perf_counter() - begin
      shown.append({"blocked_ms": 1e3 * blocked, "saved_s": total})
    path = f"{folder}/{saves.list_steps(folder)[-1]}"
    begin = time.perf_counter()
    manifests.check(path)
    checked = time.perf_counter() - begin
    size = sum(
      os.path.getsize(os.path.join(root, name))
      for root, _, names in os.walk(path)
      for name in names
    )
  report.table(shown)
  shown = shown[1:]  # the first one warms up
  report.finish(
    args,
    "checkpoints",
    {
      "state_mb": rows * 8 / 1000,
      "disk_mb": size / 1e6,
      "blocked_ms": statistics.median(x["blocked_ms"] for x in shown),
      "blocked_ms_worst": max(x["blocked_ms"] for x in shown),
      "saved_s": statistics.median(x["saved_s"] for x in shown),
      "check_s_per_gb": checked / size * 1e9,
    },
    packages=("jax", "jaxlib", "orbax-checkpoint"),
  )


if __name__ == "__main__":
  main()
