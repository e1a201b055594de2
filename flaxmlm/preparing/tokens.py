"""Cleans and tokenizes documents: pure functions, run anywhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from flaxmlm.data import cleaning as cleaning_lib
from flaxmlm.data import store

if TYPE_CHECKING:
  from flaxmlm.data.sources import Document
  from flaxmlm.tokenizers import Tokenizer
  from flaxmlm.tokenizers.vocab import Encoded

_PAIR_BORDER = "\x1e"  # "record separator"


def tokenize_shard(
  documents: Iterable[Document],
  tokenizer: Tokenizer,
  cleaning: Mapping[str, Any],
) -> store.Shard:
  """Cleans and tokenizes documents.

  Args:
    documents: What was read.
    tokenizer: Turns text into ids.
    cleaning: The keys under `data.cleaning`.

  Returns:
    The documents that are left and what became of the others.
  """
  counts: Counter[str] = Counter(read=0)
  changed: Counter[str] = Counter()
  kept = []
  for document in documents:
    counts["read"] += 1
    document = clean_document(document, cleaning, changed)
    if document is not None:
      kept.append(document)
  every = iter(tokenizer.encode_batch([t for d in kept for t in d.texts]))
  encoded = [
    next(every) if d.pair is None else _join(next(every), next(every), d.label)
    for d in kept
  ]
  lengths = np.array([len(e.ids) for e in encoded], np.int64)
  some = np.flatnonzero(lengths)
  counts["too_short"] = changed.pop("too_short", 0)
  counts["empty"] = len(lengths) - len(some)
  counts.update({f"cleaned:{step}": n for step, n in changed.items()})
  dtype = store.id_dtype(tokenizer.vocab.size)
  return store.Shard(
    ids=np.concatenate([np.zeros(0, dtype), *(e.ids for e in encoded)]).astype(
      dtype
    ),
    flags=np.concatenate([np.zeros(0, "u1"), *(e.flags for e in encoded)]),
    lengths=lengths[some],
    characters=np.array([sum(map(len, kept[i].texts)) for i in some], np.int64),
    fingerprints=np.array([fingerprint_of(kept[i]) for i in some], np.uint64),
    sources=np.array([d.source for d in kept], np.uint16)[some],
    counts=counts,
  )


def clean_document(
  document: Document, cleaning: Mapping[str, Any], counts: Counter[str]
) -> Document | None:
  """Returns a document with clean texts, None if one of them is too short."""
  texts = []
  for raw in document.texts:
    text = cleaning_lib.clean(raw, cleaning, counts)
    if text is None:
      return None
    texts.append(text)
  return document._replace(**dict(zip(("text", "pair"), texts, strict=False)))


def fingerprint_of(document: Document) -> int:
  """Returns the fingerprint of clean text, or of both, whatever the label."""
  return cleaning_lib.fingerprint(_PAIR_BORDER.join(document.texts))


def _join(first: Encoded, second: Encoded, label: int) -> Encoded:
  """Returns a pair's tokens, the second text's first with the label."""
  if not len(first.ids) or not len(second.ids):
    return first._replace(ids=first.ids[:0], flags=first.flags[:0])
  flags = second.flags.copy()
  flags[0] |= store.PAIR_START | label << store.LABEL_SHIFT
  return first._replace(
    ids=np.concatenate([first.ids, second.ids]),
    flags=np.concatenate([first.flags, flags]),
  )
