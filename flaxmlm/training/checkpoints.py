"""Saving and restoring the state with Orbax.

A checkpoint is `DIRECTORY/STEP/`: parameters, optimizer state and the step.
Everything else about a run is a function of its config.
"""

from __future__ import annotations

import logging
from typing import Any

from orbax.checkpoint import v1 as ocp

from flaxmlm import InputError
from flaxmlm.models.model import Params
from flaxmlm.storage.remote import list_names
from flaxmlm.training.step import State


def open_folder(directory: str, *, keep: int) -> ocp.training.Checkpointer:
  """Opens a folder of checkpoints; it is made if it is missing.

  Args:
    directory: The folder; remains of a save that was killed are removed.
    keep: Newest checkpoints to keep; older ones go once a newer is whole.
  """
  _quiet()
  return ocp.training.Checkpointer(
    directory,
    save_decision_policy=ocp.training.save_decision_policies.InitialSavePolicy(),
    preservation_policy=ocp.training.preservation_policies.LatestN(keep),
    cleanup_tmp_directories=True,
  )


def save(checkpointer: ocp.training.Checkpointer, state: State) -> None:
  """Saves in the background; blocks only while the state is copied.

  An error of the save before is raised here. A step that is on disk already
  is left as it is.
  """
  step = int(state.step)
  if checkpointer.latest is None or checkpointer.latest.step < step:
    checkpointer.save_async(step, state._asdict(), force=True)


def restore(
  checkpointer: ocp.training.Checkpointer, shapes: State
) -> State | None:
  """Returns the newest state, or None if there is none.

  Args:
    checkpointer: Of `open_folder`.
    shapes: Shape, dtype and sharding of every array, on any mesh.
  """
  if checkpointer.latest is None:
    return None
  return State(**checkpointer.load(abstract_state=shapes._asdict()))


def restore_params(directory: str, shapes: Params) -> tuple[int, Params]:
  """Returns the step and the parameters of the newest checkpoint.

  Args:
    directory: A folder that `open_folder` was given; nothing is changed there.
    shapes: Shape and dtype of every parameter.

  Raises:
    InputError: There is no checkpoint.
  """
  step, loaded = _load_newest(directory, {"params": shapes})
  return step, loaded["params"]


def restore_other(directory: str, shapes: State) -> State:
  """Returns the newest state of another run, whose folder stays as it is.

  Args:
    directory: A folder that `open_folder` was given.
    shapes: Shape, dtype and sharding of every array, on any mesh.

  Raises:
    InputError: There is no checkpoint.
  """
  return State(**_load_newest(directory, shapes._asdict())[1])


def _load_newest(
  directory: str, shapes: dict[str, Any]
) -> tuple[int, dict[str, Any]]:
  _quiet()
  latest = None
  if list_names(directory):
    with ocp.training.Checkpointer(directory) as checkpointer:
      latest = checkpointer.latest
  if latest is None:
    raise InputError(f"{directory}: no checkpoint there yet; train first")
  context = ocp.Context()
  context.pytree.loading.partial_load = True
  with context:
    return latest.step, ocp.load(latest.path, shapes)


def _quiet() -> None:
  """Keeps from the terminal what Orbax tells of each file that it touches."""
  logging.getLogger("absl").setLevel(logging.ERROR)
