"""Checkpoints that are damaged, cut off, or have no room."""

import contextlib
import json
import os
import pathlib
import random
import resource
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, environment
from orbax.checkpoint import v1 as ocp

from flaxmlm import InputError
from flaxmlm.storage import manifests, saves
from flaxmlm.training import checkpoints
from flaxmlm.training.checkpoints import SaveError, Saver
from flaxmlm.training.step import State

ROWS = 512  # of 4 kB


def state(step: int) -> State:
  """A state of 4 MB that no compression makes smaller; a function of step."""
  keys = jax.random.split(jax.random.key(step))
  params = {"w": jax.random.normal(keys[0], (ROWS, 1024))}
  moments = {"w": jax.random.normal(keys[1], (ROWS, 1024))}
  return State(jnp.int32(step), params, moments)


def shapes() -> State:
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    jax.eval_shape(lambda: state(0)),
  )


def save(folder, *steps: int, **options) -> Saver:
  saver = Saver(str(folder), **{"keep": 9} | options)
  for step in steps:
    saver.close(state(step), None)
  return saver


def assert_whole(folder, step: int, said=()) -> None:
  """The newest step is this one, with the very numbers that it had."""
  lines = list(said)
  facts = saves.find_newest(str(folder), strict=False, say=lines.append)
  assert facts is not None and facts["step"] == step
  got = checkpoints.restore(str(folder), facts, shapes())
  for a, b in zip(
    jax.tree.leaves(got), jax.tree.leaves(state(step)), strict=True
  ):
    np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> pathlib.Path:
  """A folder with the steps 1, 2 and 3."""
  folder = tmp_path_factory.mktemp("checkpoints") / "three"
  save(folder, 1, 2, 3)
  return folder


def files(folder: pathlib.Path) -> list[str]:
  found = [path for path in folder.rglob("*") if path.is_file()]
  return sorted(str(path.relative_to(folder)) for path in found)


def damage(path: pathlib.Path, how: str, draw: random.Random) -> bool:
  """Damages a file; False if it has nothing to flip or to cut."""
  data = bytearray(path.read_bytes())
  if how == "delete":
    path.unlink()
  elif not data:
    return False
  elif how == "flip":
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(data))
  else:
    path.write_bytes(bytes(data[: draw.randrange(len(data))]))
  return True


def check_damage(three, tmp_path, name: str, how: str, seed: int) -> None:
  folder = tmp_path / f"{how} {seed}"
  folder.mkdir()
  for step in (1, 2, 3):  # the older ones aren't touched
    copy = shutil.copytree if step == 3 else os.symlink
    copy(three / str(step), folder / str(step))
  if not damage(folder / "3" / name, how, random.Random(seed)):
    return
  with pytest.raises(InputError, match=r"/3: .*checkpoint\.strict=True"):
    saves.find_newest(str(folder), strict=True, say=print)
  said = []
  facts = saves.find_newest(str(folder), strict=False, say=said.append)
  assert facts["step"] == 2, (name, how, seed)
  assert len(said) == 1 and f"/3: {name} " in said[0], said
  assert (folder / "3.broken").is_dir() and not (folder / "3").exists()
  shutil.rmtree(folder)


def test_damage_to_any_file_is_named_and_the_newest_whole_step_is_taken(
  three, tmp_path
):
  names = files(three / "3")
  assert len(names) > 6 and "manifest.json" in names
  for seed, name in enumerate(names):
    for how in ("flip", "cut", "delete"):
      check_damage(three, tmp_path, name, how, seed)


@pytest.mark.slow
def test_hundreds_of_damages_are_all_named(three, tmp_path):
  draw = random.Random(7)
  names = [n for n in files(three / "3") if (three / "3" / n).stat().st_size]
  sizes = [(three / "3" / name).stat().st_size for name in names]
  for how, times in (("flip", 200), ("cut", 50), ("delete", 50)):
    for seed in range(times):
      # Half of them anywhere in the bytes, half in any file.
      name = draw.choices(names, sizes if seed % 2 else None)[0]
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


KILL = """
import os, sys
import test_checkpoints as t
from flaxmlm.storage import manifests, saves
from flaxmlm.training import checkpoints
folder, module, name = sys.argv[1:]
saver = t.save(folder, 1, keep=1)
def die(*args, **kwargs):
  os._exit(9)
if name == "result":  # Orbax' threads are at work
  real = checkpoints.ocp.save_async
  def save_async(*args):
    real(*args)
    die()
  checkpoints.ocp.save_async = save_async
elif name == "manifest":  # half of it is written
  real = os.fsync
  def fsync(file):
    path = os.readlink(f"/proc/self/fd/{file}")
    if path.endswith("manifest.json.tmp"):
      os.ftruncate(file, 100)
      die()
    real(file)
  os.fsync = fsync
else:
  where = {
    "orbax": checkpoints.ocp,
    "saves": saves,
    "manifests": manifests,
    "files": saves.files,
  }
  setattr(where[module], name, die)
saver.close(t.state(2), None)
"""


@pytest.mark.parametrize(
  ("module", "name", "step"),
  [
    pytest.param("orbax", "save_async", 1, id="before data"),
    pytest.param("", "result", 1, id="mid-data"),
    pytest.param("manifests", "seal", 1, id="before manifest"),
    pytest.param("", "manifest", 1, id="mid-manifest"),
    pytest.param("saves", "publish", 1, id="before its name"),
    pytest.param("saves", "remove_old", 2, id="before removal"),
    pytest.param("files", "remove_folder", 2, id="mid-retention"),
  ],
)
def test_a_kill_at_any_point_of_a_save_leaves_a_whole_step(
  module, name, step, tmp_path
):
  folder = tmp_path / "run"
  done = subprocess.run(
    [sys.executable, "-c", KILL, str(folder), module, name],
    cwd=ROOT / "tests",
    env=environment() | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"},
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
  folder.mkdir()
  size = f"size={megabytes}m"
  line = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)]
  if not shutil.which("mount") or subprocess.run(line).returncode:
    pytest.skip("no file system can be mounted here")
  try:
    yield folder
  finally:
    subprocess.run(["umount", "-l", str(folder)], check=True)


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
