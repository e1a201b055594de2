"""Steps to save and to damage, and a save that is killed on its way.

  python saved_steps.py FOLDER POINT

saves step 1 in a folder, and kills itself at a point of the save of step 2.
Tests and `benchmarks.faults` use it.
"""

from __future__ import annotations

import os
import pathlib
import random
import shutil
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from flaxmlm import InputError
from flaxmlm.storage import manifests, saves
from flaxmlm.training import checkpoints
from flaxmlm.training.checkpoints import Saver
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


def damage(path: pathlib.Path, how: str, draw: random.Random) -> None:
  """Damages a file, which has a byte at least unless it is deleted."""
  data = bytearray(path.read_bytes())
  if how == "delete":
    path.unlink()
  elif how == "flip":
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(data))
  else:
    path.write_bytes(bytes(data[: draw.randrange(len(data))]))


def files(folder: pathlib.Path) -> list[str]:
  found = [path for path in folder.rglob("*") if path.is_file()]
  return sorted(str(path.relative_to(folder)) for path in found)


def draw_damages(
  step: pathlib.Path, draw: random.Random, part: int = 1
) -> Iterator[tuple[str, str]]:
  """Yields file and kind of 200 flips, 50 truncations and 50 deletions.

  Half of them are anywhere in the bytes, half in any file.

  Args:
    step: The folder of a checkpoint.
    part: How many times fewer.
  """
  names = [name for name in files(step) if (step / name).stat().st_size]
  sizes = [(step / name).stat().st_size for name in names]
  for how, times in (("flip", 200), ("cut", 50), ("delete", 50)):
    for number in range(times // part):
      yield draw.choices(names, sizes if number % 2 else None)[0], how


def find_after_damage(
  steps: pathlib.Path,
  folder: pathlib.Path,
  name: str,
  how: str,
  draw: random.Random,
) -> tuple[str, list[str], int]:
  """Damages a file of step 3 in a copy of the steps 1, 2 and 3.

  Returns:
    What `strict` is told, what the others are told, and the step that is taken.
  """
  folder.mkdir()
  for step in (1, 2, 3):  # the older ones aren't touched
    copy = shutil.copytree if step == 3 else os.symlink
    copy(steps / str(step), folder / str(step))
  damage(folder / "3" / name, how, draw)
  refused = ""
  try:
    saves.find_newest(str(folder), strict=True, say=print)
  except InputError as error:
    refused = str(error)
  said = []
  facts = saves.find_newest(str(folder), strict=False, say=said.append)
  assert (folder / "3.broken").is_dir() != (folder / "3").is_dir()
  shutil.rmtree(folder)
  return refused, said, facts["step"]


# Of a save: the function in whose place the process ends, and the step that is
# whole after that. Two have no such function.
POINTS = {
  "before data": ("orbax", "save_async", 1),
  "mid-data": ("", "result", 1),
  "before manifest": ("manifests", "seal", 1),
  "mid-manifest": ("", "manifest", 1),
  "before its name": ("saves", "publish", 1),
  "before removal": ("saves", "remove_old", 2),
  "mid-retention": ("files", "remove_folder", 2),
}


def kill_at(folder: str, point: str) -> None:
  """Saves step 1, and ends this process, with code 9, in the save of step 2."""
  module, name, _ = POINTS[point]
  saver = save(folder, 1, keep=1)

  def die(*args, **kwargs):
    os._exit(9)

  if name == "result":  # Orbax' threads are at work
    save_async = checkpoints.ocp.save_async

    def begin(*args):
      save_async(*args)
      die()

    checkpoints.ocp.save_async = begin
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
  saver.close(state(2), None)


if __name__ == "__main__":
  kill_at(*sys.argv[1:])
