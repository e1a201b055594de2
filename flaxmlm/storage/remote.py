"""Runs and stores in a bucket, as `gs://bucket/folder`.

A store is read by memory map, so its files have to be here. They are copied
once, checked by the sha256 that the manifest has of each, and kept in a folder
that is named by the manifest's own: another store, another folder.

Of a run, checkpoints are written to the bucket and read from there by Orbax.
All else is small: it is kept in a folder of this machine, copied from the
bucket when a program begins, and to it at each checkpoint and at the end. The
bucket's files are the truth.

Paths are those of etils' epath, on which Orbax stands too: `gs://…` needs the
extra gcs. Credentials are Google's default ones.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from typing import Any

from flaxmlm import InputError

CACHE = "FLAXMLM_CACHE"
ORIGIN = "origin.txt"  # in the local folder of a run: where it is kept
_CHUNK = 16 << 20
_MANIFEST = "manifest.json"
_COMMITTED = "commit_success.txt"  # Orbax', in buckets
_PROCESS = ("JAX_PROCESS_ID", "SLURM_PROCID")
# Parts of a run that aren't copied here when a program begins.
_STAY = ("checkpoints", "store", "store.partial", "tensorboard")


def is_remote(path: str) -> bool:
  """Whether a path is one of a bucket, like gs://bucket/store."""
  return "://" in path


def cache_folder() -> str:
  """Returns where copies are kept: $FLAXMLM_CACHE, or ~/.cache/flaxmlm."""
  home = os.path.join(os.path.expanduser("~"), ".cache", "flaxmlm")
  return os.environ.get(CACHE) or home


def open_path(url: str) -> Any:
  """Returns a remote path that can be read and written.

  Raises:
    InputError: What reads such paths isn't installed.
  """
  from etils import epath

  if importlib.util.find_spec("gcsfs") is None:
    raise InputError(f"{url}: reading it wants gcsfs; pip install -e '.[gcs]'")
  return epath.Path(url)


def fetch(url: str, *, say: Callable[[str], None] = print) -> str:
  """Copies a store here, unless it is here already; returns its folder.

  Processes of one machine that want the same store at once wait for one of
  them.

  Args:
    url: Folder of the store.
    say: Is told what is copied.

  Raises:
    InputError: There is no store, a file isn't what the manifest says, or it is
      too large for the disk.
  """
  source = open_path(url)
  try:
    text = (source / _MANIFEST).read_bytes()
    files = json.loads(text)["files"]
  except Exception as error:  # gcsfs has errors of many kinds
    raise InputError(
      f"{url}/{_MANIFEST}: no store can be read there ({error}); make one by"
      " python -m flaxmlm.prepare, and copy it there"
    ) from error
  from flaxmlm.storage.files import is_inside

  outside = [name for name in files if not is_inside(name)]
  if outside:
    raise InputError(
      f"{url}/{_MANIFEST}: names the file {outside[0]!r}, outside of the store"
    )
  folder = os.path.join(
    cache_folder(), "stores", hashlib.sha256(text).hexdigest()[:32]
  )
  os.makedirs(folder, exist_ok=True)

  with open(os.path.join(folder, "lock"), "wb") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if os.path.exists(os.path.join(folder, _MANIFEST)):
      return folder
    missing = {
      name: facts
      for name, facts in files.items()
      if not _is_whole(os.path.join(folder, name), facts)
    }
    size = sum(facts["bytes"] for facts in missing.values())
    free = shutil.disk_usage(folder).free
    if size > free:
      raise InputError(
        f"{url}: {size / 1e9:.1f} GB are to be copied to {folder}, where"
        f" {free / 1e9:.1f} GB are free; set {CACHE} to a folder with room"
      )
    say(f"copying {url}, {size / 1e9:.2f} GB, to {folder}")
    for name, facts in missing.items():
      _copy(source / name, os.path.join(folder, name), facts)
    # Last: with it, all of it is here and has been checked.
    _write(os.path.join(folder, _MANIFEST), text)
  return folder


def _is_whole(path: str, facts: dict[str, Any]) -> bool:
  """Whether a file of an earlier try is what the manifest says."""
  if not os.path.exists(path) or os.path.getsize(path) != facts["bytes"]:
    return False
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest() == facts["sha256"]


def _copy(source: Any, path: str, facts: dict[str, Any]) -> None:
  os.makedirs(os.path.dirname(path), exist_ok=True)
  digest = hashlib.sha256()
  try:
    with source.open("rb") as reader, open(path + ".tmp", "wb") as writer:
      while chunk := reader.read(_CHUNK):
        digest.update(chunk)
        writer.write(chunk)
  except OSError as error:
    raise InputError(f"{source}: can't be copied: {error}") from error
  if digest.hexdigest() != facts["sha256"]:
    os.remove(path + ".tmp")
    raise InputError(
      f"{source}: its sha256 isn't the manifest's, the file is damaged; copy"
      " the store there again"
    )
  os.replace(path + ".tmp", path)


def _write(path: str, data: bytes) -> None:
  with open(path + ".tmp", "wb") as file:
    file.write(data)
  os.replace(path + ".tmp", path)


def localize(path: str) -> str:
  """Returns the folder of this machine where a run's files are.

  That is the path itself, or of one in a bucket a copy, newly made from what is
  there: all but checkpoints, store and TensorBoard's files.

  Raises:
    InputError: The bucket can't be read.
  """
  if not is_remote(path):
    url = origin(path)
    if url is None:
      return path
    path = url
  url = path.rstrip("/")
  # Processes that train together may be on one machine.
  own = next((os.environ[n] for n in _PROCESS if n in os.environ), "0")
  name = hashlib.sha256(f"{url} {own}".encode()).hexdigest()[:16]
  folder = os.path.join(
    cache_folder(), "runs", f"{url.rpartition('/')[2]}-{name}"
  )
  os.makedirs(folder, exist_ok=True)
  with (
    open(folder + ".lock", "wb") as copying,
    open(os.path.join(folder, "lock"), "ab") as training,
  ):
    fcntl.flock(copying, fcntl.LOCK_EX)
    try:
      fcntl.flock(training, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
      return folder  # who trains there has the newest
    _write(os.path.join(folder, ORIGIN), url.encode())
    try:
      # What it listed earlier may have changed since.
      source = open_path(url)
      forget(url)
      _pull(source, folder)
    except InputError:
      raise
    except Exception as error:  # gcsfs has errors of many kinds
      raise InputError(f"{url}: can't be read: {error!r}") from error
  return folder


def _pull(source: Any, folder: str, *, top: bool = True) -> None:
  """Makes a local folder what a remote one is."""
  children = source.iterdir() if source.exists() else ()
  there = {path.name: path for path in children}
  kept = {*_STAY, ORIGIN, "lock"} if top else set()
  for name in os.listdir(folder):
    if name not in there and name not in kept:
      path = os.path.join(folder, name)
      shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
  for name, path in there.items():
    if name in kept:
      continue
    local = os.path.join(folder, name)
    if path.is_dir():
      os.makedirs(local, exist_ok=True)
      _pull(path, local, top=False)
    else:
      _write(local, path.read_bytes())


def forget(url: str) -> None:
  """Forgets what has been listed of a bucket."""
  import fsspec

  fsspec.filesystem(url.partition("://")[0]).invalidate_cache()


def origin(workdir: str) -> str | None:
  """Returns where a run is kept, if that is a bucket."""
  path = os.path.join(workdir, ORIGIN)
  if not os.path.exists(path):
    return None
  with open(path, encoding="utf-8") as file:
    return file.read()


def checkpoints(workdir: str) -> str:
  """Returns the folder of a run's checkpoints, here or in the bucket."""
  url = origin(workdir)
  if url is None:
    return os.path.abspath(os.path.join(workdir, "checkpoints"))
  return f"{url}/checkpoints"


def list_checkpoints(workdir: str) -> list[str]:
  """Returns the names of a run's checkpoints, those that are whole.

  Here a checkpoint has its name once it is whole; in a bucket it has a file
  that says so.
  """
  folder = checkpoints(workdir)
  names = list_names(folder)
  if not is_remote(folder):
    return names
  root = open_path(folder)
  return [name for name in names if (root / name / _COMMITTED).exists()]


def list_names(folder: str) -> list[str]:
  """Returns the names in a folder, here or in a bucket, or none."""
  if not is_remote(folder):
    return os.listdir(folder) if os.path.isdir(folder) else []
  path = open_path(folder)
  return [child.name for child in path.iterdir()] if path.exists() else []


def make_push(workdir: str) -> Callable[[], None]:
  """Returns what copies to the bucket which files of a run have changed.

  It does nothing for a run that is kept here.
  """
  url = origin(workdir)
  if url is None:
    return lambda: None
  pushed: dict[str, tuple[int, int]] = {}

  def push() -> None:
    for folder, folders, names in os.walk(workdir):
      folders[:] = [n for n in folders if n not in ("store", "store.partial")]
      for name in names:
        path = os.path.join(folder, name)
        found = os.stat(path)
        state = found.st_size, found.st_mtime_ns
        inner = os.path.relpath(path, workdir)
        if inner in (ORIGIN, "lock") or pushed.get(inner) == state:
          continue
        with open(path, "rb") as file:
          _put(f"{url}/{inner}", file.read())
        pushed[inner] = state

  return push


def push_store(folder: str, url: str) -> None:
  """Copies a store to a bucket, its manifest last."""
  with open(os.path.join(folder, _MANIFEST), encoding="utf-8") as file:
    names = list(json.load(file)["files"])
  for name in [*names, _MANIFEST]:
    with open(os.path.join(folder, name), "rb") as file:
      _put(f"{url}/{name}", file)


def _put(url: str, data: Any) -> None:
  path = open_path(url)
  path.parent.mkdir(parents=True, exist_ok=True)
  if isinstance(data, bytes):
    path.write_bytes(data)
    return
  with path.open("wb") as file:
    shutil.copyfileobj(data, file, _CHUNK)
