"""The token store: flat arrays in a folder, written once, read by memory map.

```
manifest.json          spec, counts, vocabulary, a sha256 of every file
counts.bin             int64 [V], how often each id comes in the training split
train/ids.bin          uint16 or uint32 [tokens], documents one after another
train/flags.bin        uint8 [tokens], WORD_START | SENTENCE_START, of pairs
                       PAIR_START | label << LABEL_SHIFT
train/offsets.bin      int64 [documents + 1], where each document begins
train/sources.bin      uint16 [documents], ascending: index into its sources
validation/…           the same
tokenizer/             what turns the ids into text again
rows/                  plans made from the store (see rows.py); may be deleted
```
All arrays are little-endian. Documents stand there without [CLS] and [SEP],
which `batches` puts around each piece: one store serves every row length.

A store is assembled from shards. A shard is the tokens of some documents in
reading order; how the documents are cut into shards depends on the documents
alone, so the store is the same for any number of processes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

import numpy as np

from flaxmlm import InputError
from flaxmlm.storage import bounded, hashes, remote
from flaxmlm.storage import files as storage

WORD_START = 1
SENTENCE_START = 2
# Of documents that are pairs: where the second text begins; its label above.
PAIR_START = 4
LABEL_SHIFT = 3

SPLITS = ("train", "validation")
FORMAT = 1
MANIFEST = "manifest.json"

# What a manifest may say.
_ENTRIES = {
  *("format", "spec", "tokenizer", "bytes", "bad_records", "dtype", "vocab"),
  *("documents", "cleaned", "splits", "smallest_held_out", "unknown_tokens"),
  *("files", "sha256"),
}
_SEAL = b',\n  "sha256": "'  # before the manifest's own, its last entry
_MANIFEST_BYTES = 1 << 30  # it has a line a source file

# What becomes of a document.
KEPT, DUPLICATE, IN_VALIDATION = range(3)

# What a shard raises that isn't whole.
_BROKEN = (OSError, ValueError, KeyError, EOFError, TypeError)
_BROKEN += (AttributeError, zipfile.BadZipFile, zlib.error)

_FINGERPRINTS = 1 << 19  # sorted at a time, so that memory is bounded


class Split(NamedTuple):
  """One split's arrays; T tokens, N documents. Memory maps."""

  ids: np.ndarray  # uint16 or uint32 [T]
  flags: np.ndarray  # uint8 [T]
  offsets: np.ndarray  # int64 [N + 1]
  sources: np.ndarray  # uint16 [N]


class TokenStore(NamedTuple):
  """An open store."""

  folder: str
  hash: str  # sha256 of the manifest, which has a sha256 of every file
  manifest: dict[str, Any]
  vocab: dict[str, int]  # size, pad, unk, cls, sep, mask
  counts: np.ndarray  # int64 [V], training unigrams
  train: Split
  validation: Split


class Shard(NamedTuple):
  """The tokens of D documents that stand together in reading order.

  `counts` has the documents "read" and those dropped ("too_short", "empty"),
  and how many documents each cleaning step changed ("cleaned:STEP").
  """

  ids: np.ndarray  # uint16 or uint32 [T]
  flags: np.ndarray  # uint8 [T]
  lengths: np.ndarray  # int64 [D], tokens of each document
  characters: np.ndarray  # int64 [D], after cleaning
  fingerprints: np.ndarray  # uint64 [D], of the cleaned text
  sources: np.ndarray  # uint16 [D]
  counts: Counter[str]


class HeldOut(NamedTuple):
  """Which documents are for validation."""

  first_source: int | None
  """Those of sources from this index on. None: it is by fingerprint."""
  last: int
  """Those with a fingerprint up to this one; -1: none."""

  def among(self, fingerprints: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """Returns which of some documents these are (bool [D])."""
    if self.first_source is not None:
      return sources >= self.first_source
    if self.last < 0:
      return np.zeros(len(fingerprints), bool)
    return fingerprints <= np.uint64(self.last)


# Called with shard files in reading order, what is held out, and whether copies
# are to be dropped; gives what becomes of each shard's documents (uint8 [D]).
Choose = Callable[[Sequence[str], HeldOut, bool], Iterable[np.ndarray]]


def id_dtype(vocab_size: int) -> np.dtype:
  """Returns the dtype that ids are stored in."""
  return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def open_store(
  folder: str, *, say: Callable[[str], None] = print
) -> TokenStore:
  """Opens a store, its files as the manifest says; only counts are in memory.

  At the first use every file is read: its sha256 is the manifest's, every id is
  in the vocabulary, documents begin one after another. That is remembered by
  size and times of the file, outside of the store, so that it may be read-only.

  One in a bucket is copied here first, see `remote.fetch`.

  Args:
    folder: The store.
    say: Is told how far the check is, if it takes long.

  Raises:
    InputError: There is no store, it is of another version, or a file is
      missing, of the wrong size, or not what the manifest says.
  """
  if remote.is_remote(folder):
    folder = remote.fetch(folder)
  manifest, digest = read_manifest(folder)
  for name, facts in manifest["files"].items():
    file = os.path.join(folder, name)
    size = os.path.getsize(file) if os.path.isfile(file) else None
    if size != facts["bytes"]:
      found = "missing" if size is None else f"{size} bytes"
      raise InputError(
        f"{file}: {found}, should be {facts['bytes']} bytes; {_again(folder)}"
      )
  _check_files(folder, manifest, digest, remember=True, say=say)
  dtypes = _dtypes(manifest)
  splits = [
    Split(
      **{
        field: _map(os.path.join(folder, split, f"{field}.bin"), dtypes[field])
        for field in Split._fields
      }
    )
    for split in SPLITS
  ]
  counts = np.fromfile(os.path.join(folder, "counts.bin"), "<i8")
  return TokenStore(
    folder, digest, manifest, manifest["vocab"], counts, *splits
  )


def is_store(folder: str) -> bool:
  """Whether there is a finished store, here or in a bucket.

  Raises:
    InputError: The bucket can't be read.
  """
  try:
    return storage.exists(os.path.join(folder, MANIFEST))
  except OSError as error:
    raise InputError(f"{folder}: {error.strerror}") from error


def read_manifest(folder: str) -> tuple[dict[str, Any], str]:
  """Returns a store's manifest and the sha256 of its file.

  Raises:
    InputError: There is no store, it is of another version, or its manifest is
      damaged.
  """
  path = os.path.join(folder, MANIFEST)
  if not os.path.exists(path):
    raise InputError(
      f"{path}: no such file; make a store by"
      f" python -m flaxmlm.prepare --out={folder}"
    )
  text = bounded.read(path, most=_MANIFEST_BYTES)
  try:
    manifest = bounded.parse_json(text)
    version, _ = manifest["format"], manifest["files"]
  except (ValueError, KeyError, TypeError) as error:
    raise InputError(
      f"{path}: not the manifest of a store ({error}); {_again(folder)}"
    ) from error
  if version != FORMAT:
    raise InputError(
      f"{path}: store format {version}, this version reads {FORMAT}; make it"
      " again by python -m flaxmlm.prepare"
    )
  try:
    _check_manifest(manifest, text)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise InputError(f"{path}: damaged ({error}); {_again(folder)}") from error
  return manifest, hashlib.sha256(text).hexdigest()


def verify(store: TokenStore, *, say: Callable[[str], None] = print) -> None:
  """Reads every file, whatever is remembered of it, and checks it.

  Raises:
    InputError: A file has changed since the store was made.
  """
  _check_files(
    store.folder, store.manifest, store.hash, remember=False, say=say
  )


def _again(folder: str) -> str:
  return f"delete {folder} and prepare it again, or copy it here once more"


def _seal(manifest: Mapping[str, Any]) -> bytes:
  """Returns a manifest's text, with a sha256 of itself at its end."""
  text = json.dumps(manifest, indent=2, ensure_ascii=False)
  head = text.removesuffix("\n}").encode()
  return head + _SEAL + hashlib.sha256(head).hexdigest().encode() + b'"\n}\n'


def _check_manifest(manifest: Mapping[str, Any], text: bytes) -> None:
  """Raises ValueError, or what a wrong type gives, at what isn't right."""

  def need(condition: bool, what: str) -> None:
    if not condition:
      raise ValueError(what)

  unknown = set(manifest) - _ENTRIES
  need(not unknown, f"has {', '.join(sorted(unknown))}")
  head, seal, digest = text.rpartition(_SEAL)
  if "sha256" in manifest or seal:  # stores of before have none
    right = hashlib.sha256(head).hexdigest().encode() + b'"\n}\n'
    need(digest == right, "its own sha256 isn't right")
  vocab, files = manifest["vocab"], manifest["files"]
  size = vocab["size"]
  need(type(size) is int and 0 < size < 2**31, f"a vocabulary of {size!r}")
  ids = [vocab[name] for name in ("pad", "unk", "cls", "sep", "mask")]
  for i in (*ids, *vocab.get("others", ())):
    need(type(i) is int and 0 <= i < size, f"special id {i!r} of {size}")
  dtype = id_dtype(size)
  need(manifest["dtype"] == dtype.str, f"dtype {manifest['dtype']!r}")
  need(isinstance(manifest["spec"], dict), "no spec")
  for name, facts in files.items():
    need(storage.is_inside(name), f"names {name!r}")
    wanted = {"bytes": int, "sha256": str}
    kinds = {entry: type(value) for entry, value in facts.items()}
    need(kinds == wanted and facts["bytes"] >= 0, f"says {facts} of {name}")
  items = {"counts.bin": (size, 8)}
  for split in SPLITS:
    tokens, documents = (
      manifest["splits"][split][name] for name in ("tokens", "documents")
    )
    items[f"{split}/ids.bin"] = tokens, dtype.itemsize
    items[f"{split}/flags.bin"] = tokens, 1
    items[f"{split}/offsets.bin"] = documents + 1, 8
    items[f"{split}/sources.bin"] = documents, 2
  for name, (count, itemsize) in items.items():
    need(name in files, f"has no {name}")
    found = files[name]["bytes"]
    need(found == count * itemsize, f"{found} bytes of {name}, not {count}")


def _check_files(
  folder: str,
  manifest: Mapping[str, Any],
  digest: str,
  *,
  remember: bool,
  say: Callable[[str], None],
) -> None:
  """Raises InputError for a file that isn't what the manifest says."""
  names = {os.path.join(folder, name): name for name in manifest["files"]}
  dtypes, size = _dtypes(manifest), manifest["vocab"]["size"]
  looks = {}
  for split in SPLITS:
    figures = manifest["splits"][split]
    offsets = _look_at_order(
      dtypes["offsets"],
      first=0,
      last=figures["tokens"],
      count=figures["documents"] + 1,
    )
    for field, look in (
      ("ids", _look_at_ids(dtypes["ids"], size)),
      ("offsets", offsets),
      ("sources", _look_at_order(dtypes["sources"], first=0)),
    ):
      looks[os.path.join(folder, split, f"{field}.bin")] = look
  found = hashes.hash_files(
    names,
    looks=looks,
    context=digest,
    remember=remember,
    what=folder,
    say=say,
  )
  for path, name in names.items():
    if found[path] != manifest["files"][name]["sha256"]:
      raise InputError(
        f"{path}: its sha256 isn't the manifest's, the file is damaged or"
        f" another one; {_again(folder)}"
      )


def _look_at_ids(dtype: np.dtype, size: int) -> hashes.Look:
  """Returns what looks for an id that isn't in the vocabulary."""

  def look(chunk: memoryview) -> str | None:
    most = int(np.frombuffer(chunk, dtype).max())
    if most < size:
      return None
    return f"has the id {most}, and the vocabulary {size} tokens"

  return look


def _look_at_order(
  dtype: np.dtype, *, first: int, last: int | None = None, count: int = 0
) -> hashes.Look:
  """Returns what looks whether numbers ascend.

  Args:
    dtype: Theirs.
    first: The least that they begin with.
    last: What the last of `count` numbers is; None: anything.
    count: How many there are.
  """
  before, seen = first, 0

  def look(chunk: memoryview) -> str | None:
    nonlocal before, seen
    numbers = np.frombuffer(chunk, dtype)
    good = numbers[0] >= before and (numbers[1:] >= numbers[:-1]).all()
    before, seen = int(numbers[-1]), seen + len(numbers)
    if last is not None:
      good = good and before <= last and (seen < count or before == last)
      good = good and (seen > len(numbers) or numbers[0] == first)
    end = "" if last is None else f" from {first} to {last}"
    return None if good else f"its numbers don't ascend{end}"

  return look


def _dtypes(manifest: Mapping[str, Any]) -> dict[str, np.dtype]:
  """Returns the dtype of each field of a split."""
  return {
    "ids": np.dtype(manifest["dtype"]),
    "flags": np.dtype("u1"),
    "offsets": np.dtype("<i8"),
    "sources": np.dtype("<u2"),
  }


def validation_bound(fraction: float) -> int:
  """Returns what the fingerprints of validation documents are below.

  Args:
    fraction: Share of the documents, under 1.
  """
  return int(fraction * 2.0**64)


def lock_file(path: str) -> IO[bytes]:
  """Locks a file, made if need be, until it is closed or the process ends.

  On a file system that knows no locks it goes on without, and says so.

  Raises:
    BlockingIOError: Another process holds the lock.
  """
  lock = open(path, "wb")  # noqa: SIM115
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    lock.close()
    raise
  except OSError as error:
    print(
      f"{path}: this file system has no locks ({error.strerror}); see that no"
      " other process writes there"
    )
  return lock


def save_shard(path: str, shard: Shard, key: str) -> None:
  """Writes a shard, whole or not at all; `key` names what it was made of."""
  meta = json.dumps({"key": key, "counts": shard.counts})
  arrays = shard._asdict() | {"counts": np.frombuffer(meta.encode(), np.uint8)}
  with storage.atomic_file(path) as file:
    np.savez(file, **arrays)


def _open_shard(path: str) -> Any:
  if storage.is_remote(path):
    return np.load(io.BytesIO(storage.read(path)), allow_pickle=False)
  return np.load(path, allow_pickle=False)


def load_shard(path: str) -> Shard:
  """Reads what `save_shard` wrote.

  Raises:
    InputError: It isn't that any more; it is removed, to be made again.
    BucketError: The bucket doesn't answer.
  """
  try:
    with _open_shard(path) as arrays:
      values = {name: arrays[name] for name in Shard._fields}
    meta = json.loads(values["counts"].tobytes())
    return Shard(**values | {"counts": Counter(meta["counts"])})
  except storage.BucketError:
    raise
  except _BROKEN as error:
    with contextlib.suppress(OSError):
      storage.remove(path)
    raise InputError(
      f"{path}: damaged ({error}); start again, it is made once more"
    ) from error


def shard_size(path: str, key: str) -> tuple[int, int] | None:
  """Returns a shard's documents and tokens if it is there, made of `key`."""
  try:
    with _open_shard(path) as arrays:
      meta = json.loads(arrays["counts"].tobytes())
      lengths = arrays["lengths"]
      return (len(lengths), int(lengths.sum())) if meta["key"] == key else None
  except _BROKEN:
    return None


def read_heads(
  shards: Sequence[str],
) -> tuple[np.ndarray, np.ndarray, Counter[str]]:
  """Returns fingerprints, sources and counts, without reading the tokens."""
  fingerprints = [np.zeros(0, np.uint64)]
  sources = [np.zeros(0, np.uint16)]
  counts: Counter[str] = Counter()
  for path in shards:
    with _open_shard(path) as arrays:
      fingerprints.append(arrays["fingerprints"])
      sources.append(arrays["sources"])
      counts.update(json.loads(arrays["counts"].tobytes())["counts"])
  return np.concatenate(fingerprints), np.concatenate(sources), counts


def count_ranges(documents: int) -> int:
  """Returns how many ranges of fingerprints to work on, one at a time."""
  bits = max(documents // _FINGERPRINTS, 1).bit_length() - 1
  return 1 << min(bits, 16)


def find_range(fingerprints: np.ndarray, ranges: int) -> np.ndarray:
  """Returns the number of the range (of 2^k) of each fingerprint."""
  top = fingerprints.astype("<u8", copy=False).view("<u2")[3::4]
  return top >> (16 - (ranges.bit_length() - 1))


def decide(
  fingerprints: np.ndarray,
  validation: np.ndarray,
  *,
  disjoint: bool,
  deduplicate: bool,
) -> np.ndarray:
  """Returns what becomes of documents: KEPT, DUPLICATE, IN_VALIDATION.

  All documents of a fingerprint have to be there, in reading order: of copies
  in one split the first one stays.

  Args:
    fingerprints: uint64 [D].
    validation: bool [D], which are for validation.
    disjoint: Whether training documents that validation has too are dropped.
    deduplicate: Whether copies are dropped.

  Returns:
    uint8 [D].
  """
  fates = np.full(len(fingerprints), KEPT, np.uint8)
  training, held_out = np.flatnonzero(~validation), np.flatnonzero(validation)
  if disjoint:
    known = np.isin(fingerprints[training], fingerprints[held_out])
    fates[training[known]] = IN_VALIDATION
    training = training[~known]
  if deduplicate:
    for part in (training, held_out):
      _, first = np.unique(fingerprints[part], return_index=True)
      copies = np.ones(len(part), bool)
      copies[first] = False
      fates[part[copies]] = DUPLICATE
  return fates


def choose_in_memory(
  shards: Sequence[str], held_out: HeldOut, deduplicate: bool
) -> Iterator[np.ndarray]:
  """A `Choose` that holds the heads of all documents: some 20 bytes each."""
  heads = [read_heads([path])[:2] for path in shards]
  ends = np.cumsum([len(fingerprints) for fingerprints, _ in heads])
  fingerprints = np.concatenate(
    [np.zeros(0, np.uint64), *(h[0] for h in heads)]
  )
  sources = np.concatenate([np.zeros(0, np.uint16), *(h[1] for h in heads)])
  validation = held_out.among(fingerprints, sources)
  del heads, sources
  fates = np.empty(len(fingerprints), np.uint8)
  ranges = count_ranges(len(fingerprints))
  numbers = find_range(fingerprints, ranges)
  for number in range(ranges):
    here = np.flatnonzero(numbers == number)
    fates[here] = decide(
      fingerprints[here],
      validation[here],
      disjoint=held_out.first_source is not None,
      deduplicate=deduplicate,
    )
  del fingerprints, validation, numbers
  first = 0
  for end in ends.tolist():
    yield fates[first:end]
    first = end


def assemble(
  folder: str,
  shards: Sequence[str],
  *,
  vocab: Mapping[str, int],
  validation_fraction: float,
  validation_source: int | None,
  deduplicate: bool,
  facts: Mapping[str, Any],
  choose: Choose = choose_in_memory,
) -> dict[str, Any]:
  """Makes the store's files out of shards; the manifest comes last.

  A document goes to validation if its fingerprint lies in the lowest
  `validation_fraction` of the 64-bit range, whatever else is in the corpus. If
  none does, of few and large documents, the one with the smallest fingerprint
  goes there ("smallest_held_out" in the manifest). If validation has sources of
  its own, training documents that stand there too are dropped instead. Of
  copies the first one in reading order stays.

  One shard is in memory at a time, and what `choose` needs.

  Args:
    folder: Where to; has `tokenizer/` already.
    shards: Shard files in reading order.
    vocab: size, pad, unk, cls, sep, mask.
    validation_fraction: See above.
    validation_source: Sources from this index on are validation's own. None:
      split by fingerprint.
    deduplicate: Whether to drop copies.
    facts: Further entries of the manifest.
    choose: Finds the copies.

  Returns:
    The manifest.
  """
  for name in os.listdir(folder):
    path = os.path.join(folder, name)
    if os.path.isfile(path):  # of an earlier try that was killed
      os.unlink(path)
  bound = validation_bound(validation_fraction)
  held_out = HeldOut(validation_source, bound - 1)
  smallest, largest, counts = _survey(shards)
  smallest_held_out = (
    validation_source is None
    and validation_fraction > 0
    and bound <= smallest < largest
  )
  if smallest_held_out:
    held_out = HeldOut(None, smallest)
  fates = choose(shards, held_out, deduplicate)
  files, figures, unigrams, become = _write_splits(
    folder, shards, fates, held_out, vocab
  )
  dropped = {
    "too_short": counts["too_short"],
    "empty": counts["empty"],
    "duplicate": become[DUPLICATE],
    "in_validation": become[IN_VALIDATION],
  }
  for name in sorted(os.listdir(os.path.join(folder, "tokenizer"))):
    name = f"tokenizer/{name}"
    path = os.path.join(folder, name)
    files[name] = {"bytes": os.path.getsize(path), "sha256": _sha256(path)}
    storage.sync_file(path)
  manifest = {
    "format": FORMAT,
    **facts,
    "dtype": id_dtype(vocab["size"]).str,
    "vocab": dict(vocab),
    "documents": {
      "read": counts["read"],
      "kept": become[KEPT],
      "dropped": dropped,
    },
    "cleaned": {
      name.removeprefix("cleaned:"): count
      for name, count in sorted(counts.items())
      if name.startswith("cleaned:")
    },
    "splits": figures,
    "smallest_held_out": smallest_held_out,
    "unknown_tokens": int(unigrams["all"][vocab["unk"]]),
    "files": files,
  }
  for inner in (*SPLITS, "tokenizer"):
    storage.sync_folder(os.path.join(folder, inner))
  # All that it names is on the disk by now.
  storage.write(os.path.join(folder, MANIFEST), _seal(manifest), sync=True)
  return manifest


def _survey(shards: Sequence[str]) -> tuple[int, int, Counter[str]]:
  """Returns the smallest and largest fingerprint, and the summed counts.

  Without any document, both are 0.
  """
  counts: Counter[str] = Counter()
  ends: list[int] = []
  for path in shards:
    fingerprints, _, added = read_heads([path])
    counts.update(added)
    if len(fingerprints):
      ends += [int(fingerprints.min()), int(fingerprints.max())]
      ends = [min(ends), max(ends)]
  smallest, largest = ends or (0, 0)
  return smallest, largest, counts


def _write_splits(
  folder: str,
  shards: Sequence[str],
  fates: Iterable[np.ndarray],
  held_out: HeldOut,
  vocab: Mapping[str, int],
) -> tuple[dict[str, Any], dict[str, Any], dict[str, np.ndarray], list[int]]:
  """Writes all arrays, one shard in memory at a time."""
  writers: dict[str, _Writer] = {}
  for split in SPLITS:
    os.makedirs(os.path.join(folder, split), exist_ok=True)
    for field in Split._fields:
      name = f"{split}/{field}.bin"
      writers[name] = _Writer(os.path.join(folder, name))
  figures = {
    split: {"documents": 0, "tokens": 0, "characters": 0} for split in SPLITS
  }
  unigrams = {
    name: np.zeros(vocab["size"], np.int64) for name in ("train", "all")
  }
  dtype = id_dtype(vocab["size"])
  for split in SPLITS:
    writers[f"{split}/offsets.bin"].write(np.zeros(1, "<i8"))
  become = np.zeros(3, np.int64)
  for path, fate in zip(shards, fates, strict=True):
    shard = load_shard(path)
    become += np.bincount(fate, minlength=3)
    validation = held_out.among(shard.fingerprints, shard.sources)
    for split in SPLITS:
      chosen = (fate == KEPT) & (validation == (split == "validation"))
      tokens = np.repeat(chosen, shard.lengths)
      lengths = shard.lengths[chosen]
      ids = shard.ids[tokens]
      ends = figures[split]["tokens"] + np.cumsum(lengths)
      for field, array in (
        ("ids", ids.astype(dtype)),
        ("flags", shard.flags[tokens].astype("u1")),
        ("offsets", ends.astype("<i8")),
        ("sources", shard.sources[chosen].astype("<u2")),
      ):
        writers[f"{split}/{field}.bin"].write(array)
      figures[split]["documents"] += len(lengths)
      figures[split]["tokens"] += len(ids)
      figures[split]["characters"] += int(shard.characters[chosen].sum())
      seen = np.bincount(ids, minlength=vocab["size"])
      unigrams["all"] += seen
      if split == "train":
        unigrams["train"] += seen
  writers["counts.bin"] = _Writer(os.path.join(folder, "counts.bin"))
  writers["counts.bin"].write(unigrams["train"].astype("<i8"))
  files = {name: writer.close() for name, writer in writers.items()}
  return files, figures, unigrams, become.tolist()


class _Writer:
  """A file that knows its sha256."""

  def __init__(self, path: str):
    self._file = open(path, "wb")  # noqa: SIM115
    self._hash = hashlib.sha256()

  def write(self, array: np.ndarray) -> None:
    data = memoryview(np.ascontiguousarray(array)).cast("B")
    self._file.write(data)
    self._hash.update(data)

  def close(self) -> dict[str, Any]:
    size = self._file.tell()
    self._file.flush()
    os.fsync(self._file.fileno())
    self._file.close()
    return {"bytes": size, "sha256": self._hash.hexdigest()}


def _sha256(path: str) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _map(path: str, dtype: np.dtype) -> np.ndarray:
  if os.path.getsize(path) == 0:  # which can't be mapped
    return np.zeros(0, dtype)
  # A plain view: indexing a np.memmap object costs several times as much.
  return np.memmap(path, dtype, mode="r").view(np.ndarray)
