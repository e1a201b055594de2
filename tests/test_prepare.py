"""Preparing: the same store by any way to it, and nothing lost on the way."""

import hashlib
import json
import os
import pathlib
import random
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

from flaxmlm import InputError, config, prepare, tokenizers
from flaxmlm.data import batches, cleaning, rows, store
from flaxmlm.preparing import documents, shards

ROOT = pathlib.Path(__file__).parent.parent
DATA = pathlib.Path(
  os.environ.get("FLAXMLM_DATA", ROOT.parent / "shared" / "data")
)
SMALL_SHARDS = 4000


def write_text(path, lines, *, seed=0):
  """Writes lines of words: some of them copies, some short, some not clean."""
  draw = random.Random(seed)
  letters = "abcdefghijklmnop"
  words = [
    "".join(draw.choices(letters, k=draw.randint(2, 8))) for _ in range(200)
  ]
  texts = []
  for number in range(lines):
    if number % 10 == 9:
      texts.append(draw.choice(texts))
    elif number % 10 == 5:
      texts.append("a  b")
    else:
      text = " ".join(draw.choices(words, k=draw.randint(3, 60)))
      texts.append(text.replace("a", "a\u200b") + ".  Ende")
  path.write_text("\n".join(texts) + "\n", encoding="utf-8")
  return texts


def make_config(source, **values):
  base = {
    "data.source": str(source),
    "data.document": "line",
    "data.validation_fraction": 0.1,
    "data.row_length": 32,
    "data.processes": 1,
    "data.cleaning.min_chars": 6,
    "tokenizer.kind": "bpe",
    "tokenizer.vocab_size": 300,
  }
  values = {name.replace("__", "."): value for name, value in values.items()}
  return config.check_keys(base | values, where="test")


def files_of(folder):
  """Returns sha256 of each file under a folder, but the kept plans."""
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(pathlib.Path(folder).rglob("*"))
    if path.is_file() and "rows" not in path.parts
  }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  """A text file, its lines, and the store of it made in one process."""
  folder = tmp_path_factory.mktemp("corpus")
  texts = write_text(folder / "text.txt", 600)
  out = str(folder / "store")
  made = prepare.prepare_store(
    make_config(folder / "text.txt"), out, progress=False
  )
  return folder / "text.txt", texts, made


def test_one_process_or_two_make_the_same_bytes(corpus, tmp_path, monkeypatch):
  monkeypatch.setattr(shards, "SHARD_CHARS", SMALL_SHARDS)
  path, _, made = corpus
  c = make_config(path, data__processes=2)
  prepare.prepare_store(c, str(tmp_path / "two"), progress=False)
  # And so do shards of another size: `corpus` is one of a single shard.
  assert files_of(tmp_path / "two") == files_of(made.folder)


def test_killed_and_started_again_makes_the_same_bytes(corpus, tmp_path):
  path, _, made = corpus
  out = tmp_path / "store"
  partial = tmp_path / "store.partial" / "shards"
  # Slower than it is, so that the kill always comes in the middle.
  script = f"""
import os, sys, time
from flaxmlm import prepare
from flaxmlm.preparing import shards
from tests_config import c
shards.SHARD_CHARS = {SMALL_SHARDS}
read_part = shards.read_part
def slowly(*args):
  for document in read_part(*args):
    time.sleep(0.005)
    yield document
shards.read_part = slowly
if __name__ == "__main__":
  prepare.prepare_store(c, {str(out)!r}, progress=False)
"""
  c = make_config(path, data__processes=2)
  (tmp_path / "tests_config.py").write_text(
    "from flaxmlm import config\n"
    f"c = config.check_keys({config.to_flat(c)!r}, where='test')\n"
  )
  (tmp_path / "slow.py").write_text(script)
  environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
  process = subprocess.Popen(
    [sys.executable, str(tmp_path / "slow.py")], env=environment
  )
  deadline = time.monotonic() + 60
  while len(list(partial.rglob("*.npz"))) < 5 and time.monotonic() < deadline:
    assert process.poll() is None
    time.sleep(0.01)
  workers = children(process.pid)
  process.send_signal(signal.SIGKILL)
  process.wait()
  finished = {p: p.stat().st_ino for p in partial.rglob("*.npz")}
  assert len(finished) >= 5
  assert not out.exists()
  wait_for_end(workers)

  kept = []
  save_shard = store.save_shard
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(shards, "SHARD_CHARS", SMALL_SHARDS)
    patch.setattr(
      store,
      "save_shard",
      lambda path, *rest: (kept.append(path), save_shard(path, *rest)),
    )
    patch.setattr(tokenizers, "train", None)  # it is there already
    again = make_config(path, data__processes=1)
    prepare.prepare_store(again, str(out), progress=False)
  assert not set(kept) & set(map(str, finished))
  assert files_of(out) == files_of(made.folder)
  assert not (tmp_path / "store.partial").exists()


def children(pid):
  if not sys.platform.startswith("linux"):
    return []
  with open(f"/proc/{pid}/task/{pid}/children") as file:
    return [int(child) for child in file.read().split()]


def wait_for_end(pids):
  """Waits until processes have ended; fails if they don't."""
  deadline = time.monotonic() + 20
  for pid in pids:
    while os.path.exists(f"/proc/{pid}/stat"):
      with open(f"/proc/{pid}/stat") as file:
        if file.read().rpartition(")")[2].split()[0] == "Z":
          break
      assert time.monotonic() < deadline, f"worker {pid} lives on"
      time.sleep(0.05)


def test_every_document_once_and_in_one_split(corpus):
  _, texts, made = corpus
  options = config.defaults().data.cleaning.to_dict() | {"min_chars": 6}
  cleaned = [cleaning.clean(text, options, Counter()) for text in texts]
  left = list(dict.fromkeys(text for text in cleaned if text is not None))
  tokenizer = tokenizers.load(os.path.join(made.folder, "tokenizer"))
  expected = {"train": Counter(), "validation": Counter()}
  for text, encoded in zip(left, tokenizer.encode_batch(left), strict=True):
    held_out = cleaning.fingerprint(text) / 2**64 < 0.1
    ids, flags = encoded.ids.tolist(), encoded.flags.tolist()
    for i in range(0, len(ids), 30):
      # A piece begins a word, even where a long document is cut in one.
      begins = [flags[i] | 1, *flags[i + 1 : i + 30]]
      piece = zip(ids[i : i + 30], begins, strict=True)
      expected["validation" if held_out else "train"][tuple(piece)] += 1

  for split, pieces in expected.items():
    plan = rows.load(made, split, 32)
    read = Counter()
    for batch in batches.in_order(made, plan, batch_size=16):
      for ids, segments, flags in zip(*batch[:2], batch.flags, strict=True):
        for number in range(1, segments.max() + 1):
          here = np.flatnonzero(segments == number)[1:-1]
          piece = zip(ids[here].tolist(), flags[here].tolist(), strict=True)
          read[tuple(piece)] += 1
    assert read == pieces

  dropped = made.manifest["documents"]["dropped"]
  short = cleaned.count(None)
  assert short > 0
  assert dropped["too_short"] == short
  assert dropped["duplicate"] == len(texts) - short - len(left)


def test_a_finished_store_is_left_alone(corpus):
  path, _, made = corpus
  before = {
    p: p.stat().st_mtime_ns for p in pathlib.Path(made.folder).rglob("*")
  }
  # Neither seed, row length nor processes change a store.
  c = make_config(path, seed=5, data__row_length=64, data__processes=2)
  again = prepare.prepare_store(c, made.folder, progress=False)
  assert again.hash == made.hash
  after = {
    p: p.stat().st_mtime_ns for p in pathlib.Path(made.folder).rglob("*")
  }
  assert after == before


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"tokenizer.vocab_size": 400}, "tokenizer.vocab_size: 300 -> 400"),
    ({"data.cleaning.min_chars": 7}, "data.cleaning.min_chars: 6 -> 7"),
    ({"data.document": "file"}, "data.document: 'line' -> 'file'"),
    ({"data.source": "embedded"}, "data.source: text.txt of .* -> embedded"),
  ],
)
def test_the_store_of_another_config_is_refused(corpus, change, message):
  path, _, made = corpus
  with pytest.raises(InputError, match=message):
    prepare.prepare_store(
      make_config(path, **change), made.folder, progress=False
    )


def test_a_file_of_another_size_is_refused(tmp_path):
  path = tmp_path / "text.txt"
  write_text(path, 100)
  out = str(tmp_path / "store")
  prepare.prepare_store(make_config(path), out, progress=False)
  with open(path, "a") as file:
    file.write("one more\n")
  with pytest.raises(InputError, match=r"text.txt of \d+ bytes -> text.txt"):
    prepare.prepare_store(make_config(path), out, progress=False)


def test_unfinished_work_of_another_config_is_started_over(corpus, tmp_path):
  path, _, made = corpus
  other = tmp_path / "other.txt"
  write_text(other, 50, seed=1)
  out = tmp_path / "store"
  c = make_config(other, data__document="file")
  with pytest.raises(InputError, match="data.document=paragraph"):
    prepare.prepare_store(c, str(out), progress=False)
  assert (tmp_path / "store.partial").exists()
  prepare.prepare_store(make_config(path), str(out), progress=False)
  assert files_of(out) == files_of(made.folder)


def test_a_folder_of_something_else_is_not_touched(corpus, tmp_path):
  (tmp_path / "notes.txt").write_text("mine")
  with pytest.raises(InputError, match="isn't a store"):
    prepare.prepare_store(make_config(corpus[0]), str(tmp_path), progress=False)
  assert os.listdir(tmp_path) == ["notes.txt"]


def test_two_at_once_are_refused(corpus, tmp_path):
  out = str(tmp_path / "store")
  with (
    prepare._started(f"{out}.partial", {}, say=None),
    pytest.raises(InputError, match="another process is making this store"),
  ):
    prepare.prepare_store(make_config(corpus[0]), out, progress=False)


def test_a_single_document_names_the_way_out(tmp_path):
  path = tmp_path / "text.txt"
  write_text(path, 20)
  c = make_config(path, data__document="file", data__validation_fraction=1e-9)
  with pytest.raises(InputError, match="data.document=paragraph makes many"):
    prepare.prepare_store(c, str(tmp_path / "a"), progress=False)
  c.data.validation_fraction = 0.0
  made = prepare.prepare_store(c, str(tmp_path / "b"), progress=False)
  assert len(made.validation.ids) == 0


def test_of_a_few_files_one_is_held_out_and_it_is_said(tmp_path, capsys):
  for number in range(5):
    write_text(tmp_path / f"{number}.txt", 20, seed=number)
  c = make_config(
    tmp_path / "*.txt",
    data__document="file",
    data__validation_fraction=1e-9,
  )
  made = prepare.prepare_store(c, str(tmp_path / "store"))
  assert len(made.validation.sources) == 1
  assert len(made.train.sources) == 4
  assert "the one with the smallest hash is held out" in capsys.readouterr().out


def test_a_full_disk_and_a_bad_folder_are_one_line_each(corpus, tmp_path):
  arguments = [
    f"--config.data.source={corpus[0]}",
    "--config.data.document=line",
    "--config.tokenizer.vocab_size=200",
  ]
  # A limit on the size of files stands for the end of the disk: it comes in
  # the middle of writing too.
  limited = (
    "import resource, runpy, sys; sys.argv[0] = 'prepare';"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
    "runpy.run_module('flaxmlm.prepare', run_name='__main__')"
  )
  full = subprocess.run(
    [sys.executable, "-c", limited, *arguments, f"--out={tmp_path / 'store'}"],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  assert full.returncode == 2
  assert "File too large; free some space" in full.stderr
  assert full.stderr.count("\n") == 1
  (tmp_path / "file").write_text("")
  refused = run_program(*arguments, f"--out={tmp_path / 'file' / 'store'}")
  assert refused.returncode == 2
  assert "Not a directory" in refused.stderr
  assert refused.stderr.count("\n") == 1


def test_nothing_left_for_the_tokenizer_names_the_keys(tmp_path):
  write_text(tmp_path / "text.txt", 20)
  c = make_config(tmp_path / "text.txt", data__cleaning__min_chars=10**6)
  with pytest.raises(InputError, match="data.cleaning.min_chars=1000000"):
    prepare.prepare_store(c, str(tmp_path / "store"), progress=False)


def test_an_empty_source_says_so(tmp_path):
  (tmp_path / "text.txt").write_text("\n\n")
  c = make_config(
    tmp_path / "text.txt", tokenizer__path=str(make_tokenizer(tmp_path))
  )
  with pytest.raises(InputError, match="no document in it"):
    prepare.prepare_store(c, str(tmp_path / "store"), progress=False)


def make_tokenizer(folder):
  """Saves a WordPiece vocabulary of single letters."""
  letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ."
  pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
  pieces += [mark + letter for letter in letters for mark in ("", "##")]
  path = folder / "vocab.txt"
  path.write_text("\n".join(pieces) + "\n")
  return path


def test_a_given_tokenizer_and_a_validation_source(tmp_path):
  train, held_out = tmp_path / "train.txt", tmp_path / "validation.txt"
  texts = [f"line {letter * 7}" for letter in "abcdefghij"]
  train.write_text("\n".join(texts))
  held_out.write_text("\n".join([*texts[:3], "line of its own"]))
  c = make_config(
    train,
    data__validation_source=str(held_out),
    tokenizer__path=str(make_tokenizer(tmp_path)),
  )
  made = prepare.prepare_store(c, str(tmp_path / "store"), progress=False)
  tokenizer = tokenizers.load(str(tmp_path / "store" / "tokenizer"))

  def decoded(split):
    bounds = zip(split.offsets[:-1], split.offsets[1:], strict=True)
    return [tokenizer.decode(split.ids[a:b]) for a, b in bounds]

  assert decoded(made.train) == texts[3:]
  assert decoded(made.validation) == [*texts[:3], "line of its own"]
  assert made.manifest["documents"]["dropped"]["in_validation"] == 3
  assert made.manifest["tokenizer"] == tokenizer.fingerprint


def test_the_tokenizer_never_sees_validation(corpus):
  path, texts, _ = corpus
  c = make_config(path)
  seen = set(documents.tokenizer_texts(c))
  options = c.data.cleaning.to_dict()
  for text in texts:
    cleaned = cleaning.clean(text, options, Counter())
    if cleaned is not None:
      held_out = cleaning.fingerprint(cleaned) / 2**64 < 0.1
      assert (cleaned in seen) != held_out


def test_of_a_large_corpus_a_part_is_cleaned_for_the_tokenizer(
  corpus, monkeypatch
):
  path, texts, _ = corpus
  monkeypatch.setattr(documents, "BLOCK_CHARS", 100)
  wanted = sum(map(len, texts)) // 4
  c = make_config(path, data__document="file", data__validation_fraction=0)
  c.tokenizer.sample_chars = wanted // documents.OVERSAMPLE
  seen = list(documents.tokenizer_texts(c))
  assert 0.7 * wanted < sum(map(len, seen)) < 1.3 * wanted
  assert max(map(len, seen)) <= 100


def test_of_many_files_some_are_read_for_the_tokenizer(tmp_path):
  for number in range(100):
    lines = [f"file {number} line {line} of it" for line in range(100)]
    (tmp_path / f"{number}.txt").write_text("\n".join(lines))
  size = sum(path.stat().st_size for path in tmp_path.iterdir())
  c = make_config(tmp_path, data__validation_fraction=0)
  c.tokenizer.sample_chars = size // 100 // documents.OVERSAMPLE
  seen = list(documents.tokenizer_texts(c))
  assert 0.5 * size < 100 * sum(map(len, seen)) < 2 * size
  files = [int(text.split()[1]) for text in seen]
  assert 8 < len(set(files)) <= documents.SAMPLE_FILES
  assert files == sorted(files)


def test_blocks_are_the_text(monkeypatch):
  monkeypatch.setattr(documents, "BLOCK_CHARS", 10)
  text = "abc\ndefgh\n" * 5 + "x" * 35 + "\nend"
  blocks = list(documents._blocks(text))
  assert "".join(blocks) == text
  assert all(0 < len(block) <= 10 for block in blocks)
  assert blocks[0] == "abc\ndefgh\n"


def test_bad_records_are_counted(tmp_path):
  path = tmp_path / "text.jsonl"
  lines = [json.dumps({"text": f"text number {i} of many"}) for i in range(50)]
  path.write_text("\n".join([*lines, '{"text": 3}', "{"]))
  with pytest.raises(InputError, match="text.jsonl:51"):
    prepare.prepare_store(
      make_config(path), str(tmp_path / "a"), progress=False
    )
  c = make_config(path, data__on_bad_record="skip", tokenizer__vocab_size=60)
  made = prepare.prepare_store(c, str(tmp_path / "b"), progress=False)
  assert made.manifest["bad_records"] == 2
  assert made.manifest["documents"]["kept"] == 50


def test_the_flags_are_those_of_the_tokenizers(corpus):
  made = corpus[2]
  first = made.train.offsets[:-1]
  both = store.WORD_START | store.SENTENCE_START
  assert (made.train.flags[first] & both == both).all()
  assert tokenizers.flags.WORD_START == store.WORD_START
  assert tokenizers.flags.SENTENCE_START == store.SENTENCE_START


def run_program(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "flaxmlm.prepare", *arguments],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )


def test_the_program(corpus, tmp_path):
  path, texts, _ = corpus
  arguments = [
    f"--config.data.source={path}",
    "--config.data.document=line",
    "--config.data.validation_fraction=0.1",
    "--config.tokenizer.vocab_size=200",
  ]
  dry = run_program(*arguments, "--dry_run", f"--out={tmp_path / 'store'}")
  assert dry.returncode == 0, dry.stderr
  assert dry.stdout.count("before:") == 10
  assert r"\u200b" in dry.stdout
  assert os.listdir(tmp_path) == []

  arguments += [f"--out={tmp_path / 'store'}", f"--json={tmp_path / 'j.json'}"]
  for said in ("documents read", "nothing to do"):
    done = run_program(*arguments)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    last = done.stdout.splitlines()[-1]
    line = ["next:", "python", "-m", "flaxmlm.train", *arguments[:-2]]
    given = [f"--config.data.store={tmp_path / 'store'}", "--workdir=runs/NAME"]
    assert shlex.split(last) == [*line, *given]
  facts = json.loads((tmp_path / "j.json").read_text())
  assert facts["documents_read"] == len(texts)
  made = store.open_store(str(tmp_path / "store"))
  assert facts["tokens_train"] == len(made.train.ids)

  refused = run_program(*arguments, "--config.tokenizer.kind=bpe")
  assert refused.returncode == 2
  assert refused.stderr.count("\n") == 1
  assert "tokenizer.kind: 'unigram' -> 'bpe'" in refused.stderr


def test_without_apache_beam_a_line_says_what_to_install(tmp_path):
  # As if it were not there, where it is.
  script = (
    "import runpy, sys; sys.modules['apache_beam'] = None;"
    "runpy.run_module('flaxmlm.prepare', run_name='__main__')"
  )
  arguments = [f"--out={tmp_path / 'store'}", "--runner=DirectRunner"]
  done = subprocess.run(
    [sys.executable, "-c", script, *arguments],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  assert done.returncode == 2
  assert "pip install -e '.[beam]'" in done.stderr
  assert done.stderr.count("\n") == 1
  alone = run_program(f"--out={tmp_path / 'store'}", "--", "--streaming")
  assert alone.returncode == 2
  assert "no --runner=NAME before them" in alone.stderr
  assert os.listdir(tmp_path) == []


def test_a_store_inside_of_its_source_is_refused(tmp_path):
  (tmp_path / "a.txt").write_text("one text of some length " * 20)
  done = run_program(
    f"--config.data.source={tmp_path}", f"--out={tmp_path / 'store'}"
  )
  assert done.returncode == 2
  assert "would be read as text" in done.stderr
  assert os.listdir(tmp_path) == ["a.txt"]


def test_the_dry_run_says_what_it_left_out(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{\n')
  (tmp_path / "b.pdf").write_text("what is it?")
  out = run_program(
    f"--config.data.source={tmp_path}",
    "--config.data.on_bad_record=skip",
    "--dry_run",
  ).stdout
  assert "1 bad records skipped" in out and "a.jsonl:2" in out
  assert "b.pdf" in out


def test_rows_of_real_text_are_full(tmp_path):
  path = DATA / "c4_mini" / "train.jsonl"
  if not path.exists():
    pytest.skip("no real data: FLAXMLM_DATA names its folder")
  c = make_config(path, tokenizer__vocab_size=2000)
  made = prepare.prepare_store(c, str(tmp_path / "store"), progress=False)
  for L in (128, 512):
    assert rows.load(made, "train", L).fill >= 0.995
