"""What saving and checking costs: `python -m benchmarks.checkpoints`.

A state of so many megabytes is saved, restored and checked, on one device, in a
folder of the disk that is to be measured (--folder). Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp

from flaxmlm.storage import manifests, saves
from flaxmlm.training.checkpoints import Saver
from flaxmlm.training.step import State


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--megabytes", type=int, default=200)
  parser.add_argument("--times", type=int, default=5)
  parser.add_argument("--folder", default=".")
  args = parser.parse_args()
  rows = args.megabytes * 1000 // 8

  @jax.jit
  def make(step):
    keys = jax.random.split(jax.random.key(step))
    shape = (rows, 1000)
    w, m = (jax.random.normal(key, shape) for key in keys)
    return State(step, {"w": w}, {"w": m})

  blocked, total = [], []
  with tempfile.TemporaryDirectory(dir=args.folder) as folder:
    saver = Saver(folder, keep=1)
    for step in range(1, args.times + 2):
      state = jax.block_until_ready(make(jnp.int32(step)))
      begin = time.perf_counter()
      saver.save(state, None)
      blocked.append(time.perf_counter() - begin)
      saver.wait()
      total.append(time.perf_counter() - begin)
    path = f"{folder}/{saves.list_steps(folder)[-1]}"
    begin = time.perf_counter()
    manifests.check(path)
    checked = time.perf_counter() - begin
    size = sum(
      os.path.getsize(os.path.join(root, name))
      for root, _, names in os.walk(path)
      for name in names
    )
  result = {
    "state_MB": args.megabytes,
    "on_disk_MB": round(size / 1e6),
    "blocked_ms": [round(1e3 * x, 1) for x in blocked[1:]],  # the first warms
    "blocked_ms_worst": round(1e3 * max(blocked[1:]), 1),
    "saved_s": round(statistics.median(total[1:]), 2),
    "check_s": round(checked, 3),
    "check_s_per_GB": round(checked / size * 1e9, 2),
    "cores": os.cpu_count(),
    "versions": f"jax {jax.__version__}, Python {platform.python_version()}",
    "date": time.strftime("%Y-%m-%d"),
  }
  print(json.dumps(result, indent=2))


if __name__ == "__main__":
  main()
