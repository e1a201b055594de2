"""The programs as people run them: the quickstart, shortened, to its end."""

import fcntl
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, environment, lines, program

import flaxmlm
from flaxmlm import InputError, tokenizers
from flaxmlm.data import store as store_lib
from flaxmlm.inference import starting
from flaxmlm.models import Inputs

STEPS = 60
SHORT = [
  "--config=configs/quickstart.py",
  f"--config.train.steps={STEPS}",
  "--config.optimizer.warmup_steps=10",
  "--config.checkpoint.every=8",
  "--config.eval.every=30",
  "--config.eval.rows=64",
  "--config.log.every=2",
]


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> pathlib.Path:
  """A finished run of the shortened quickstart."""
  workdir = tmp_path_factory.mktemp("runs") / "quickstart"
  out = program("train", *SHORT, f"--workdir={workdir}")
  assert f"step {STEPS}/{STEPS}" in out
  assert "report: " in out and "fill_mask" in out
  return workdir


def test_a_reader_that_has_seen_enough_is_no_error():
  reader, writer = os.pipe()
  os.close(reader)
  done = subprocess.run(
    [sys.executable, "-m", "flaxmlm.train", "--print_config", *SHORT[:1]]
    + ["--workdir=runs/none"],
    cwd=ROOT,
    env=environment(),
    stdout=writer,
    stderr=subprocess.PIPE,
    text=True,
  )
  os.close(writer)
  assert done.returncode == 1 and done.stderr == ""


def test_it_learns_and_writes_what_it_promises(run):
  metrics = lines(run / "metrics.jsonl")
  steps = [line["step"] for line in metrics if "train/loss" in line]
  assert steps == list(range(2, STEPS + 1, 2))
  evals = [line for line in metrics if "eval/loss" in line]
  assert [line["step"] for line in evals] == [0, 30, 60]
  assert abs(evals[0]["eval/loss"] - np.log(2048)) < 0.2
  assert evals[-1]["eval/loss"] < evals[0]["eval/loss"] - 0.8
  for line in metrics:
    if "train/loss" in line:
      assert 0 < line["train/tokens_per_second"] < 1e7
      assert 0 < line["train/grad_norm"] < 100
      assert 0 <= line["train/host_share"] < 1
  for name in ("config.json", "report.html", "tokenizer", "store"):
    assert (run / name).exists()
  assert any((run / "tensorboard").iterdir())


def test_killed_and_started_again_it_is_the_same_run(run, tmp_path):
  workdir = tmp_path / "again"
  line = [*SHORT, f"--workdir={workdir}", f"--config.data.store={run}/store"]
  last = random.SystemRandom().randrange(26, STEPS - 8)
  print(f"to be killed after step {last}")
  metrics = workdir / "metrics.jsonl"
  process = subprocess.Popen(
    [sys.executable, "-m", "flaxmlm.train", *line],
    cwd=ROOT,
    env=environment(),
    stdout=subprocess.DEVNULL,
  )
  while not metrics.exists() or f'"step": {last - last % 2},' not in (
    metrics.read_text()
  ):
    assert process.poll() is None
    time.sleep(0.02)
  process.kill()
  process.wait()
  out = program("train", *line)
  assert "going on after step" in out
  want, got = flaxmlm.load(str(run)), flaxmlm.load(str(workdir))
  assert want.step == got.step == STEPS
  for a, b in zip(
    jax.tree.leaves(want.params), jax.tree.leaves(got.params), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  timed = ("tokens_per_second", "mfu", "host_share")
  figures = [
    [
      {k: v for k, v in line.items() if not k.endswith(timed)}
      for line in lines(folder / "metrics.jsonl")
    ]
    for folder in (workdir, run)
  ]
  assert figures[0] == figures[1]


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(run, tmp_path):
  workdir = tmp_path / "stopped"
  process = subprocess.Popen(
    [
      *(sys.executable, "-m", "flaxmlm.train", *SHORT),
      *(f"--workdir={workdir}", f"--config.data.store={run}/store"),
    ],
    cwd=ROOT,
    env=environment(),
    stdout=subprocess.PIPE,
    text=True,
  )
  metrics = workdir / "metrics.jsonl"
  while not metrics.exists() or '"step": 10,' not in metrics.read_text():
    assert process.poll() is None
    time.sleep(0.02)
  process.send_signal(signal.SIGINT)
  out, _ = process.communicate(timeout=120)
  assert process.returncode == 0
  assert "the same line again goes on" in out
  stopped = flaxmlm.load(str(workdir)).step
  assert f"stopped after step {stopped:,} of {STEPS}" in out


def test_another_config_is_refused_with_the_differences(run):
  error = program(
    "train",
    *SHORT,
    f"--workdir={run}",
    "--config.optimizer.peak_lr=1",
    code=2,
  )
  assert error.count("\n") == 1
  assert "optimizer.peak_lr: 0.006 -> 1.0" in error


def test_another_store_is_refused(run, tmp_path):
  workdir, store = tmp_path / "run", tmp_path / "store"
  shutil.copytree(run / "checkpoints", workdir / "checkpoints")
  shutil.copytree(run / "store", store)
  shutil.copy(run / "store.json", workdir)
  line = [*SHORT, f"--workdir={workdir}", f"--config.data.store={store}"]
  path = store / "manifest.json"
  manifest = json.loads(path.read_text()) | {"bad_records": 1}
  del manifest["sha256"]
  path.write_bytes(store_lib._seal(manifest))  # good, but another one
  error = program("train", *line, code=2)
  assert f"(in {store}); take these back" in error
  assert error.endswith("--allow=store\n")
  line += [f"--workdir={tmp_path}/new", "--config.tokenizer.vocab_size=77"]
  error = program("train", *line, code=2)
  assert "was made with tokenizer.vocab_size=2048, not 77" in error


def test_a_store_of_another_text_is_not_taken_for_this_one(tmp_path):
  text = "\n".join(
    f"The number {i} is followed by {i + 1}." for i in range(300)
  )
  for name in ("one", "other"):
    (tmp_path / f"{name}.txt").write_text(f"{text}\nThis is {name}.\n")
  workdir = tmp_path / "run"
  line = [*SHORT, "--config.data.document=line"]
  line += ["--config.tokenizer.vocab_size=100"]
  one = f"--config.data.source={tmp_path}/one.txt"
  program("prepare", *line, one, f"--out={workdir}/store")
  line += [f"--config.data.source={tmp_path}/other.txt"]
  error = program("train", *line, f"--workdir={workdir}", code=2)
  assert "holds the store of another config" in error


def test_the_folder_of_a_model_is_no_workdir(tmp_path):
  path = tmp_path / "config.json"
  path.write_text('{"model_type": "bert"}')
  error = program("train", *SHORT, f"--workdir={tmp_path}", code=2)
  assert "is a Hugging Face folder, and no run is there" in error
  assert path.read_text() == '{"model_type": "bert"}'


def test_evaluate_agrees_with_the_run(run, tmp_path):
  figures = tmp_path / "figures.json"
  program("evaluate", f"--workdir={run}", "--rows=64", f"--json={figures}")
  got = json.loads(figures.read_text())
  want = lines(run / "metrics.jsonl")[-1]
  for name in ("eval/loss", "eval/accuracy", "eval/unigram_entropy"):
    np.testing.assert_allclose(got[name], want[name], rtol=1e-6)


def test_evaluate_on_another_text(run, tmp_path):
  text = tmp_path / "other.txt"
  text.write_text("Return a list of the names of all files. " * 20)
  out = program("evaluate", f"--workdir={run}", f"--source={text}")
  assert "perplexity" in out


def test_preview_shows_the_rows_of_the_run(run, tmp_path):
  path = tmp_path / "rows.jsonl"
  page = tmp_path / "rows.html"
  files = f"--json={path}", f"--html={page}"
  out = program("preview", f"--workdir={run}", "--steps=0:3", *files)
  assert "hidden" in out and "[MASK]" in out
  assert page.read_text().count("<article>") == 3 * 4
  rows = lines(path)
  assert [row["step"] for row in rows] == sorted([0, 1, 2] * 32)
  for row in rows:
    back = list(row["input_ids"])
    for slot, target, weight in zip(
      row["slots"], row["targets"], row["weights"], strict=True
    ):
      if weight:
        back[slot] = target
    assert back == row["original_ids"]


@pytest.mark.slow
def test_the_previewed_rows_give_the_losses_that_training_logs(run, tmp_path):
  # At a learning rate of 0 the parameters stay those that are saved.
  workdir, path = tmp_path / "still", tmp_path / "rows.jsonl"
  program(
    "train",
    "--config=configs/quickstart.py",
    f"--workdir={workdir}",
    f"--config.data.store={run}/store",
    "--config.train.steps=3",
    "--config.log.every=1",
    "--config.eval.rows=32",
    "--config.optimizer.warmup_steps=0",
    "--config.optimizer.peak_lr=0",
    "--config.optimizer.muon_peak_lr=0",
  )
  program("preview", f"--workdir={workdir}", "--steps=0:3", f"--json={path}")
  m = flaxmlm.load(str(workdir))
  rows = lines(path)
  logged = lines(workdir / "metrics.jsonl")
  for line in logged[1:-1]:
    shown = [row for row in rows if row["step"] == line["step"] - 1]
    ids, segments, positions, slots, targets, weights = (
      jnp.array([row[name] for row in shown])
      for name in (
        *("input_ids", "segments", "positions"),
        *("slots", "targets", "weights"),
      )
    )
    hidden = m.model.encode(
      m.params, Inputs(ids, segments, positions, 0 * ids), None
    )
    hidden = jnp.take_along_axis(hidden, slots[..., None], axis=1)
    logits = np.asarray(m.model.predict(m.params, hidden), np.float64)
    logits -= logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    want = (nll * weights).sum() / weights.sum()
    np.testing.assert_allclose(line["train/loss"], want, rtol=1e-5)
  assert len({line["train/loss"] for line in logged[1:-1]}) == 3


def test_a_second_process_on_the_same_workdir_is_refused(run):
  with open(run / "lock", "wb") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    error = program("train", *SHORT, f"--workdir={run}", code=2)
  assert "another process trains there" in error


@pytest.mark.slow
def test_a_run_begins_with_the_parameters_of_another(run, tmp_path):
  workdir = tmp_path / "next"
  out = program(
    "train",
    "--config.train.batch_size=32",
    f"--workdir={workdir}",
    "--config=configs/quickstart.py",
    f"--config.model.init_from={run}",
    f"--config.data.store={run}/store",
    "--config.train.steps=1",
    "--config.optimizer.warmup_steps=1",
    "--config.eval.rows=64",
  )
  assert "another vocabulary" not in out
  want = lines(run / "metrics.jsonl")[-1]["eval/loss"]
  got = lines(workdir / "metrics.jsonl")[0]["eval/loss"]
  np.testing.assert_allclose(got, want, rtol=1e-6)
  error = program(
    "train",
    "--config=configs/quickstart.py",
    f"--workdir={tmp_path / 'other'}",
    f"--config.model.init_from={run}",
    "--config.model.width=64",
    code=2,
  )
  assert "model.width=64" in error and "has 128" in error


def test_another_vocabulary_keeps_what_it_shares(run):
  m = flaxmlm.load(str(run))
  texts = [(ROOT / "docs" / "data.md").read_text()]
  other = tokenizers.train(texts, kind="unigram", vocab_size=300)
  said = []
  params = starting.start_from(
    str(run),
    other,
    m.params,
    said.append,
    options=m.config | {"objective": {"name": "masked"}, "seed": 0},
  )
  old = np.asarray(m.params["encoder"]["embeddings"]["word"]["embedding"])
  new = np.asarray(params["encoder"]["embeddings"]["word"]["embedding"])
  assert new.shape == (300, old.shape[1])
  known = m.tokenizer.tokens(range(len(old)))
  shared = 0
  for token, name in enumerate(other.tokens(range(300))):
    if name in known:
      row = old[known.index(name)]
      shared += 1
    elif name.startswith("▁"):
      row = old[m.tokenizer.encode(other.decode([token]))].mean(axis=0)
    else:
      continue
    np.testing.assert_allclose(new[token], row, rtol=1e-5, atol=1e-7)
  assert 100 < shared < 300
  assert f"of 300 tokens; {shared:,} keep their rows" in said[0]
  assert params["mlm"]["bias"].shape == (300,)


def test_pieces_that_go_on_in_a_word_are_made_of_such_pieces(run):
  old = flaxmlm.load(str(run))
  new = tokenizers.train(
    ["singing songs and playing games in the morning"] * 50,
    kind="wordpiece",
    vocab_size=50,
  )
  rows, _ = starting._rows(old, new)
  names = new.tokens(range(new.vocab.size))
  letter = names.index("##g")
  assert old.tokenizer.tokens(rows[letter]) == ["g"]
  whole = names.index("s")
  assert "".join(old.tokenizer.tokens(rows[whole])) == "▁s"


def test_fill_mask_on_the_command_line_and_in_python(run, tmp_path):
  path = tmp_path / "filled.json"
  texts = ["Return a [MASK] object.", "The [MASK] of the [MASK]."]
  out = program("fill_mask", f"--workdir={run}", f"--json={path}", *texts)
  assert texts[0] in out and "%" in out
  piped = program("fill_mask", f"--workdir={run}", input="\n".join(texts))
  assert piped == out
  m = flaxmlm.load(str(run))
  filled = m.fill_mask(texts, top_k=5)
  assert [r["result"] for r in json.loads(path.read_text())] == filled
  alone = m.fill_mask(texts[0])
  for one, same in zip(alone, filled[0], strict=True):
    assert one["token"] == same["token"]
    assert one["sequence"] == same["sequence"]
    np.testing.assert_allclose(one["score"], same["score"], rtol=1e-4)
  for guess in filled[0]:
    assert set(guess) == {"score", "token", "token_str", "sequence"}
    assert "[MASK]" not in guess["sequence"]
  assert len(filled[1]) == 2
  assert all("[MASK]" in guess["sequence"] for guess in filled[1][0])
  scores = [guess["score"] for guess in filled[0]]
  assert scores == sorted(scores, reverse=True)


def test_fill_mask_is_the_softmax_of_the_logits(run):
  m = flaxmlm.load(str(run))
  vocab = m.tokenizer.vocab
  text = "Return a [MASK] object."
  ids = [[vocab.cls, *m.tokenizer.encode(text), vocab.sep]]
  place = ids[0].index(vocab.mask)
  logits = m.logits(np.array(ids))[0, place].astype(np.float64)
  p = np.exp(logits) / np.exp(logits).sum()
  filled = m.fill_mask(text, top_k=vocab.size)
  got = np.zeros(vocab.size)
  got[[guess["token"] for guess in filled]] = [g["score"] for g in filled]
  np.testing.assert_allclose(got, p, rtol=1e-4)


def test_encode_doesnt_depend_on_padding_and_batch(run):
  m = flaxmlm.load(str(run))
  ids = np.random.default_rng(0).integers(5, 2000, (3, 20))
  alone = m.encode(ids[:1])
  padded = np.pad(ids, ((0, 0), (0, 13)), constant_values=9)
  valid = np.pad(np.ones_like(ids), ((0, 0), (0, 13)))
  together = m.encode(padded, attention_mask=valid)
  np.testing.assert_allclose(together[:1, :20], alone, atol=2e-5)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", "empty text"),
    ("no mask here", r"no \[MASK\]"),
    ("[MASK] " + "word " * 100, "at most 62 fit"),
  ],
)
def test_texts_that_cant_be_filled_are_refused(run, text, message):
  m = flaxmlm.load(str(run))
  with pytest.raises(InputError, match=message):
    m.fill_mask(text)


def test_load_refuses_a_folder_that_is_no_run(tmp_path):
  with pytest.raises(InputError, match="neither a workdir"):
    flaxmlm.load(str(tmp_path))
