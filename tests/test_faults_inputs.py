"""Corrupt inputs and stores, kills: named or counted, never silently wrong."""

import hashlib
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
from collections import Counter

import broken_configs
import numpy as np
import pytest
from conftest import ROOT, environment

from flaxmlm import InputError
from flaxmlm.data import cleaning, rows, sources, store
from flaxmlm.storage import files, hashes, remote

GOOD = {"named", "skipped", "read"}
MEMORY = 1 << 30


def read_corrupt(folder, count, seed) -> list[dict]:
  """Has a process of its own read corrupt inputs; returns what became."""
  done = subprocess.run(
    [
      *(sys.executable, str(ROOT / "tests" / "corrupt_inputs.py")),
      *(str(folder), str(count), str(seed)),
    ],
    env=environment(),
    capture_output=True,
    text=True,
    timeout=570,
  )
  said = [json.loads(line) for line in done.stdout.splitlines()]
  assert done.returncode == 0, (said[-1], done.stderr[-2000:])
  return [facts for facts in said if "result" in facts]


def check_corrupt(found: list[dict]) -> None:
  wrong = [facts for facts in found if facts["result"] not in GOOD]
  assert not wrong
  assert max(facts["rss"] for facts in found) < MEMORY


def test_corrupt_inputs_are_named_or_counted(tmp_path):
  found = read_corrupt(tmp_path, 200, seed=0)
  assert len(found) == 200
  check_corrupt(found)
  counts = Counter(facts["result"] for facts in found)
  assert counts["named"] > 60 and counts["skipped"] > 40


@pytest.mark.slow
def test_a_thousand_corrupt_inputs(tmp_path):
  found = read_corrupt(tmp_path, 1000, seed=1)
  check_corrupt(found)
  assert len({facts["kind"] for facts in found}) == 15


@pytest.mark.slow
def test_small_files_that_are_large_inside(tmp_path):
  found = read_corrupt(tmp_path, -1, seed=0)
  assert len(found) == 35
  check_corrupt(found)


# --- bounds, one by one ----------------------------------------------------


def test_an_archive_out_of_proportion_is_damage(tmp_path, monkeypatch):
  import gzip

  path = tmp_path / "a.txt.gz"
  path.write_bytes(gzip.compress(b"line\n" * 100_000))
  read = lambda: list(sources.read([str(path)], document="line"))  # noqa: E731
  assert len(read()) == 100_000
  monkeypatch.setattr(sources, "_UNPACKED_LEAST", 1000)
  with pytest.raises(InputError, match="unpacks to more than 128 times"):
    read()


@pytest.mark.parametrize(
  ("name", "data", "message"),
  [
    ("a.txt", "x" * 11, "document of more than 10"),
    ("a.jsonl", '{"text": "%s"}' % ("x" * 11), "'text' has more than 10"),
    ("a.csv", "text\n" + "x" * 11, "'text' has more than 10"),
    ("a.tsv", "text\n" + "x" * 50, "line of more than 40"),
    ("a.csv", 'text\n"' + "x\n" * 90 + '"', "row of more than 80"),
  ],
)
def test_what_is_too_long_is_a_bad_record(
  tmp_path, monkeypatch, name, data, message
):
  monkeypatch.setattr(sources, "_MAX_TEXT", 10)
  monkeypatch.setattr(sources, "_MAX_LINE", 40)
  path = tmp_path / name
  path.write_text(data)
  with pytest.raises(InputError, match=message):
    list(sources.read([str(path)]))
  bad = sources.BadRecords()
  assert not list(sources.read([str(path)], on_bad_record="skip", bad=bad))
  assert bad.count == 1


@pytest.mark.parametrize(
  ("name", "document", "data", "line", "after"),
  [
    ("a.txt", "line", "one\n{}\ntwo\n", 2, 3),
    ("a.txt", "paragraph", "one\n\n{}\n\ntwo\n", 3, 5),
    # Of lines that are short enough, but too many.
    ("a.txt", "paragraph", "one\n\n8 chars.\n8 chars.\n9\n\ntwo", 3, 7),
    ("a.jsonl", "file", '{{"text": "one"}}\n{}\n{{"text": "two"}}', 2, 3),
    ("a.csv", "file", "text\none\n{}\ntwo\n", 3, 4),
  ],
)
def test_what_follows_a_line_that_is_too_long_is_read(
  tmp_path, monkeypatch, name, document, data, line, after
):
  monkeypatch.setattr(sources, "_MAX_TEXT", 10)
  monkeypatch.setattr(sources, "_MAX_LINE", 40)
  path = tmp_path / name
  path.write_text(data.format("x" * 1000))
  bad = sources.BadRecords()
  options = {"document": document, "on_bad_record": "skip"}
  found = list(sources.read([str(path)], **options, bad=bad))
  assert [one.text for one in found] == ["one", "two"]
  assert found[1].where == f"{path}:{after}"
  [message] = bad.messages
  assert bad.count == 1 and message.startswith(f"{path}:{line}: ")


def test_marks_without_letters_take_no_square(tmp_path):
  """The order of marks is Unicode's, within each thousand."""
  marks = "\u0301\u0327" * 100_000  # some minutes, were they one run
  text = "naïve " * 100 + "a" + marks
  found = cleaning.normalize(text, "NFC")
  assert sorted(cleaning.normalize(found, "NFD")) == sorted(
    cleaning.normalize(text, "NFD")
  )
  short = "e\u0301" * 2000
  assert cleaning.normalize(short, "NFC") == "\u00e9" * 2000


def test_a_page_that_nests_too_deeply_is_still_text():
  options = dict.fromkeys(cleaning.STEPS, False)
  options |= {"html": True, "unicode": "none", "min_chars": 1}
  inner = "<script>no()</script>A &lt; B"
  page = "<div>" * 100_000 + inner + "</div>" * 100_000
  assert cleaning.clean(page, options, Counter()) == "A < B"
  flat = "<p>one" * 50_000 + "<div><p>two</p></div>" * 50_000
  lines = cleaning.clean(flat, options, Counter()).split()
  assert lines == ["one"] * 50_000 + ["two"] * 50_000


def test_names_in_a_manifest_stay_in_its_folder():
  for name in ("a", "a/b.bin", "tokenizer/vocab.txt"):
    assert files.is_inside(name)
  for name in ("", ".", "..", "../a", "a/../../b", "/a", "a//b", "a\\b", "a\n"):
    assert not files.is_inside(name)


# --- stores ----------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  return broken_configs.make_world(tmp_path_factory.mktemp("world"))


def parts(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the files of a store that hold something."""
  found = [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size]
  return sorted(p for p in found if "rows" not in p.parts)


def test_damaged_stores_are_named(world, tmp_path):
  """200 flipped bits, 50 truncations, 50 files that are gone, 20 swapped."""
  draw = random.Random(0)
  folder = tmp_path / "store"
  shutil.copytree(world / "store", folder)
  good = {path: path.read_bytes() for path in parts(folder)}
  # Each file as often as the others: most bytes are those of a few.
  faults = ["flip"] * 200 + ["cut"] * 50 + ["gone"] * 50 + ["swapped"] * 20
  store.open_store(str(folder))
  for fault in faults:
    path = draw.choice(list(good))
    data = bytearray(good[path])
    place = draw.randrange(len(data))
    if fault == "flip":
      data[place] ^= 1 << draw.randrange(8)
      path.write_bytes(data)
    elif fault == "cut":
      path.write_bytes(data[:place])
    elif fault == "gone":
      path.unlink()
    else:  # of the same size, so that nothing else tells them apart
      path.write_bytes(draw.randbytes(len(data)))
    with pytest.raises(InputError, match=str(path.relative_to(tmp_path))):
      store.open_store(str(folder))
    path.write_bytes(good[path])
  store.open_store(str(folder))


def test_a_damaged_plan_isnt_used(world, tmp_path):
  """Rows are made again, the same, whatever became of the file."""
  draw = random.Random(0)
  folder = tmp_path / "store"
  shutil.copytree(world / "store", folder)
  made = store.open_store(str(folder))
  want = rows.load(made, "train", 32)
  [plan] = (folder / "rows").iterdir()
  for _ in range(30):
    path = draw.choice(sorted(plan.iterdir()))
    data = bytearray(path.read_bytes())
    if data:
      data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    got = rows.load(made, "train", 32)
    for a, b in zip(want[2:], got[2:], strict=True):
      np.testing.assert_array_equal(a, b)


def reseal(folder: pathlib.Path, **changes) -> None:
  """Makes the manifest true to the files, and changes what it says."""
  path = folder / "manifest.json"
  manifest = json.loads(path.read_text()) | changes
  del manifest["sha256"]
  for name, facts in manifest["files"].items():
    data = (folder / name).read_bytes()
    facts["bytes"] = len(data)
    facts["sha256"] = hashlib.sha256(data).hexdigest()
  path.write_bytes(store._seal(manifest))


def set_item(path: pathlib.Path, dtype: str, index: int, value: int) -> None:
  array = np.fromfile(path, dtype)
  array[index] = value
  array.tofile(path)


@pytest.mark.parametrize(
  ("name", "dtype", "index", "value", "message"),
  [
    ("train/ids.bin", "<u2", 7, 21, "id 21, and the vocabulary 21"),
    ("validation/ids.bin", "<u2", -1, 65535, "id 65535"),
    ("train/offsets.bin", "<i8", 0, 1, "don't ascend"),
    ("train/offsets.bin", "<i8", 3, -1, "don't ascend"),
    ("train/offsets.bin", "<i8", 3, 10**9, "don't ascend"),
    ("train/offsets.bin", "<i8", -1, 10**9, "don't ascend"),
    ("train/sources.bin", "<u2", 0, 1, "don't ascend"),
  ],
)
def test_a_store_whose_hashes_are_right_and_numbers_wrong(
  world, tmp_path, name, dtype, index, value, message
):
  folder = tmp_path / "store"
  shutil.copytree(world / "store", folder)
  set_item(folder / name, dtype, index, value)
  reseal(folder)
  with pytest.raises(InputError, match=rf"{name}.*{message}"):
    store.open_store(str(folder))


@pytest.mark.parametrize(
  "changes",
  [
    {"dtype": "<u4"},
    {"vocab": {"size": 21, "pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 21}},
    {"vocab": {"size": -1}},
    {"splits": {}},
    {"spec": []},
    {"nonsense": 1},
    {"files": {"../escape": {"bytes": 0, "sha256": ""}}},
  ],
)
def test_a_manifest_that_contradicts_itself(world, tmp_path, changes):
  folder = tmp_path / "store"
  shutil.copytree(world / "store", folder)
  (tmp_path / "escape").write_bytes(b"")
  reseal(folder, **changes)
  with pytest.raises(InputError, match=r"manifest\.json: damaged"):
    store.open_store(str(folder))


def test_files_are_read_once_and_again_when_they_change(
  world, tmp_path, monkeypatch
):
  monkeypatch.setenv(remote.CACHE, str(tmp_path / "cache"))
  monkeypatch.setattr(hashes, "_FRESH_SECONDS", 0.0)
  folder = tmp_path / "store"
  shutil.copytree(world / "store", folder)
  read = []
  hash_one = hashes._hash

  def count(path, *rest):
    read.append(os.path.relpath(path, folder))
    return hash_one(path, *rest)

  monkeypatch.setattr(hashes, "_hash", count)
  store.open_store(str(folder))
  names = json.loads((folder / "manifest.json").read_text())["files"]
  assert sorted(read) == sorted(names)
  read.clear()
  store.open_store(str(folder))
  assert not read
  # Another file of the same size and time, under the same name.
  path = folder / "train" / "flags.bin"
  times = path.stat()
  (tmp_path / "other").write_bytes(bytes(times.st_size))
  os.utime(tmp_path / "other", ns=(times.st_atime_ns, times.st_mtime_ns))
  os.replace(tmp_path / "other", path)
  with pytest.raises(InputError, match=r"flags\.bin: its sha256"):
    store.open_store(str(folder))
  assert read == ["train/flags.bin"]


def test_a_store_and_a_cache_that_cant_be_written(world, tmp_path, monkeypatch):
  monkeypatch.setenv(remote.CACHE, str(tmp_path / "none" / "cache"))
  (tmp_path / "none").write_text("a file, where the cache was to be")
  folder = tmp_path / "store"
  shutil.copytree(world / "store", folder)
  before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
  for path in before:
    path.chmod(0o555 if path.is_dir() else 0o444)
  try:
    assert store.open_store(str(folder)).vocab["size"] == 21
  finally:
    for path in before:
      path.chmod(0o755 if path.is_dir() else 0o644)
  assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_what_is_remembered_is_private(world, tmp_path, monkeypatch):
  monkeypatch.setenv(remote.CACHE, str(tmp_path / "cache"))
  monkeypatch.setattr(hashes, "_FRESH_SECONDS", 0.0)
  store.open_store(str(world / "store"))
  folder = tmp_path / "cache" / "hashes"
  assert folder.stat().st_mode & 0o077 == 0
  # Damage of it costs the time of reading, no more.
  for path in folder.iterdir():
    path.write_text('{"ids.bin": 3}')
  store.open_store(str(world / "store"))


def test_stores_of_before_open(world, tmp_path):
  """They have no sha256 of the manifest in it."""
  folder = tmp_path / "store"
  shutil.copytree(world / "store", folder)
  path = folder / "manifest.json"
  manifest = json.loads(path.read_text())
  del manifest["sha256"]
  path.write_text(json.dumps(manifest, indent=2) + "\n")
  store.open_store(str(folder))


def test_the_threads_see_what_one_would(tmp_path):
  draw = random.Random(0)
  want = {}
  for number in range(20):
    path = tmp_path / f"{number}.bin"
    path.write_bytes(draw.randbytes(draw.choice([0, 1, 1000, 9_000_000])))
    want[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
  assert hashes.hash_files(want) == want
  (tmp_path / "3.bin").unlink()
  with pytest.raises(InputError, match=r"3\.bin"):
    hashes.hash_files(want)


# --- prepare ---------------------------------------------------------------

# Kills itself at the n-th thing that it does with a file of the store.
KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import broken_configs
from flaxmlm import config, prepare
from flaxmlm.preparing import shards
import sentencepiece, tokenizers.models, numpy, ftfy
shards.SHARD_CHARS = 3000
folder = sys.argv[1]
c = config.check_keys({{
  "data.source": sys.argv[2], "data.document": "line", "data.processes": 1,
  "data.validation_fraction": 0.1, "tokenizer.kind": "bpe",
  "tokenizer.vocab_size": 60,
}}, where="test")
count, last = 0, 0
events = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")
def hook(event, args):
  global count
  if last is None or event not in events:
    return
  if isinstance(args[0], str) and "partial" not in args[0]:
    if event != "os.rename":
      return
  count += 1
  if count == last:
    os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
def run(out, stop):
  global last
  child = os.fork()
  if not child:
    last = stop
    try:
      prepare.prepare_store(c, out, progress=False)
      os.write(2, b"%d\\n" % count)
      os._exit(0)
    except BaseException as error:
      os.write(2, repr(error).encode())
      os._exit(1)
  return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
for word in sys.argv[3:]:
  out = os.path.join(folder, word)
  print(word, run(out, int(word)), run(out, 0), flush=True)
"""


def sha256s(folder: pathlib.Path) -> dict[str, str]:
  return {
    str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
    for p in folder.rglob("*")
    if p.is_file()
  }


def kill_at(world, tmp_path, places) -> dict[int, tuple[int, int]]:
  """Prepares a store, killed at each place; returns both exit codes."""
  script = tmp_path / "killed.py"
  script.write_text(KILLED.format(tests=str(ROOT / "tests")))
  done = subprocess.run(
    [
      *(sys.executable, str(script), str(tmp_path), str(world / "text.txt")),
      *map(str, places),
    ],
    env=environment() | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=570,
  )
  assert done.returncode == 0, done.stderr
  found = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
  return {place: codes for place, *codes in found}


def check_killed(world, tmp_path, places) -> None:
  codes = kill_at(world, tmp_path, [0, *places])
  assert codes.pop(0) == [0, 0]
  want = sha256s(tmp_path / "0")
  killed = 0
  for place, (first, second) in codes.items():
    assert first in (-9, 0) and second == 0, (place, first, second)
    killed += first == -9
    assert sha256s(tmp_path / str(place)) == want, place
    assert not (tmp_path / f"{place}.partial").exists()
  assert killed >= 0.8 * len(places)


def test_prepare_killed_at_any_file_resumes_to_the_same_bytes(world, tmp_path):
  check_killed(world, tmp_path, random.Random(0).sample(range(1, 95), 12))


@pytest.mark.slow
def test_prepare_killed_at_every_file(world, tmp_path):
  check_killed(world, tmp_path, range(1, 95))


def test_a_source_that_changed_under_a_resume_is_named(
  world, tmp_path, capsys, monkeypatch
):
  from flaxmlm import config, prepare

  path = tmp_path / "text.txt"
  shutil.copy(world / "text.txt", path)
  values = {
    "data.source": str(path),
    "data.document": "line",
    "data.validation_fraction": 0.1,
    "data.processes": 1,
    "tokenizer.path": str(world / "vocab.txt"),
  }
  c = config.check_keys(values, where="test")
  assemble = store.assemble

  def stop(*args, **kwargs):
    raise KeyboardInterrupt

  def swap(*args, **kwargs):
    data = bytearray(path.read_bytes())
    data[0] = ord("b") if data[0] == ord("a") else ord("a")
    path.write_bytes(data)  # of the same size
    return assemble(*args, **kwargs)

  monkeypatch.setattr(store, "assemble", stop)
  with pytest.raises(KeyboardInterrupt):
    prepare.prepare_store(c, str(tmp_path / "store"))
  # Changed while it is away: it says so, and starts over.
  monkeypatch.setattr(store, "assemble", assemble)
  data = bytearray(path.read_bytes())
  data[:4] = b"hhhh"
  path.write_bytes(data)
  prepare.prepare_store(c, str(tmp_path / "store"))
  said = capsys.readouterr().out
  assert "starting over (data.source: the contents of text.txt" in said
  fresh = prepare.prepare_store(c, str(tmp_path / "fresh"))
  assert sha256s(tmp_path / "fresh") == sha256s(tmp_path / "store")
  # Changed since: the store isn't that of the text any more.
  data[:4] = b"gggg"
  path.write_bytes(data)
  with pytest.raises(InputError, match="contents of text.txt .* have changed"):
    prepare.prepare_store(c, fresh.folder)
  # Changed meanwhile.
  monkeypatch.setattr(store, "assemble", swap)
  with pytest.raises(InputError, match="changed while it was read.*text.txt"):
    prepare.prepare_store(c, str(tmp_path / "third"))
