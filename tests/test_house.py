"""The house: imports only go down, and help needs no JAX."""

import ast
import doctest
import importlib
import subprocess
import sys

import pytest
from conftest import ROOT

PACKAGE = ROOT / "flaxmlm"
# Each floor may import those that are listed, and itself.
FLOORS = {
  "tokenizers": {"storage"},
  "storage": set(),
  "data": {"storage"},
  "models": set(),
  "objectives": {"models"},
  "pages": {"tokenizers"},
  "planning": {"training"},
  "training": {"models", "objectives", "pages", "storage"},
  "interop": {"models", "storage"},
  "preparing": {"tokenizers", "data", "config", "storage"},
  "inference": {
    *("tokenizers", "models", "objectives", "training", "interop"),
    *("config", "storage"),
  },
}
STEP_KNOWS = {"models", "objectives", "training.sharding"}
EXAMPLES = [
  path for path in PACKAGE.rglob("*.py") if ">>> " in path.read_text()
]
PROGRAMS = ["train", "prepare", "preview", "evaluate", "fill_mask", "export"]
PROGRAMS += ["plan", "doctor"]


def imports(path) -> set[str]:
  """Names in flaxmlm that a file imports, at any depth: "training.loop"."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  prefix = "flaxmlm."
  return {name.removeprefix(prefix) for name in found if prefix in name}


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_only_go_down(floor):
  for path in (PACKAGE / floor).rglob("*.py"):
    for name in imports(path):
      room = name.split(".")[0]
      assert room == "InputError" or room in FLOORS[floor] | {floor}, (
        f"{path.relative_to(ROOT)} imports {name}"
      )


def test_every_folder_has_its_floor():
  folders = {p.parent.name for p in PACKAGE.glob("*/*.py")}
  assert folders == set(FLOORS)


def test_the_step_knows_neither_data_nor_checkpoints():
  for name in imports(PACKAGE / "training" / "step.py"):
    assert any(name.startswith(known) for known in STEP_KNOWS), name


@pytest.mark.parametrize("path", sorted(EXAMPLES), ids=lambda path: path.stem)
def test_the_examples_in_the_docstrings(path):
  name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
  module = importlib.import_module(name.removesuffix(".__init__"))
  found = doctest.testmod(module)
  assert found.attempted > 0 == found.failed


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_imports_no_heavy_library(name):
  done = subprocess.run(
    [sys.executable, "-X", "importtime", "-m", f"flaxmlm.{name}", "--help"],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0 and "usage:" in done.stdout
  imported = {
    line.rpartition("|")[2].strip().split(".")[0]
    for line in done.stderr.splitlines()
  }
  heavy = {"jax", "numpy", "flax", "orbax", "pyarrow", "matplotlib", "rich"}
  heavy |= {
    "tokenizers",
    "sentencepiece",
    "tensorflow_datasets",
    "tensorboardX",
    "apache_beam",
  }
  assert not imported & heavy


def test_the_programs_are_listed():
  done = subprocess.run(
    [sys.executable, "-m", "flaxmlm"],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  for name in PROGRAMS:
    assert f"flaxmlm.{name}" in done.stdout
