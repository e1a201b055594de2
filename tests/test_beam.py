"""Apache Beam makes the store that the processes of one machine make."""

import gzip
import json
import os
import random
import subprocess
import sys
import threading

import numpy as np
import pytest
from conftest import ROOT
from test_prepare import files_of, make_config, make_tokenizer, write_text

from flaxmlm import InputError, prepare
from flaxmlm.data import store
from flaxmlm.preparing import documents, shards

pytest.importorskip("apache_beam", reason="pip install -e '.[beam]'")
from flaxmlm.preparing import beam  # noqa: E402

DIRECT = ["--runner=DirectRunner"]
# The one of Beam's local runners that tries a bundle again.
RETRYING = ["--runner=BundleBasedDirectRunner"]


@pytest.fixture
def small(monkeypatch):
  """Many parts of several shards each, and several ranges of fingerprints."""
  monkeypatch.setattr(shards, "SHARD_CHARS", 2000)
  monkeypatch.setattr(documents, "PART_BYTES", 8000)
  monkeypatch.setattr(store, "_FINGERPRINTS", 64)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
  """Sources with copies in each and between them; one is empty."""
  folder = tmp_path_factory.mktemp("texts")
  (folder / "many").mkdir()
  for number in range(12):
    write_text(folder / "many" / f"{number}.txt", 30, seed=number % 9)
  (folder / "nothing.txt").write_text("\n")
  lines = write_text(folder / "more.txt", 200, seed=3)
  with gzip.open(folder / "records.jsonl.gz", "wt", encoding="utf-8") as file:
    for line in [*lines[::3], "something that stands here alone"]:
      file.write(json.dumps({"text": line}) + "\n")
  return folder


def many(texts, **values):
  names = ("many", "nothing.txt", "more.txt")
  return make_config(
    "", data__source=tuple(f"{texts}/{name}" for name in names), **values
  )


CASES = {
  "fraction": {},
  "copies stay": {"data.cleaning.deduplicate": False},
  "smallest": {"data.document": "file", "data.validation_fraction": 1e-12},
  "source": {"data.validation_source": "records.jsonl.gz"},
  "source, copies stay": {
    "data.validation_source": "records.jsonl.gz",
    "data.cleaning.deduplicate": False,
  },
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_bytes(texts, tmp_path, small, case):
  values = dict(CASES[case])
  if "data.validation_source" in values:
    values["data.validation_source"] = f"{texts}/records.jsonl.gz"
  c = many(texts, **values)
  assert len(documents.cut(c)) > 5
  made = prepare.prepare_store(c, str(tmp_path / "pool"), progress=False)
  prepare.prepare_store(c, str(tmp_path / "beam"), progress=False, beam=DIRECT)
  assert files_of(tmp_path / "beam") == files_of(tmp_path / "pool")
  dropped = made.manifest["documents"]["dropped"]
  assert (dropped["duplicate"] > 0) == c.data.cleaning.deduplicate
  assert (dropped["in_validation"] > 0) == ("source" in case)
  assert made.manifest["smallest_held_out"] == (case == "smallest")
  assert not (tmp_path / "beam.partial").exists()


def test_pairs_too(tmp_path, small):
  path = tmp_path / "pairs.jsonl"
  draw = random.Random(0)
  words = ["first", "second", "third", "fourth"]
  rows = [
    {
      "text": " ".join(draw.choices(words, k=4)),
      "other": " ".join(draw.choices(words, k=3)),
      "label": draw.choice("ab"),
    }
    for _ in range(300)
  ]
  path.write_text("\n".join(map(json.dumps, rows)))
  c = make_config(
    path,
    data__pair_field="other",
    objective__name=("masked", "sentence_pair"),
    objective__labels=("a", "b"),
    tokenizer__path=str(make_tokenizer(tmp_path)),
  )
  made = prepare.prepare_store(c, str(tmp_path / "pool"), progress=False)
  prepare.prepare_store(c, str(tmp_path / "beam"), progress=False, beam=DIRECT)
  assert files_of(tmp_path / "beam") == files_of(tmp_path / "pool")
  assert (made.train.flags >> store.LABEL_SHIFT).any()


def test_the_first_in_reading_order_stays_whatever_comes_first():
  # Part: fingerprint, document, whether it is for validation.
  parts = {
    7: [(5, 0, False), (9, 3, False)],
    2: [(9, 4, False), (9, 6, False)],
    11: [(5, 1, False)],
  }
  heads = {n: np.array(part, beam._HEAD).tobytes() for n, part in parts.items()}
  for order in ([7, 2, 11], [11, 2, 7], [2, 7, 11]):
    came = (0, [(number, heads[number]) for number in order])
    goes = {
      number: np.frombuffer(answer, beam._FATE).tolist()
      for number, answer in beam._decide(came, False, True)
    }
    copy = store.DUPLICATE
    assert goes == {2: [(6, copy)], 7: [(3, copy)], 11: [(1, copy)]}


def test_a_worker_that_fails_is_tried_again(
  texts, tmp_path, small, monkeypatch
):
  c = many(texts)
  prepare.prepare_store(c, str(tmp_path / "pool"), progress=False)
  saved, failed = [], []
  save_shard = store.save_shard

  def fail_once(path, *rest):
    # The second shard of three parts, the first time: the disk is full. All
    # parts are one bundle here, which is tried four times.
    if path.endswith("000001.npz") and path not in failed and len(failed) < 3:
      failed.append(path)
      raise OSError(28, "No space left on device", path)
    saved.append(path)
    save_shard(path, *rest)

  monkeypatch.setattr(store, "save_shard", fail_once)
  prepare.prepare_store(
    c, str(tmp_path / "beam"), progress=False, beam=RETRYING
  )
  assert len(failed) == 3
  # What was made before the failure isn't made again.
  assert len(saved) == len(set(saved))
  assert files_of(tmp_path / "beam") == files_of(tmp_path / "pool")


def test_every_bundle_twice_makes_the_same(texts, tmp_path, small):
  c = many(texts)
  prepare.prepare_store(c, str(tmp_path / "pool"), progress=False)
  prepare.prepare_store(
    c,
    str(tmp_path / "beam"),
    progress=False,
    beam=[*DIRECT, "--direct_runner_bundle_repeat=1"],
  )
  assert files_of(tmp_path / "beam") == files_of(tmp_path / "pool")


def test_a_part_that_fails_is_named_and_the_rest_is_kept(
  texts, tmp_path, small, monkeypatch
):
  c = many(texts)
  prepare.prepare_store(c, str(tmp_path / "pool"), progress=False)
  out = str(tmp_path / "beam")
  with monkeypatch.context() as patch:
    tokenize_shard = shards.tokenize_shard

    def fail(found, *rest):
      if found[0].where.endswith("more.txt:1"):
        raise RuntimeError("too long\nfor this tokenizer")
      return tokenize_shard(found, *rest)

    patch.setattr(shards, "tokenize_shard", fail)
    with pytest.raises(InputError) as raised:
      prepare.prepare_store(c, out, progress=False, beam=DIRECT)
  message = str(raised.value)
  number = [part.specs[0] for part in documents.cut(c)].index(
    f"{texts}/more.txt"
  )
  assert f"part {number}: RuntimeError: for this tokenizer" in message
  assert "more.txt:1 to " in message
  assert "\n" not in message
  made = {
    p: p.stat().st_ino for p in (tmp_path / "beam.partial").rglob("*.npz")
  }
  # By the processes of this machine, even.
  prepare_shard = store.save_shard
  again = []
  monkeypatch.setattr(
    store,
    "save_shard",
    lambda path, *rest: (again.append(path), prepare_shard(path, *rest)),
  )
  prepare.prepare_store(c, out, progress=False)
  assert again and not set(again) & set(map(str, made))
  assert files_of(out) == files_of(tmp_path / "pool")


def test_bad_records_are_those_of_the_pool(tmp_path, small):
  for number in range(4):
    lines = [
      json.dumps({"text": f"text {i} of file {number}, or so"})
      for i in range(300)
    ]
    lines[7 * number] = "{"
    (tmp_path / f"{number}.jsonl").write_text("\n".join(lines))
  c = make_config(
    tmp_path / "*.jsonl", tokenizer__path=str(make_tokenizer(tmp_path))
  )
  for way in (None, DIRECT):
    with pytest.raises(InputError, match=r"0.jsonl:1: broken JSON.*skip"):
      prepare.prepare_store(
        c, str(tmp_path / f"bad{way}"), progress=False, beam=way
      )
  c.data.on_bad_record = "skip"
  c.data.max_bad_records = 3
  for way in (None, DIRECT):
    with pytest.raises(InputError, match="more than data.max_bad_records=3"):
      prepare.prepare_store(
        c, str(tmp_path / f"limit{way}"), progress=False, beam=way
      )
  c.data.max_bad_records = 4
  prepare.prepare_store(c, str(tmp_path / "pool"), progress=False)
  made = prepare.prepare_store(
    c, str(tmp_path / "beam"), progress=False, beam=DIRECT
  )
  assert made.manifest["bad_records"] == 4
  assert files_of(tmp_path / "beam") == files_of(tmp_path / "pool")


def test_after_a_bad_record_no_further_part_is_read(tmp_path, monkeypatch):
  good, bad = json.dumps({"text": "some words"}), "{"
  for number, text in enumerate([good, good, bad, good]):
    (tmp_path / f"{number}.jsonl").write_text(text)
  c = make_config(
    tmp_path / "*.jsonl", tokenizer__path=str(make_tokenizer(tmp_path))
  )
  monkeypatch.setattr(documents, "PART_BYTES", 1)
  read, tasks = [], shards.tasks
  monkeypatch.setattr(
    shards,
    "tasks",
    lambda parts, *rest: (read.append(parts[0][0]), tasks(parts, *rest))[1],
  )
  # Beam shuffles the parts; here, the bad one comes second.
  list_parts = beam._list_parts
  monkeypatch.setattr(beam.beam, "Reshuffle", lambda: beam.beam.Map(same))
  monkeypatch.setattr(
    beam,
    "_list_parts",
    lambda path: [[*list_parts(path)][i] for i in (3, 2, 0, 1)],
  )
  with pytest.raises(InputError, match="2.jsonl:1: broken JSON"):
    prepare.prepare_store(
      c, str(tmp_path / "store"), progress=False, beam=DIRECT
    )
  assert read == [3, 2]


def same(value):
  return value


def test_a_worker_waits_for_a_job_that_it_does_not_see_yet(
  texts, tmp_path, monkeypatch
):
  """As behind NFS, which shows a new file to others after a while."""
  c = many(texts, tokenizer__path=str(make_tokenizer(tmp_path)))
  recipe = shards.Recipe(str(tmp_path / "shards"), str(tmp_path), "none", {})
  (tmp_path / "shards").mkdir()
  (tmp_path / "job" / "results").mkdir(parents=True)
  job = beam.Job(str(tmp_path / "job"), documents.reading(c), recipe)
  part = (0, 0, [f"{texts}/nothing.txt"])
  parts = tmp_path / "job" / "parts.json"
  timer = threading.Timer(0.5, parts.write_text, [json.dumps([part[1:]])])
  timer.start()
  beam._make_part(part, job)
  assert parts.exists()
  assert beam._read_result(job, 0, 0.0) is not None
  # One that is gone is waited for once.
  monkeypatch.setattr(beam, "_PATIENCE", 0.1)
  gone = job._replace(folder=str(tmp_path / "gone"))
  for _ in range(2):
    beam._make_part(part, gone)
    monkeypatch.setattr(beam, "_PATIENCE", float("inf"))
  assert not (tmp_path / "gone").exists()


def test_workers_that_write_elsewhere_are_noticed(texts, tmp_path, monkeypatch):
  monkeypatch.setattr(beam, "_make_part", lambda numbered, job: None)
  monkeypatch.setattr(beam, "_PATIENCE", 0.0)
  with pytest.raises(InputError, match="all of them must see --out"):
    prepare.prepare_store(
      many(texts), str(tmp_path / "store"), progress=False, beam=DIRECT
    )


def run_program(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "flaxmlm.prepare", *arguments],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )


def test_the_program(texts, tmp_path):
  arguments = [
    f"--config.data.source=('{texts}/many', '{texts}/more.txt')",
    "--config.data.document=line",
    "--config.tokenizer.kind=bpe",
    "--config.tokenizer.vocab_size=300",
  ]
  alone = run_program(*arguments, f"--out={tmp_path / 'pool'}")
  assert alone.returncode == 0, alone.stderr
  # Two processes of Beam's, which get nothing but what they are sent.
  done = run_program(
    *arguments,
    f"--out={os.path.relpath(tmp_path / 'beam', ROOT)}",
    "--runner=DirectRunner",
    "--",
    "--direct_num_workers=2",
    "--direct_running_mode=multi_processing",
  )
  assert done.returncode == 0, done.stderr
  assert "tokenizing by Apache Beam: 2 parts" in done.stdout
  assert files_of(tmp_path / "beam") == files_of(tmp_path / "pool")
  assert "direct" not in done.stdout.splitlines()[-1]

  (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{\n')
  bad = run_program(
    f"--config.data.source={tmp_path}/bad.jsonl",
    f"--config.tokenizer.path={make_tokenizer(tmp_path)}",
    f"--out={tmp_path / 'bad'}",
    "--runner=DirectRunner",
  )
  assert bad.returncode == 2
  assert "bad.jsonl:2: broken JSON" in bad.stderr
  assert bad.stderr.count("\n") == 1


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--runner=NoRunner"], "NoRunner"),
    (["--runner=DirectRunner", "--", "--direct_num_workers=x"], "invalid int"),
    (["--runner=DirectRunner", "--", "--nonsense=1"], "no option --nonsense"),
  ],
)
def test_arguments_that_beam_does_not_take(tmp_path, arguments, message):
  done = run_program(f"--out={tmp_path / 'store'}", *arguments)
  assert done.returncode == 2
  assert message in done.stderr.splitlines()[-1]
  assert not (tmp_path / "store.partial").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
  "arguments",
  [
    [
      "--runner=DirectRunner",
      "--direct_num_workers=2",
      "--direct_running_mode=multi_processing",
    ],
    # As Flink, Spark and others do, by a job server; this one is Beam's own.
    [
      "--runner=PortableRunner",
      "--job_endpoint=embed",
      "--environment_type=LOOPBACK",
    ],
  ],
  ids=["processes", "job server"],
)
def test_real_text(real_data, tmp_path, arguments):
  novels = sorted((real_data / "novels").iterdir())[:10]
  c = make_config(
    "",
    data__source=tuple(map(str, novels)),
    data__document="paragraph",
    data__cleaning__unwrap=True,
    tokenizer__vocab_size=4000,
  )
  prepare.prepare_store(c, str(tmp_path / "pool"), progress=False)
  made = prepare.prepare_store(
    c, str(tmp_path / "beam"), progress=False, beam=arguments
  )
  assert made.manifest["splits"]["train"]["tokens"] > 10**6
  assert files_of(tmp_path / "beam") == files_of(tmp_path / "pool")


@pytest.mark.slow
def test_chinese_words(real_data, tmp_path):
  pytest.importorskip("jieba")
  text = (real_data / "zh" / "modern.txt").read_text(encoding="utf-8")
  for number in range(2):
    part = text[number * 200_000 : (number + 1) * 200_000]
    (tmp_path / f"{number}.txt").write_text(part, encoding="utf-8")
  c = make_config(
    "",
    data__source=(f"{tmp_path}/0.txt", f"{tmp_path}/1.txt"),
    tokenizer__words="jieba",
    tokenizer__vocab_size=8000,
  )
  prepare.prepare_store(c, str(tmp_path / "pool"), progress=False)
  made = prepare.prepare_store(
    c, str(tmp_path / "beam"), progress=False, beam=DIRECT
  )
  flags = made.train.flags
  words = np.count_nonzero(flags & store.WORD_START)
  # Chinese has no spaces: without jieba, a line would be a word.
  assert 0.3 < words / len(flags) < 1
  assert files_of(tmp_path / "beam") == files_of(tmp_path / "pool")
