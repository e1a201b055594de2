"""Rows: which pieces of which documents stand together in a row of L tokens.

A document longer than L - 2 tokens is cut into pieces of L - 2 and a rest, so
that each piece fits a row with its own [CLS] and [SEP]. Whole pieces are then
packed by best-fit-decreasing: longest first, each into the fullest row that
still has room (D. S. Johnson, "Near-optimal bin packing algorithms", 1973).
It runs over the histogram of lengths (as in Krell et al., arXiv:2107.02027):
rows that hold the same lengths are one entry with a count, so that the cost
depends on L, hardly on the number of documents.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flaxmlm import InputError
from flaxmlm.data.store import SENTENCE_START, TokenStore
from flaxmlm.storage import bounded, hashes

SPECIALS = 2  # [CLS] and [SEP] of each piece
_BLOCK = 1 << 18  # documents that are looked at together
_FLAGS_BLOCK = 1 << 24  # tokens
_HASHES = "sha256.json"  # of the files of a plan
_VERSION = 4  # of the planner and its files; part of a cached plan's name


class RowPlan(NamedTuple):
  """The rows of a split; R rows, P pieces.

  Row r holds the pieces `row_start[r]` to `row_start[r + 1]`. A piece is the
  tokens `piece_start` to `piece_start + piece_length` of the split's ids. Rows
  that are to be pairs hold one piece each. Of whole sentences, those of several
  come first, then those of one, both in the order of the text.
  """

  split: str
  row_length: int
  row_start: np.ndarray  # int64 [R + 1]
  piece_start: np.ndarray  # int64 [P]
  piece_length: np.ndarray  # int32 [P], without [CLS] and [SEP]
  pairs: np.ndarray = np.zeros(0, np.int64)  # [1]: rows that have two parts

  @property
  def rows(self) -> int:
    """Number of rows R."""
    return len(self.row_start) - 1

  @property
  def fill(self) -> float:
    """Share of the rows' slots that isn't padding."""
    used = int(self.piece_length.sum(dtype=np.int64))
    used += SPECIALS * len(self.piece_length)
    return used / max(self.rows * self.row_length, 1)


def plan(
  offsets: np.ndarray, row_length: int, *, split: str = "train"
) -> RowPlan:
  """Packs documents into rows.

  The plan depends on the lengths and on L alone. Which of the pieces of one
  length goes where is scrambled, and so is the order of the rows: neighbours in
  a row aren't neighbours in the corpus, and the first rows are a fair sample.

  Args:
    offsets: int64 [documents + 1], ascending; document d is the tokens
      `offsets[d]` to `offsets[d + 1]`. Need not begin at 0.
    row_length: L, at least 3.
    split: Name of the split, kept in the plan.

  Returns:
    The plan; it has no rows if there are no tokens.
  """
  room = row_length - SPECIALS
  if room < 1:
    raise InputError(f"data.row_length={row_length} has no room for a token")
  offsets = np.asarray(offsets, np.int64)
  patterns, repeats = _pack(_count_lengths(offsets, room))
  row_start, piece_length = _lay_out(patterns, repeats)
  starts, lengths = _cut(offsets, room)
  starts = starts[_scrambled(lengths)]
  del lengths  # 10**8 documents: each array that is kept counts
  piece_start = np.empty_like(starts)
  piece_start[np.argsort(piece_length, kind="stable")] = starts
  return RowPlan(split, row_length, row_start, piece_start, piece_length)


def plan_sentences(
  offsets: np.ndarray,
  starts: np.ndarray,
  row_length: int,
  *,
  split: str = "train",
) -> RowPlan:
  """Puts whole sentences of one document into each row, as many as fit.

  A row is one piece, and has room for one more [SEP]: it is to become a pair.
  What doesn't fit any more begins the next row, so first sentences tend to be
  long; half of the documents are filled from their end, where it is the last
  ones: then lengths don't tell which part of a row was first.

  Args:
    offsets: As of `plan`.
    starts: int64, ascending: where sentences begin, between the first and the
      last of `offsets`.
    row_length: L, at least 4. A sentence that is longer than L - 3 is cut.
    split: Name of the split, kept in the plan.

  Returns:
    The plan; it has no rows if there are no tokens.
  """
  room = row_length - SPECIALS - 1
  if room < 1:
    raise InputError(f"data.row_length={row_length} has no room for a token")
  offsets = np.asarray(offsets, np.int64)
  borders = np.union1d(starts, offsets)
  begin, end = offsets[:-1], offsets[1:]
  backward = (mix(np.arange(len(begin))) & np.uint64(1)).astype(bool)
  starts, stops = _fill(begin[~backward], end[~backward], borders, room)
  mirrored = _fill(-end[backward], -begin[backward], -borders[::-1], room)
  piece_start = np.concatenate([starts, -mirrored[1]])
  piece_length = np.concatenate([stops - starts, mirrored[1] - mirrored[0]])
  some = np.flatnonzero(piece_length)
  inner = np.searchsorted(borders, piece_start + 1)
  single = borders[inner[some]] >= (piece_start + piece_length)[some]
  order = some[np.lexsort([piece_start[some], single])]
  return RowPlan(
    split,
    row_length,
    np.arange(len(order) + 1),
    piece_start[order],
    piece_length[order].astype(np.int32),
    np.array([np.count_nonzero(~single)]),
  )


def plan_pairs(
  offsets: np.ndarray, row_length: int, *, split: str = "train"
) -> RowPlan:
  """Puts each document that is a pair into a row of its own.

  Those of more than L - 3 tokens have no room, and are left out.

  Args:
    offsets: As of `plan`.
    row_length: L, at least 4.
    split: Name of the split, kept in the plan.
  """
  offsets = np.asarray(offsets, np.int64)
  lengths = np.diff(offsets)
  fit = lengths <= row_length - SPECIALS - 1
  rows = np.count_nonzero(fit)
  return RowPlan(
    split,
    row_length,
    np.arange(rows + 1),
    offsets[:-1][fit],
    lengths[fit].astype(np.int32),
    np.array([rows]),
  )


def _fill(
  begin: np.ndarray, end: np.ndarray, borders: np.ndarray, room: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns where pieces of at most `room` tokens begin and end, at borders.

  Each goes as far as it can, from where the one before it ends; where there is
  no border, it is cut. `begin` and `end` are those of documents.
  """
  begins, ends = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
  # A turn cuts the next piece off every document that goes on.
  while len(begin):
    limit = np.minimum(begin + room, end)
    stop = borders[np.searchsorted(borders, limit, side="right") - 1]
    stop = np.where(stop > begin, stop, limit)
    begins.append(begin)
    ends.append(stop)
    begin, end = stop[stop < end], end[stop < end]
  return np.concatenate(begins), np.concatenate(ends)


def find_sentences(flags: np.ndarray, offsets: np.ndarray) -> np.ndarray:
  """Returns where sentences begin in the documents of offsets, ascending."""
  found = [np.zeros(0, np.int64)]
  for first in range(int(offsets[0]), int(offsets[-1]), _FLAGS_BLOCK):
    block = flags[first : min(first + _FLAGS_BLOCK, int(offsets[-1]))]
    found.append(np.flatnonzero(block & SENTENCE_START) + first)
  return np.concatenate(found)


def predict_fill(offsets: np.ndarray, row_length: int) -> float:
  """Returns the `fill` that `plan` would reach, without the memory of a plan.

  Args:
    offsets: As of `plan`; a memory map is read in blocks.
    row_length: L.
  """
  histogram = _count_lengths(offsets, row_length - SPECIALS)
  used = int(histogram @ (np.arange(len(histogram)) + SPECIALS))
  _, repeats = _pack(histogram)
  return used / max(sum(repeats) * row_length, 1)


def ragged(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
  """Returns the numbers `start, … start + size - 1` of each range in turn.

  >>> ragged(np.array([7, 0]), np.array([2, 3])).tolist()
  [7, 8, 0, 1, 2]
  """
  sizes = np.asarray(sizes, np.int64)
  ends = np.cumsum(sizes)
  total = int(ends[-1]) if len(ends) else 0
  result = np.repeat(starts - (ends - sizes), sizes)
  result += np.arange(total)
  return result


def mix(values: np.ndarray | np.uint64) -> np.ndarray:
  """Hashes uint64 to uint64, one to one: the finaliser of SplitMix64.

  Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014.
  Used where a shuffle must never change with NumPy's version.
  """
  x = np.array(values, np.uint64, ndmin=1)
  x ^= x >> np.uint64(30)
  x *= np.uint64(0xBF58476D1CE4E5B9)
  x ^= x >> np.uint64(27)
  x *= np.uint64(0x94D049BB133111EB)
  x ^= x >> np.uint64(31)
  return x


def load(
  store: TokenStore,
  split: str,
  row_length: int,
  *,
  source: int | None = None,
  kind: str = "packed",
) -> RowPlan:
  """Returns the plan of a split, from the store's folder where it is kept.

  A plan is made once and kept in the store's `rows/` under a name with the
  manifest's hash. Where the store can't be written to, it is made each time; so
  is one that is damaged.

  Args:
    store: An open store.
    split: "train" or "validation".
    row_length: L.
    source: Only documents of this source (an index into the store's sources):
      for sources with weights. None: all of them.
    kind: "packed", "sentences" or "pairs": see `plan`, `plan_sentences` and
      `plan_pairs`.
  """
  offsets = getattr(store, split).offsets
  if source is not None:
    ends = np.searchsorted(getattr(store, split).sources, [source, source + 1])
    offsets = offsets[ends[0] : ends[1] + 1]
  which = "all" if source is None else str(source)
  which += f"-{kind}" * (kind != "packed")
  folder = os.path.join(
    store.folder,
    "rows",
    f"{split}-{row_length}-{which}-{store.hash[:16]}-v{_VERSION}",
  )
  names = RowPlan._fields[2:]
  if os.path.isdir(folder):
    try:
      return RowPlan(split, row_length, *_read(folder, names))
    except (OSError, ValueError, EOFError, KeyError) as error:
      print(f"{folder}: damaged ({error}); made again")
      shutil.rmtree(folder, ignore_errors=True)
  if kind == "sentences":
    starts = find_sentences(getattr(store, split).flags, offsets)
    made = plan_sentences(offsets, starts, row_length, split=split)
  else:
    make = {"packed": plan, "pairs": plan_pairs}[kind]
    made = make(offsets, row_length, split=split)
  with contextlib.suppress(OSError):
    _keep(folder, {name: getattr(made, name) for name in names})
  return made


def _read(folder: str, names: Sequence[str]) -> list[np.ndarray]:
  """Reads the arrays of a plan that `_keep` wrote, if they are still those.

  Raises:
    ValueError, among others: They aren't.
  """
  wanted = bounded.read_object(os.path.join(folder, _HASHES))
  paths = {name: os.path.join(folder, f"{name}.npy") for name in names}
  found = hashes.hash_files(paths.values(), what=folder)
  for name, path in paths.items():
    if found[path] != wanted[name]:
      raise ValueError(f"{name}.npy isn't what was written")
  arrays = [
    np.load(path, mmap_mode="r", allow_pickle=False) for path in paths.values()
  ]
  # Plain views: indexing a np.memmap object costs several times as much.
  return [array.view(np.ndarray) for array in arrays]


def _keep(folder: str, arrays: dict[str, np.ndarray]) -> None:
  """Writes a plan's folder; another process may do the same meanwhile."""
  os.makedirs(os.path.dirname(folder), exist_ok=True)
  partial = tempfile.mkdtemp(dir=os.path.dirname(folder))
  try:
    digests = {}
    for name, array in arrays.items():
      path = os.path.join(partial, f"{name}.npy")
      np.save(path, array, allow_pickle=False)
      with open(path, "rb") as file:
        digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    with open(os.path.join(partial, _HASHES), "w", encoding="utf-8") as file:
      json.dump(digests, file)
    os.chmod(partial, 0o755)
    os.rename(partial, folder)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _count_lengths(offsets: np.ndarray, room: int) -> np.ndarray:
  """Returns how many pieces of each length documents are cut into."""
  histogram = np.zeros(room + 1, np.int64)
  for first in range(0, len(offsets) - 1, _BLOCK):
    sizes = np.diff(offsets[first : first + _BLOCK + 1])
    whole, rest = np.divmod(sizes, room)
    histogram += np.bincount(rest, minlength=room + 1)
    histogram[room] += whole.sum()
  histogram[0] = 0
  return histogram


def _cut(offsets: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns start (int64) and length (int32) of each document's pieces."""
  pieces = -(-np.diff(offsets) // room)
  starts = ragged(np.zeros(len(pieces), np.int64), pieces)  # ranks, so far
  starts *= room
  starts += np.repeat(offsets[:-1], pieces)
  lengths = np.repeat(offsets[1:], pieces)
  lengths -= starts
  np.minimum(lengths, room, out=lengths)
  return starts, lengths.astype(np.int32)


def _lay_out(
  patterns: list[np.ndarray], repeats: list[int]
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the rows in their order: `RowPlan`'s row_start, piece_length."""
  sizes = np.array([len(p) for p in patterns], np.int32)
  begins = np.cumsum(sizes) - sizes
  row_pattern = np.repeat(np.arange(len(patterns), dtype=np.int32), repeats)
  row_pattern = row_pattern[_scrambled(np.zeros_like(row_pattern))]
  row_size = sizes[row_pattern]
  row_start = np.zeros(len(row_size) + 1, np.int64)
  np.cumsum(row_size, out=row_start[1:])
  lengths = np.concatenate([*patterns, np.zeros(0, np.int32)])
  return row_start, lengths[ragged(begins[row_pattern], row_size)]


def _scrambled(values: np.ndarray) -> np.ndarray:
  """Returns the order that sorts non-negative values, equal ones scrambled.

  One array is sorted in place: value, some bits of a hash, index.
  """
  count = len(values)
  low = count.bit_length()
  high = 64 - max(int(values.max(initial=0)).bit_length(), 1)
  key = mix(np.arange(1, count + 1, dtype=np.uint64))
  key >>= np.uint64(low + 64 - high)
  key <<= np.uint64(low)
  key |= np.arange(count, dtype=np.uint64)
  key |= values.astype(np.uint64) << np.uint64(high)
  key.sort()
  key &= np.uint64((1 << low) - 1)
  return key.view(np.int64)


def _pack(histogram: np.ndarray) -> tuple[list[np.ndarray], list[int]]:
  """Packs `histogram[n]` pieces of n tokens by best-fit-decreasing.

  Returns:
    The different rows, each as the lengths of its pieces, and how many there
    are of each.
  """
  row_length = len(histogram) - 1 + SPECIALS
  # A row is a chain of (what it held before, length, how many of that length);
  # rows of one content and one room left are a group: [chain, count].
  groups: dict[int, list[tuple[tuple | None, int]]] = {}
  rooms: list[int] = []  # of `groups`, ascending

  def put(room: int, chain: tuple | None, rows: int) -> None:
    if rows == 0:
      return
    if room not in groups:
      groups[room] = []
      bisect.insort(rooms, room)
    groups[room].append((chain, rows))

  for length in np.flatnonzero(histogram)[::-1].tolist():
    size = length + SPECIALS
    left = int(histogram[length])
    while left:
      tightest = bisect.bisect_left(rooms, size)
      if tightest < len(rooms):
        room = rooms[tightest]
        chain, rows = groups[room].pop()
        if not groups[room]:
          del groups[room], rooms[tightest]
      else:
        room, chain = row_length, None
        rows = -(-left // (room // size))
      # Best fit fills one row with this length before it touches the next.
      times = room // size
      full = min(rows, left // times)
      put(room - times * size, (chain, length, times), full)
      rows -= full
      left -= full * times
      if rows and left:
        put(room - left * size, (chain, length, left), 1)
        rows -= 1
        left = 0
      put(room, chain, rows)

  patterns, repeats = [], []
  for room in rooms:
    for chain, rows in groups[room]:
      lengths: list[int] = []
      while chain is not None:
        chain, length, times = chain
        lengths += [length] * times
      patterns.append(np.array(lengths, np.int32))
      repeats.append(rows)
  return patterns, repeats
