"""The runs that a run goes on from: WORKDIR/chain.json.

Each run of a chain is a phase: a config and a workdir of its own. Steps are
counted through the whole chain. The file is written once, before the first step
of a phase, and is all that it needs of the others from then on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from flaxmlm import InputError
from flaxmlm.storage import files, remote

FILE = "chain.json"


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
  """

  workdir: str
  config: dict[str, Any]
  store: str | None
  first_step: int
  last_step: int
  first_row: int

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

  @property
  def row_offset(self) -> int:
    """Row use of step 0, were all steps like this phase's; see `batches.at`."""
    before = self.first_step * self.config["train"]["batch_size"]
    return self.first_row - before

  @property
  def place(self) -> dict[str, int]:
    """Where it begins in the chain, as its checkpoints note it."""
    return {
      "first_step": self.first_step,
      "first_row": self.first_row,
      "row_offset": self.row_offset,
    }


def read_chain(workdir: str) -> list[Phase]:
  """Returns the phases of a run, the oldest first, the run itself last.

  Raises:
    InputError: A file of the run can't be read, or lacks what a phase is.
  """
  here = remote.localize(workdir)
  try:
    *before, own = _read_phases(here)
    for phase in (*before, own):
      _ = phase.tokens, phase.order  # all that they are asked
  except (OSError, ValueError, TypeError, KeyError) as error:
    raise InputError(
      f"{workdir}: {FILE}, config.json or store.json isn't what a run writes"
      f" ({type(error).__name__}: {error})"
    ) from error
  step = newest_step(here)
  step = own.first_step if step is None else step
  name = remote.origin(here) or workdir
  return [*before, own._replace(workdir=name, last_step=step)]


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
    own = own._replace(first_row=alike[-1].first_row + alike[-1].rows)
  return [*before, own]


def write_chain(workdir: str, phases: list[Phase]) -> None:
  """Writes the chain of a run."""
  text = json.dumps([phase._asdict() for phase in phases], indent=2)
  files.write(os.path.join(workdir, FILE), text.encode(), sync=True)


def check_place(
  workdir: str, phase: Phase, noted: Mapping[str, int] | None
) -> None:
  """Raises InputError if a run's checkpoint is of another place in the chain.

  Args:
    workdir: Of the run.
    phase: The run, as its chain has it.
    noted: Its `place` as the checkpoint has it; None in those of before that
      was noted.
  """
  changed = [
    f"{name}: {noted[name]} -> {value}"
    for name, value in phase.place.items()
    if noted is not None and noted[name] != value
  ]
  if changed:
    raise InputError(
      f"{workdir}/{FILE} is missing, or isn't that of the newest checkpoint:"
      f" {'; '.join(changed)}; bring it back, or the rows would come in another"
      " order"
    )


def newest_step(workdir: str) -> int | None:
  """Returns the step of a run's newest checkpoint; None if there is none."""
  names = remote.list_checkpoints(workdir)
  return max((int(name) for name in names if name.isdigit()), default=None)
