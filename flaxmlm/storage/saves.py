"""The steps in a run's folder of checkpoints: which are whole, which may go.

```
checkpoints/STEP/           a step, sealed by its manifest.json
checkpoints/STEP.saving/    being saved; of a killed run: worth nothing
checkpoints/STEP.removing/  being removed
checkpoints/STEP.broken/    was found to be damaged; for people to look at
```

In a bucket, where a folder can't be renamed at once, a step is saved and
removed under its own name. There Orbax' commit_success.txt comes behind all
that it writes, and the manifest last; these two go first.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any

from flaxmlm import InputError
from flaxmlm.storage import files, manifests

_COMMITTED = "commit_success.txt"


def list_steps(folder: str) -> list[int]:
  """Returns the steps in a folder, the newest last, whole or not."""
  names = files.list_names(folder)
  return sorted(int(name) for name in names if re.fullmatch(r"\d+", name))


def find_newest(
  folder: str, *, strict: bool, say: Callable[[str], None]
) -> Mapping[str, Any] | None:
  """Returns the manifest of the newest step that is whole, and checks that.

  Newer ones that are damaged are named and set aside, as STEP.broken. What a
  killed process left half saved or half removed goes. Only one process may
  train there.

  Args:
    folder: The folder of checkpoints; it may be missing.
    strict: Whether to refuse if any but the newest would be taken.
    say: Is told what is found.

  Returns:
    What the manifest says, with its `step`; None if nothing was ever saved.

  Raises:
    InputError: None is whole, or the newest one isn't under `strict`.
  """
  for name in sorted(files.list_names(folder)):
    if match := re.fullmatch(r"(\d+)\.(saving|removing)(\..*)?", name):
      if match[2] == "saving":
        say(
          f"{folder}/{name}: the save of step {match[1]} was cut off; removed"
        )
      files.remove_folder(f"{folder}/{name}")
  found, broken = _check_newest(folder)
  lines = {step: f"{folder}/{step}: {why}" for step, why in broken.items()}
  cut_off = [step for step in list_steps(folder) if _is_cut_off(folder, step)]
  # Where nothing was ever saved, that is the one step there.
  if found is None and lines and list(lines) != cut_off[:1]:
    raise InputError(
      f"{'; '.join(lines.values())}; no step there is whole: bring one back, or"
      " begin again in another --workdir"
    )
  for step in cut_off:
    say(f"{folder}/{step}: its save, or its removal, was cut off; removed")
    files.remove_folder(f"{folder}/{step}")
    lines.pop(step, None)
  if strict and lines:
    raise InputError(
      f"{'; '.join(lines.values())}; checkpoint.strict=True takes no older one"
    )
  for step, line in lines.items():
    aside = _set_aside(folder, step)
    say(
      f"WARNING: {line}; set aside as {aside}, step {found['step']} is taken in"
      " its place"
    )
  return found


def check_newest(
  folder: str, say: Callable[[str], None]
) -> Mapping[str, Any] | None:
  """Returns the manifest of the newest whole step, and changes nothing.

  Args:
    folder: The folder of checkpoints.
    say: Is told of newer steps that are damaged.

  Raises:
    InputError: There are steps, and none is whole.
  """
  found, broken = _check_newest(folder)
  lines = [f"{folder}/{step}: {why}" for step, why in broken.items()]
  if found is None and broken:
    raise InputError(f"{'; '.join(lines)}; no step there is whole")
  for line in lines:
    say(f"WARNING: {line}; step {found['step']} is taken in its place")
  return found


def _check_newest(
  folder: str,
) -> tuple[dict[str, Any] | None, dict[int, str]]:
  """Returns the newest whole step's manifest; what is wrong with newer ones."""
  broken = {}
  for step in reversed(list_steps(folder)):
    try:
      facts = manifests.check(f"{folder}/{step}")
      if facts.get("step") == step:
        return facts, broken
      broken[step] = f"its manifest is of step {facts.get('step')}"
    except manifests.BrokenError as error:
      broken[step] = str(error)
    except OSError as error:
      # Unless it is the disk's, it may well be readable another time.
      if isinstance(error, files.BucketError) or error.errno != errno.EIO:
        raise InputError(f"{folder}/{step}: can't be read: {error}") from error
      broken[step] = f"can't be read: {error}"
  return None, broken


def _is_cut_off(folder: str, step: int) -> bool:
  """Whether a step in a bucket was never whole, or is none any more."""
  path = f"{folder}/{step}"
  return (
    files.is_remote(folder)
    and not manifests.is_sealed(path)
    and not files.exists(f"{path}/{_COMMITTED}")
  )


def _set_aside(folder: str, step: int) -> str:
  names = set(files.list_names(folder))
  aside, number = f"{step}.broken", 1
  while aside in names:
    number += 1
    aside = f"{step}.broken-{number}"
  files.move_folder(f"{folder}/{step}", f"{folder}/{aside}")
  return aside


def publish(folder: str, step: int) -> None:
  """Gives STEP.saving, which is sealed, its name."""
  os.rename(f"{folder}/{step}.saving", f"{folder}/{step}")
  files.sync_folder(folder)


def choose(
  losses: Mapping[int, float | None], *, keep: int, best: int, every: int
) -> set[int]:
  """Returns the steps that stay.

  Args:
    losses: Validation loss of each step, None where there was no evaluation.
    keep: So many of the newest.
    best: So many of those with the least loss.
    every: Steps that this divides; 0: none.

  >>> losses = {10: 3.0, 20: 2.0, 30: 2.5, 40: None, 50: 4.0}
  >>> sorted(choose(losses, keep=1, best=1, every=30))
  [20, 30, 50]
  """
  steps = sorted(losses)
  known = [s for s in steps if losses[s] is not None and losses[s] == losses[s]]
  lowest = sorted(known, key=lambda step: (losses[step], -step))
  stay = {*steps[-keep:], *lowest[:best]}
  return stay | {step for step in steps if every and step % every == 0}


def remove_old(folder: str, *, keep: int, best: int, every: int) -> list[int]:
  """Removes the steps that `choose` doesn't; returns them.

  The newest must have been found whole: nothing is looked at again. A damaged
  one isn't counted, and stays; in a bucket, what was cut off goes.
  """
  losses: dict[int, float | None] = {}
  for step in list_steps(folder):
    try:
      losses[step] = manifests.read(f"{folder}/{step}").get("loss")
    except manifests.BrokenError:
      if _is_cut_off(folder, step):
        files.remove_folder(f"{folder}/{step}")
  stay = choose(losses, keep=keep, best=best, every=every)
  gone = [step for step in losses if step not in stay]
  for step in gone:
    remove(folder, step)
  return gone


def remove(folder: str, step: int) -> None:
  """Removes a step; a kill on the way leaves nothing that looks like one."""
  path = f"{folder}/{step}"
  if files.is_remote(folder):
    for name in (manifests.FILE, _COMMITTED):
      files.remove(f"{path}/{name}")
  else:
    os.rename(path, f"{path}.removing")
    path = f"{path}.removing"
  files.remove_folder(path)


def find_room(folder: str) -> int | None:
  """Returns the bytes that are free where a folder is; None in a bucket."""
  if files.is_remote(folder):
    return None
  return shutil.disk_usage(folder).free
