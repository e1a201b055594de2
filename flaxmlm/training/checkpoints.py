"""Saving and restoring the state with Orbax.

A checkpoint is `DIRECTORY/STEP/`: parameters, optimizer state and the step, and
a manifest with the sha256 of every file (storage/manifests.py). Everything else
about a run is a function of its config, which the manifest has too.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from flaxmlm import InputError
from flaxmlm.models.model import Params
from flaxmlm.storage import files, manifests, saves
from flaxmlm.training import hosts
from flaxmlm.training.step import State

_SPARE_BYTES = 8 << 20  # beside the arrays, and for what else is written


class SaveError(Exception):
  """Checkpoints can't be saved, and were tried often enough."""


class Saver:
  """Saves states in the background, notices failures, and tries again.

  All processes make the same calls, at the same steps. What is answered is only
  about this one; the loop puts it to the vote.

  A save is: the state is copied from the devices, while the step loop waits;
  Orbax writes it to STEP.saving; all files are flushed, read back, hashed, and
  the manifest is written; the folder gets its name, STEP; older ones go.
  """

  def __init__(
    self,
    directory: str,
    *,
    newest: int | None = None,
    keep: int,
    best: int = 0,
    every: int = 0,
    record: Mapping[str, Any] | None = None,
    max_failures: int = 10,
    retry_seconds: float = 60.0,
    before: Callable[[], None] = lambda: None,
  ):
    """Makes the folder if it is missing.

    Args:
      directory: The folder of checkpoints.
      newest: The step that is there, and whole; None: there is none.
      keep: Newest checkpoints to keep.
      best: Checkpoints of the least validation loss to keep.
      every: Steps whose multiples are kept for ever; 0: none.
      record: What the manifest says of the run.
      max_failures: Failures in a row that are too many.
      retry_seconds: How long to wait after one.
      before: Called by the first process before it saves; if it raises
        InputError, the run ends, and no failure is counted.

    Raises:
      InputError: The folder can't be made.
    """
    _quiet()
    try:
      files.make_folder(directory)
    except OSError as error:
      raise InputError(f"{directory}: can't be made: {error}") from error
    self._directory = directory
    self._retention = {"keep": keep, "best": best, "every": every}
    self._record = dict(record or {})
    self._max_failures = max_failures
    self._retry_seconds = retry_seconds
    self._before = before
    self._thread: threading.Thread | None = None
    self._whole = newest  # the newest step that is on the disk
    self._step: int | None = None  # of the newest try
    self._reason: str | None = None  # why that failed, here
    self._told = False  # the reason was told by `failed`
    self._counted = False  # the newest try counts as failed, everywhere
    self._failures = 0  # in a row, the same number in all processes
    self._again = 0.0  # when to try again

  def save(self, state: State, loss: float | None) -> None:
    """Saves in the background; blocks while the state is copied.

    Waits for the save before, if that still goes on.

    Args:
      state: What to save; it may be donated afterwards.
      loss: Of the validation at that step; None if there was none.

    Raises:
      SaveError: It was one failure too many.
      InputError: Of `before`.
    """
    self._settle()
    step = int(state.step)
    if step == self._whole:
      return
    self._step, self._reason = step, None
    self._told = self._counted = False
    for part in (self._prepare, self._begin):
      try:
        part(state, loss)
      except InputError:  # it isn't this process that may save
        raise
      except Exception as error:  # any, of a disk or a network
        self._reason = _describe(error)
      if hosts.any_of(self._reason is not None):
        self._drop(step)
        self.count_failure()
        return

  def failed(self) -> bool:
    """Whether the save has failed since this was last asked; never waits."""
    told = self._told
    self._told = self._reason is not None
    return self._told and not told and not self._counted

  def is_due_again(self) -> bool:
    """Whether it is time to save again; the first process says so, once."""
    due = self._counted and time.monotonic() >= self._again
    due &= jax.process_index() == 0
    if due:
      self._again = float("inf")
    return due

  def count_failure(self) -> None:
    """Takes note, in all processes, that the newest save has failed in one.

    Raises:
      SaveError: It was one too many.
    """
    if self._counted:
      return
    self._counted = True
    self._failures += 1
    self._again = time.monotonic() + self._retry_seconds
    reason = self._reason or "another process can't write its part"
    line = (
      f"no checkpoint of step {self._step:,}: {reason} (failure"
      f" {self._failures} of {self._max_failures} in a row)"
    )
    if self._failures >= self._max_failures:
      raise SaveError(line)
    if self._reason is not None or jax.process_index() == 0:
      _say(
        f"WARNING: {line}; the run goes on, and tries again in"
        f" {self._retry_seconds:g} s"
      )

  def close(self, state: State, loss: float | None) -> None:
    """Waits until this state, the last one, is on the disk.

    Raises:
      SaveError: It can't be saved.
    """
    self._settle()
    while self._whole != int(state.step):
      if self._counted:
        time.sleep(self._retry_seconds)
      self.save(state, loss)
      self._settle()

  def newest(self) -> int | None:
    """Waits for the save before; returns the newest step that is on the disk.

    All processes have to ask, and are answered the same.
    """
    try:
      self._settle()
    except SaveError as error:
      _say(f"WARNING: {error}")
    return self._whole

  def wait(self) -> None:
    """Waits until nothing is being saved."""
    if self._thread is not None:
      self._thread.join()

  def _settle(self) -> None:
    """Waits for the save before, and counts it: as failed, or as good."""
    self.wait()
    if self._step is None:
      return
    if hosts.any_of(self._reason is not None):
      self.count_failure()
    else:
      self._whole, self._failures = self._step, 0

  def _prepare(self, state: State, loss: float | None) -> None:
    """Raises an error if it can't be saved for sure."""
    if jax.process_index() == 0:
      self._before()
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    _check_room(self._directory, size)

  def _begin(self, state: State, loss: float | None) -> None:
    """Has Orbax copy the state, and leaves the rest to a thread."""
    step = int(state.step)
    facts = {
      "step": step,
      "loss": loss,
      "arrays": describe(state),
      "run": self._record,
    }
    response = ocp.save_async(_saving(self._directory, step), state._asdict())

    def finish() -> None:
      try:
        response.result()
        if jax.process_index() == 0:
          finish_step(self._directory, step, facts)
      except Exception as error:  # any, of a disk or a network
        self._drop(step)
        self._reason = _describe(error)
        return
      try:
        if jax.process_index() == 0:
          saves.remove_old(self._directory, **self._retention)
      except Exception as error:
        _say(f"WARNING: an old checkpoint can't be removed: {_describe(error)}")

    self._thread = threading.Thread(target=finish, name=f"save {step}")
    self._thread.start()

  def _drop(self, step: int) -> None:
    """Removes what a failed save has left, to make room."""
    if jax.process_index() == 0:
      saving = _saving(self._directory, step)
      for path in (saving, f"{saving}.orbax-checkpoint-tmp"):
        try:
          files.remove_folder(path)
        except Exception as error:
          _say(f"WARNING: {path} can't be removed: {_describe(error)}")


def finish_step(directory: str, step: int, facts: Mapping[str, Any]) -> None:
  """Seals a step that Orbax has written, and gives it its name."""
  manifests.seal(_saving(directory, step), facts)
  if not files.is_remote(directory):
    saves.publish(directory, step)


def describe(state: State) -> dict[str, str]:
  """Returns dtype and shape of every array, by its path in the state.

  >>> import numpy as np
  >>> describe(State(np.int32(3), {"w": np.zeros((2, 3), np.float32)}, ()))
  {'step': 'int32[]', 'params/w': 'float32[2,3]'}
  """
  found = jax.tree_util.tree_flatten_with_path(state)[0]
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): (
      f"{x.dtype}[{','.join(map(str, x.shape))}]"
    )
    for path, x in found
  }


def restore(directory: str, facts: Mapping[str, Any], shapes: State) -> State:
  """Returns a state that was saved, on any mesh.

  Args:
    directory: The folder of checkpoints.
    facts: The manifest of the step, which has been checked.
    shapes: Shape, dtype and sharding of every array.

  Raises:
    InputError: The arrays that were saved are others.
  """
  loaded = _load(directory, facts, shapes, shapes._asdict())
  return State(**loaded)


def restore_params(directory: str, shapes: Params) -> tuple[int, Params]:
  """Returns the step and the parameters of the newest whole checkpoint.

  Args:
    directory: A folder of checkpoints; nothing is changed there.
    shapes: Shape and dtype of every parameter.

  Raises:
    InputError: There is no checkpoint, or none is whole.
  """
  facts = saves.check_newest(directory, _say)
  if facts is None:
    raise InputError(f"{directory}: no checkpoint there yet; train first")
  loaded = _load(
    directory, facts, State(None, shapes, None), {"params": shapes}
  )
  return facts["step"], loaded["params"]


def restore_other(directory: str, shapes: State) -> State:
  """Returns the newest state of another run, whose folder stays as it is.

  Args:
    directory: A folder of checkpoints.
    shapes: Shape, dtype and sharding of every array, on any mesh.

  Raises:
    InputError: There is no checkpoint, or none is whole.
  """
  facts = saves.check_newest(directory, _say)
  if facts is None:
    raise InputError(f"{directory}: no checkpoint there yet; train first")
  return restore(directory, facts, shapes)


def _load(
  directory: str,
  facts: Mapping[str, Any],
  wanted: State,
  shapes: dict[str, Any],
) -> dict[str, Any]:
  """Returns the parts of a state that are wanted.

  Orbax would convert another dtype without a word, and speak of other shapes as
  an "incompatible handler".
  """
  _quiet()
  there = facts["arrays"]
  for name, want in describe(wanted).items():
    if there.get(name) != want:
      raise InputError(
        f"{directory}/{facts['step']}: {name} is"
        f" {there.get(name, 'not there')}, and the config wants {want}"
      )
  context = ocp.Context()
  context.pytree.loading.partial_load = True
  with context:
    return ocp.load(f"{directory}/{facts['step']}", shapes)


def _saving(directory: str, step: int) -> str:
  """Returns where Orbax writes a step to."""
  suffix = "" if files.is_remote(directory) else ".saving"
  return f"{directory}/{step}{suffix}"


def _check_room(directory: str, size: int) -> None:
  """Raises OSError if a state has no room, or nothing can be written at all.

  Orbax leaves threads behind, for minutes, if it can't even make a folder.
  """
  free = saves.find_room(directory)
  if free is None:
    return
  if free < size + _SPARE_BYTES:
    raise OSError(
      f"{directory} has {free / 1e9:.3f} GB free, and it takes up to"
      f" {(size + _SPARE_BYTES) / 1e9:.3f} GB"
    )
  with tempfile.TemporaryFile(dir=directory) as file:
    file.write(bytes(4096))


def _describe(error: BaseException) -> str:
  """Returns an error in a line."""
  text = str(error).strip().splitlines() or [type(error).__name__]
  return (
    text[0]
    if isinstance(error, OSError)
    else (f"{type(error).__name__}: {text[0]}")
  )


def _say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def _quiet() -> None:
  """Keeps from the terminal what Orbax tells of each file that it touches."""
  logging.getLogger("absl").setLevel(logging.CRITICAL)
