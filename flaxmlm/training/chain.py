"""The runs that a run goes on from: WORKDIR/chain.json; and its rollbacks.

Each run of a chain is a phase: a config and a workdir of its own. Steps are
counted through the whole chain. The file is written once, before the first step
of a phase, and is all that it needs of the others from then on.

A run that goes back to a checkpoint of its own, to go on from there with other
rows, notes that in WORKDIR/rollbacks.json before it does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flaxmlm import InputError
from flaxmlm.storage import files, remote

FILE = "chain.json"
ROLLBACKS = "rollbacks.json"


class Phase(NamedTuple):
  """One run of a chain.

  Attributes:
    workdir: Where it is, or was.
    config: Its config, as nested dicts.
    store: sha256 of the manifest of its store; None for a run of before that
      was noted (store.json), whose order of the data nothing goes on in.
    first_step: Steps done before it, of the whole chain.
    last_step: Steps done at its end, or until now.
    first_row: Row uses of its order of the data that all phases before it
      made.
    skips: (step, rows): from that step on so many row uses were left out, once
      for each rollback.
  """

  workdir: str
  config: dict[str, Any]
  store: str | None
  first_step: int
  last_step: int
  first_row: int
  skips: Sequence[Sequence[int]] = ()

  @property
  def steps(self) -> int:
    """Steps of this phase alone."""
    return self.last_step - self.first_step

  @property
  def rows(self) -> int:
    """Rows that this phase has seen."""
    return self.steps * self.config["train"]["batch_size"]

  @property
  def tokens(self) -> int:
    """Tokens that this phase has seen, padding included."""
    return self.rows * self.config["data"]["row_length"]

  @property
  def order(self) -> tuple[Any, ...]:
    """What the order of its rows is a function of."""
    data = self.config["data"]
    weights = tuple(data.get("weights", ()))
    return self.store, self.config["seed"], data["row_length"], weights

  def row_offset(self, step: int) -> int:
    """Row use of step 0, were all steps like this one; see `batches.at`."""
    before = self.first_step * self.config["train"]["batch_size"]
    skipped = sum(rows for first, rows in self.skips if first <= step)
    return self.first_row - before + skipped

  @property
  def place(self) -> dict[str, Any]:
    """Its place in the chain, and its rollbacks, as checkpoints note them."""
    before = self.first_step * self.config["train"]["batch_size"]
    return {
      "first_step": self.first_step,
      "first_row": self.first_row,
      "row_offset": self.first_row - before,
      "skips": [list(one) for one in self.skips],
    }


def read_chain(workdir: str) -> list[Phase]:
  """Returns the phases of a run, the oldest first, the run itself last.

  Raises:
    InputError: A file of the run can't be read, or lacks what a phase is.
  """
  here = remote.localize(workdir)
  try:
    *before, own = _read_phases(here)
    skips = _read_skips(here)
    for phase in (*before, own):
      _ = phase.tokens, phase.order  # all that they are asked
  except (OSError, ValueError, TypeError, KeyError) as error:
    raise InputError(
      f"{workdir}: {FILE}, {ROLLBACKS}, config.json or store.json isn't what a"
      f" run writes ({type(error).__name__}: {error})"
    ) from error
  step = newest_step(here)
  step = own.first_step if step is None else step
  name = remote.origin(here) or workdir
  return [*before, own._replace(workdir=name, last_step=step, skips=skips)]


def _read_phases(workdir: str) -> list[Phase]:
  """Returns the phases as the files of a run have them."""

  def read(name: str) -> Any:
    with open(os.path.join(workdir, name), encoding="utf-8") as file:
      return json.load(file)

  def is_there(name: str) -> bool:
    return os.path.exists(os.path.join(workdir, name))

  if is_there(FILE):
    return [Phase(**values) for values in read(FILE)]
  store = (
    read("store.json")["manifest_sha256"] if is_there("store.json") else None
  )
  return [Phase(workdir, read("config.json"), store, 0, 0, 0)]


def _read_skips(workdir: str) -> list[tuple[int, int]]:
  """Returns the `Phase.skips` of a run's own phase."""
  try:
    with open(os.path.join(workdir, ROLLBACKS), encoding="utf-8") as file:
      return [(int(one["step"]), int(one["rows"])) for one in json.load(file)]
  except FileNotFoundError:
    return []


def find_chain(
  workdir: str, config: Mapping[str, Any], store: str
) -> list[Phase]:
  """Returns the phases of a run that may not have begun yet.

  An order of the data is that of a store, seed, row length and weights. A phase
  goes on in its order, with any batch size, where the newest phase with the
  same one ended, whatever came between; else it begins at the first row.

  Args:
    workdir: Of the run.
    config: Its config, as nested dicts.
    store: sha256 of the manifest of its store.
  """
  run = config["train"]["continue_from"]
  if newest_step(workdir) is not None:
    return read_chain(workdir)
  name = remote.origin(workdir) or workdir
  if run is None:
    return [Phase(name, dict(config), store, 0, 0, 0)]
  before = read_chain(run)
  step = before[-1].last_step
  own = Phase(name, dict(config), store, step, step, 0)
  alike = [phase for phase in before if phase.order == own.order]
  if alike:
    last = alike[-1]
    skipped = sum(n for first, n in last.skips if first <= last.last_step)
    own = own._replace(first_row=last.first_row + last.rows + skipped)
  return [*before, own]


def write_chain(workdir: str, phases: list[Phase]) -> None:
  """Writes the chain of a run that begins, and has not gone back yet."""
  _write(workdir, FILE, [phase._asdict() for phase in phases])
  if os.path.exists(os.path.join(workdir, ROLLBACKS)):  # of one that was here
    write_skips(workdir, phases[-1])


def write_skips(workdir: str, phase: Phase) -> None:
  """Writes a run's rollbacks, which are on the disk then."""
  names = ("step", "rows")
  values = [dict(zip(names, one, strict=True)) for one in phase.skips]
  _write(workdir, ROLLBACKS, values)


def _write(workdir: str, name: str, values: Any) -> None:
  text = json.dumps(values, indent=2)
  files.write(os.path.join(workdir, name), text.encode(), sync=True)


def check_place(
  workdir: str, phase: Phase, step: int, noted: Mapping[str, Any] | None
) -> None:
  """Raises InputError if a run's checkpoint is of another place in the chain.

  The run may have gone back since, to this checkpoint or to a later one that is
  no more; what it has noted before stays.

  Args:
    workdir: Of the run.
    phase: The run, as its chain has it.
    step: Of the checkpoint.
    noted: Its `place` as the checkpoint has it; None in those of before that
      was noted.
  """
  if noted is None:
    return
  place = phase.place
  then, now = noted.get("skips", []), place.pop("skips")
  later = now[len(then) :]
  wrong = {FILE: [], ROLLBACKS: []}
  wrong[FILE] = [
    f"{name}: {noted[name]} -> {value}"
    for name, value in place.items()
    if noted[name] != value
  ]
  if now[: len(then)] != then or any(first < step for first, _ in later):
    wrong[ROLLBACKS] = [f"[step, rows]: {then} -> {now}"]
  for name, changed in wrong.items():
    if changed:
      raise InputError(
        f"{workdir}/{name} is missing, or isn't that of the newest checkpoint:"
        f" {'; '.join(changed)}; bring it back, or the rows would come in"
        " another order"
      )


def newest_step(workdir: str) -> int | None:
  """Returns the step of a run's newest checkpoint; None if there is none."""
  names = remote.list_checkpoints(workdir)
  return max((int(name) for name in names if name.isdigit()), default=None)
