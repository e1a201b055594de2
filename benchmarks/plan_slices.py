"""What `plan` says of the configs on many slices, one after another.

  python -m benchmarks.plan_slices [--quick] [--json] [--only=TEXT]

Each line compiles the whole train step for a slice that isn't here (libtpu is
wanted), which takes from one to several minutes. `--json` keeps what each says
in benchmarks/results/plan-slices.json as it comes; what is there already isn't
compiled anew: remove the file to begin again. `--only` takes the lines with
that text in them, `--quick` models of one layer. The tables are those of
docs/tpu.md.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks import report

SLICES = ("v5e:4x4", "v5e:16x16", "v6e:16x16", "v5p:4x4x4", "v4:4x4x4")
BASE, BILLION = "configs/bert_base.py", "configs/bert_1b.py"
LARGE = {"layers": 24, "width": 1024, "heads": 16, "ffn": 4096}
RESULTS = os.path.join(report.RESULTS, "plan-slices.json")


def main() -> None:
  parser = report.parser(__doc__)
  parser.add_argument("--only", metavar="TEXT", default="")
  args = parser.parse_args()
  results = read()
  for command in commands():
    if args.only not in command:
      continue
    if args.quick:
      command += " --config.model.layers=1"
    if command not in results:
      results[command] = ask(command)
    if args.json:
      write(results)
  report.table([row(*item) for item in results.items() if args.only in item[0]])


def commands() -> Iterator[str]:
  """Yields the lines to run, 32 rows of 512 or 16 of 1,024 a chip."""
  for tpu in SLICES:
    yield line(BASE, tpu, 32)
    yield line(BASE, tpu, 32, attention="row")
  for attention in ("auto", "row"):
    large = line(BASE, "v4:4x4x4", 32, **LARGE, attention=attention)
    yield f"{large} --config.optimizer.name=lamb"
  for tpu in SLICES:
    yield line(BILLION, tpu, 16, remat="full")
  yield line(BILLION, "v5e:16x16", 16, remat="dots")
  yield line(BASE, "v5e:8x8", 32, attention="row")
  yield line(BASE, "v5e:2x2", 32, attention="row")


def line(path: str, tpu: str, rows: int, **model: Any) -> str:
  """Returns a line that plans for so many rows a chip."""
  from flaxmlm.planning import chips

  keys = [f"--config.train.batch_size={rows * chips.parse_tpu(tpu).count}"]
  keys += [f"--config.model.{name}={value}" for name, value in model.items()]
  return f"python -m flaxmlm.plan --config={path} --tpu={tpu} {' '.join(keys)}"


def ask(command: str) -> dict[str, Any]:
  """Returns what a line says, and how long it took."""
  print(command, flush=True)
  began = time.perf_counter()
  with tempfile.TemporaryDirectory() as folder:
    file = os.path.join(folder, "plan.json")
    done = subprocess.run(
      [sys.executable, *command.split()[1:], f"--json={file}"],
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )
    if done.returncode:
      raise SystemExit(done.stderr)
    with open(file, encoding="utf-8") as values:
      found = json.load(values)
  return found | {"seconds_to_plan": round(time.perf_counter() - began)}


def row(command: str, values: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what a table shows of a line's figures."""
  keys = dict(word.lstrip("-").split("=", 1) for word in command.split()[3:])
  shown = {
    "config": os.path.basename(keys.pop("config")).removesuffix(".py"),
    "slice": keys.pop("tpu"),
    "keys": " ".join(
      f"{key.removeprefix('config.')}={value}" for key, value in keys.items()
    ),
    "fits": str(values["fits"]),
    "GiB": values["memory_total"] / 2**30,
  }
  if not values["fits"]:
    return shown | dict.fromkeys(("ms", "tok/s/chip", "MFU %", "bound by"), "-")
  step = values["step_seconds"]
  return shown | {
    "ms": 1e3 * step,
    "tok/s/chip": values["tokens_per_second"] / values["chips"],
    "MFU %": 100 * values["mfu"],
    "bound by": values["bound_by"],
  }


def read() -> dict[str, dict[str, Any]]:
  """Returns what is kept, by line."""
  if not os.path.exists(RESULTS):
    return {}
  with open(RESULTS, encoding="utf-8") as file:
    kept = json.load(file)["results"]
  return {values.pop("command"): values for values in kept}


def write(results: Mapping[str, Mapping[str, Any]]) -> None:
  """Keeps what the lines said."""
  figures = {
    "benchmark": "plan-slices",
    "date": datetime.date.today().isoformat(),
    "versions": {"python": platform.python_version()}
    | {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
    "results": [
      {"command": command, **values} for command, values in results.items()
    ],
  }
  with open(RESULTS, "w", encoding="utf-8") as file:
    json.dump(figures, file, indent=2)
    file.write("\n")


if __name__ == "__main__":
  main()
