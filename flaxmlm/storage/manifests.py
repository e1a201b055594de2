"""What is in a folder, by the sha256 of every file: FOLDER/manifest.json.

Whoever fills a folder seals it, as the last thing that is done there. From then
on `check` tells whether it is still what it was, to the bit. The manifest lies
inside, so that it goes where the folder goes: one rename or copy takes both.
Orbax reads the folders that it made by their names, and doesn't see it.

Folders may be here or in a bucket.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from flaxmlm.storage import files

FILE = "manifest.json"
_CHUNK = 4 << 20
_THREADS = 8  # hashlib lets the others run


class BrokenError(Exception):
  """A folder isn't what its manifest says; the message says where."""


def seal(folder: str, facts: Mapping[str, Any]) -> None:
  """Writes the manifest of a folder that is complete.

  Here, each file is flushed to the disk, dropped from memory and read back
  first. A bucket has what it has confirmed.

  Args:
    folder: The folder; sub-folders count.
    facts: What else the manifest is to say, for JSON; hashed too.

  Raises:
    BrokenError: A file was read back otherwise than it was written.
    OSError: The disk is full, or something else is wrong with it.
  """
  sums = _hash_files(folder, _sizes(folder))
  if not files.is_remote(folder):
    for name in sums:
      _flush(os.path.join(folder, name))
    for root, _, _ in os.walk(folder):
      files.sync_folder(root)
    again = _hash_files(folder, sums)
    if again != sums:
      unlike = sorted(n for n in sums if sums[n] != again[n])
      raise BrokenError(f"{unlike[0]} is read otherwise than it was written")
  body = dict(facts) | {"files": sums}
  text = _dump({"body": body, "sha256": _hash(_dump(body))})
  if files.is_remote(folder):
    files.write(f"{folder}/{FILE}", text)
    return
  with open(os.path.join(folder, FILE + ".tmp"), "wb") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(os.path.join(folder, FILE + ".tmp"), os.path.join(folder, FILE))
  files.sync_folder(folder)


def is_sealed(folder: str) -> bool:
  """Whether a folder has a manifest, of whatever is in it."""
  return files.exists(f"{folder}/{FILE}")


def read(folder: str) -> dict[str, Any]:
  """Returns the facts that `seal` was given; the files aren't looked at.

  Raises:
    BrokenError: There is no manifest, or it isn't as it was written.
  """
  body = _read(folder)
  return {name: value for name, value in body.items() if name != "files"}


def check(folder: str) -> dict[str, Any]:
  """Returns the facts that `seal` was given, if every file is as it was.

  Files are read by several threads.

  Raises:
    BrokenError: A file is missing, shorter, longer or of another hash, or the
      manifest itself is. The message names it.
  """
  body = _read(folder)
  wanted = body.pop("files")
  there = _sizes(folder)
  for name, facts in wanted.items():
    if name not in there:
      raise BrokenError(f"{name} is missing")
    if there[name] != facts["bytes"]:
      raise BrokenError(
        f"{name} has {there[name]:,} bytes of {facts['bytes']:,}"
      )
  found = _hash_files(folder, wanted)
  for name, facts in wanted.items():
    if found[name] != facts:
      raise BrokenError(f"{name} isn't what was written: its sha256 differs")
  return body


def _read(folder: str) -> dict[str, Any]:
  try:
    text = files.read(f"{folder}/{FILE}")
  except FileNotFoundError:
    raise BrokenError(f"{FILE} is missing") from None
  try:
    whole = json.loads(text)
    body = whole["body"]
    same = _dump(whole) == text and _hash(_dump(body)) == whole["sha256"]
  except (ValueError, KeyError, TypeError, RecursionError):
    same = False
  if not same:
    raise BrokenError(f"{FILE} isn't what was written")
  return body


def _sizes(folder: str) -> dict[str, int]:
  """Returns the size of every file in a folder, but its manifest's."""
  named = {
    path.removeprefix(f"{folder}/"): size
    for path, size in files.list_tree(folder).items()
  }
  return {n: s for n, s in named.items() if n not in (FILE, FILE + ".tmp")}


def _hash_files(folder: str, names: Iterable[str]) -> dict[str, dict[str, Any]]:
  """Returns size and sha256 of files in a folder, by name."""

  def facts(name: str) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with files.open_reader(f"{folder}/{name}") as file:
      while chunk := file.read(_CHUNK):
        digest.update(chunk)
        size += len(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}

  found = sorted(names)
  with ThreadPoolExecutor(_THREADS) as pool:
    return dict(zip(found, pool.map(facts, found), strict=True))


def _flush(path: str) -> None:
  """Sends a file to the disk, and forgets what memory has of it."""
  file = os.open(path, os.O_RDONLY)
  try:
    os.fsync(file)
    if hasattr(os, "posix_fadvise"):
      os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
  finally:
    os.close(file)


def _dump(values: Any) -> bytes:
  return json.dumps(values, sort_keys=True, indent=1).encode()


def _hash(text: bytes) -> str:
  return hashlib.sha256(text).hexdigest()
