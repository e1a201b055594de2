"""What every benchmark prints: a table, and a line of JSON at the end."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from typing import Any

RESULTS = os.path.join(os.path.dirname(__file__), "results")


def parser(doc: str | None) -> argparse.ArgumentParser:
  """Returns a parser with the arguments that every benchmark takes."""
  result = argparse.ArgumentParser(
    description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  result.add_argument("--quick", action="store_true", help="a smaller run")
  result.add_argument(
    "--json",
    action="store_true",
    help="keep the figures as benchmarks/results/NAME.json",
  )
  return result


def data_folder(*names: str) -> str | None:
  """Returns a folder or file of the real data, or None where there is none.

  FLAXMLM_DATA says where the data is; ../shared/data beside the repository
  otherwise.
  """
  root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  default = os.path.join(os.path.dirname(root), "shared", "data")
  path = os.path.join(os.environ.get("FLAXMLM_DATA", default), *names)
  return path if os.path.exists(path) else None


def machine(packages: Sequence[str]) -> dict[str, Any]:
  """Returns the date, the machine and the versions of some packages."""
  return {
    "date": datetime.date.today().isoformat(),
    "cpu": _cpu_model(),
    "cores": len(os.sched_getaffinity(0)),
    "memory_gib": round(
      os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1
    ),
    "system": platform.platform(terse=True),
    "python": platform.python_version(),
    "versions": {name: importlib.metadata.version(name) for name in packages},
  }


def table(rows: Sequence[Mapping[str, Any]]) -> None:
  """Prints rows of the same columns; numbers with four digits."""
  names = list(rows[0])
  lines = [names, *([_shown(row[name]) for name in names] for row in rows)]
  widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
  for line in lines:
    cells = zip(line, widths, strict=True)
    print("  ".join(f"{cell:>{width}}" for cell, width in cells))


def finish(
  args: argparse.Namespace,
  name: str,
  figures: Mapping[str, Any],
  *,
  packages: Sequence[str],
) -> None:
  """Prints the figures as the last line, one JSON object; keeps them if asked.

  Args:
    args: What `parser` parsed.
    name: The benchmark's name.
    figures: What it measured.
    packages: Whose versions matter.
  """
  result = {
    "benchmark": name,
    "quick": args.quick,
    **figures,
    "machine": machine(packages),
  }
  if args.json:
    os.makedirs(RESULTS, exist_ok=True)
    with open(os.path.join(RESULTS, f"{name}.json"), "w") as file:
      json.dump(result, file, indent=2)
      file.write("\n")
  sys.stdout.flush()
  print(json.dumps(result))


def _shown(value: Any) -> str:
  if isinstance(value, float):
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
  return f"{value:,}" if isinstance(value, int) else str(value)


def _cpu_model() -> str:
  try:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
      for line in file:
        if line.startswith("model name"):
          return line.partition(":")[2].strip()
  except OSError:
    pass
  return platform.processor() or platform.machine()
