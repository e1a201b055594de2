"""Minimal pairs: all of them, by paradigm, and every bad line by its place."""

import gzip
import json

import pytest

from flaxmlm import InputError
from flaxmlm.data import minimal_pairs


def as_line(good: object, bad: object) -> str:
  pair = {"sentence_good": good, "sentence_bad": bad, "UID": "x"}
  return json.dumps(pair) + "\n"


def test_paradigms_are_files_in_natural_order(tmp_path):
  for name in ("p_10.jsonl", "p_2.jsonl", "p_1.json"):
    (tmp_path / name).write_text(as_line(name, "b") + "\n" + as_line("c", "d"))
  data = as_line("é", "e").encode()
  (tmp_path / "q.v2.jsonl.gz").write_bytes(gzip.compress(data))
  (tmp_path / "notes.txt").write_text("text")
  (tmp_path / "LICENSE").write_text("text")
  pairs, others = minimal_pairs.read(str(tmp_path))
  assert list(pairs) == ["p_1", "p_2", "p_10", "q.v2"]
  assert pairs["p_2"] == [
    ("p_2.jsonl", "b", f"{tmp_path}/p_2.jsonl:1"),
    ("c", "d", f"{tmp_path}/p_2.jsonl:3"),
  ]
  assert pairs["q.v2"] == [("é", "e", f"{tmp_path}/q.v2.jsonl.gz:1")]
  assert sorted(others) == [f"{tmp_path}/LICENSE", f"{tmp_path}/notes.txt"]


@pytest.mark.parametrize(
  ("data", "message"),
  [
    (b"{\n", r"a.jsonl:2: broken JSON"),
    (b"[]\n", r"a.jsonl:2: JSON, but not an object \(list\)"),
    (b'{"sentence_good": "x"}\n', r"a.jsonl:2: no text in .*'sentence_bad'"),
    (as_line(None, "x").encode(), r"a.jsonl:2: no text in .*'sentence_good'"),
    (as_line("x", 1).encode(), r"a.jsonl:2: no text in .*'sentence_bad'"),
    (as_line("x", "y").encode("utf-16"), r"a.jsonl:2: not utf-8"),
  ],
)
def test_a_bad_line_is_named(tmp_path, data, message):
  path = tmp_path / "a.jsonl"
  path.write_bytes(as_line("x", "y").encode() + data)
  with pytest.raises(InputError, match=message):
    minimal_pairs.read(str(path))


def test_a_damaged_archive_is_no_short_one(tmp_path):
  data = "".join(as_line(str(i), "b") for i in range(999)).encode()
  path = tmp_path / "a.jsonl.gz"
  path.write_bytes(gzip.compress(data)[:-99])
  with pytest.raises(InputError, match=r"a.jsonl.gz:\d+: truncated or damaged"):
    minimal_pairs.read(str(path))


@pytest.mark.parametrize(
  ("names", "message"),
  [
    (["a.txt"], "no minimal pairs there; wants .jsonl files"),
    (["a.jsonl", "b/a.jsonl.gz"], r"a.jsonl is the paradigm 'a' too"),
    (["empty.jsonl"], "empty.jsonl: no pair in it"),
  ],
)
def test_files_that_arent_paradigms_are_refused(tmp_path, names, message):
  for name in names:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    data = b"" if name == "empty.jsonl" else as_line("x", "y").encode()
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
  with pytest.raises(InputError, match=message):
    minimal_pairs.read(str(tmp_path))


@pytest.mark.parametrize("spec", ["embedded", "tfds:blimp"])
def test_sources_without_files_have_no_pairs(spec):
  with pytest.raises(InputError, match="no minimal pairs there"):
    minimal_pairs.read(spec)
