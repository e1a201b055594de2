"""Sources: what is read is what was written, and bad input says where it is."""

from __future__ import annotations

import bz2
import csv
import gc
import gzip
import io
import json
import lzma
import os
import pathlib
import random
import re
import shutil
import sys
import sysconfig
import tracemalloc
import warnings
from collections.abc import Callable

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from flaxmlm import InputError
from flaxmlm.data import sources
from flaxmlm.data.sources import BadRecords, files, read

DATA = pathlib.Path(os.environ.get("FLAXMLM_DATA", "../shared/data"))

ARCHIVES: dict[str, Callable[[bytes], bytes]] = {
  "": bytes,
  ".gz": gzip.compress,
  ".bz2": bz2.compress,
  ".xz": lzma.compress,
  ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}

# What files must give back whole: quotes, line ends, tabs, every plane.
TEXTS = [
  "plain",
  'He said "no, never", and\nleft.\n\nThen',
  "naïve ß 中文 😀 \u2028 \x85 \u200d",
  "tab\tand comma, and ; and '",
  " blanks around ",
]


def texts(*specs: object, **options: object) -> list[str]:
  return [d.text for d in read([str(s) for s in specs], **options)]


def write(path: pathlib.Path, data: bytes) -> pathlib.Path:
  """Writes bytes, in the archive that the path's ending asks for."""
  ending = path.suffix if path.suffix in ARCHIVES else ""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(ARCHIVES[ending](data))
  return path


def as_table(rows: list[list[str]]) -> bytes:
  file = io.StringIO()
  csv.writer(file).writerows(rows)
  return file.getvalue().encode()


def json_lines(records: list[object]) -> bytes:
  return "".join(json.dumps(r) + "\n" for r in records).encode()


# --- what is good comes back ------------------------------------------------


@pytest.mark.parametrize("archive", ARCHIVES)
def test_every_format_in_every_archive_gives_the_texts_back(tmp_path, archive):
  parquet = tmp_path / "made.parquet"
  table = pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS})
  pyarrow.parquet.write_table(table, parquet)
  rows = [["id", "text"], *([str(i), t] for i, t in enumerate(TEXTS))]
  contents = {
    "jsonl": json_lines([{"id": 1, "text": t} for t in TEXTS]),
    "json": "\n\n".join(
      json.dumps({"text": t}, ensure_ascii=False) for t in TEXTS
    ).encode(),
    "csv": as_table(rows),
    "parquet": parquet.read_bytes(),
  }
  for kind, data in contents.items():
    path = write(tmp_path / f"data.{kind}{archive}", data)
    # The csv module writes what stands in a field as it is.
    assert texts(path) == TEXTS, kind


def test_where_is_the_line_that_a_document_starts_at(tmp_path):
  path = write(
    tmp_path / "a.csv", b'text,n\n"two\nlines",1\n\none,2\n"a\nb\nc",3\n'
  )
  found = [(d.where, d.text) for d in read([str(path)])]
  expected = [(2, "two\nlines"), (5, "one"), (6, "a\nb\nc")]
  assert found == [(f"{path}:{n}", text) for n, text in expected]
  path = write(tmp_path / "a.txt", b"\n \none\ntwo\n\n\n\nthree\n")
  found = [(d.where, d.text) for d in read([str(path)], document="paragraph")]
  assert found == [(f"{path}:3", "one\ntwo"), (f"{path}:8", "three")]
  found = [(d.where, d.text) for d in read([str(path)], document="line")]
  assert [where.rpartition(":")[2] for where, _ in found] == ["3", "4", "8"]
  [whole] = read([str(path)])
  assert whole[:3] == ("\n \none\ntwo\n\n\n\nthree\n", 0, str(path))


def test_quotes_in_tsv_are_literal(tmp_path):
  path = write(tmp_path / "a.tsv", b'n\ttext\n1\t"so" he\n2\tshe said "\n')
  assert texts(path) == ['"so" he', 'she said "']


def test_byte_order_marks_and_line_ends(tmp_path):
  for number, (encoding, end) in enumerate(
    [("utf-8-sig", "\r\n"), ("utf-8", "\r"), ("utf-16", "\n")]
  ):
    data = f"é one{end}two{end}{end}three".encode(encoding)
    path = write(tmp_path / f"{number}.txt", data)
    options = {"encoding": encoding.removesuffix("-sig")}
    assert texts(path, **options) == ["é one\ntwo\n\nthree"]
    lines = texts(path, document="line", **options)
    assert lines == ["é one", "two", "three"]
  path = write(tmp_path / "bom.csv", b"\xef\xbb\xbftext,n\r\none,1\r\n")
  assert texts(path) == ["one"]


def test_other_encodings_and_fields(tmp_path):
  path = write(tmp_path / "a.txt", "schön".encode("latin-1"))
  assert texts(path, encoding="latin-1") == ["schön"]
  path = write(tmp_path / "a.jsonl", b'{"body": "x", "text": 3}\n')
  assert texts(path, text_field="body") == ["x"]


def test_frames_of_an_archive_follow_one_another(tmp_path):
  parts = [b"one\n", b"two\n" * 50_000, b"", b"three\n"]
  for ending in (".gz", ".bz2", ".xz", ".zst"):
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(b"".join(map(ARCHIVES[ending], parts)))
    assert texts(path) == [b"".join(parts).decode()], ending


def test_a_damaged_archive_leaves_nothing_open(tmp_path):
  path = tmp_path / "rows.parquet.gz"
  path.write_bytes(gzip.compress(bytes(9999))[:-9])
  with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    with pytest.raises(InputError, match="truncated or damaged"):
      list(read([str(path)]))
    gc.collect()
  assert not [str(each.message) for each in said]


def test_a_real_web_corpus():
  path = DATA / "c4_mini" / "train.jsonl"
  if not path.exists():
    pytest.skip("no real web pages: set FLAXMLM_DATA")
  truth = [json.loads(line)["text"] for line in path.open(encoding="utf-8")]
  assert texts(path) == truth


def test_real_novels_in_a_folder():
  if not (DATA / "novels").exists():
    pytest.skip("no real novels: set FLAXMLM_DATA")
  spec = str(DATA / "novels")
  names = files([spec])
  assert names == sorted(str(p) for p in (DATA / "novels").glob("*.txt"))
  with open(names[0], encoding="utf-8-sig") as file:
    assert next(iter(read([spec]))).text == file.read()


# --- which files ------------------------------------------------------------


def test_files_come_in_natural_order_each_once(tmp_path):
  names = ["p-1.txt", "p-2.txt.gz", "p-10.txt", "q/a.jsonl", "q/r/b.csv.zst"]
  for name in [*names, "q/notes.md", "archive.gz", ".hidden/x.txt", ".y.txt"]:
    write(tmp_path / name, b"")
  expected = [str(tmp_path / name) for name in names]
  assert files([str(tmp_path)]) == expected
  assert files([f"{tmp_path}/**"]) == expected
  assert files([f"{tmp_path}/p-*", f"{tmp_path}/p-1.txt"]) == [
    *expected[:3],
    expected[0],
  ]
  bad = BadRecords()
  list(read([str(tmp_path)], text_field="x", on_bad_record="skip", bad=bad))
  ignored = [os.path.basename(path) for path in bad.ignored_files]
  assert ignored == ["archive.gz", "notes.md"]


def test_a_name_with_brackets_is_a_name(tmp_path):
  path = write(tmp_path / "a[1].txt", b"x")
  assert texts(path) == ["x"]


def test_links_that_go_round_are_followed_once(tmp_path):
  write(tmp_path / "in" / "a.txt", b"x")
  (tmp_path / "in" / "loop").symlink_to(tmp_path)
  (tmp_path / "out").symlink_to(tmp_path / "in")
  assert texts(tmp_path / "out") == ["x"]


def test_documents_know_their_source(tmp_path):
  a, b = write(tmp_path / "a.txt", b"a"), write(tmp_path / "b.txt", b"b")
  found = [(d.text, d.source) for d in read([str(b), str(a), str(b)])]
  assert found == [("b", 0), ("a", 1), ("b", 2)]


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("none.txt", "no such file or folder"),
    ("*.txt", "no such file or folder"),
    ("empty", "no text files there"),
    ("a.pdf", r"a\.pdf: unknown ending; known are \.txt .* \.zst behind"),
    ("a.gz", "unknown ending"),
  ],
)
def test_specs_that_name_nothing_are_refused_at_once(tmp_path, name, message):
  (tmp_path / "empty").mkdir()
  write(tmp_path / "a.pdf", b"x")
  write(tmp_path / "a.gz", b"x")
  for function in (files, read):  # Without a single document asked for.
    with pytest.raises(InputError, match=message):
      function([str(tmp_path / name)])


def test_an_unknown_encoding_is_refused_at_once(tmp_path):
  path = write(tmp_path / "a.txt", b"x")
  with pytest.raises(InputError, match="data.encoding=utf9"):
    read([str(path)], encoding="utf9")


def test_an_unreadable_file_is_an_error_even_when_skipping(tmp_path):
  path = write(tmp_path / "a.txt", b"x")
  documents = read([str(path)], on_bad_record="skip")
  path.unlink()
  with pytest.raises(InputError, match=r"a\.txt: No such file"):
    list(documents)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz", "a.parquet"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, name):
  os.mkfifo(tmp_path / name)
  with pytest.raises(InputError, match=f"{name}.*: a pipe or a device"):
    texts(tmp_path)


# --- what is bad says where -------------------------------------------------

# Kind of bad record: name, contents, where it is, what is said, good texts.
BAD = {
  "undecodable line": (
    "a.txt",
    b"one\ncaf\xe9 \nthree\n",
    ":2",
    r"not utf-8 \(byte 0xe9\); set data\.encoding",
    ["one", "three"],
  ),
  "broken JSON": (
    "a.jsonl",
    b'{"text": "one"}\n{"text": "tw\n{"text": "three"}\n',
    ":2",
    r"broken JSON \(.*\); write one object a line",
    ["one", "three"],
  ),
  "JSON nested beyond reason": (
    "a.jsonl",
    b'{"text": "one"}\n' + b"[" * 100_000 + b'\n{"text": "three"}\n',
    ":2",
    "broken JSON",
    ["one", "three"],
  ),
  "undecodable JSON": (
    "a.jsonl",
    b'{"text": "one"}\n\n{"text": "caf\xe9"}\n',
    ":3",
    "not utf-8",
    ["one"],
  ),
  "not an object": (
    "a.jsonl",
    b'["one"]\n{"text": "two"}\n',
    ":1",
    r"not an object \(list\)",
    ["two"],
  ),
  "missing field": (
    "a.jsonl",
    b'{"text": "one"}\n{"body": "x", "id": 1}\n',
    ":2",
    r"no field 'text' \(there are: body, id\); set data\.text_field",
    ["one"],
  ),
  "field of another type": (
    "a.jsonl",
    b'{"text": null}\n{"text": "two"}\n',
    ":1",
    "'text' is NoneType, not a string",
    ["two"],
  ),
  "row too short": (
    "a.csv",
    b'n,text\n1,one\n"2\n"\n3,three\n',
    ":3",
    "1 fields in a table of 2 columns",
    ["one", "three"],
  ),
  "stray quote": (
    "a.csv",
    b'n,text\n1,one\n2,"tw"o\n3,three\n',
    ":3",
    "broken row",
    ["one", "three"],
  ),
  "quote that never closes": (
    "a.csv",
    b'n,text\n1,one\n2,"two\n3,three\n',
    ":3",
    "broken row",
    ["one"],
  ),
  "undecodable field": (
    "a.tsv",
    b"n\ttext\n1\tone\n2\tcaf\xe9\n3\tthree\n",
    ":3",
    "not utf-8",
    ["one", "three"],
  ),
  "missing column": (
    "a.tsv",
    b"id\tbody\n1\tone\n",
    ":1",
    r"no field 'text' \(there are: id, body\)",
    [],
  ),
}


@pytest.mark.parametrize("archive", ARCHIVES)
@pytest.mark.parametrize("kind", BAD)
def test_bad_records_say_where_and_can_be_skipped(tmp_path, kind, archive):
  name, data, place, message, good = BAD[kind]
  path = write(tmp_path / f"{name}{archive}", data)
  where = re.escape(f"{path}{place}: ")
  with pytest.raises(InputError, match=f"^{where}.*{message}") as caught:
    texts(path, document="line")
  assert "\n" not in str(caught.value)
  assert "set data.on_bad_record=skip" in str(caught.value)
  bad = BadRecords()
  options = {"document": "line", "on_bad_record": "skip", "bad": bad}
  assert texts(path, **options) == good
  assert bad.count == len(bad.messages) == 1
  assert re.match(f"{where}.*{message.partition(';')[0]}", bad.messages[0])


def test_an_undecodable_text_is_skipped_whole(tmp_path):
  path = write(tmp_path / "a.txt", b"one\n\ntwo\ncaf\xe9\nmore\n\nthree\n")
  with pytest.raises(InputError, match=r"a\.txt:4: not utf-8"):
    texts(path)
  bad = BadRecords()
  options = {"on_bad_record": "skip", "bad": bad}
  assert texts(path, document="paragraph", **options) == ["one", "three"]
  assert texts(path, **options) == []
  assert bad.count == 2


def test_utf16_that_ends_in_the_middle(tmp_path):
  data = "one\ntwo\n".encode("utf-16")
  path = write(tmp_path / "a.txt", data + b"x")
  with pytest.raises(InputError, match=r"a\.txt:3: not utf-16"):
    texts(path, encoding="utf-16", document="line")


@pytest.mark.parametrize("archive", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "line", "paragraph", "file"])
def test_damaged_archives_keep_what_is_before(tmp_path, archive, damage, kind):
  draw = random.Random(0)
  good = [draw.randbytes(15).hex() for _ in range(8_000)]
  if kind == "jsonl":
    name, data = "a.jsonl", json_lines([{"text": t} for t in good])
  elif kind == "csv":
    name, data = "a.csv", as_table([["text"], *([t] for t in good)])
  else:
    end = "\n\n" if kind == "paragraph" else "\n"
    name, data = "a.txt", end.join(good).encode()
  packed = bytearray(ARCHIVES[archive](data))
  if damage == "cut":
    del packed[len(packed) * 2 // 3 :]
  else:
    middle = len(packed) * 2 // 3
    packed[middle : middle + 64] = draw.randbytes(64)
  path = tmp_path / f"{name}{archive}"
  path.write_bytes(packed)
  options = {"document": kind if name == "a.txt" else "file"}
  with pytest.raises(InputError, match=rf"{name}\{archive}"):
    texts(path, **options)
  bad = BadRecords()
  found = texts(
    path, on_bad_record="skip", max_bad_records=9**9, bad=bad, **options
  )
  assert bad.count >= 1
  if kind == "file":
    assert found == []
  elif damage == "cut":
    assert bad.count == 1
    assert found == good[: len(found)]
    # A whole block may be lost (900 kB for bz2), what came before may not.
    assert archive in (".bz2", ".xz") or len(found) > len(good) / 4


def test_a_parquet_file_cut_short(tmp_path):
  path = tmp_path / "a.parquet"
  table = pyarrow.table({"text": ["x" * 100] * 1000})
  pyarrow.parquet.write_table(table, path)
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(InputError, match=r"a\.parquet.*: truncated or damaged"):
    texts(path)
  bad = BadRecords()
  other = write(tmp_path / "b.txt", b"good")
  options = {"on_bad_record": "skip", "bad": bad}
  assert texts(path, other, **options) == ["good"]
  assert bad.count == 1


def test_bad_values_and_columns_of_parquet(tmp_path):
  path = tmp_path / "a.parquet"
  undecodable = pyarrow.array([b"caf\xe9"]).view(pyarrow.utf8())
  column = pyarrow.chunked_array([["one", None], undecodable, ["four"]])
  table = pyarrow.table({"text": column, "n": range(4)})
  pyarrow.parquet.write_table(table, path)
  with pytest.raises(InputError, match=r"a\.parquet:2: field 'text' is None"):
    texts(path)
  bad = BadRecords()
  options = {"on_bad_record": "skip", "bad": bad}
  assert texts(path, **options) == ["one", "four"]
  assert bad.count == 2
  assert ":3: not utf-8" in bad.messages[1]
  with pytest.raises(InputError, match=r"'body' \(there are: text, n\)"):
    texts(path, text_field="body")
  with pytest.raises(InputError, match="'n' is int, not a string"):
    texts(path, text_field="n")


def test_too_many_bad_records_are_an_error(tmp_path):
  path = write(tmp_path / "a.jsonl", b"{\n" * 20 + b'{"text": "x"}\n')
  bad = BadRecords()
  options = {"on_bad_record": "skip", "bad": bad}
  assert texts(path, max_bad_records=20, **options) == ["x"]
  assert bad.count == 20
  assert len(bad.messages) == 10
  with pytest.raises(InputError, match=r"max_bad_records=19.*a\.jsonl:1: "):
    texts(path, max_bad_records=19, on_bad_record="skip")


# --- memory -----------------------------------------------------------------


@pytest.mark.parametrize("archive", [".gz", ".zst"])
@pytest.mark.parametrize("text", ["random", "constant"])
def test_a_big_file_is_never_in_memory(tmp_path, archive, text):
  draw = random.Random(0)
  pieces = [draw.randbytes(5000).hex() for _ in range(2000)]
  if text == "constant":
    pieces = pieces[:1] * 2000
  data = json_lines([{"text": piece} for piece in pieces])
  path = write(tmp_path / f"a.jsonl{archive}", data)
  tracemalloc.start()
  count = sum(len(d.text) for d in read([str(path)]))
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert count == 2000 * 10_000
  assert peak < 10e6


def test_a_quote_that_never_closes_does_not_pull_in_the_file(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(sources, "_MAX_FIELD", 100_000)
  path = write(tmp_path / "a.csv", b'text\n"never' + b"\nx" * 500_000)
  with pytest.raises(InputError, match=r":2: broken row \(field larger"):
    texts(path)


# --- embedded ---------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded() -> list[sources.Document]:
  return list(read(["embedded"]))


def test_embedded_is_the_same_each_time_and_large_enough(embedded):
  sources._embedded.cache_clear()
  assert list(read(["embedded"])) == embedded
  size = sum(len(d.text) for d in embedded)
  assert 1_000_000 < size < 3_000_000
  assert len(embedded) > 3000


def test_embedded_has_no_near_duplicates(embedded):
  assert len({d.text for d in embedded}) == len(embedded)
  before: set[tuple[str, ...]] = set()
  for text in (d.text for d in embedded):
    words = re.findall(r"\w+", text.lower())
    shingles = set(zip(*(words[i:] for i in range(5)), strict=False))
    assert len(shingles & before) <= len(shingles) / 2, text[:200]
    before |= shingles


def test_embedded_docstrings_are_those_of_the_library(embedded):
  import argparse
  import inspect

  where = {d.where: d.text for d in embedded}
  assert where["embedded:argparse"] == inspect.getdoc(argparse)
  parse = argparse.ArgumentParser.add_subparsers  # has no docstring
  assert inspect.getdoc(parse) is None
  assert "embedded:argparse.ArgumentParser.add_subparsers" not in where
  assert not any(
    re.search(r"\btests?\.|idlelib|site-packages", w) for w in where
  )


def test_a_python_without_its_texts_says_so(tmp_path, monkeypatch):
  monkeypatch.setattr(sources, "_embedded", sources._embedded.__wrapped__)
  monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
  # The library's source alone is enough.
  assert next(read(["embedded"])).where.startswith("embedded:")
  monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
  with pytest.raises(InputError, match="source embedded: this Python"):
    texts("embedded")


# --- tfds -------------------------------------------------------------------

BUILDER = """
import numpy as np
import tensorflow_datasets as tfds

class TinyBooks(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version("1.0.0")
  BUILDER_CONFIGS = [
    tfds.core.BuilderConfig(name="en"), tfds.core.BuilderConfig(name="de")
  ]

  def _info(self):
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict({
        "text": tfds.features.Text(), "label": np.int64,
      }))

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(30),
            "test": self._generate_examples(3)}

  def _generate_examples(self, count):
    for i in range(count):
      yield i, {"text": f"{self.builder_config.name} buch № {i}", "label": i}
"""


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
  code = tmp_path_factory.mktemp("code")
  (code / "tiny_books").mkdir()
  (code / "tiny_books" / "__init__.py").write_text("")
  (code / "tiny_books" / "tiny_books.py").write_text(BUILDER)
  sys.path.insert(0, str(code))
  try:
    from tiny_books.tiny_books import TinyBooks
  finally:
    sys.path.remove(str(code))
  place = tmp_path_factory.mktemp("tfds")
  for config in ("en", "de"):
    builder = TinyBooks(
      config=config, data_dir=str(place), file_format="array_record"
    )
    builder.download_and_prepare()
  return str(place)


def test_tfds_reads_what_was_prepared(tfds_dir):
  found = list(read(["tfds:tiny_books/de"], tfds_dir=tfds_dir))
  expected = {f"de buch № {i}" for i in range(30)}
  assert {d.text for d in found} == expected
  assert [d.where for d in found] == [
    f"tfds:tiny_books/de[{i}]" for i in range(30)
  ]


def test_tfds_splits_slices_and_versions(tfds_dir):
  options = {"tfds_dir": tfds_dir}
  everything = texts("tfds:tiny_books/en", **options)
  assert texts("tfds:tiny_books/en:train[:50%]", **options) == everything[:15]
  assert len(texts("tfds:tiny_books/en:1.0.0:test", **options)) == 3
  assert len(texts("tfds:tiny_books/en:1.0.0", **options)) == 30


def test_tfds_slices_make_up_the_whole(tfds_dir):
  everything = texts("tfds:tiny_books/en", tfds_dir=tfds_dir)
  specs = sources.cut_tfds("tfds:tiny_books/en:1.0.0", tfds_dir, 100)
  assert len(specs) > 3
  assert specs[0].startswith("tfds:tiny_books/en:1.0.0:train[0:")
  parts = [texts(spec, tfds_dir=tfds_dir) for spec in specs]
  assert all(parts) and sum(parts, []) == everything
  for whole in ("tfds:tiny_books/en:train[:50%]", "tfds:tiny_books/en"):
    assert sources.cut_tfds(whole, tfds_dir, 10**6) == [whole]


@pytest.mark.parametrize(
  ("spec", "field", "message"),
  [
    ("tfds:none", "text", "no prepared data set none in"),
    ("tfds:tiny_books/fr", "text", "no prepared data set tiny_books/fr"),
    ("tfds:tiny_books/en:dev", "text", "no split 'dev'; there are: .*train"),
    ("tfds:tiny_books/en:train[5:", "text", "tiny_books/en:train"),
    ("tfds:", "text", "write it tfds:NAME"),
    ("tfds:tiny_books/en", "body", r"there are: .*label.*set data\.text_field"),
    ("tfds:tiny_books/en", "label", "'label' is .*int.*, not a string"),
  ],
)
def test_tfds_mistakes_are_one_line(tfds_dir, spec, field, message):
  with pytest.raises(InputError, match=message) as caught:
    texts(spec, tfds_dir=tfds_dir, text_field=field)
  assert "\n" not in str(caught.value)


def test_a_damaged_tfds_file_says_where(tfds_dir, tmp_path):
  copy = shutil.copytree(tfds_dir, tmp_path / "tfds")
  path = next(copy.glob("tiny_books/en/*/*train*"))
  path.write_bytes(path.read_bytes()[:-100])
  options = {"tfds_dir": str(copy)}
  with pytest.raises(InputError, match=r"^tfds:tiny_books/en.*damaged"):
    texts("tfds:tiny_books/en", **options)
  bad = BadRecords()
  texts("tfds:tiny_books/en", on_bad_record="skip", bad=bad, **options)
  assert bad.count == 1


def test_tfds_needs_no_tensorflow(tfds_dir):
  texts("tfds:tiny_books/en", tfds_dir=tfds_dir)
  assert "tensorflow" not in sys.modules
