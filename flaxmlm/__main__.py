"""Lists the programs."""

from __future__ import annotations

import ast
import pathlib

from flaxmlm import config

PROGRAMS = ("prepare", "preview", "plan", "train")
PROGRAMS += ("doctor", "evaluate", "fill_mask", "export")


def main() -> None:
  """Prints the list; the console script `flaxmlm`."""
  config.run(show)


def show() -> None:
  """Prints each program with the first line of its docstring."""
  print("flaxmlm: pretrain masked language models on your own text\n")
  folder = pathlib.Path(__file__).parent
  for name in PROGRAMS:
    source = (folder / f"{name}.py").read_text(encoding="utf-8")
    doc = ast.get_docstring(ast.parse(source)) or ""
    print(f"  python -m flaxmlm.{name:<10}  {doc.splitlines()[0]}")
  print("\nEach has a --help. docs/config.md lists every config key.")


if __name__ == "__main__":
  main()
