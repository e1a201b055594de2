"""Runs and stores in a bucket, as `gs://bucket/folder`.

A store is read by memory map, so its files have to be here. They are copied
once, checked by the sha256 that the manifest has of each, and kept in a folder
that is named by the manifest's own: another store, another folder.

Of a run, checkpoints are written to the bucket and read from there by Orbax.
All else is small: it is kept in a folder of this machine, copied from the
bucket when a program begins, and to it at each checkpoint and at the end. The
bucket's files are the truth.

`gs://…` needs the extra gcs. Credentials are Google's default ones.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

from flaxmlm import InputError
from flaxmlm.storage import files, lease
from flaxmlm.storage.files import is_remote, list_names

CACHE = "FLAXMLM_CACHE"
ORIGIN = "origin.txt"  # in the local folder of a run: where it is kept
_CHUNK = 16 << 20
_MANIFEST = "manifest.json"
_PROCESS = ("JAX_PROCESS_ID", "SLURM_PROCID")
# Parts of a run that aren't copied here when a program begins.
_STAY = ("checkpoints", "stalls", "store", "store.partial", "tensorboard")


def cache_folder() -> str:
  """Returns where copies are kept: $FLAXMLM_CACHE, or ~/.cache/flaxmlm."""
  home = os.path.join(os.path.expanduser("~"), ".cache", "flaxmlm")
  return os.environ.get(CACHE) or home


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
  url = url.rstrip("/")
  try:
    text = files.read(f"{url}/{_MANIFEST}")
    parts = json.loads(text)["files"]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise InputError(
      f"{url}/{_MANIFEST}: no store can be read there ({error}); make one by"
      " python -m flaxmlm.prepare, and copy it there"
    ) from error
  outside = [name for name in parts if not files.is_inside(name)]
  if outside:
    raise InputError(
      f"{url}/{_MANIFEST}: names the file {outside[0]!r}, outside of the store"
    )
  folder = _folder_of(text)
  os.makedirs(folder, exist_ok=True)

  with open(os.path.join(folder, "lock"), "wb") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if os.path.exists(os.path.join(folder, _MANIFEST)):
      return folder
    missing = {
      name: facts
      for name, facts in parts.items()
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
      _copy(f"{url}/{name}", os.path.join(folder, name), facts)
    # Last: with it, all of it is here and has been checked.
    files.write(os.path.join(folder, _MANIFEST), text)
  return folder


def keep_store(folder: str) -> None:
  """Moves a store of this machine to where `fetch` would copy it."""
  target = _folder_of(files.read(os.path.join(folder, _MANIFEST)))
  os.makedirs(target, exist_ok=True)
  with open(os.path.join(target, "lock"), "wb") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if os.path.exists(os.path.join(target, _MANIFEST)):
      return
    # Last the manifest: with it, all of it is here.
    names = sorted(os.listdir(folder), key=lambda name: name == _MANIFEST)
    for name in names:
      path = os.path.join(target, name)
      if os.path.isdir(path):  # of an unfinished copy
        shutil.rmtree(path)
      os.replace(os.path.join(folder, name), path)


def workplace(url: str) -> str:
  """Returns where a store is made that is to be copied to a bucket."""
  url = url.rstrip("/")
  name = hashlib.sha256(url.encode()).hexdigest()[:16]
  return os.path.join(
    cache_folder(), "making", f"{url.rpartition('/')[2]}-{name}"
  )


def _folder_of(manifest: bytes) -> str:
  """Returns where the copy of a store is kept."""
  name = hashlib.sha256(manifest).hexdigest()[:32]
  return os.path.join(cache_folder(), "stores", name)


def _is_whole(path: str, facts: dict[str, Any]) -> bool:
  """Whether a file of an earlier try is what the manifest says."""
  if not os.path.exists(path) or os.path.getsize(path) != facts["bytes"]:
    return False
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest() == facts["sha256"]


def _copy(source: str, path: str, facts: dict[str, Any]) -> None:
  os.makedirs(os.path.dirname(path), exist_ok=True)
  digest = hashlib.sha256()
  try:
    with (
      files.open_reader(source) as reader,
      open(path + ".tmp", "wb") as writer,
    ):
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
  with open(os.path.join(folder, "lock"), "ab") as training:
    try:
      fcntl.flock(training, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
      return folder  # who trains there has the newest
    with _copying(folder):
      if origin(folder) != url:
        files.write(os.path.join(folder, ORIGIN), url.encode())
      _pull(folder)
  return folder


def pull(folder: str) -> None:
  """Makes the local folder of a run what the bucket has of it.

  Raises:
    InputError: The bucket can't be read.
  """
  with _copying(folder):
    _pull(folder)


@contextlib.contextmanager
def _copying(folder: str) -> Iterator[None]:
  """Keeps all others from copying to the local folder of a run."""
  with open(folder + ".lock", "wb") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield


def _pull(folder: str) -> None:
  url = origin(folder)
  try:
    every = files.list_tree(url)
    inner = {each.removeprefix(f"{url}/"): each for each in every}
    kept = (ORIGIN, "lock", lease.MEMO)  # of this machine
    stay = (*_STAY, *kept, lease.FILE)
    there = {n: u for n, u in inner.items() if n.split("/")[0] not in stay}
    for top, folders, names in os.walk(folder):
      if top == folder:
        folders[:] = [name for name in folders if name not in _STAY]
      for name in names:
        path = os.path.join(top, name)
        own = os.path.relpath(path, folder)
        if own not in there and own not in kept:
          files.remove(path)
    named = {there_url: name for name, there_url in there.items()}
    for found, data in files.read_many(list(named)):
      path = os.path.join(folder, named[found])
      os.makedirs(os.path.dirname(path), exist_ok=True)
      files.write(path, data)
  except OSError as error:
    raise InputError(f"{url}: can't be read: {error}") from error


@contextlib.contextmanager
def claim(workdir: str, *, alone: bool = True) -> Iterator[Callable[[], None]]:
  """Keeps all others from training in a run's bucket, see `lease`.

  What the bucket has of the run is copied here once more, now that nobody
  changes it. Of a run that is kept here, nothing is done.

  Args:
    workdir: The local folder of the run.
    alone: See `lease.hold`.

  Yields:
    What raises InputError if another process has taken over; to be called
    before anything is saved.

  Raises:
    InputError: Another process trains there, or the bucket doesn't answer.
  """
  url = origin(workdir)
  if url is None:
    yield lambda: None
    return
  memo = os.path.join(workdir, lease.MEMO)
  with lease.hold(url, memo, alone=alone) as check:
    pull(workdir)
    yield check


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
  """Returns the names in a run's folder of checkpoints; digits are steps.

  Here a step has its name once it is whole; in a bucket, where nothing can be
  renamed at once, it has a manifest.
  """
  folder = checkpoints(workdir)
  names = list_names(folder)
  if not is_remote(folder):
    return names
  return [
    name
    for name in names
    if name.isdigit() and files.exists(f"{folder}/{name}/{_MANIFEST}")
  ]


def make_push(workdir: str) -> Callable[[bool], None]:
  """Returns what copies to the bucket which files of a run have changed.

  It does nothing for a run that is kept here.

  Returns:
    `push(must)`. If a file can't be copied, it says so in a line, and the next
    push tries it again; with `must` it raises InputError, which names the local
    folder that has the files.
  """
  url = origin(workdir)
  if url is None:
    return lambda must: None
  pushed: dict[str, tuple[int, int]] = {}

  def push(must: bool) -> None:
    changed = {
      inner: state
      for inner, state in _states(workdir).items()
      if pushed.get(inner) != state
    }
    for number, (inner, state) in enumerate(changed.items()):
      try:
        files.write(f"{url}/{inner}", files.read(os.path.join(workdir, inner)))
      except OSError as error:
        left = f"{len(changed) - number} files couldn't be copied to {url}"
        what = f"{left} ({error.strerror}), and are in {workdir}"
        if must:
          raise InputError(
            f"{what}; copy them there before anything else uses this run:"
            f" gcloud storage cp -r '{workdir}/*' {url}"
          ) from error
        print(
          f"WARNING: {what}; they are tried again with the next checkpoint",
          file=sys.stderr,
          flush=True,
        )
        return
      pushed[inner] = state

  return push


def _states(workdir: str) -> dict[str, tuple[int, int]]:
  """Returns size and time of a run's files, those that are to be copied."""
  states = {}
  for folder, folders, names in os.walk(workdir):
    folders[:] = [n for n in folders if n not in ("store", "store.partial")]
    for name in names:
      path = os.path.join(folder, name)
      inner = os.path.relpath(path, workdir)
      if inner not in (ORIGIN, "lock", lease.MEMO):
        found = os.stat(path)
        states[inner] = found.st_size, found.st_mtime_ns
  return states


def push_store(folder: str, url: str) -> None:
  """Copies a store to a bucket, its manifest last.

  Raises:
    BucketError: The bucket doesn't take it.
  """
  with open(os.path.join(folder, _MANIFEST), encoding="utf-8") as file:
    names = list(json.load(file)["files"])
  for name in [*names, _MANIFEST]:
    files.copy_there(os.path.join(folder, name), f"{url}/{name}")
