"""Files of this machine and of a bucket, by the same functions.

A path with `://` in it, like gs://bucket/folder/file, is one of a bucket; any
other is one of this machine. A bucket has no folders, only names with `/` in
them. What is written there is there whole or not at all, whoever else writes
it, and is seen by all as soon as it is there.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import functools
import glob
import importlib.util
import io
import logging
import os
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

from flaxmlm import InputError

_BLOCK = 8 << 20  # bytes that a reader asks a bucket for at once
_SILENCE_SECONDS = 60  # of a bucket, before it is asked again
AT_ONCE = 32  # files that are read from a bucket at the same time
_MAGIC = "*?["


class BucketError(OSError):
  """A bucket doesn't answer, or refuses; it may another time."""


@contextlib.contextmanager
def named(path: str) -> Iterator[None]:
  """Gives the error of a full disk, which as a rule names no file, this name.

  >>> with named("metrics.jsonl"):
  ...   raise OSError(28, "No space left on device")
  Traceback (most recent call last):
  OSError: [Errno 28] No space left on device: 'metrics.jsonl'
  """
  try:
    yield
  except OSError as error:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    if not full or error.filename is not None:
      raise
    raise OSError(error.errno, error.strerror, path) from error


def is_remote(path: str) -> bool:
  """Whether a path is one of a bucket, like gs://bucket/store."""
  return "://" in path


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


@functools.cache
def bucket_system(protocol: str) -> Any:
  """Returns fsspec's file system, one that remembers no listing.

  Raises:
    InputError: It isn't gs, or what reads such paths isn't installed.
  """
  if protocol != "gs":
    raise InputError(
      f"{protocol}://: of buckets, those of gs:// alone can be read"
    )
  if importlib.util.find_spec("gcsfs") is None:
    raise InputError(
      "gs://: what reads such paths is missing; pip install -e '.[gcs]'"
    )
  import aiohttp
  import fsspec

  # What goes wrong is raised; gcsfs would print it too.
  logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
  # Else it waits for ever. It tries six times.
  silence = aiohttp.ClientTimeout(
    sock_connect=_SILENCE_SECONDS, sock_read=_SILENCE_SECONDS
  )
  return fsspec.filesystem(
    protocol, use_listings_cache=False, requests_timeout=silence
  )


@contextlib.contextmanager
def opened(url: str) -> Iterator[tuple[Any, str]]:
  """Gives the file system of a path, and the path's name there.

  Raises:
    FileNotFoundError: So it was inside.
    FileExistsError: The same.
    BucketError: It was something else, but no InputError.
  """
  protocol, _, name = url.partition("://")
  try:
    yield bucket_system(protocol), name.rstrip("/")
  except (BucketError, InputError):
    raise
  except FileNotFoundError as error:
    raise FileNotFoundError(errno.ENOENT, "not there", url) from error
  except FileExistsError as error:
    raise FileExistsError(errno.EEXIST, "there already", url) from error
  except TimeoutError as error:
    raise BucketError(errno.ETIMEDOUT, "it doesn't answer", url) from error
  except Exception as error:  # gcsfs has errors of many kinds
    what = str(error).strip() or type(error).__name__
    raise BucketError(errno.EIO, what.splitlines()[0], url) from error


def read(path: str) -> bytes:
  """Returns what is in a file.

  Raises:
    FileNotFoundError: It isn't there.
    OSError: It can't be read.
  """
  if not is_remote(path):
    with open_here(path) as file:
      return file.read()
  with opened(path) as (fs, name):
    return fs.cat_file(name)


def read_many(paths: Sequence[str]) -> Iterator[tuple[str, bytes]]:
  """Yields path and content of those files that are there; some at a time."""
  for first in range(0, len(paths), AT_ONCE):
    some = paths[first : first + AT_ONCE]
    if not some or not is_remote(some[0]):
      for path in some:
        with contextlib.suppress(FileNotFoundError):
          yield path, read(path)
      continue
    with opened(some[0]) as (fs, _):
      names = [path.partition("://")[2] for path in some]
      # Of whole files. By fs.cat, a name with "*" or "[" in it is a glob.
      found = fs.cat_ranges(names, None, None)
      for data in found:
        if isinstance(data, Exception) and not isinstance(
          data, FileNotFoundError
        ):
          raise data
    pairs = zip(some, found, strict=True)
    yield from ((path, data) for path, data in pairs if type(data) is bytes)


def write(path: str, data: bytes, *, sync: bool = False) -> None:
  """Writes a file that is there whole or not at all; see `atomic_file`."""
  if is_remote(path):
    with opened(path) as (fs, name):
      fs.pipe_file(name, data)
    return
  with atomic_file(path, sync=sync) as file:
    file.write(data)


@contextlib.contextmanager
def atomic_file(path: str, *, sync: bool = False) -> Iterator[IO[bytes]]:
  """Opens a file to be there whole or not at all, whoever writes it too.

  One of a bucket is kept in memory until it is closed.

  Args:
    path: Its name; here the file has another one until it is whole.
    sync: Whether it is on the disk, with its name, when this returns: a power
      cut then leaves it whole too. A bucket has what it has confirmed.
  """
  if is_remote(path):
    buffer = io.BytesIO()
    yield buffer
    write(path, buffer.getvalue())
    return
  temporary = f"{path}.{uuid.uuid4().hex}.tmp"
  try:
    with named(path), open(temporary, "xb") as file:
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


def exists(path: str) -> bool:
  """Whether a file is there; of a folder in a bucket, whether one is in it."""
  if not is_remote(path):
    return os.path.exists(path)
  try:
    with opened(path) as (fs, name):
      fs.info(name)
  except FileNotFoundError:
    return False
  return True


def list_names(folder: str) -> list[str]:
  """Returns the names in a folder, or none if it isn't there."""
  if not is_remote(folder):
    return os.listdir(folder) if os.path.isdir(folder) else []
  try:
    with opened(folder) as (fs, name):
      found = fs.ls(name, detail=False)
  except FileNotFoundError:
    return []
  # A folder that some program has made is a name that ends in "/".
  names = (entry.rstrip("/").removeprefix(f"{name}/") for entry in found)
  return [entry for entry in names if entry != name]


def make_folder(path: str) -> None:
  """Makes a folder, if need be; in a bucket there is nothing to make."""
  if not is_remote(path):
    os.makedirs(path, exist_ok=True)


def remove_folder(path: str) -> None:
  """Removes a folder with all that is in it, if it is there."""
  if not is_remote(path):
    shutil.rmtree(path, ignore_errors=True)
    return
  with contextlib.suppress(FileNotFoundError), opened(path) as (fs, name):
    fs.rm(glob.escape(name), recursive=True)


def move_folder(path: str, target: str) -> None:
  """Gives a folder another name; in a bucket, file after file."""
  if not is_remote(path):
    os.rename(path, target)
    return
  for each in list_tree(path):
    with opened(each) as (fs, name):
      inner = each.removeprefix(path.rstrip("/"))
      fs.cp_file(name, target.partition("://")[2].rstrip("/") + inner)
      fs.rm_file(name)


def remove(path: str) -> None:
  """Removes a file, if it is there."""
  with contextlib.suppress(FileNotFoundError):
    if not is_remote(path):
      os.unlink(path)
      return
    with opened(path) as (fs, name):
      fs.rm_file(name)


def copy_here(urls: Iterable[str], folder: str, target: str) -> None:
  """Copies files of a bucket's folder to one of this machine.

  Raises:
    FileNotFoundError: One isn't in the bucket.
    OSError: One can't be read or written.
  """
  inner = {url: url.removeprefix(f"{folder}/") for url in urls}
  for url, data in read_many(list(inner)):
    path = os.path.join(target, inner.pop(url))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write(path, data)
  for url in inner:
    raise FileNotFoundError(errno.ENOENT, "not there", url)


def copy_there(path: str, url: str) -> None:
  """Copies a file of this machine to a bucket, however large it is."""
  with opened(url) as (fs, name):
    fs.put_file(path, name)


def list_tree(folder: str) -> dict[str, int]:
  """Returns the size in bytes of each file under a folder, by its path."""
  folder = folder.rstrip("/")
  if is_remote(folder):
    return _list(f"{folder}/")
  paths = (
    os.path.join(root, name)
    for root, _, names in os.walk(folder)
    for name in names
  )
  return {path: os.path.getsize(path) for path in paths}


# Listing a large folder takes long, and a program asks for its sources often.
@functools.cache
def find_texts(pattern: str) -> Mapping[str, int]:
  """Returns what a file's name, a folder or a glob of a bucket stands for.

  As with files of this machine, `**` crosses folders, a folder is read with all
  below, and hidden files are left out. Asked for again in one process, it is
  not listed again.

  Args:
    pattern: With `*`, `?` and `[…]` in parts of its path, or without.

  Returns:
    The size in bytes of each file by its path.

  Raises:
    BucketError: The bucket can't be listed.
  """
  pattern = pattern.rstrip("/")
  magic = min((i for i in map(pattern.find, _MAGIC) if i >= 0), default=None)
  every = _list(pattern[:magic])
  sizes = {url: size for url, size in every.items() if fits(url, pattern)}
  _SIZES.update(sizes)
  return sizes


_SIZES: dict[str, int] = {}  # of each file that has been found


def fits(path: str, pattern: str) -> bool:
  """Whether a path is meant by a pattern: itself, or a folder above it.

  >>> fits("gs://b/texts/a/1.txt", "gs://b/texts")
  True
  >>> fits("gs://b/texts/a/1.txt", "gs://b/texts/*.txt")
  False
  >>> fits("gs://b/texts/a/1.txt", "gs://b/**/*.txt")
  True
  """
  return _fits(path.split("/"), pattern.rstrip("/").split("/"))


def _fits(path: list[str], pattern: list[str]) -> bool:
  if not pattern:
    return not any(name.startswith(".") for name in path)
  if not path:
    return False
  hidden = path[0].startswith(".")
  if pattern[0] == "**":
    further = not hidden and _fits(path[1:], pattern)
    return further or _fits(path, pattern[1:])
  if hidden and not pattern[0].startswith("."):
    return False
  alike = path[0] == pattern[0] or fnmatch.fnmatchcase(path[0], pattern[0])
  return alike and _fits(path[1:], pattern[1:])


def size_of(path: str) -> int:
  """Returns a file's size in bytes.

  Raises:
    OSError: It isn't there.
  """
  if not is_remote(path):
    return os.path.getsize(path)
  if path not in _SIZES and path not in find_texts(path):
    raise FileNotFoundError(errno.ENOENT, "not there", path)
  return _SIZES[path]


def open_reader(path: str) -> io.BufferedIOBase:
  """Opens a file for reading.

  Of one in a bucket some megabytes are in memory, whatever its size.

  Raises:
    OSError: Here or while reading: it isn't there, or can't be read.
  """
  if not is_remote(path):
    return open_here(path)
  return io.BufferedReader(_Reader(path), 1 << 18)


def open_here(path: str, buffering: int = -1) -> Any:
  """Opens a file of this machine for reading, and nothing that isn't one.

  A pipe that nobody writes to would be waited for, for ever.

  Args:
    path: Its name.
    buffering: As of Python's own `open`.

  Raises:
    OSError: It isn't there, can't be read, or is a pipe or a device.
  """

  def opener(path: str, flags: int) -> int:
    number = os.open(path, flags | os.O_NONBLOCK)  # says nothing to a file
    mode = os.fstat(number).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
      os.close(number)
      what = "a pipe or a device; copy what it has into a file"
      raise OSError(errno.EINVAL, what, path)
    return number

  return open(path, "rb", buffering, opener=opener)


class _Reader(io.RawIOBase):
  """A file of a bucket, whose errors are known from damage of what is in it."""

  _file = None  # it is closed too if it couldn't be opened

  def __init__(self, url: str):
    self._url = url
    with opened(url) as (fs, name):
      self._file = fs.open(name, "rb", block_size=_BLOCK)

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    with opened(self._url):
      data = self._file.read(len(buffer))
    buffer[: len(data)] = data
    return len(data)

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    return self._file.seek(offset, whence)

  def tell(self) -> int:
    return self._file.tell()

  def close(self) -> None:
    if not self.closed and self._file is not None:
      self._file.close()
    super().close()


def _list(prefix: str) -> dict[str, int]:
  """Returns the sizes of all files whose path begins in some way."""
  protocol, _, name = prefix.partition("://")
  prefix += "" if "/" in name else "/"
  folder, _, begin = prefix.rpartition("/")
  with opened(folder) as (fs, name):
    try:
      found = fs.find(name, prefix=begin, detail=True)
    except FileNotFoundError:
      return {}
  sizes = {
    f"{protocol}://{path}": int(facts["size"])
    for path, facts in found.items()
    if facts["type"] == "file" and not path.endswith("/")
  }
  # Of what is no folder but a file, that itself is found.
  return {url: size for url, size in sizes.items() if url.startswith(prefix)}
