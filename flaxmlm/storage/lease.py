"""Who alone may write to a folder of a bucket: FOLDER/lease.json.

The file is made on the condition that there is none, which the bucket checks,
so of several processes that begin at once one gets it. The holder writes it
anew twice a minute, on the condition that nobody else has, and removes it at
its end.

A holder that is killed leaves it behind. Another process takes it over

- at once, if the holder was on this machine with the same local folder, whose
  lock is free again, or if it was last written more than an hour ago;
- else once it hasn't changed for three minutes, in which that process waits.
  They are counted by that process's clock alone: those of two machines needn't
  agree.

So two processes that live and reach the bucket never hold it both. One that was
suspended, or cut off from the bucket, for three minutes can lose it. It learns
that from `check`, which is to be called before anything is written. Between the
check and the end of what is written then, nothing guards.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from flaxmlm import InputError
from flaxmlm.storage import files

FILE = "lease.json"
MEMO = "lease.txt"  # in the local folder of who held it: which one
RENEWED_EVERY = 30.0  # seconds
STALE_AFTER = 180.0
LONG_GONE = 3600.0
_LOOK_EVERY = 5.0


class _Found(NamedTuple):
  """A lease that is there."""

  generation: str
  age: float  # seconds, as the bucket's clock and this one's differ
  facts: dict[str, Any]

  @property
  def holder(self) -> str:
    """Names the process that holds it."""
    facts = self.facts
    return (
      f"process {facts.get('process')} on {facts.get('host')}, since"
      f" {facts.get('since')}"
    )


@contextlib.contextmanager
def hold(
  folder: str,
  memo: str,
  *,
  alone: bool = True,
  say: Callable[[str], None] = print,
) -> Iterator[Callable[[], None]]:
  """Holds the lease of a folder.

  Args:
    folder: In a bucket.
    memo: A file of this machine, which is locked, and names the lease that was
      last held by it, and those that may have been.
    alone: Whether this process alone writes there. If not, the others may still
      write after an exception: the lease is renewed until this process ends,
      and expires then.
    say: Is told if it takes time.

  Yields:
    What raises InputError if the lease is held no more.

  Raises:
    InputError: Another process holds it, or the bucket doesn't answer.
  """
  url = f"{folder}/{FILE}"
  token = uuid.uuid4().hex
  facts = {
    "host": socket.gethostname(),
    "process": os.getpid(),
    "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    "token": token,
  }
  with open(memo, "a+b") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise InputError(
        f"{folder}: another process of this machine writes there; wait for it"
      ) from error
    file.seek(0)
    before = file.read().decode().split()
    # Till it is known which one is there, each may be.
    file.write(f" {token}".encode())
    file.flush()
    try:
      generation = _take(url, facts, before, say)
    except OSError as error:
      raise InputError(f"{folder}: {error.strerror}") from error
    file.truncate(0)
    file.write(token.encode())
    file.flush()
    with _renewed(url, facts, generation, alone) as check:
      yield check


def check_free(folder: str) -> None:
  """Raises InputError if a process holds the lease of a folder.

  One that hasn't been renewed in three minutes, by this machine's clock and the
  bucket's, counts for nothing.
  """
  try:
    found = _look(f"{folder}/{FILE}")
  except OSError as error:
    raise InputError(f"{folder}: {error.strerror}") from error
  if found is not None and found.age < STALE_AFTER:
    raise InputError(
      f"{folder}: {found.holder} still writes there; stop it first"
    )


def _take(
  url: str,
  facts: dict[str, Any],
  before: Sequence[str],
  say: Callable[[str], None],
) -> str:
  """Makes the lease, or takes it over; returns its generation.

  Args:
    url: Of the file.
    facts: What it is to say.
    before: Tokens of this machine's folder, one of which it may have.
    say: See `hold`.
  """
  folder = url.removesuffix(f"/{FILE}")
  seen, since = None, 0.0
  while True:
    found = _look(url)
    if found is not None and found.facts.get("token") == facts["token"]:
      return found.generation  # written, though the answer was lost
    gone = found is None
    if found is not None:
      if seen is not None and found.generation != seen.generation:
        raise InputError(
          f"{folder}: {found.holder}, writes there and lives; stop it, or take"
          " another folder"
        )
      if seen is None:
        seen, since = found, time.monotonic()
      gone = (
        found.facts.get("token") in before
        or found.age > LONG_GONE
        or time.monotonic() - since > STALE_AFTER
      )
      if not gone and seen is found:
        say(
          f"{folder}: held by {found.holder}; waiting {STALE_AFTER:.0f} s to"
          " see whether that lives (if you know that it doesn't: gcloud storage"
          f" rm {url})"
        )
    if gone:
      try:
        return _put(url, facts, "0" if found is None else found.generation)
      except FileExistsError:
        continue  # someone was faster
    time.sleep(_LOOK_EVERY)


@contextlib.contextmanager
def _renewed(
  url: str, facts: dict[str, Any], generation: str, alone: bool
) -> Iterator[Callable[[], None]]:
  """Renews a lease for as long as it is held, then removes it; see `hold`."""
  lock, ended = threading.Lock(), threading.Event()
  lost, failed = False, True

  def renew() -> None:
    nonlocal generation, lost
    with lock:
      if lost:
        return
      try:
        generation = _put(url, facts, generation)
      except FileExistsError:
        found = _look(url)
        if found is not None and found.facts.get("token") == facts["token"]:
          generation = found.generation  # ours, though the answer was lost
        else:
          lost = True

  def keep_on() -> None:
    while not ended.wait(RENEWED_EVERY):
      with contextlib.suppress(OSError):  # the next time, perhaps
        renew()

  def check() -> None:
    with contextlib.suppress(OSError):  # what is written next says so
      renew()
    if lost:
      raise InputError(
        f"{url.removesuffix(f'/{FILE}')}: another process has taken over here,"
        " since this one didn't answer for minutes; nothing more is written"
      )

  thread = threading.Thread(target=keep_on, daemon=True)
  thread.start()
  try:
    yield check
    failed = False
  finally:
    if alone or not failed:
      ended.set()
      with lock, contextlib.suppress(OSError):
        if not lost:
          _remove(url, generation)


def _look(url: str) -> _Found | None:
  """Returns the lease that is there."""
  try:
    with files.opened(url) as (fs, name):
      info = fs.info(name)
      facts = json.loads(fs.cat_file(name))
  except FileNotFoundError:
    return None
  age = time.time() - info["mtime"].timestamp()
  return _Found(info["generation"], age, facts)


def _put(url: str, facts: dict[str, Any], generation: str) -> str:
  """Writes the lease if it is of a generation still; returns its new one.

  Args:
    url: Of the file.
    facts: What it says.
    generation: "0": if there is none.

  Raises:
    FileExistsError: It isn't.
  """
  with files.opened(url) as (fs, name):
    bucket, _, key = name.partition("/")
    upload = fs.base.replace("/storage/", "/upload/storage/")
    answer = fs.call(
      "POST",
      f"{upload}b/{urllib.parse.quote(bucket, safe='')}/o",
      uploadType="media",
      name=key,
      ifGenerationMatch=generation,
      headers={"Content-Type": "text/plain"},
      data=json.dumps(facts).encode(),
      json_out=True,
    )
  return answer["generation"]


def _remove(url: str, generation: str) -> None:
  """Removes the lease if it is of a generation still."""
  with files.opened(url) as (fs, name):
    bucket, _, key = name.partition("/")
    fs.call("DELETE", "b/{}/o/{}", bucket, key, ifGenerationMatch=generation)
