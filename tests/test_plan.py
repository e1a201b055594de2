"""What a plan says, and a floor under what the TPU's compiler says of ours."""

import importlib.util
import json
import subprocess
import sys

import pytest
from conftest import ROOT, environment

ROWS, L, V, D, F, M = 32, 512, 32_768, 768, 3_072, 77
# Small enough for seconds, of chips by roofline.
TINY = [
  *("--config=configs/bert_mini.py", "--config.model.layers=1"),
  *("--config.model.width=32", "--config.model.heads=4"),
  *("--config.model.ffn=64", "--config.tokenizer.vocab_size=512"),
]


def run(tmp_path, *arguments: str) -> tuple[dict, str]:
  """Runs the program; returns its figures and what it printed."""
  file = tmp_path / "plan.json"
  done = subprocess.run(
    [sys.executable, "-m", "flaxmlm.plan", f"--json={file}", *arguments],
    cwd=ROOT,
    # The TPU's compiler knows none of the CPU's flags.
    env=environment() | {"XLA_FLAGS": ""},
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr
  assert done.stderr == ""
  return json.loads(file.read_text()), done.stdout


def need_compiler() -> None:
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("the TPU's compiler (libtpu) isn't installed")


def test_a_search_ranks(tmp_path):
  found, said = run(tmp_path, "--gpu=h100x4", "--search", *TINY)
  times = [row["step_seconds"] for row in found["search"]]
  assert times == sorted(times) and len(times) >= 4
  # In the order in which they are printed, with their keys.
  _, _, table = said.partition("the fastest first:\n")
  lines = table.splitlines()
  assert len(lines) == len(times)
  for line, row in zip(lines, found["search"], strict=True):
    assert row["fits"]
    for key, value in row["keys"].items():
      assert f"--config.{key}={value}" in line


def test_what_would_fit_is_said(tmp_path):
  """A row more than fits as it is, and less than with what it names."""
  rows = 2**18
  keys = [f"--config.train.batch_size={rows}", "--gpu=h100x4", *TINY]
  found, said = run(tmp_path, *keys)
  assert not found["fits"]
  assert found["memory_total"] > found["memory_of_chip"]
  would = [f"--config.{k}={v}" for k, v in found["would_fit"].items()]
  assert "would fit, from a shorter model's figures: " + " ".join(would) in said
  fitting, _ = run(tmp_path, *keys, *would)
  assert fitting["fits"]
