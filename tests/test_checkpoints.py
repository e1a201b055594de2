"""Checkpoints that are damaged, cut off, or have no room."""

import contextlib
import errno
import json
import os
import pathlib
import random
import resource
import shutil
import subprocess
import sys
import time

import faulty_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, environment
from orbax.checkpoint import v1 as ocp
from saved_steps import (
  POINTS,
  ROWS,
  assert_whole,
  damage,
  draw_damages,
  files,
  find_after_damage,
  save,
  shapes,
  state,
)

from flaxmlm import InputError
from flaxmlm.storage import manifests, saves
from flaxmlm.training import checkpoints
from flaxmlm.training.checkpoints import SaveError, Saver


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> pathlib.Path:
  """A folder with the steps 1, 2 and 3."""
  folder = tmp_path_factory.mktemp("checkpoints") / "three"
  save(folder, 1, 2, 3)
  return folder


def check_damage(three, tmp_path, name: str, how: str, seed: int) -> None:
  copy, draw = tmp_path / f"{how} {seed}", random.Random(seed)
  refused, said, step = find_after_damage(three, copy, name, how, draw)
  assert "/3: " in refused and "checkpoint.strict=True" in refused
  assert step == 2, (name, how, seed)
  assert len(said) == 1 and f"/3: {name} " in said[0], said


def test_damage_to_any_file_is_named_and_the_newest_whole_step_is_taken(
  three, tmp_path
):
  names = files(three / "3")
  assert len(names) > 6 and "manifest.json" in names
  for seed, name in enumerate(names):
    for how in ("flip", "cut", "delete"):
      if how == "delete" or (three / "3" / name).stat().st_size:
        check_damage(three, tmp_path, name, how, seed)


@pytest.mark.slow
def test_hundreds_of_damages_are_all_named(three, tmp_path):
  drawn = draw_damages(three / "3", random.Random(7))
  for seed, (name, how) in enumerate(drawn):
    check_damage(three, tmp_path, name, how, seed)


def test_what_is_taken_has_the_very_numbers_that_it_had(three, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(three, folder)
  assert_whole(folder, 3)
  for step in (3, 2):
    data = max((folder / str(step)).rglob("*"), key=lambda p: p.stat().st_size)
    damage(data, "flip", random.Random(step))
  assert_whole(folder, 1)
  # The run goes on, and saves the same steps again.
  save(folder, 2, 3, newest=1)
  assert_whole(folder, 3)
  assert sorted(os.listdir(folder)) == ["1", "2", "2.broken", "3", "3.broken"]


def test_none_whole_is_an_error_and_nothing_is_touched(three, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(three, folder)
  for step in (1, 2, 3):
    (folder / str(step) / "manifest.json").unlink()
  for _ in range(2):
    with pytest.raises(InputError, match="no step there is whole") as error:
      saves.find_newest(str(folder), strict=False, say=print)
    for step in (1, 2, 3):
      assert f"/{step}: manifest.json is missing" in str(error.value)
  assert sorted(os.listdir(folder)) == ["1", "2", "3"]
  assert saves.find_newest(str(tmp_path / "no"), strict=True, say=print) is None


def test_a_manifest_of_another_step_is_none(three, tmp_path):
  shutil.copytree(three / "1", tmp_path / "1")
  shutil.copytree(three / "3", tmp_path / "5")
  said = []
  facts = saves.find_newest(str(tmp_path), strict=False, say=said.append)
  assert facts["step"] == 1 and "its manifest is of step 3" in said[0]


def test_readers_name_what_is_damaged_and_change_nothing(
  three, tmp_path, capsys
):
  folder = tmp_path / "run"
  shutil.copytree(three, folder)
  (folder / "3" / "state" / "_METADATA").unlink()
  step, params = checkpoints.restore_params(str(folder), shapes().params)
  assert step == 2
  np.testing.assert_array_equal(params["w"], state(2).params["w"])
  assert "/3: state/_METADATA is missing; step 2" in capsys.readouterr().err
  assert sorted(os.listdir(folder)) == ["1", "2", "3"]


def test_other_readers_of_orbax_folders_see_nothing_else(three, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(three, folder)
  damage(folder / "3" / "state" / "_METADATA", "flip", random.Random(0))
  saves.find_newest(str(folder), strict=False, say=print)
  with ocp.training.Checkpointer(str(folder)) as other:
    assert [found.step for found in other.checkpoints] == [1, 2]
    got = other.load(abstract_state=shapes()._asdict())
  np.testing.assert_array_equal(got["params"]["w"], state(2).params["w"])


def test_other_arrays_are_refused_by_name(three):
  facts = saves.check_newest(str(three), print)
  for name, other in (
    ("bfloat16", jax.ShapeDtypeStruct((ROWS, 1024), jnp.bfloat16)),
    ("shape", jax.ShapeDtypeStruct((ROWS, 512), jnp.float32)),
  ):
    wanted = shapes()._replace(params={"w": other})
    with pytest.raises(InputError, match=r"params/w is float32\[512,1024\]"):
      checkpoints.restore(str(three), facts, wanted)
    assert name
  wanted = shapes()._replace(params={"v": shapes().params["w"]})
  with pytest.raises(InputError, match="params/v is not there"):
    checkpoints.restore(str(three), facts, wanted)


def test_the_newest_the_best_and_every_nth_stay(tmp_path):
  losses = {10: 3.0, 20: 1.0, 30: float("nan"), 40: 2.0, 50: 4.0, 60: None}
  saver = Saver(str(tmp_path), keep=2, best=1, every=30)
  for step, loss in losses.items():
    saver.close(state(step), loss)
  assert saves.list_steps(str(tmp_path)) == [20, 30, 50, 60]
  # A damaged one isn't counted, and isn't removed.
  (tmp_path / "60" / "manifest.json").unlink()
  assert saves.remove_old(str(tmp_path), keep=1, best=0, every=0) == [20, 30]
  assert saves.list_steps(str(tmp_path)) == [50, 60]


def test_nothing_older_goes_before_the_newer_is_read_back(
  tmp_path, monkeypatch, capsys
):
  saver = save(tmp_path, 1, keep=1, max_failures=2)
  flush = manifests._flush

  def decay(path: str) -> None:
    """A disk that doesn't give back what was written."""
    if "/d/" in path:
      damage(pathlib.Path(path), "flip", random.Random(0))
    flush(path)

  monkeypatch.setattr(manifests, "_flush", decay)
  saver.save(state(2), None)
  saver.wait()
  assert saver.failed()
  saver.count_failure()
  assert "is read otherwise than it was written" in capsys.readouterr().err
  assert os.listdir(tmp_path) == ["1"]
  monkeypatch.undo()
  saver.save(state(3), None)
  saver.wait()
  assert os.listdir(tmp_path) == ["3"]
  assert_whole(tmp_path, 3)


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_point_of_a_save_leaves_a_whole_step(point, tmp_path):
  folder, step = tmp_path / "run", POINTS[point][-1]
  done = subprocess.run(
    [sys.executable, ROOT / "tests" / "saved_steps.py", folder, point],
    env=environment() | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 9, done.stderr
  assert_whole(folder, step)
  save(folder, step + 1, keep=1, newest=step)
  assert os.listdir(folder) == [str(step + 1)]
  assert_whole(folder, step + 1)


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, megabytes: int):
  """Mounts a file system of its own; the test is skipped where it may not."""
  with faulty_runs.small_disk(folder, megabytes) as there:
    if not there:
      pytest.skip("no file system can be mounted here")
    yield folder


def test_no_room_is_seen_before_a_save(tmp_path, capsys):
  with small_disk(tmp_path / "disk", 24) as disk:
    folder = disk / "run"
    saver = save(folder, 1, max_failures=3, retry_seconds=0.0)
    (disk / "filler").write_bytes(bytes(14 << 20))
    saver.save(state(2), None)
    said = capsys.readouterr().err
    assert "no checkpoint of step 2" in said and "MB" not in said
    assert "GB free" in said and "failure 1 of 3 in a row" in said
    assert saver.is_due_again() and not saver.is_due_again()
    assert_whole(folder, 1)
    (disk / "filler").unlink()
    saver.close(state(3), None)
    assert_whole(folder, 3)


@pytest.mark.parametrize("how", ["disk", "limit"])
def test_a_disk_that_fills_up_during_a_save(how, tmp_path, monkeypatch, capsys):
  """A small disk; where that may not be, files that may not grow."""
  monkeypatch.setattr(saves, "find_room", lambda folder: None)
  with contextlib.ExitStack() as stack:
    disk = tmp_path
    if how == "disk":
      disk = stack.enter_context(small_disk(tmp_path / "disk", 12))
    folder = disk / "run"
    saver = save(folder, 1, keep=1, max_failures=3, retry_seconds=0.0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if how == "disk":
      (disk / "filler").write_bytes(bytes(6 << 20))
    else:
      stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
      resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    for step in (2, 3):
      saver.save(state(step), None)
      deadline = time.monotonic() + 60
      while not saver.failed():
        assert time.monotonic() < deadline
        time.sleep(0.01)
      assert not saver.failed()  # told once
      saver.count_failure()
      assert f"no checkpoint of step {step}" in capsys.readouterr().err
      assert os.listdir(folder) == ["1"]
    assert_whole(folder, 1)
    saver.save(state(4), None)
    saver.wait()
    with pytest.raises(SaveError, match="failure 3 of 3 in a row"):
      saver.count_failure()
    # There is room again.
    if how == "disk":
      (disk / "filler").unlink()
    else:
      resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    save(folder, 5, newest=1, keep=1)
    assert_whole(folder, 5)
    assert os.listdir(folder) == ["5"]


def test_a_step_that_came_though_its_save_failed_counts(
  tmp_path, monkeypatch, capsys
):
  saver = save(tmp_path, 1, max_failures=2, retry_seconds=0.0)
  publish = saves.publish

  def fail_late(*args) -> None:
    publish(*args)
    raise OSError("no answer")

  monkeypatch.setattr(saves, "publish", fail_late)
  saver.close(state(2), None)
  assert "no checkpoint of step 2: no answer" in capsys.readouterr().err
  assert_whole(tmp_path, 2)
  monkeypatch.undo()
  saver.close(state(3), None)
  assert saves.list_steps(str(tmp_path)) == [1, 2, 3]


def test_a_file_system_that_cant_flush_folders_will_do(tmp_path, monkeypatch):
  fsync = os.fsync

  def refuse(number: int) -> None:
    if os.path.isdir(f"/proc/self/fd/{number}"):
      raise OSError(errno.EINVAL, "Invalid argument")
    fsync(number)

  monkeypatch.setattr(os, "fsync", refuse)
  save(tmp_path, 1, max_failures=1)
  assert_whole(tmp_path, 1)


def test_a_success_in_between_starts_the_count_again(tmp_path):
  saver = save(tmp_path, 1, max_failures=2, retry_seconds=0.0)
  for step in (2, 4, 6):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
      saver.save(state(step), None)
      saver.wait()
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    saver.save(state(step + 1), None)  # counts that one, at the latest
    saver.wait()
  assert saves.list_steps(str(tmp_path)) == [1, 3, 5, 7]


def test_the_manifest_says_what_the_run_is(tmp_path):
  save(tmp_path, 1, record={"store": "abc"})
  text = json.loads((tmp_path / "1" / "manifest.json").read_text())
  body = text["body"]
  assert body["run"] == {"store": "abc"} and body["step"] == 1
  assert body["arrays"]["params/w"] == "float32[512,1024]"
  assert set(body["files"]) == set(files(tmp_path / "1")) - {"manifest.json"}
