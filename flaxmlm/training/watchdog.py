"""Ends a process that hangs, so that what has started it starts it again.

The loop says what it begins to do, and a thread counts how long that lasts: a
wait for a peer that is stuck, for a disk that doesn't answer, for devices. If
that is too long, the stacks of all threads are written to a file, a line says
so, and the process ends.

What is measured is time in which this process ran: a machine that sleeps, a
debugger or a scheduler that stops the process for hours is no stall.
"""

from __future__ import annotations

import collections
import datetime
import faulthandler
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

# Of sysexits.h, EX_TEMPFAIL: "the user is invited to try again".
STALLED = 75
# A restart costs the steps since the last checkpoint, and compiling: minutes. A
# disk or a network that comes back within that is better waited for.
LEAST_SECONDS = 300.0
# The first of a kind compiles, or finds nothing in any cache.
FIRST_SECONDS = 3600.0
_MEDIANS = 20  # the bound, in medians of what the same took before
_KNOWN = 3  # of a kind that have ended, after the first, before that counts
# What is shorter says nothing about the bound; a step that only hands its work
# to the devices takes milliseconds, whatever the work.
_SHORT_SECONDS = 1.0
_TICK_SECONDS = 1.0
_WRITE_SECONDS = 10.0  # for a file, on a disk that may hang too
_LINGER_SECONDS = 5.0  # for processes that wait for this one, and write too

_WORDS = {
  "start": "the start",
  "data": "reading the batch of step {step:,}",
  "step": "step {step:,}",
  "evaluation": "the evaluation after step {step:,}",
  "save": "the checkpoint of step {step:,}",
  "rollback": "going back after step {step:,}",
  "end": "the end of the run",
}


class Watch:
  """Knows what a process does, and for how long; the loop's own, no thread's.

  The loop stores an attribute, and no lock is taken. It watches once `begin` is
  called.
  """

  def __init__(self, seconds: float | None = None):
    """Knows nothing yet.

    Args:
      seconds: What may take so long (`train.stall_seconds`); None: 20 times the
        median of the same, 300 at least.
    """
    self._seconds = seconds
    self._doing: tuple[str, int] = ("", 0)  # replaced, and never changed
    self._since = time.perf_counter()
    self._ended: collections.Counter[str] = collections.Counter()
    self._took: dict[str, collections.deque[float]] = {
      kind: collections.deque(maxlen=100) for kind in _WORDS
    }

  def enter(self, kind: str, step: int | None = None) -> None:
    """Says what begins now, and that what was before has ended.

    Args:
      kind: "start", "data", "step", "evaluation", "save", "rollback", "end";
        "": nothing that has a bound.
      step: The step it belongs to; None: as before.
    """
    now = time.perf_counter()
    before, old = self._doing
    if before:
      self.ended(before, now - self._since)
    self._since = now
    self._doing = (kind, old if step is None else step)

  def ended(self, kind: str, seconds: float) -> None:
    """Takes note of how long something of a kind took."""
    if self._ended[kind] and seconds >= _SHORT_SECONDS:
      self._took[kind].append(seconds)
    self._ended[kind] += 1

  def bound(self, kind: str) -> float:
    """Returns how many seconds something of a kind may take now.

    >>> watch = Watch()
    >>> for seconds in (400.0, 0.0, 20.0, 30.0):
    ...   print(watch.bound("step"))
    ...   watch.ended("step", seconds)
    3600.0
    3600.0
    3600.0
    3600.0
    >>> watch.bound("step")
    500.0
    """
    ended, took = self._ended[kind], list(self._took[kind])
    if ended == 0:
      return max(FIRST_SECONDS, self._seconds or 0.0)
    if self._seconds is not None:
      return self._seconds
    if ended <= _KNOWN:
      return FIRST_SECONDS
    return max(LEAST_SECONDS, _MEDIANS * statistics.median(took or [0.0]))

  def begin(self, folder: str, process: int = 0) -> None:
    """Watches from now on, to the end of the process.

    Args:
      folder: Where stacks go; made when there are any.
      process: The number of this one.
    """
    name = f"process-{process}"
    threading.Thread(
      target=self._watch, args=(folder, name), name="watchdog", daemon=True
    ).start()

  def _watch(self, folder: str, name: str) -> None:
    tick = min(_TICK_SECONDS, (self._seconds or LEAST_SECONDS) / 10)
    doing, lasted, last = self._doing, 0.0, time.monotonic()
    while True:
      time.sleep(tick)
      now = time.monotonic()
      # No more than a tick: this thread was stopped too, if it was longer.
      lasted += min(now - last, tick)
      last = now
      if self._doing is not doing:
        doing, lasted = self._doing, 0.0
      elif doing[0] and lasted > (bound := self.bound(doing[0])):
        _end(folder, name, *doing, bound)


def _end(
  folder: str, name: str, kind: str, step: int, bound: float
) -> NoReturn:
  """Writes the stacks, says what stalls, and ends the process.

  None of it may hang: it is a disk, perhaps, that does.
  """
  what = _WORDS[kind].format(step=step)
  when = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
  path = os.path.join(folder, f"{when}-{name}.txt")
  who = name.replace("-", " ")
  line = f"error: {who} stalls: {what} takes more than {bound:,.0f} s"

  def write() -> None:
    os.makedirs(folder, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
      file.write(f"{line}\n\n")
      file.flush()
      faulthandler.dump_traceback(file)
      os.fsync(file.fileno())

  def say() -> None:
    where = f"in {path}"
    if not written:
      faulthandler.dump_traceback(sys.__stderr__)
      where = f"above, for {folder} can't be written"
    text = (
      f"{line}; the stacks of its threads are {where}; the same line again"
      " goes on"
    )
    os.write(2, f"{text}\n".encode(errors="replace"))

  written = _tries(write)
  _tries(say)
  time.sleep(_LINGER_SECONDS)
  os._exit(STALLED)


def _tries(function: Callable[[], None]) -> bool:
  """Whether a function ends well, soon enough."""
  done = []

  def run() -> None:
    try:
      function()
      done.append(True)
    except OSError:
      pass

  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  thread.join(_WRITE_SECONDS)
  return bool(done)
