"""What becomes of faults: the table of docs/reliability.md, as JSON.

  python -m benchmarks.faults [--quick] [--json] [--only ROW ...]

A function a row. Each returns counts: how many faults there were, and how many
of them were answered as they must be. What makes the faults is what the tests
use (tests/broken_configs.py, tests/corrupt_inputs.py).
"""

from __future__ import annotations

import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable

from benchmarks import report
from flaxmlm import InputError
from flaxmlm.data import store
from flaxmlm.storage import hashes, remote

TESTS = str(pathlib.Path(__file__).parent.parent / "tests")
sys.path.insert(0, TESTS)
import broken_configs  # noqa: E402


def main() -> None:
  parser = report.parser(__doc__)
  parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
  args = parser.parse_args()
  figures = {}
  for name in args.only:
    with tempfile.TemporaryDirectory() as folder:
      os.environ[remote.CACHE] = os.path.join(folder, "cache")
      start = time.perf_counter()
      figures[name] = ROWS[name](pathlib.Path(folder), args.quick)
      figures[name]["row_seconds"] = time.perf_counter() - start
    print(f"{name}: {json.dumps(figures[name])}", flush=True)
  report.finish(args, "faults", figures, packages=["flaxmlm", "jax"])


def broken(folder: pathlib.Path, quick: bool) -> dict:
  """300 broken configs: code 2, one line, the key's name, under 2 s."""
  world = broken_configs.make_world(folder / "world")
  outcomes = [
    (fault, broken_configs.attempt(fault.argv))
    for fault in broken_configs.make(world, 100 if quick else 300, seed=0)
  ]
  right = [broken_configs.is_right(*pair) for pair in outcomes]
  seconds = []
  alone = 0
  some = list(broken_configs.make(world, 60, seed=3))[:: 12 if quick else 3]
  for fault in some:
    start = time.perf_counter()
    done = subprocess.run(
      [sys.executable, "-m", "flaxmlm.train", *fault.argv],
      capture_output=True,
      text=True,
    )
    seconds.append(time.perf_counter() - start)
    outcome = broken_configs.Outcome(done.returncode, done.stderr, seconds[-1])
    alone += broken_configs.is_right(fault, outcome)
  return {
    "configs": len(right),
    "right": sum(right),
    "processes": len(some),
    "processes_right": alone,
    "process_seconds_most": max(seconds),
  }


def corrupt(folder: pathlib.Path, quick: bool) -> dict:
  """1,000 corrupt inputs, and small files that are large inside."""
  found = []
  for place, count in (("drawn", 200 if quick else 1000), ("bombs", -1)):
    if quick and count < 0:
      continue
    done = subprocess.run(
      [
        *(sys.executable, os.path.join(TESTS, "corrupt_inputs.py")),
        *(str(folder / place), str(count), "1"),
      ],
      capture_output=True,
      text=True,
      check=True,
    )
    lines = map(json.loads, done.stdout.splitlines())
    found += [facts for facts in lines if "result" in facts]
  results = Counter(facts["result"] for facts in found)
  good = {name: results.pop(name, 0) for name in ("named", "skipped", "read")}
  return {
    "inputs": len(found),
    **good,
    "faults": sum(results.values()),
    "seconds_most": max(facts["seconds"] for facts in found),
    "memory_gib_most": max(facts["rss"] for facts in found) / 2**30,
  }


def stores(folder: pathlib.Path, quick: bool) -> dict:
  """200 flipped bits, 50 truncations, 50 files that are gone, in stores."""
  made = broken_configs.make_world(folder / "world") / "store"
  draw = random.Random(0)
  every = [p for p in made.rglob("*") if p.is_file() and p.stat().st_size]
  paths = sorted(p for p in every if "rows" not in p.parts)
  counts: Counter[str] = Counter()
  part = 10 if quick else 1
  for fault, number in (("flipped", 200), ("cut", 50), ("gone", 50)):
    for _ in range(number // part):
      path = draw.choice(paths)
      good = path.read_bytes()
      place = draw.randrange(len(good))
      if fault == "flipped":
        changed = bytearray(good)
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
      elif fault == "cut":
        path.write_bytes(good[:place])
      else:
        path.unlink()
      counts[fault] += 1
      try:
        store.open_store(str(made))
        counts["silently_wrong"] += 1
      except InputError as error:
        counts["named"] += str(path) in str(error)
      path.write_bytes(good)
  return {"silently_wrong": 0, **counts}


def hashing(folder: pathlib.Path, quick: bool) -> dict:
  """What checking a large store costs: at its first use, and after."""
  size = (1 << 28) if quick else (1 << 30)
  block = random.Random(0).randbytes(1 << 24)
  paths = []
  for name, share in (("ids", 2), ("flags", 1)):
    path = folder / f"{name}.bin"
    with open(path, "wb") as file:
      for _ in range(share * size // len(block)):
        file.write(block)
    paths.append(str(path))
  time.sleep(2.1)  # what was written a moment ago isn't remembered
  seconds = []
  for _ in range(2):
    start = time.perf_counter()
    hashes.hash_files(paths)
    seconds.append(time.perf_counter() - start)
  gigabytes = sum(map(os.path.getsize, paths)) / 1e9
  for path in paths:
    os.unlink(path)
  shutil.rmtree(os.environ[remote.CACHE], ignore_errors=True)
  return {
    "gigabytes": gigabytes,
    "first_seconds": seconds[0],
    "first_gigabytes_per_second": gigabytes / seconds[0],
    "second_seconds": seconds[1],
  }


ROWS: dict[str, Callable[[pathlib.Path, bool], dict]] = {
  "broken_configs": broken,
  "corrupt_inputs": corrupt,
  "damaged_stores": stores,
  "checking_a_store": hashing,
}

if __name__ == "__main__":
  main()
