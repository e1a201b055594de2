"""Numbers that go wrong: updates that were skipped, jumps of the loss.

A run keeps them in WORKDIR/incidents.jsonl, an object a line, each once however
often its step is run again:

  step, kind     the step, as in metrics.jsonl; `non_finite`, `overflow`,
                 `loss_spike`, `rollback` or `stop`
  examples       "A:B": the row uses of the batch, A to B - 1
  rollbacks      how often the run had gone back until then
  preview        a command that shows the batch as the step saw it
  loss, grad_norm, and what else the kind has; null is what isn't finite
"""

from __future__ import annotations

import collections
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from flaxmlm import InputError
from flaxmlm.models.model import Params
from flaxmlm.training import metrics

FILE = "incidents.jsonl"
_IN_FLIGHT = 2  # steps that may not have ended yet
# A jump is told from noise by the steps before it.
_HISTORY, _FEWEST, _SPIKE = 100, 20, 6.0  # steps, steps, deviations
_SIGMAS = 1.4826  # a normal distribution's deviation, in median deviations
_LARGEST = 1e30  # of a parameter; float32 ends at 3.4e38
# Of the median: what varies less isn't taken for noise.
_LEAST, _LEAST_OF_FEW = 1e-3, 0.25

Tell = Callable[[Mapping[str, Any]], None]


class DivergedError(Exception):
  """The run can't go on from the parameters that it has, after `step`."""

  def __init__(self, step: int, why: str):
    super().__init__(f"step {step:,}: {why}")
    self.step, self.why = step, why


class Guard:
  """Looks at the sums of steps for what isn't finite, and for jumps.

  Sums are the same in all processes, and so is all that follows from them.
  """

  def __init__(
    self,
    *,
    limit: int,
    shares: Mapping[str, float],
    tell: Tell,
    memory: Mapping[str, Any] | None = None,
  ):
    """Begins at any step.

    Args:
      limit: Skips in a row that are too many.
      shares: Weight of each task in the loss.
      tell: Is told of incidents.
      memory: Of one before, as of the step before; None: there was none.
    """
    memory = memory or {}
    self.skipped: int = memory.get("skipped", 0)  # in a row, until now
    self._losses = collections.deque(memory.get("losses", ()), maxlen=_HISTORY)
    self._jumping: bool = memory.get("jumping", False)
    self._jumps = 0
    self._limit, self._shares, self._tell = limit, shares, tell
    self._waiting: collections.deque[tuple[int, Any]] = collections.deque()

  @property
  def memory(self) -> dict[str, Any]:
    """What it knows of the steps looked at, for a checkpoint."""
    return {
      "skipped": self.skipped,
      "jumping": self._jumping,
      "losses": list(self._losses),
    }

  def note(self, step: int, sums: Any) -> None:
    """Takes a step's sums, and looks at those of two steps before.

    These have ended in the loop, which costs no waiting for the device.

    Raises:
      DivergedError: Too many updates in a row were skipped.
    """
    names = {"step": ("skipped", "grad_norm")}
    names |= dict.fromkeys(self._shares, ("nll", "weight"))
    few = {part: {n: sums[part][n] for n in names[part]} for part in names}
    for x in jax.tree.leaves(few):
      x.copy_to_host_async()
    self._waiting.append((step, few))
    while len(self._waiting) > _IN_FLIGHT:
      self._look(*self._waiting.popleft())

  def settle(self) -> None:
    """Looks at all steps up to the newest, and waits for it.

    Raises:
      DivergedError: Too many updates in a row were skipped.
    """
    while self._waiting:
      self._look(*self._waiting.popleft())

  def count_jumps(self) -> int:
    """Returns the steps whose loss has jumped since this was last asked."""
    jumps, self._jumps = self._jumps, 0
    return jumps

  def _look(self, step: int, sums: Any) -> None:
    sums = jax.device_get(sums)
    values = {
      "loss": loss(sums, self._shares),
      "grad_norm": float(sums["step"]["grad_norm"]),
    }
    if not sums["step"]["skipped"]:
      self.skipped = 0
      self._look_for_jump(step, values)
      return
    self.skipped += 1
    wrong = [name for name, x in values.items() if not math.isfinite(x)]
    self._tell(
      {
        "step": step,
        "kind": "non_finite",
        "what": wrong[0],
        "skipped_in_a_row": self.skipped,
        **values,
      }
    )
    if self.skipped >= self._limit:
      raise DivergedError(step, f"{self.skipped} updates in a row were skipped")

  def _look_for_jump(self, step: int, values: Mapping[str, float]) -> None:
    """Tells of a jump of the loss. Only the first step of one is told."""
    score, median = find_jump(self._losses, values["loss"])
    if score > _SPIKE and not self._jumping:
      more = {"median": median, "z": score}
      self._tell({"step": step, "kind": "loss_spike", **values, **more})
    self._jumping = score > _SPIKE
    self._jumps += self._jumping
    self._losses.append(values["loss"])

  def measure(self, step: int, params: Params) -> float:
    """Returns the largest absolute value of all parameters; waits for them.

    Raises:
      DivergedError: It is so large that a step may overflow.
    """
    largest = float(_find_largest(params))
    if not largest < _LARGEST:
      self._tell({"step": step, "kind": "overflow", "largest": largest})
      raise DivergedError(step, f"parameters have grown to {largest:.2g}")
    return largest


@jax.jit
def _find_largest(params: Params) -> Array:
  each = [jnp.abs(x).max() for x in jax.tree.leaves(params)]
  return jnp.stack([x.astype(jnp.float32) for x in each]).max()


def find_jump(losses: Sequence[float], value: float) -> tuple[float, float]:
  """Returns how far a loss is above the median of others, and the median.

  In what would be standard deviations if the median absolute deviation were
  that of normally distributed losses (Iglewicz and Hoaglin, "How to detect and
  handle outliers", 1993), 0.1 % of the median at least. Fewer than 20 others
  say little about noise: there it is a quarter of the median at least. It has
  jumped if that is more than 6.

  >>> others = [2.0, 2.1, 1.9, 2.0, 2.2]
  >>> find_jump(others * 4, 3.0)[0] > 6
  True
  >>> [find_jump(others, value)[0] > 6 for value in (4.9, 5.1)]
  [False, True]
  """
  if not losses:
    return 0.0, math.nan
  least = _LEAST if len(losses) >= _FEWEST else _LEAST_OF_FEW
  before = np.array(losses)
  median = float(np.median(before))
  spread = _SIGMAS * float(np.median(np.abs(before - median)))
  return (value - median) / max(spread, least * abs(median), 1e-30), median


def loss(sums: Any, shares: Mapping[str, float]) -> float:
  """Returns what a step minimised: the tasks' weighted sum."""
  return sum(
    share * float(sums[task]["nll"]) / max(float(sums[task]["weight"]), 1.0)
    for task, share in shares.items()
  )


def open_book(workdir: str, *, anew: bool, say: Callable[[str], None]) -> Tell:
  """Returns what writes an incident into a run's file, and says it.

  One that is there already, of a step that is run again, isn't written again.

  Args:
    workdir: Of the run.
    anew: Whether the run begins, and what is there is of another one.
    say: Is told a line.
  """
  path = os.path.join(workdir, FILE)
  there = [] if anew else metrics.read(path)
  text = "".join(_line(incident) for incident in there)
  if there or os.path.exists(path):  # a line may have been cut off by a kill
    with open(path + ".tmp", "w", encoding="utf-8") as file:
      file.write(text)
    os.replace(path + ".tmp", path)
  known = {_name(incident) for incident in there}

  def tell(incident: Mapping[str, Any]) -> None:
    say(describe(incident))
    if _name(incident) not in known:
      known.add(_name(incident))
      with open(path, "a", encoding="utf-8") as file:
        file.write(_line(incident))

  return tell


def discard(incident: Mapping[str, Any]) -> None:
  """Writes nothing: for the processes that aren't the first one."""


def describe(incident: Mapping[str, Any]) -> str:
  """Returns a line about an incident.

  >>> nan = {"kind": "non_finite", "what": "grad_norm", "loss": 3.0}
  >>> nan |= {"step": 12, "grad_norm": math.inf, "skipped_in_a_row": 1}
  >>> print(describe(nan | {"preview": "python -m flaxmlm.preview"}))
  WARNING: step 12: the gradient isn't finite (loss 3, gradient norm inf); \
the update was skipped (1 in a row); its batch: python -m flaxmlm.preview
  """
  head = f"WARNING: step {incident['step']:,}:"
  batch = f"its batch: {incident.get('preview')}"
  if incident["kind"] == "rollback":
    return (
      f"{head} going back to step {incident['to']:,} (rollback"
      f" {incident['rollbacks'] + 1}); from there on {incident['rows']:,} rows"
      " are left out"
    )
  if incident["kind"] == "stop":
    return f"{head} stopped: {incident['why']}"
  if incident["kind"] == "overflow":
    return f"{head} parameters have grown to {incident['largest']:.2g}; {batch}"
  if incident["kind"] == "loss_spike":
    return (
      f"{head} the loss has jumped to {incident['loss']:.4g}, from a median of"
      f" {incident['median']:.4g} (z {incident['z']:.1f}); {batch}"
    )
  what = {"loss": "loss", "grad_norm": "gradient"}
  return (
    f"{head} the {what[incident['what']]} isn't finite (loss"
    f" {incident['loss']:.4g}, gradient norm {incident['grad_norm']:.4g}); the"
    f" update was skipped ({incident['skipped_in_a_row']} in a row); {batch}"
  )


@jax.jit
def _are_finite(state: Any) -> Any:
  return jax.tree.map(lambda x: jnp.isfinite(x).all(), state)


def check_finite(state: Any, where: str) -> None:
  """Raises InputError if an array that a run begins with isn't finite."""
  found = jax.device_get(_are_finite(state))
  for path, fine in jax.tree_util.tree_flatten_with_path(found)[0]:
    if not fine:
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      raise InputError(
        f"{where}: {name} has numbers that aren't finite, and nothing could be"
        " learned from there; begin with something else"
      )


def _name(incident: Mapping[str, Any]) -> tuple[Any, ...]:
  return incident["step"], incident["kind"], incident["rollbacks"]


def _line(values: Mapping[str, Any]) -> str:
  finite = {
    key: None if isinstance(x, float) and not math.isfinite(x) else x
    for key, x in values.items()
  }
  return json.dumps(finite) + "\n"
