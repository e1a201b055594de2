"""Files that may be damaged or made by somebody else, read within bounds.

A file of a few bytes can't fill the memory; what is wrong is one line that
names the file.
"""

from __future__ import annotations

import json
from typing import Any

from flaxmlm import InputError
from flaxmlm.storage.files import open_here

# Of a text file that says how to read others: tokenizer.json, config.json, ….
# The largest that are published are some 35 MB.
MOST_BYTES = 1 << 26
# Objects and arrays in one JSON text: of empty ones, this is half a gigabyte.
MOST_PARTS = 1 << 23


def read(path: str, *, most: int = MOST_BYTES) -> bytes:
  """Reads a file of at most `most` bytes.

  Raises:
    InputError: It is larger, or can't be read.
  """
  try:
    with open_here(path) as file:
      data = file.read(most + 1)
  except (OSError, ValueError) as error:  # ValueError: a NUL in the name
    raise InputError(f"{path}: {reason(error)}") from error
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


def reason(error: Exception) -> str:
  """Returns what is wrong, without the file's name."""
  return getattr(error, "strerror", None) or str(error)
