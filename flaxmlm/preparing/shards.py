"""Shard files: what a worker makes, whichever way it was started.

A shard is some `SHARD_CHARS` of a part's documents. Its file is named by its
part and its place in there, and is kept with a hash of all that it was made of:
to make it again changes nothing, and takes only the time of reading.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from flaxmlm import InputError, tokenizers
from flaxmlm.data import store
from flaxmlm.data.sources import BadRecords, Document
from flaxmlm.preparing.documents import Part, read_part
from flaxmlm.preparing.tokens import tokenize_shard
from flaxmlm.storage.files import copy_here, is_remote, list_tree, make_folder

# Characters of a shard: large enough to keep a process busy for a fraction of a
# second, small enough for its tokens to be a few MB.
SHARD_CHARS = 4 << 20


class Recipe(NamedTuple):
  """How documents become shards; the same for all of a store."""

  folder: str
  """Where the shards go, here or in a bucket: `FOLDER/PART/SHARD.npz`."""
  tokenizer: str
  """Folder of the tokenizer."""
  fingerprint: str
  """Of the tokenizer."""
  cleaning: dict[str, Any]
  """The keys under `data.cleaning`."""


class Task(NamedTuple):
  """A shard to make."""

  path: str
  documents: list[Document]
  recipe: Recipe

  @property
  def where(self) -> str:
    """Where its text stands: the first document and the last one."""
    first, last = self.documents[0].where, self.documents[-1].where
    return first if first == last else f"{first} to {last}"


class Done(NamedTuple):
  """A shard that is made."""

  path: str
  documents: int
  """That were read for it."""
  kept: int
  """That are in it."""
  tokens: int
  bytes: int


def tasks(
  parts: Iterable[tuple[int, Part]],
  options: Mapping[str, Any],
  recipe: Recipe,
  bad: BadRecords,
) -> Iterator[Task]:
  """Reads numbered parts and cuts each into shards of one document at least.

  Args:
    parts: Of `documents.cut`, with their numbers there.
    options: Of `documents.reading`.
    recipe: What the shards are made by.
    bad: Is filled with what was skipped.

  Raises:
    InputError: See `sources.read`.
  """
  for number, part in parts:
    folder = os.path.join(recipe.folder, f"{number:06d}")
    make_folder(folder)
    documents = read_part(part, options, bad)
    for place, shard in enumerate(_cut(documents)):
      yield Task(os.path.join(folder, f"{place:06d}.npz"), shard, recipe)


def _cut(documents: Iterable[Document]) -> Iterator[list[Document]]:
  shard: list[Document] = []
  size = 0
  for document in documents:
    shard.append(document)
    size += sum(map(len, document.texts))
    if size >= SHARD_CHARS:
      yield shard
      shard, size = [], 0
  if shard:
    yield shard


def make_shard(task: Task) -> Done:
  """Makes a shard unless it is there already, made of the same text.

  Raises:
    OSError: It can't be written.
  """
  texts = [text for d in task.documents for text in d.texts]
  recipe = task.recipe
  head = [
    recipe.fingerprint,
    recipe.cleaning,
    [(d.source, d.pair is None, d.label) for d in task.documents],
    [*map(len, texts)],
  ]
  data = "".join(texts).encode("utf-8", "surrogatepass")
  digest = hashlib.sha256(json.dumps(head).encode())
  digest.update(data)
  key = digest.hexdigest()
  size = store.shard_size(task.path, key)
  if size is None:
    tokenizer = _tokenizer_at(recipe.tokenizer, recipe.fingerprint)
    try:
      shard = tokenize_shard(task.documents, tokenizer, recipe.cleaning)
    except Exception as error:
      error.add_note(f"in the shard of {task.where}")
      raise
    store.save_shard(task.path, shard, key)
    size = len(shard.lengths), len(shard.ids)
  return Done(task.path, len(task.documents), *size, len(data))


@functools.cache
def _tokenizer_at(folder: str, fingerprint: str) -> tokenizers.Tokenizer:
  """Loads a tokenizer once; another one in the same folder is another.

  Raises:
    InputError: It isn't there, or is another one.
  """
  if is_remote(folder):
    with tempfile.TemporaryDirectory() as here:
      copy_here(list_tree(folder), folder, here)
      tokenizer = tokenizers.load(here)
  else:
    tokenizer = tokenizers.load(folder)
  if tokenizer.fingerprint != fingerprint:
    raise InputError(
      f"{folder}: holds another tokenizer here than where the job was started;"
      " all workers must see the same --out"
    )
  return tokenizer
