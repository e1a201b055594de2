"""Minimal pairs: two sentences that differ in what makes one of them wrong.

BLiMP's form (Warstadt et al., 2020, "BLiMP: The Benchmark of Linguistic Minimal
Pairs for English"): a .jsonl file a paradigm, an object a pair.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from flaxmlm import InputError
from flaxmlm.data import sources

FIELDS = ("sentence_good", "sentence_bad")
_ARCHIVE = "|".join(map(re.escape, sources.ARCHIVES))
_ENDING = re.compile(rf"\.jsonl?({_ARCHIVE})?$", re.IGNORECASE)


class Pair(NamedTuple):
  """The sentence that is right, the one that is wrong, and `FILE:LINE`."""

  good: str
  bad: str
  where: str


def read(spec: str) -> tuple[dict[str, list[Pair]], list[str]]:
  """Reads the paradigms of a file, folder or glob.

  Args:
    spec: .jsonl files, plain or in an archive; see `sources`.

  Returns:
    The pairs by the name of their file, without its ending, and the other
    files that were there.

  Raises:
    InputError: No such file, a line that isn't a pair, a file without one, or
      two files of one name.
  """
  known, others = sources.find(spec)
  paths: dict[str, str] = {}
  pairs: dict[str, list[Pair]] = {}
  for path in known:
    if not _ENDING.search(path):
      others.append(path)
      continue
    name = _ENDING.sub("", os.path.basename(path))
    if name in paths:
      raise InputError(
        f"{path}: {paths[name]} is the paradigm {name!r} too; rename one"
      )
    paths[name] = path
    records = sources.read_objects(path)
    pairs[name] = [_as_pair(record, where) for where, record in records]
    if not pairs[name]:
      raise InputError(f"{path}: no pair in it; leave the file out")
  if not pairs:
    raise InputError(f"{spec}: no minimal pairs there; wants .jsonl files")
  return pairs, others


def _as_pair(record: dict[str, object], where: str) -> Pair:
  for field in FIELDS:
    if not isinstance(record.get(field), str):
      raise InputError(
        f"{where}: no text in the field {field!r}; a pair has"
        f" {' and '.join(FIELDS)}"
      )
  return Pair(*(record[field] for field in FIELDS), where)
