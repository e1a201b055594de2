"""The sha256 of files, several at once, and remembered.

Hashes are remembered in a folder of the user's own, under
`remote.cache_folder()`, by size, times and number of the file (inode): where
none of these has changed, the file isn't read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent import futures
from typing import Any

from flaxmlm import InputError
from flaxmlm.storage import bounded, files, remote
from flaxmlm.storage.bounded import reason

_CHUNK = 1 << 23  # bytes; a multiple of every item's size
# A file may be changed again within the clock's tick that it was hashed in.
_FRESH_SECONDS = 2.0
_PATIENCE_SECONDS = 10.0

# Called with each chunk of a file, in order; says what is wrong, if it is.
Look = Callable[[memoryview], str | None]


def hash_files(
  paths: Iterable[str],
  *,
  looks: Mapping[str, Look] | None = None,
  context: str = "",
  remember: bool = True,
  what: str = "files",
  say: Callable[[str], None] = print,
) -> dict[str, str]:
  """Returns the sha256 of files, those that haven't changed from memory.

  Files are read at the speed of the disk, several at once.

  Args:
    paths: The files.
    looks: What looks at the contents of a file while they are read. It is not
      called for a file that is remembered.
    context: What the memory is of: what `looks` know beside the contents.
    remember: Whether to look what is remembered. It is noted all the same.
    what: What the files are, for the progress line.
    say: Is told each ten seconds how far it is.

  Raises:
    InputError: A file can't be read, or a look finds something wrong.
  """
  looks = looks or {}
  folders: dict[str, list[str]] = {}
  for path in paths:
    folders.setdefault(os.path.dirname(path) or ".", []).append(path)
  memories = {folder: _Memory(folder, context) for folder in folders}
  found: dict[str, str] = {}
  missing: dict[str, int] = {}
  for folder, names in folders.items():
    for path in names:
      known = memories[folder].get(path) if remember else None
      if known is None:
        missing[path] = _size(path)
      else:
        found[path] = known
  meter = _Meter(what, sum(missing.values()), say)
  threads = max(min(len(missing), _cores(), 8), 1)
  with futures.ThreadPoolExecutor(threads) as pool:
    # The largest first: they are what is waited for.
    order = sorted(missing, key=missing.get, reverse=True)
    done = {p: pool.submit(_hash, p, looks.get(p), meter) for p in order}
    try:
      for path, result in done.items():
        found[path], state = result.result()
        memories[os.path.dirname(path) or "."].set(path, found[path], state)
    except BaseException:
      meter.stopped = True
      pool.shutdown(cancel_futures=True)
      raise
  for memory in memories.values():
    memory.save()
  return found


def _hash(path: str, look: Look | None, meter: _Meter) -> tuple[str, list[int]]:
  """Returns a file's sha256 and its state when it was read."""
  digest = hashlib.sha256()
  try:
    with files.open_here(path, buffering=0) as file:
      state = _state(os.fstat(file.fileno()))
      view = memoryview(bytearray(min(state[0], _CHUNK)))
      while not meter.stopped:
        size = 0
        while size < len(view) and (got := file.readinto(view[size:])):
          size += got
        if not size:
          break
        digest.update(view[:size])
        if look is not None and (wrong := look(view[:size])):
          raise InputError(f"{path}: {wrong}")
        meter.add(size)
  except OSError as error:
    raise InputError(f"{path}: {reason(error)}; get it again") from error
  return digest.hexdigest(), state


class _Meter:
  """Says how much of some bytes has been read, each ten seconds."""

  def __init__(self, what: str, total: int, say: Callable[[str], None]):
    self._what, self._total, self._say = what, total, say
    self._lock = threading.Lock()
    self._done = 0
    self._start = self._last = time.monotonic()
    self.stopped = False

  def add(self, size: int) -> None:
    with self._lock:
      self._done += size
      now = time.monotonic()
      if now - self._last < _PATIENCE_SECONDS:
        return
      self._last = now
      speed = self._done / (now - self._start)
      left = (self._total - self._done) / speed
      text = (
        f"checking {self._what}: {self._done / 1e9:.1f} of"
        f" {self._total / 1e9:.1f} GB, {left:.0f} s to go"
      )
    self._say(text)


class _Memory:
  """The hashes of a folder's files, as they were when they were read."""

  def __init__(self, folder: str, context: str):
    key = f"{os.path.realpath(folder)}\n{context}"
    name = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
    self._path = os.path.join(
      remote.cache_folder(), "hashes", f"{name[:32]}.json"
    )
    self._known: dict[str, Any] = {}
    self._changed = False
    with contextlib.suppress(InputError):
      self._known = bounded.read_object(self._path)

  def get(self, path: str) -> str | None:
    """Returns the hash of a file that is as it was; None if it isn't known."""
    entry = self._known.get(os.path.basename(path))
    try:
      state, digest = entry["state"], entry["sha256"]
      return digest if state == _state(os.stat(path)) else None
    except (OSError, KeyError, TypeError):
      return None

  def set(self, path: str, digest: str, state: list[int]) -> None:
    """Notes a file's hash, unless the file changed a moment ago."""
    if time.time() - max(state[1:3]) / 1e9 > _FRESH_SECONDS:
      entry = {"state": state, "sha256": digest}
      self._known[os.path.basename(path)] = entry
      self._changed = True

  def save(self) -> None:
    """Keeps it for the next time, where that can be."""
    if not self._changed:
      return
    with contextlib.suppress(OSError):
      os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
      files.write(self._path, json.dumps(self._known).encode())


def _state(found: os.stat_result) -> list[int]:
  return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _size(path: str) -> int:
  try:
    return os.path.getsize(path)
  except OSError as error:
    raise InputError(f"{path}: {reason(error)}; get it again") from error


def _cores() -> int:
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
