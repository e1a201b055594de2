"""Makes shards by the processes of one machine."""

from __future__ import annotations

import collections
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent import futures

from flaxmlm import InputError
from flaxmlm.preparing import shards


def run(
  tasks: Iterator[shards.Task], processes: int = 0
) -> Iterator[shards.Done]:
  """Makes shards, some at a time, and yields what is done in their order.

  Args:
    tasks: What to make; it is read in this process.
    processes: How many others make them; 0: one a core. 1, or text for no more
      than one shard: it is done in this one.

  Raises:
    InputError: A process died; and what the tasks raise.
  """
  # Starting processes takes longer than a single shard.
  first, size = [], 0
  for task in tasks:
    first.append(task)
    size += sum(len(text) for d in task.documents for text in d.texts)
    if len(first) > 1 and size > shards.SHARD_CHARS:
      break
  else:
    processes = 1
  yield from _run(itertools.chain(first, tasks), processes or _cores())


def _cores() -> int:
  """Returns how many cores this process may use, where that can be known."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _run(tasks: Iterable[shards.Task], processes: int) -> Iterator[shards.Done]:
  if processes == 1:
    yield from map(shards.make_shard, tasks)
    return
  pool = futures.ProcessPoolExecutor(
    processes,
    mp_context=multiprocessing.get_context("spawn"),
    initializer=_start_worker,
  )
  pending: collections.deque[futures.Future[shards.Done]] = collections.deque()
  try:
    for task in tasks:
      pending.append(pool.submit(shards.make_shard, task))
      if len(pending) > processes:
        yield pending.popleft().result()
    while pending:
      yield pending.popleft().result()
  except futures.process.BrokenProcessPool as error:
    raise InputError(
      "a process died, perhaps for want of memory: with fewer of them"
      " (data.processes) it goes on where it was; or the program that started"
      ' it is a script without `if __name__ == "__main__":`'
    ) from error
  finally:
    pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
  """Makes a worker end when its parent does, even by SIGKILL.

  It would wait for ever: workers hold the writing end of their own queue.
  """
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  parent = multiprocessing.parent_process()

  def watch() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()
