"""Reads documents: from files, TensorFlow Datasets or Python itself.

A source is written as one string, a spec:

- `embedded`: texts that come with every Python, see `_embedded`;
- a path, a glob (`**` crosses folders) or a folder (read recursively), of this
  machine or of a bucket (`gs://bucket/texts/*.jsonl`, extra gcs). Known are
  .txt, .jsonl and .json (an object a line), .parquet, .csv (quoted as in RFC
  4180) and .tsv (tab-separated, quotes are literal), each with a header line
  where it is a table, and plain or as .gz, .bz2, .xz or .zst;
- `tfds:NAME[/CONFIG][:VERSION][:SPLIT]`: a data set that TensorFlow Datasets
  has prepared in a random-access format; the split is `train` by default and
  may be a slice (`tfds:wiki40b/en:train[:10%]`). TensorFlow isn't needed.

Everything streams: what is in memory is one document (or a few Parquet rows),
whatever the size of the file. A document has at most 16,777,216 characters, a
line with its field names and escapes 67,108,864, and an archive unpacks to at
most 128 times its own size, or 32 MiB: what is larger is damage, or made to
fill a memory.
"""

from __future__ import annotations

import ast
import bz2
import csv
import dataclasses
import functools
import glob
import gzip
import inspect
import io
import itertools
import lzma
import numbers
import os
import re
import shutil
import sysconfig
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from flaxmlm import InputError
from flaxmlm.storage import bounded
from flaxmlm.storage import files as storage

FORMATS = (".txt", ".jsonl", ".json", ".parquet", ".csv", ".tsv")
ARCHIVES = (".gz", ".bz2", ".xz", ".zst")

# What an archive that is cut short or damaged raises while it is read.
_DAMAGE = (EOFError, OSError, UnicodeError, zlib.error, lzma.LZMAError)
# ... and where its head asks for more memory than there is.
_DAMAGE += (MemoryError,)
# Bytes that could not be decoded, as the handler "surrogateescape" leaves them.
_UNDECODED = re.compile("[\udc80-\udcff]")
# The longest csv field: an opening quote that is never closed would otherwise
# pull the rest of the file into memory.
_MAX_FIELD = 1 << 26
# Characters of a document, and of a line that it stands in: no novel has as
# many, escaped as JSON neither.
_MAX_TEXT = 1 << 24
_MAX_LINE = 1 << 26
_SPLIT = "set data.document=paragraph or line, or cut it"
# What an archive may unpack to: 128 times its size. Text packs to a tenth.
_UNPACKED_RATIO = 128
_UNPACKED_LEAST = 1 << 25

# Called with where a bad record is, what is wrong, and what helps. Raises, or
# counts and returns.
_Report = Callable[[str, str, str], None]
# Where a record is, and its fields.
_Record = tuple[str, tuple[str, ...]]


class Document(NamedTuple):
  """One text, or a pair of them, and where it came from."""

  text: str
  source: int
  """Index into the specs."""
  where: str
  """`FILE:LINE` (1-based, where the document starts), `FILE:ROW` for Parquet,
  `FILE`, `tfds:NAME[INDEX]` or `embedded:NAME`."""
  pair: str | None = None
  """The second text of a pair."""
  label: int = 0
  """Of a pair: index into the labels."""

  @property
  def texts(self) -> tuple[str, ...]:
    """The text, or both."""
    return (self.text,) if self.pair is None else (self.text, self.pair)


# Fields of a record: the text's; of pairs the second text's and the label's.
_FIELD_KEYS = ("data.text_field", "data.pair_field", "data.label_field")


@dataclasses.dataclass
class BadRecords:
  """What `read` left out, filled in while it runs."""

  count: int = 0
  """Bad records that were skipped."""
  messages: list[str] = dataclasses.field(default_factory=list)
  """Where and what the first ten of them were."""
  ignored_files: list[str] = dataclasses.field(default_factory=list)
  """Files in folders and globs whose ending isn't known."""

  def check(self, limit: int) -> None:
    """Raises InputError if more than `data.max_bad_records` were skipped."""
    if self.count > limit:
      raise InputError(
        f"more than data.max_bad_records={limit} bad records; the first was"
        f" {self.messages[0]}"
      )


class _Damage(Exception):  # noqa: N818
  """The rest of a file can't be read. Holds where, what and what helps."""


def files(specs: Sequence[str]) -> list[str]:
  """Returns every file that the specs name, in reading order.

  The files of a folder or glob are in natural order (`part-2` before
  `part-10`), each once; hidden ones are left out. `embedded` and `tfds:` name
  no file.

  Raises:
    InputError: A spec names no file, or one whose ending isn't known.
  """
  return [path for spec in specs for path in find(spec)[0]]


def read(
  specs: Sequence[str],
  *,
  text_field: str = "text",
  pair_field: str | None = None,
  label_field: str = "label",
  labels: Sequence[str] = (),
  document: str = "file",
  encoding: str = "utf-8",
  on_bad_record: str = "error",
  max_bad_records: int = 1000,
  tfds_dir: str | None = None,
  bad: BadRecords | None = None,
) -> Iterator[Document]:
  r"""Returns the documents of the specs, one after another.

  A byte order mark is removed and line ends become `\n`; otherwise the text
  is as it was written, empty documents included. Blank lines of .jsonl and
  .csv are no records.

  A bad record is one that can't be decoded or parsed, or has no string in
  `text_field`. A damaged or truncated file is one bad record, after the good
  ones before the damage; so is a table without the column.

  Args:
    specs: Sources, see the module.
    text_field: Field or column with the text; .txt files have none.
    pair_field: That with the second text, if documents are pairs with a label.
    label_field: That with the label, a string or an integer.
    labels: What a label may be; another one is a bad record.
    document: What a document is in a .txt file: the "file", a "paragraph"
      (block between blank lines) or a "line" (that isn't blank).
    encoding: Encoding of all files but Parquet.
    on_bad_record: "error" or "skip".
    max_bad_records: With "skip", the most that are skipped.
    tfds_dir: `data_dir` of TensorFlow Datasets; None is its own default.
    bad: Is filled with what was skipped.

  Raises:
    InputError: At once: a spec that names nothing, an unknown encoding. While
      reading: a bad record, or more than `max_bad_records`; an unreadable file.
  """
  try:
    "".encode(encoding)
  except (LookupError, ValueError):
    raise InputError(
      f"data.encoding={encoding}: Python knows no such encoding;"
      " try utf-8, latin-1, utf-16 or cp1252"
    ) from None
  records = BadRecords() if bad is None else bad

  def report(where: str, what: str, remedy: str) -> None:
    message = f"{where}: {what}"
    if on_bad_record == "error":
      remedy = f"{remedy}, or " if remedy else ""
      raise InputError(f"{message}; {remedy}set data.on_bad_record=skip")
    records.count += 1
    if len(records.messages) < 10:
      records.messages.append(message)
    records.check(max_bad_records)

  fields = (text_field,)
  if pair_field is not None:
    fields = (text_field, pair_field, label_field)
  found = []
  for spec in specs:
    paths, ignored = find(spec)
    records.ignored_files += ignored
    found.append(paths)
    plain = [path for path in paths if _ending(path)[0] == ".txt"]
    if pair_field is not None and (plain or spec == "embedded"):
      raise InputError(
        f"source {(plain or [spec])[0]}: has no fields, and"
        f" data.pair_field={pair_field} names one; take .jsonl, .parquet, .csv,"
        " .tsv or tfds"
      )

  def documents() -> Iterator[Document]:
    for source, (spec, paths) in enumerate(zip(specs, found, strict=True)):
      if spec == "embedded":
        entries = ((where, (text,)) for where, text in _embedded())
      elif spec.startswith("tfds:"):
        entries = _tfds(spec, fields, tfds_dir, report)
      else:
        entries = (
          values
          for path in paths
          for values in _file(path, fields, document, encoding, report)
        )
      for where, (text, *of_pair) in entries:
        if not of_pair:
          yield Document(text, source, where)
          continue
        pair, label = of_pair
        if label in labels:
          yield Document(text, source, where, pair, labels.index(label))
        else:
          what = f"label {label!r} is none of {', '.join(labels)}"
          report(where, what, "set objective.labels")

  return documents()


def read_objects(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields `FILE:LINE` and content of the objects of a .jsonl file, in UTF-8.

  Raises:
    InputError: While reading: a line that isn't an object, or damage.
  """

  def report(where: str, what: str, remedy: str) -> None:
    raise InputError(f"{where}: {what}; wants one object a line, in UTF-8")

  try:
    yield from _objects(path, "utf-8", report)
  except _Damage as damage:
    report(*damage.args)


def find(spec: str) -> tuple[list[str], list[str]]:
  """Returns the files of a spec and those left out for their ending.

  Raises:
    InputError: See `files`.
  """
  if spec == "embedded" or spec.startswith("tfds:"):
    return [], []
  if storage.is_remote(spec):
    try:
      roots = paths = set(storage.find_texts(spec))
    except OSError as error:
      raise InputError(f"source {spec}: {error.strerror}") from error
    is_file = spec in paths
  else:
    is_file = os.path.isfile(spec)
    roots = [spec] if os.path.exists(spec) else glob.glob(spec, recursive=True)
    paths = {path for root in roots for path in _walk(root)}
  if is_file:
    if not _ending(spec)[0]:
      raise InputError(f"source {spec}: unknown ending; {_KNOWN}")
    return [spec], []
  if not roots:
    raise InputError(f"source {spec}: no such file or folder")
  ordered = sorted(paths, key=lambda path: (_natural(path), path))
  known = [path for path in ordered if _ending(path)[0]]
  if not known:
    raise InputError(f"source {spec}: no text files there; {_KNOWN}")
  return known, [path for path in ordered if not _ending(path)[0]]


_KNOWN = (
  f"known are {' '.join(FORMATS)}, plain or with {' '.join(ARCHIVES)} behind"
)


def _walk(root: str) -> Iterator[str]:
  if not os.path.isdir(root):
    yield root
    return
  seen = set()
  for folder, folders, names in os.walk(root, followlinks=True):
    folders[:] = sorted(name for name in folders if not name.startswith("."))
    real = os.path.realpath(folder)
    if real in seen:  # A link to a folder above would go round for ever.
      folders.clear()
      continue
    seen.add(real)
    for name in names:
      if not name.startswith("."):
        yield os.path.join(folder, name)


def _natural(path: str) -> list[int | str]:
  parts = re.split(r"([0-9]+)", path)
  return [int(p) if i % 2 else p for i, p in enumerate(parts)]


def _ending(path: str) -> tuple[str, str]:
  """Returns a file's format and archive as endings; unknown or none is ""."""
  stem, last = os.path.splitext(path.lower())
  archive = last if last in ARCHIVES else ""
  kind = os.path.splitext(stem)[1] if archive else last
  return (kind, archive) if kind in FORMATS else ("", "")


def _file(
  path: str,
  fields: tuple[str, ...],
  document: str,
  encoding: str,
  report: _Report,
) -> Iterator[_Record]:
  """Yields where and fields of a file's documents."""
  kind, _ = _ending(path)
  try:
    if kind == ".parquet":
      yield from _parquet(path, fields, report)
    elif kind == ".txt" and document == "file":
      for _, text in _decoded(path, encoding, _whole(path, encoding), report):
        yield path, (text,)
    elif kind == ".txt":
      lines = _lines(path, encoding)
      blocks = lines
      if document == "paragraph":
        blocks = _paragraphs(lines, path)
      for number, text in _decoded(path, encoding, blocks, report):
        if len(text) > _MAX_TEXT:
          what = f"a document of more than {_MAX_TEXT:,} characters"
          report(f"{path}:{number}", what, "cut it")
        elif text.strip():
          yield f"{path}:{number}", (text,)
    elif kind in (".csv", ".tsv"):
      yield from _table(path, fields, encoding, kind, report)
    else:
      for where, record in _objects(path, encoding, report):
        values = [record.get(field) for field in fields]
        if found := _strings(values, fields, record, where, report):
          yield where, found
  except _Damage as damage:
    report(*damage.args)


def _open(path: str) -> io.BufferedIOBase:
  """Opens a file for reading, decompressed."""
  file = storage.open_reader(path)
  match _ending(path)[1]:
    case ".gz":
      unpacked: Any = gzip.open(file)  # noqa: SIM115
    case ".bz2":
      unpacked = bz2.open(file)  # noqa: SIM115
    case ".xz":
      unpacked = lzma.open(file)  # noqa: SIM115
    case ".zst":
      unpacked = _Zstandard(file)
    case _:
      return file
  return io.BufferedReader(_Bounded(path, unpacked, file), 1 << 17)


class _Bounded(io.RawIOBase):
  """What an archive unpacks to, as long as that is in proportion."""

  def __init__(self, path: str, unpacked: Any, packed: io.IOBase):
    self._file, self._packed = unpacked, packed
    size = storage.size_of(path)
    self._left = max(_UNPACKED_RATIO * size, _UNPACKED_LEAST)

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: memoryview | bytearray) -> int:
    count = self._file.readinto(buffer)
    self._left -= count
    if self._left < 0:
      ratio = _UNPACKED_RATIO
      raise EOFError(f"it unpacks to more than {ratio} times its size")
    return count

  def close(self) -> None:
    if not self.closed:
      self._file.close()
      self._packed.close()
    super().close()


class _Zstandard(io.RawIOBase):
  """Decompresses all frames of a .zst file.

  zstandard's own stream reader takes a file that is cut short for its end;
  this one raises EOFError, as gzip, bz2 and lzma do.
  """

  def __init__(self, file: io.BufferedIOBase):
    import zstandard

    # Windows of up to 2 GB, as `zstd --long=31` writes them.
    self._start = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    self._error = zstandard.ZstdError
    self._frame = None
    self._input = b""
    self._output = memoryview(b"")
    self._file = file

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: memoryview | bytearray) -> int:
    while not self._output:
      # A kilobyte of zstd can hold megabytes of text.
      self._input = self._input or self._file.read(1 << 8)
      if not self._input:
        if self._frame is not None:
          raise EOFError("the last frame isn't complete")
        return 0
      frame = self._frame or self._start.decompressobj()
      try:
        self._output = memoryview(frame.decompress(self._input))
      except self._error as error:
        raise EOFError(error) from None
      self._input = frame.unused_data
      self._frame = None if frame.eof else frame
    count = min(len(buffer), len(self._output))
    buffer[:count] = self._output[:count]
    self._output = self._output[count:]
    return count

  def close(self) -> None:
    if not self.closed:
      self._file.close()
    super().close()


def _text(path: str, encoding: str) -> io.TextIOWrapper:
  """Opens a text file; bytes that can't be decoded become surrogates."""
  return io.TextIOWrapper(_open(path), encoding, errors="surrogateescape")


def _lines(path: str, encoding: str) -> Iterator[tuple[int, str]]:
  """Yields number and text of each line, without its end.

  Raises:
    _Damage: The rest of the file can't be read.
  """
  number = 0
  try:
    with _text(path, encoding) as file:
      read_line = file.readline
      while line := read_line(_MAX_LINE + 1):
        if len(line) > _MAX_LINE:
          what = f"a line of more than {_MAX_LINE:,} characters"
          raise _Damage(f"{path}:{number + 1}", what, "cut it")
        number += 1
        if number == 1:
          line = line.removeprefix("\ufeff")
        yield number, line.removesuffix("\n")
  except _DAMAGE as error:
    raise _damage(f"{path}:{number + 1}", path, encoding, error) from None


def _whole(path: str, encoding: str) -> Iterator[tuple[int, str]]:
  """Yields the text of a whole file, as line 1; raises as `_lines`."""
  try:
    with _text(path, encoding) as file:
      text = file.read(_MAX_TEXT + 1)
      if len(text) > _MAX_TEXT:
        what = f"a document of more than {_MAX_TEXT:,} characters"
        raise _Damage(path, what, _SPLIT)
  except _DAMAGE as error:
    raise _damage(path, path, encoding, error) from None
  yield 1, text.removeprefix("\ufeff")


def _damage(
  where: str, path: str, encoding: str, error: BaseException
) -> Exception:
  if isinstance(error, storage.BucketError):
    return error  # another try may do
  if isinstance(error, OSError) and error.errno is not None:
    return InputError(f"{path}: {error.strerror}; make it readable")
  if isinstance(error, UnicodeError):
    return _Damage(where, f"not {encoding} ({error})", "set data.encoding")
  what = f"truncated or damaged ({_first_line(error)})"
  return _Damage(where, what, "get the file again")


def _first_line(error: BaseException) -> str:
  return (str(error).strip() or type(error).__name__).splitlines()[0]


def _decoded(
  path: str,
  encoding: str,
  blocks: Iterable[tuple[int, str]],
  report: _Report,
) -> Iterator[tuple[int, str]]:
  """Passes on the blocks that could be decoded and reports the others."""
  for number, text in blocks:
    wrong = None if text.isascii() else _UNDECODED.search(text)
    if wrong is None:
      yield number, text
    else:
      line = number + text.count("\n", 0, wrong.start())
      byte = ord(wrong[0]) - 0xDC00
      what = f"not {encoding} (byte 0x{byte:02x})"
      report(f"{path}:{line}", what, "set data.encoding")


def _paragraphs(
  lines: Iterable[tuple[int, str]], path: str
) -> Iterator[tuple[int, str]]:
  """Yields the first line's number and the text of each block of lines."""
  start = size = 0
  block: list[str] = []
  for number, line in lines:
    if line and not line.isspace():
      if not block:
        start, size = number, 0
      block.append(line)
      size += len(line)
      if size > _MAX_TEXT:
        what = f"a paragraph of more than {_MAX_TEXT:,} characters"
        raise _Damage(f"{path}:{start}", what, "cut it, or see data.document")
    elif block:
      yield start, "\n".join(block)
      block = []
  if block:
    yield start, "\n".join(block)


def _objects(
  path: str, encoding: str, report: _Report
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields where and content of a .jsonl file's objects."""
  for number, line in _decoded(path, encoding, _lines(path, encoding), report):
    if not line or line.isspace():
      continue
    where = f"{path}:{number}"
    try:
      record = bounded.parse_json(line)
    except ValueError as error:
      report(where, f"broken JSON ({error})", "write one object a line")
      continue
    if isinstance(record, dict):
      yield where, record
    else:
      what = f"JSON, but not an object ({type(record).__name__})"
      report(where, what, "write one object a line")


def _strings(
  values: Sequence[object],
  fields: tuple[str, ...],
  names: Iterable[str],
  where: str,
  report: _Report,
) -> tuple[str, ...] | None:
  """Returns a record's fields; None, reported, if one is none of text."""
  result = []
  for value, field, key in zip(values, fields, _FIELD_KEYS, strict=False):
    if key == "data.label_field" and isinstance(value, numbers.Integral):
      value = str(value)
    if not isinstance(value, str):
      _report_field(value, field, names, where, report, key)
      return None
    if len(value) > _MAX_TEXT:
      what = f"field {field!r} has more than {_MAX_TEXT:,} characters"
      report(where, what, "cut it")
      return None
    result.append(value)
  return tuple(result)


def _report_field(
  value: object,
  field: str,
  names: Iterable[str],
  where: str,
  report: _Report,
  key: str,
) -> None:
  """Reports a field that is missing or isn't a string."""
  names = list(names)
  if field in names:
    wanted = "a string"
    if key == "data.label_field":
      wanted += " or an integer"
    what = f"field {field!r} is {type(value).__name__}, not {wanted}"
  else:
    # A table without a header shows its first row here, however long.
    some = ", ".join(" ".join(name.split())[:40] for name in names[:20])
    what = f"no field {field!r} (there are: {some or 'none'})"
  report(where, what, f"set {key}")


def _has_columns(
  fields: tuple[str, ...], names: Sequence[str], where: str, report: _Report
) -> bool:
  """Whether a table has all the fields; reports the first that it hasn't."""
  for field, key in zip(fields, _FIELD_KEYS, strict=False):
    if field not in names:
      _report_field(None, field, names, where, report, key)
      return False
  return True


def _table(
  path: str,
  fields: tuple[str, ...],
  encoding: str,
  kind: str,
  report: _Report,
) -> Iterator[_Record]:
  """Yields the fields of a .csv or .tsv file; its first row is the header."""
  csv.field_size_limit(_MAX_FIELD)
  number = size = 0

  def read_lines() -> Iterator[str]:
    nonlocal size
    for _, line in _lines(path, encoding):
      size += len(line)
      if size > 2 * _MAX_LINE:
        what = f"a row of more than {2 * _MAX_LINE:,} characters"
        raise _Damage(f"{path}:{number}", what, "mend its quotes")
      yield line + "\n"

  lines = read_lines()
  if kind == ".tsv":
    rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
  else:
    rows = csv.reader(lines, strict=True)
  header: list[str] = []
  while True:
    number, size = rows.line_num + 1, 0
    where = f"{path}:{number}"
    try:
      row = next(rows)
    except StopIteration:
      return
    except csv.Error as error:
      report(where, f"broken row ({error})", "quote it as csv wants it")
      continue
    if not row:
      continue
    if not header:
      header = row
      if not _has_columns(fields, header, where, report):
        return
      columns = [header.index(field) for field in fields]
    elif len(row) != len(header):
      what = f"{len(row)} fields in a table of {len(header)} columns"
      report(where, what, "mend the row")
    else:
      values = [row[column] for column in columns]
      for _ in _decoded(path, encoding, [(number, "".join(values))], report):
        if found := _strings(values, fields, header, where, report):
          yield where, found


# Rows that are in memory at once. A value of a dictionary is a few bits in the
# file and as long as it is in memory; more rows at once aren't faster.
_PARQUET_BATCH = 8


def _parquet(
  path: str, fields: tuple[str, ...], report: _Report
) -> Iterator[_Record]:
  """Yields the fields of a Parquet file, a batch of rows at a time."""
  import pyarrow
  import pyarrow.parquet

  number = 0
  try:
    with _seekable(path) as file:
      table = pyarrow.parquet.ParquetFile(file)
      schema = table.schema_arrow
      if not _has_columns(fields, schema.names, path, report):
        return
      for batch in table.iter_batches(
        _PARQUET_BATCH, columns=list(fields), use_threads=False
      ):
        names = batch.schema.names
        columns = [batch.column(names.index(field)) for field in fields]
        for row in zip(*columns, strict=True):
          number += 1
          where = f"{path}:{number}"
          try:
            values = [value.as_py() for value in row]
          except UnicodeDecodeError as error:
            report(where, f"not utf-8 ({error})", "")
            continue
          if found := _strings(values, fields, schema.names, where, report):
            yield where, found
  except (*_DAMAGE, pyarrow.ArrowException) as error:
    raise _damage(f"{path}:{number + 1}", path, "utf-8", error) from None


def _seekable(path: str) -> io.BufferedIOBase:
  """Opens a file that is read from its end; archives go through the disk."""
  if not _ending(path)[1]:
    return storage.open_reader(path)
  file = tempfile.TemporaryFile()  # noqa: SIM115
  try:
    with _open(path) as archive:
      shutil.copyfileobj(archive, file)
  except BaseException:
    file.close()
    raise
  return file


# Examples read at once; one by one takes half as long again.
_TFDS_BATCH = 256
_TFDS = re.compile(r"tfds:([^:]+(?::\d[\w.*]*)?)(?::(.+))?")


def _open_tfds(spec: str, data_dir: str | None) -> tuple[Any, str, str]:
  """Returns a data set's builder, its name with the version, and the split."""
  match = _TFDS.fullmatch(spec)
  if match is None:
    raise InputError(
      f"source {spec}: write it tfds:NAME[/CONFIG][:VERSION][:SPLIT]"
    )
  name, split = match[1], match[2] or "train"
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import read_only_builder

  place = data_dir or "the default folder of TensorFlow Datasets"
  try:
    # From the files alone: the code that made them may be anywhere.
    builder = read_only_builder.builder_from_files(name, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError:
    raise InputError(
      f"source {spec}: no prepared data set {name} in {place}; set"
      " data.tfds_dir, or prepare it with file_format='array_record'"
    ) from None
  except ValueError as error:
    raise InputError(f"source {spec}: {_first_line(error)}") from None
  whole = re.match(r"\w+", split)
  if whole is None or whole[0] not in builder.info.splits:
    raise InputError(
      f"source {spec}: no split {split!r}; there are:"
      f" {', '.join(builder.info.splits)}"
    )
  return builder, name, split


def cut_tfds(spec: str, data_dir: str | None, size: int) -> list[str]:
  """Returns specs of slices that make up a `tfds:` spec, in reading order.

  Args:
    spec: If its split is a slice already, or several splits, it stays whole.
    data_dir: See `tfds_dir` of `read`.
    size: Bytes of a slice, about.

  Raises:
    InputError: There is no such data set or split.
  """
  builder, name, split = _open_tfds(spec, data_dir)
  if not re.fullmatch(r"\w+", split):
    return [spec]
  facts = builder.info.splits[split]
  slices = min(facts.num_bytes // size, facts.num_examples)
  if slices < 2:
    return [spec]
  ends = [facts.num_examples * i // slices for i in range(slices + 1)]
  return [
    f"tfds:{name}:{split}[{first}:{end}]"
    for first, end in itertools.pairwise(ends)
  ]


def _tfds(
  spec: str, fields: tuple[str, ...], data_dir: str | None, report: _Report
) -> Iterator[_Record]:
  """Yields the fields of a data set that TensorFlow Datasets has prepared."""
  builder, _, split = _open_tfds(spec, data_dir)
  names = list(builder.info.features)
  if not _has_columns(fields, names, spec, report):
    return
  try:
    rows = builder.as_data_source(split)
  except NotImplementedError:
    raise InputError(
      f"source {spec}: prepared as {builder.info.file_format.value}, which"
      " needs TensorFlow; prepare it again with file_format='array_record'"
    ) from None
  except (ValueError, OSError) as error:
    raise InputError(f"source {spec}: {_first_line(error)}") from None
  for start in range(0, len(rows), _TFDS_BATCH):
    indices = range(start, min(start + _TFDS_BATCH, len(rows)))
    try:
      batch = rows.__getitems__(indices)
    except (RuntimeError, ValueError, OSError) as error:
      what = f"truncated or damaged ({_first_line(error)})"
      report(f"{spec}[{start}]", what, "prepare it again")
      return
    for index, row in zip(indices, batch, strict=True):
      where = f"{spec}[{index}]"
      try:
        values = [
          v.decode("utf-8") if isinstance(v, bytes) else v
          for v in (row[field] for field in fields)
        ]
      except UnicodeDecodeError as error:
        report(where, f"not utf-8 ({error})", "")
        continue
      if found := _strings(values, fields, names, where, report):
        yield where, found


# Parts of the standard library that aren't documentation of it, or whose
# texts are copies of other packages.
_NOT_STDLIB = {
  "__phello__",
  "__pycache__",
  "_bundled",
  "_distutils_hack",
  "dist-packages",
  "idlelib",
  "lib2to3",
  "pip",
  "pkg_resources",
  "pydoc_data",
  "setuptools",
  "site-packages",
  "test",
  "tests",
  "turtledemo",
}


@functools.cache  # it is read for the tokenizer and for the tokens
def _embedded() -> list[tuple[str, str]]:
  """Returns where and text of what comes with the Python that is running.

  These are the topics of `help()` (`pydoc_data.topics`) and the docstrings of
  the standard library's modules, classes and functions, which are read from
  the source, not imported. Docstrings of fewer than 40 characters are left
  out, and near-duplicates: a text of which more than half of the 5-word
  shingles have stood in texts before it. On Python 3.11 to 3.13 that leaves
  1.7 to 1.8 million characters in 5,400 to 5,700 texts, 66 of them topics (0.4
  million), and takes 2 to 3 seconds.

  Raises:
    InputError: This Python comes with neither.
  """
  seen: set[str] = set()
  short: set[str] = set()
  found: list[tuple[str, str]] = []
  for where, text in itertools.chain(_topics(), _docstrings()):
    words = re.findall(r"\w+", text.lower())
    shingles = {" ".join(words[i : i + 5]) for i in range(len(words) - 4)}
    if not shingles:
      key = " ".join(words)
      fresh = key not in short
      short.add(key)
    else:
      fresh = 2 * len(shingles & seen) <= len(shingles)
    if fresh:
      seen |= shingles
      found.append((f"embedded:{where}", text))
  if not found:
    raise InputError(
      "source embedded: this Python comes without pydoc_data and without"
      f" the source of its library ({sysconfig.get_path('stdlib')}); install"
      " them or name a source of your own"
    )
  return found


def _topics() -> Iterator[tuple[str, str]]:
  try:
    from pydoc_data.topics import topics
  except ImportError:  # Debian has it in a package of its own.
    return
  for name in sorted(topics):
    yield f"topics.{name}", topics[name].strip()


def _docstrings() -> Iterator[tuple[str, str]]:
  root = sysconfig.get_path("stdlib")
  for folder, folders, names in os.walk(root):
    folders[:] = sorted(
      name
      for name in folders
      if name not in _NOT_STDLIB and not name.startswith(("config-", "."))
    )
    for name in sorted(names):
      if not name.endswith(".py"):
        continue
      path = os.path.join(folder, name)
      try:
        with open(path, "rb") as file:
          tree = ast.parse(file.read())
      except (OSError, SyntaxError, ValueError):
        continue  # A broken or foreign file in there isn't our business.
      module = os.path.relpath(path, root).removesuffix(".py")
      module = module.replace(os.sep, ".").removesuffix(".__init__")
      for dotted, docstring in _docstrings_in(tree, module):
        if len(docstring) >= 40:
          yield dotted, docstring


def _docstrings_in(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
  docstring = ast.get_docstring(node, clean=False)
  if docstring:
    yield name, inspect.cleandoc(docstring)
  for child in node.body:
    if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
      yield from _docstrings_in(child, f"{name}.{child.name}")
