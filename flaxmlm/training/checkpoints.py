"""Saving and restoring the state with Orbax.

A checkpoint is `DIRECTORY/STEP/`: parameters, optimizer state and the step, and
a manifest with the sha256 of every file (storage/manifests.py). Everything else
about a run is a function of its config, which the manifest has too.
"""

from __future__ import annotations

import json
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
from flaxmlm.training.watchdog import Watch

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
    watch: Watch | None = None,
    check: Callable[[], None] = lambda: None,
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
      watch: Is told when something waits for a save, and how long saves take.
      check: Called by the first process, from any thread, before it seals or
        removes a step; raises InputError if it no longer may.

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
    self._watch = watch or Watch()
    self._check = check
    self._thread: threading.Thread | None = None
    self._given_up = threading.Event()  # what the thread does counts no more
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
    self._watch.enter("save")
    self._settle()
    step = int(state.step)
    if step == self._whole:
      return
    again = self._counted and step == self._step
    self._step, self._reason = step, None
    self._told = self._counted = False
    if again and hosts.any_of(self._is_there(state)):
      return  # `_settle` counts it
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

  def failed(self) -> int:
    """The step whose save has failed since this was last asked, or 0.

    Never waits.
    """
    told = self._told
    self._told = self._reason is not None
    new = self._told and not told and not self._counted
    return self._step or 0 if new else 0

  def is_due_again(self) -> bool:
    """Whether it is time to save again; the first process says so, once."""
    due = self._counted and time.monotonic() >= self._again
    due &= jax.process_index() == 0
    if due:
      self._again = float("inf")
    return due

  def count_failure(self, step: int | None = None) -> None:
    """Takes note, in all processes, that the newest save has failed in one.

    Args:
      step: Of the save; that of an older one has been counted since.

    Raises:
      SaveError: It was one too many.
    """
    if self._counted or step not in (None, self._step):
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
    self._watch.enter("save")
    self._settle()
    while self._whole != int(state.step):
      if self._counted:
        self._watch.enter("")
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

  def note(self, record: Mapping[str, Any]) -> None:
    """Takes what manifests say of the run from now on, beside the rest."""
    self._record |= record

  def wait(self) -> None:
    """Waits until nothing is being saved."""
    if self._thread is not None:
      self._thread.join()

  def _settle(self) -> None:
    """Waits for the save before, and counts it: as failed, or as good.

    Where one process has failed, the others' threads wait for it in vain, for
    20 minutes (Orbax' barrier): they are left to themselves.
    """
    if self._step is None:
      return
    busy = True
    while busy:
      busy = self._is_busy(seconds=0.1)
      if hosts.any_of(self._reason is not None):
        self._give_up()
        self.count_failure()
        return
      busy = hosts.any_of(busy)
    self._whole, self._failures = self._step, 0

  def _is_busy(self, seconds: float) -> bool:
    """Whether this process still saves, after a wait; alone it waits longer."""
    if self._thread is None:
      return False
    self._thread.join(seconds if jax.process_count() > 1 else None)
    return self._thread.is_alive()

  def _give_up(self) -> None:
    """Leaves a save that has failed somewhere; removes what there is of it."""
    self._given_up.set()
    self._thread = None
    self._drop(self._step)  # others may have written since that was last done

  def _is_there(self, state: State) -> bool:
    """Whether what failed came after all; the first process says so."""
    step = int(state.step)
    if jax.process_index() != 0:
      return False
    try:
      facts = manifests.check(f"{self._directory}/{step}")
    except (manifests.BrokenError, OSError):
      return False
    own = json.loads(json.dumps(self._record))
    return (
      facts.get("step") == step
      and facts["arrays"] == describe(state)
      and facts["run"] == own
    )

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
    began = time.perf_counter()
    response = ocp.save_async(_saving(self._directory, step), state._asdict())
    given_up = self._given_up = threading.Event()

    def finish() -> None:
      try:
        response.result()
        if jax.process_index() == 0 and not given_up.is_set():
          self._check()
          finish_step(self._directory, step, facts)
        self._watch.ended("save", time.perf_counter() - began)
      except Exception as error:  # any, of a disk or a network
        if given_up.is_set():
          return
        self._drop(step)
        self._reason = _describe(error)
        return
      if given_up.is_set():
        return
      try:
        if jax.process_index() == 0:
          self._check()
          saves.remove_old(self._directory, **self._retention)
      except Exception as error:
        _say(f"WARNING: an old checkpoint can't be removed: {_describe(error)}")

    self._thread = threading.Thread(
      target=finish, name=f"save {step}", daemon=True
    )
    self._thread.start()

  def _drop(self, step: int) -> None:
    """Removes what a failed save has left, to make room.

    In a bucket, where that has the step's own name, a sealed one stays: it came
    after all, or is that of a process that has taken over.
    """
    if jax.process_index() == 0:
      saving = _saving(self._directory, step)
      remote = files.is_remote(saving)
      for path in (saving, f"{saving}.orbax-checkpoint-tmp"):
        try:
          self._check()
          if not (remote and manifests.is_sealed(path)):
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
