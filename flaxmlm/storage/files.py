"""Files that may be damaged or made by somebody else: read, checked, written.

What is read has a bound, so that a file of a few bytes can't fill the memory;
what is wrong is one line that names the file. What is written is there whole or
not at all.

Hashes of large files are remembered in a folder of the user's own, under
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
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
from typing import IO, Any

from flaxmlm import InputError
from flaxmlm.storage import remote

# Of a text file that says how to read others: tokenizer.json, config.json, ….
# The largest that are published are some 35 MB.
MOST_BYTES = 1 << 26
# Objects and arrays in one JSON text: of empty ones, this is half a gigabyte.
MOST_PARTS = 1 << 23
_CHUNK = 1 << 23  # bytes; a multiple of every item's size
# A file may be changed again within the clock's tick that it was hashed in.
_FRESH_SECONDS = 2.0
_PATIENCE_SECONDS = 10.0


def read(path: str, *, most: int = MOST_BYTES) -> bytes:
  """Reads a file of at most `most` bytes.

  Raises:
    InputError: It is larger, or can't be read.
  """
  try:
    with open(path, "rb") as file:
      data = file.read(most + 1)
  except (OSError, ValueError) as error:  # ValueError: a NUL in the name
    raise InputError(f"{path}: {_reason(error)}") from error
  if len(data) > most:
    raise InputError(
      f"{path}: more than {most:,} bytes, too many for what it should be; is it"
      " the right file?"
    )
  return data


def parse_json(text: bytes | str, **options: Any) -> Any:
  """Parses JSON from anybody; options are those of `json.loads`.

  Raises:
    ValueError: It isn't JSON, is nested too deeply, or has more than
      `MOST_PARTS` objects and arrays.
  """
  marks = (b"[", b"{") if isinstance(text, bytes) else ("[", "{")
  if len(text) > MOST_PARTS and sum(map(text.count, marks)) > MOST_PARTS:
    raise ValueError(f"more than {MOST_PARTS:,} objects and arrays")
  try:
    return json.loads(text, **options)
  except RecursionError:
    raise ValueError("nested too deeply") from None


def read_json(path: str, *, most: int = MOST_BYTES) -> Any:
  """Reads a JSON file of at most `most` bytes.

  Raises:
    InputError: It is larger, isn't JSON or can't be read.
  """
  try:
    return parse_json(read(path, most=most))
  except InputError:
    raise
  except ValueError as error:
    raise InputError(f"{path}: not JSON: {error}") from error


def read_object(path: str, *, most: int = MOST_BYTES) -> dict[str, Any]:
  """Reads a JSON file that holds an object; raises as `read_json`."""
  found = read_json(path, most=most)
  if not isinstance(found, dict):
    raise InputError(
      f"{path}: not a JSON object, but {type(found).__name__}; is it the right"
      " file?"
    )
  return found


def is_inside(name: Any) -> bool:
  """Says whether a name from a file stays in the folder that it is of."""
  return (
    isinstance(name, str)
    and name not in ("", ".")
    and name.isprintable()
    and "\\" not in name
    and not os.path.isabs(name)
    and os.path.normpath(name) == name
    and not name.startswith("..")
  )


@contextlib.contextmanager
def atomic_file(path: str, *, sync: bool = False) -> Iterator[IO[bytes]]:
  """Opens a file to be there whole or not at all, whoever writes it too.

  Args:
    path: Its name; the file has another one until it is whole.
    sync: Whether it is on the disk, with its name, when this returns: a power
      cut then leaves it whole too.
  """
  temporary = f"{path}.{uuid.uuid4().hex}.tmp"
  try:
    with open(temporary, "xb") as file:
      yield file
      if sync:
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if sync:
      sync_folder(os.path.dirname(path))
  finally:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(temporary)


def write_atomically(path: str, data: bytes, *, sync: bool = False) -> None:
  """Writes a file that is there whole or not at all; see `atomic_file`."""
  with atomic_file(path, sync=sync) as file:
    file.write(data)


def sync_file(path: str) -> None:
  """Has the disk keep what stands in a file."""
  with open(path, "rb") as file:
    os.fsync(file.fileno())


def sync_folder(folder: str) -> None:
  """Has the disk keep the names in a folder, where it can."""
  with contextlib.suppress(OSError):  # not every file system knows it
    number = os.open(folder or ".", os.O_RDONLY)
    try:
      os.fsync(number)
    finally:
      os.close(number)


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
    with open(path, "rb", buffering=0) as file:
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
    raise InputError(f"{path}: {_reason(error)}; get it again") from error
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
      self._known = read_object(self._path)

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
      write_atomically(self._path, json.dumps(self._known).encode())


def _state(found: os.stat_result) -> list[int]:
  return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _size(path: str) -> int:
  try:
    return os.path.getsize(path)
  except OSError as error:
    raise InputError(f"{path}: {_reason(error)}; get it again") from error


def _reason(error: Exception) -> str:
  return getattr(error, "strerror", None) or str(error)


def _cores() -> int:
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
