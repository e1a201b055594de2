"""Broken configs: code 2, one line, the wrong key's name, nothing begun."""

import json
import subprocess
import sys

import broken_configs
import pytest
from conftest import ROOT, environment

from flaxmlm import InputError, config


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  return broken_configs.make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("seed", [0, 1])
def test_broken_configs_are_one_line_that_names_the_key(world, seed):
  wrong = []
  for fault in broken_configs.make(world, 300, seed):
    outcome = broken_configs.attempt(fault.argv)
    if not broken_configs.is_right(fault, outcome):
      wrong.append((fault, outcome))
  assert not wrong


def test_a_good_config_is_accepted(world, tmp_path):
  """What the others are told apart from."""
  argv = [
    f"--config={broken_configs.QUICKSTART}",
    f"--workdir={tmp_path}/run",
    f"--config.data.source={world}/text.txt",
    "--config.data.document=line",
    f"--config.tokenizer.path={world}/vocab.txt",
  ]
  assert broken_configs.attempt(argv).code is None


def test_processes_answer_as_functions_do(world):
  faults = list(broken_configs.make(world, 24, seed=2))[::4]
  for fault in faults:
    done = subprocess.run(
      [sys.executable, "-m", "flaxmlm.train", *fault.argv],
      cwd=ROOT,
      env=environment(),
      capture_output=True,
      text=True,
      timeout=60,
    )
    outcome = broken_configs.Outcome(done.returncode, done.stderr, 0)
    assert broken_configs.is_right(fault, outcome), (fault, outcome)


def test_a_part_of_a_json_config_sets_only_that(world, tmp_path):
  path = tmp_path / "part.json"
  path.write_text(json.dumps({"train": {"steps": 7}, "model.layers": 3}))
  c = config.load(str(path), ["--config.model.width=96"])
  changed = config.differences(config.defaults(), c)
  assert changed == [
    "model.layers: 12 -> 3",
    "model.width: 768 -> 96",
    "train.steps: 100000 -> 7",
  ]
  # As a Python config that sets the same.
  twin = tmp_path / "part.py"
  twin.write_text(
    broken_configs.HEAD
    + "  c = defaults()\n  c.train.steps = 7\n  c.model.layers = 3\n"
    + "  return c\n"
  )
  same = config.load(str(twin), ["--config.model.width=96"])
  assert config.differences(same, c) == []


def test_a_json_config_runs_nothing(tmp_path):
  """Not even where it asks for it; a Python config is code by design."""
  path = tmp_path / "evil.json"
  mark = tmp_path / "ran"
  code = f"__import__('os').mkdir({str(mark)!r})"
  path.write_text(json.dumps({"data": {"source": code, "weights": code}}))
  with pytest.raises(InputError, match="data.weights"):
    config.load(str(path))
  with pytest.raises(InputError, match="data.weights"):
    config.load(None, [f"--config.data.weights=({code},)"])
  assert not mark.exists()
  path = tmp_path / "evil.py"
  path.write_text(code)
  with pytest.raises(InputError):
    config.load(str(path))
  assert mark.exists()


def test_a_python_config_leaves_no_bytecode(tmp_path):
  path = tmp_path / "config.py"
  for layers in (1, 2):  # within the same second
    path.write_text(
      broken_configs.HEAD
      + f"  c = defaults()\n  c.model.layers = {layers}\n  return c\n"
    )
    assert config.load(str(path)).model.layers == layers
  assert [p.name for p in tmp_path.iterdir()] == ["config.py"]


def test_what_a_file_says_cant_steer_a_terminal(tmp_path):
  path = tmp_path / "config.json"
  path.write_text(json.dumps({"a\x1b]0;title\x07\r\n\u202eb": 1}))
  with pytest.raises(InputError) as error:
    config.load(str(path))
  assert str(error.value).isprintable()
  assert "a\\x1b]0;title\\x07\\r \\u202eb" in str(error.value)
