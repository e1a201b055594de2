"""Going on from a run, with longer rows, and into a larger model."""

import fcntl
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, environment, lines, program, random_params

import flaxmlm
from flaxmlm import InputError, config, models, tokenizers, train
from flaxmlm.data import batches, rows
from flaxmlm.data.store import open_store
from flaxmlm.inference import starting, tiling
from flaxmlm.models import Inputs
from flaxmlm.training import chain, optimizers, sharding
from flaxmlm.training.step import make_init, state_shapes

TINY = """
from flaxmlm.config import defaults

def get_config():
  c = defaults()
  c.data.source = "TEXT"
  c.data.document = "paragraph"
  c.data.row_length = 32
  c.data.validation_fraction = 0.1
  c.tokenizer.vocab_size = 300
  c.model.layers = 2
  c.model.width = 32
  c.model.heads = 2
  c.model.ffn = 64
  c.model.max_positions = 32
  c.optimizer.peak_lr = 1e-2
  c.optimizer.schedule = "constant"
  c.optimizer.warmup_steps = 4
  c.train.steps = 12
  c.train.batch_size = 16
  c.eval.every = 0
  c.eval.rows = 64
  c.checkpoint.every = 5
  c.log.every = 4
  return c
"""


def fit(*overrides: str, workdir, path=None, code=0) -> str:
  """Trains; returns what was printed."""
  args = [f"--config.{o}" for o in overrides]
  if path is not None:
    args.append(f"--config={path}")
  return program("train", f"--workdir={workdir}", *args, code=code)


def parse(*overrides: str, workdir="nowhere", path=None):
  args = [f"--workdir={workdir}", *(f"--config.{o}" for o in overrides)]
  if path is not None:
    args.append(f"--config={path}")
  return config.parse(config.parser(None), args)[1]


def arrays(folder) -> list[np.ndarray]:
  return jax.tree.leaves(flaxmlm.load(str(folder)).params)


def assert_same(a, b):
  for x, y in zip(arrays(a), arrays(b), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> pathlib.Path:
  return tmp_path_factory.mktemp("chain")


def chatter() -> str:
  """300 paragraphs of a language of 800 words, a few of them much used."""
  random = np.random.default_rng(0)
  syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
  words = [
    "".join(random.choice(syllables, n)) for n in random.integers(1, 5, 800)
  ]
  follow = (800 * random.random((800, 4)) ** 4).astype(int)
  paragraphs = []
  for word in random.integers(800, size=300):
    said = [word]
    for choice in random.integers(4, size=49):
      said.append(follow[said[-1], choice])
    paragraphs.append(" ".join(words[i] for i in said))
  return "\n\n".join(paragraphs)


@pytest.fixture(scope="session")
def file(folder) -> pathlib.Path:
  path = folder / "tiny.py"
  text = folder / "chatter.txt"
  text.write_text(chatter())
  path.write_text(TINY.replace("TEXT", str(text)))
  return path


@pytest.fixture(scope="session")
def run(folder, file) -> pathlib.Path:
  """A run of twelve steps at a constant learning rate."""
  workdir = folder / "stable"
  fit(workdir=workdir, path=file)
  return workdir


@pytest.fixture(scope="session")
def decay(folder, run) -> pathlib.Path:
  """Its decay: eight more steps."""
  workdir = folder / "decay"
  out = fit(
    f"train.continue_from={run}",
    "optimizer.schedule=wsd",
    "optimizer.decay_steps=8",
    "train.steps=20",
    workdir=workdir,
  )
  assert f"{run}, step 12 of 20" in out and "goes on, at row use 192" in out
  return workdir


@pytest.mark.slow
def test_two_phases_are_the_run_left_alone(folder, file, run, decay):
  alone = folder / "alone"
  fit(
    f"data.store={run}/store",
    "optimizer.schedule=wsd",
    "optimizer.decay_steps=8",
    "train.steps=20",
    workdir=alone,
    path=file,
  )
  assert_same(alone, decay)
  whole = [
    x
    for x in lines(alone / "metrics.jsonl")
    if x["step"] > 12 and "train/loss" in x
  ]
  phase = [x for x in lines(decay / "metrics.jsonl") if "train/loss" in x]
  for name in ("step", "train/loss", "train/learning_rate", "train/tokens"):
    assert [x[name] for x in phase] == [x[name] for x in whole]


@pytest.mark.slow
def test_a_phase_begins_where_the_run_ended(run, decay):
  first = lines(decay / "metrics.jsonl")[0]
  assert first["step"] == 12
  assert first["eval/loss"] == lines(run / "metrics.jsonl")[-1]["eval/loss"]


@pytest.mark.slow
def test_a_killed_phase_ends_as_if_left_alone_without_the_run(
  folder, run, decay
):
  copy, workdir = folder / "copy", folder / "killed"
  shutil.copytree(run, copy)
  line = [
    *(sys.executable, "-m", "flaxmlm.train", f"--workdir={workdir}"),
    f"--config.train.continue_from={copy}",
    f"--config.data.store={run}/store",
    "--config.optimizer.schedule=wsd",
    "--config.optimizer.decay_steps=8",
    "--config.train.steps=20",
    "--config.log.every=1",
  ]
  process = subprocess.Popen(
    line, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL
  )
  saved = workdir / "checkpoints" / "15"
  while not saved.exists():
    assert process.poll() is None
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  process.wait()
  shutil.rmtree(copy)
  program("train", *line[3:])
  assert_same(workdir, decay)
  assert [
    x["step"] for x in lines(workdir / "metrics.jsonl") if "train/loss" in x
  ] == [*range(13, 21)]


@pytest.mark.slow
def test_the_chain_is_recorded(folder, run, decay):
  old, new = chain.read_chain(str(decay))
  assert (old.workdir, old.first_step, old.last_step) == (str(run), 0, 12)
  assert (new.first_step, new.last_step, new.first_row) == (12, 20, 12 * 16)
  assert old.config["optimizer"]["schedule"] == "constant"
  assert new.config["optimizer"]["schedule"] == "wsd"
  assert (old.tokens, new.tokens) == (12 * 16 * 32, 8 * 16 * 32)
  assert new.config == json.loads((decay / "config.json").read_text())


@pytest.mark.slow
def test_a_phase_without_its_chain_is_refused(run, decay, tmp_path):
  workdir = tmp_path / "decay"
  shutil.copytree(decay, workdir)
  (workdir / "chain.json").unlink()
  line = (f"--workdir={workdir}", f"--config={decay}/config.json")
  error = program("train", *line, code=2)
  assert f"{workdir}/chain.json is missing" in error
  assert "first_step: 12 -> 0; first_row: 192 -> 0; bring" in error
  shutil.copy(decay / "chain.json", workdir)
  assert "going on after step 20" in program("train", *line)


@pytest.mark.slow
def test_a_chain_that_never_began_is_forgotten(folder, file, decay):
  workdir = folder / "plain"
  workdir.mkdir()
  shutil.copy(decay / "chain.json", workdir)
  fit(
    "train.steps=2",
    "optimizer.warmup_steps=1",
    workdir=workdir,
    path=file,
  )
  [phase] = chain.read_chain(str(workdir))
  assert (phase.first_step, phase.last_step, phase.first_row) == (0, 2, 0)


@pytest.mark.slow
def test_a_whole_config_of_before_keeps_the_store(folder, run):
  got = parse(
    f"train.continue_from={run}", "train.steps=30", path=run / "config.json"
  )
  assert got.data.store == str(run / "store")


@pytest.mark.slow
def test_the_next_phase_may_differ_in_much(folder, run, decay):
  text = folder / "other.txt"
  text.write_text("".join(f"A line with the number {i}.\n" for i in range(400)))
  workdir = folder / "third"
  out = fit(
    f"train.continue_from={decay}",
    f"data.source={text}",
    "data.document=line",
    "data.row_length=64",
    "model.max_positions=64",
    "model.dropout=0",
    "objective.rate=0.3",
    "optimizer.clip_norm=None",
    "train.batch_size=8",
    "train.steps=23",
    "seed=5",
    workdir=workdir,
  )
  assert "32 positions are repeated to 64" in out
  assert "begins anew, at row use 0" in out
  phases = chain.read_chain(str(workdir))
  assert [phase.last_step for phase in phases] == [12, 20, 23]
  assert phases[-1].first_row == 0
  tokens = lines(workdir / "metrics.jsonl")[-2]["train/tokens"]
  assert tokens == 20 * 16 * 32 + 3 * 8 * 64
  m = flaxmlm.load(str(workdir))
  assert m.max_length == 64 and m.step == 23
  before = flaxmlm.load(str(run)).tokenizer
  assert m.tokenizer.fingerprint == before.fingerprint


@pytest.mark.slow
def test_preview_shows_the_rows_of_a_phase(folder, run, decay):
  path = folder / "rows.jsonl"
  args = [f"--workdir={decay}", f"--json={path}"]
  program("preview", *args, "--steps=13:14")
  shown = [json.loads(line)["original_ids"] for line in path.open()]
  store = open_store(str(run / "store"))
  plan = rows.load(store, "train", 32)
  want = batches.at(store, plan, seed=0, step=13, batch_size=16)
  assert shown == want.ids.tolist()
  error = program("preview", *args, "--steps=3:4", code=2)
  assert "begins at step 12" in error and str(run) in error


@pytest.mark.slow
def test_another_batch_size_goes_on_in_the_same_order(run):
  store = open_store(str(run / "store"))
  c = parse(
    f"train.continue_from={run}", "train.batch_size=8", "train.steps=13"
  )
  phase = chain.find_chain("nowhere", c.to_dict(), store.hash)[-1]
  plan = rows.load(store, "train", 32)
  got = batches.at(
    store, plan, seed=0, step=12, batch_size=8, offset=phase.row_offset(12)
  )
  want = batches.at(store, plan, seed=0, step=12, batch_size=16)
  np.testing.assert_array_equal(got.ids, want.ids[:8])


def test_an_order_goes_on_over_a_phase_with_another(tmp_path):
  def phase(name, steps, before=None, **changes):
    c = config.defaults()
    c.train.continue_from = before and str(tmp_path / before)
    c.data.row_length = changes.get("row_length", 32)
    c.train.batch_size = changes.get("batch_size", 4)
    workdir = tmp_path / name
    (workdir / "checkpoints").mkdir(parents=True)
    found = chain.find_chain(str(workdir), c.to_dict(), "store")
    chain.write_chain(str(workdir), found)
    (workdir / "checkpoints" / str(steps)).mkdir()
    return chain.read_chain(str(workdir))[-1]

  short = [phase("first", 10), phase("second", 13, "first", batch_size=8)]
  assert phase("third", 15, "second", row_length=64).first_row == 0
  short.append(phase("fourth", 20, "third", batch_size=3))
  uses = [
    phase.row_offset(step) + step * phase.config["train"]["batch_size"] + row
    for phase in short
    for step in range(phase.first_step, phase.last_step)
    for row in range(phase.config["train"]["batch_size"])
  ]
  assert uses == list(range(10 * 4 + 3 * 8 + 5 * 3))


def write_run(folder, **changes):
  """Files of a run of nine steps; a change of None leaves one out."""
  files = {
    "config.json": config.defaults().to_dict(),
    "store.json": {"manifest_sha256": "abc"},
    **{f"{name}.json": value for name, value in changes.items()},
  }
  (folder / "checkpoints" / "9").mkdir(parents=True)
  for name, value in files.items():
    if value is not None:
      (folder / name).write_text(json.dumps(value))


def test_a_run_of_before_stores_were_noted_goes_on_in_a_new_order(tmp_path):
  write_run(tmp_path, store=None)
  [phase] = chain.read_chain(str(tmp_path))
  assert phase.store is None and phase.last_step == 9
  c = config.defaults()
  c.train.continue_from = str(tmp_path)
  found = chain.find_chain("nowhere", c.to_dict(), "abc")
  assert (found[-1].first_step, found[-1].first_row) == (9, 0)


def test_a_run_of_before_a_key_was_there_is_a_phase(tmp_path):
  values = config.defaults().to_dict()
  del values["data"]["weights"], values["optimizer"], values["objective"]
  write_run(tmp_path, config=values)
  [phase] = chain.read_chain(str(tmp_path))
  assert phase.tokens == 9 * 256 * 128 and phase.order


@pytest.mark.parametrize(
  "changes",
  [
    {"config": None},
    {"config": {"train": {"steps": 3}}},
    {"store": {}},
    {"chain": []},
    {"chain": [{"workdir": "x"}]},
    {"chain": {"workdir": "x"}},
  ],
)
def test_a_run_whose_files_are_broken_is_named(tmp_path, changes):
  write_run(tmp_path, **changes)
  with pytest.raises(InputError, match="isn't what a run writes") as error:
    chain.read_chain(str(tmp_path))
  assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("overrides", "words"),
  [
    (["train.steps=12"], "train.steps=12: "),
    (["model.width=64"], "model.width=64, but "),
    (["model.layers=1"], "model.layers=1, but "),
    (["model.norm_eps=1e-5"], "model.norm_eps=1e-05, but "),
    (["model.max_positions=16"], "model.max_positions=16, but "),
    (["optimizer.name=lamb"], "optimizer.name='lamb', but "),
    (["tokenizer.kind=bpe"], "tokenizer.kind='bpe', but "),
    (["model.init_from=x"], "model.init_from=x: "),
    (["data.row_length=64"], "data.row_length=64 is longer than"),
    (["train.continue_from=missing"], "train.continue_from=missing: no run"),
  ],
)
@pytest.mark.slow
def test_what_a_phase_may_not_change_is_named(run, overrides, words):
  given = [f"train.continue_from={run}", "train.steps=20", *overrides]
  with pytest.raises(InputError) as error:
    parse(*given)
  assert str(error.value).startswith(words) and "\n" not in str(error.value)


@pytest.mark.slow
def test_a_phase_needs_a_workdir_of_its_own(run):
  with pytest.raises(InputError, match="needs another one"):
    parse(f"train.continue_from={run}", workdir=run)


@pytest.mark.slow
def test_a_run_that_still_trains_is_refused(run):
  with open(run / "lock", "wb") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="a process still trains there"):
      train.hold_run(str(run))


@pytest.mark.slow
def test_a_run_doesnt_train_while_a_phase_begins(folder, run):
  copy = folder / "held"
  shutil.copytree(run, copy)
  with train.hold_run(str(copy)), train.hold_run(str(copy)):
    error = program("train", f"--workdir={copy}", code=2)
  assert "or begins to go on from it" in error
  assert "report: " in program("train", f"--workdir={copy}")


@pytest.mark.slow
def test_a_phase_lets_the_run_go_once_it_has_begun(folder, run):
  workdir = folder / "begun"
  line = [
    *(sys.executable, "-m", "flaxmlm.train", f"--workdir={workdir}"),
    f"--config.train.continue_from={run}",
    "--config.train.steps=20000",
    "--config.log.every=1",
  ]
  process = subprocess.Popen(
    line,
    cwd=ROOT,
    env=environment() | {"PYTHONUNBUFFERED": "1"},
    stdout=subprocess.PIPE,
    text=True,
  )
  held = []
  try:
    for line in process.stdout:
      with open(run / "lock", "rb") as lock:
        try:
          fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
          held.append(False)
        except BlockingIOError:
          held.append(True)
      if line.startswith("step 12/"):
        break
  finally:
    process.kill()
    process.wait()
  assert held[0] and not held[-1]


@pytest.mark.slow
def test_a_run_that_has_gone_on_is_noticed(run):
  c = config.from_json(str(run / "config.json"))
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  model = models.build(c.model, vocab_size=300, dtype="float32")
  optimizer = optimizers.make_optimizer(c.optimizer, steps=c.train.steps)
  shapes = state_shapes(*make_init(model.init, optimizer, mesh))
  state = starting.continue_from(str(run), shapes, mesh, print, step=12)
  assert int(state.step) == 12
  with pytest.raises(InputError, match="of step 12, not 10 any more"):
    starting.continue_from(str(run), shapes, mesh, print, step=10)


@pytest.mark.slow
def test_a_store_of_another_tokenizer_is_refused(folder, file, run):
  line = [f"--config={file}", "--config.tokenizer.vocab_size=280"]
  program("prepare", *line, f"--out={folder}/store")
  error = fit(
    f"train.continue_from={run}",
    f"data.store={folder}/store",
    "train.steps=13",
    workdir=folder / "refused",
    code=2,
  )
  assert "was made with another tokenizer" in error


@pytest.mark.slow
def test_another_tokenizer_is_refused_before_a_store_is_made(folder, run):
  # The file that the run's tokenizer was taken from is another one by now.
  texts = [(folder / "chatter.txt").read_text()]
  other = tokenizers.train(texts, kind="bpe", vocab_size=300)
  other.save(str(folder / "tokenizer"))
  copy = folder / "with_path"
  shutil.copytree(run, copy)
  c = config.from_json(str(copy / "config.json"))
  c.tokenizer.path = str(folder / "tokenizer")
  (copy / "config.json").write_text(config.to_json(c))
  workdir = folder / "refused_early"
  error = fit(
    f"train.continue_from={copy}",
    f"tokenizer.path={folder}/tokenizer",
    "data.cleaning.min_chars=20",
    "train.steps=13",
    workdir=workdir,
    code=2,
  )
  assert "is another tokenizer than that of train.continue_from" in error
  assert "leave the key out" in error
  assert not list(workdir.glob("store*"))


@pytest.mark.slow
def test_a_phase_that_saved_nothing_begins_from_its_line(folder, run, tmp_path):
  text = folder / "chatter.txt"
  line = (f"train.continue_from={run}", "train.steps=13")
  first = parse(*line, "data.source=embedded", "seed=3")
  (tmp_path / "config.json").write_text(config.to_json(first))
  again = parse(*line, f"data.source={text}", workdir=tmp_path)
  assert config.differences(parse(*line, f"data.source={text}"), again) == []


@pytest.mark.slow
def test_a_phase_that_saved_nothing_is_found_in_its_workdir(run, tmp_path):
  c = parse(
    f"train.continue_from={run}", "train.steps=13", "data.cleaning.min_chars=9"
  )
  assert c.tokenizer.path == f"{run}/tokenizer"
  (tmp_path / "config.json").write_text(config.to_json(c))
  assert config.differences(c, parse(workdir=tmp_path)) == []


@pytest.mark.slow
def test_other_cleaning_of_a_text_that_isnt_known_is_refused(
  folder, run, tmp_path
):
  stored = tmp_path / "stored"
  shutil.copytree(run, stored)
  values = config.to_flat(config.from_json(str(run / "config.json")))
  values |= {"data.store": f"{run}/store", "data.source": "embedded"}
  text = config.to_json(config.check_keys(values, where="test"))
  (stored / "config.json").write_text(text)
  line = (f"train.continue_from={stored}", "train.steps=13")
  assert parse(*line).data.store == f"{run}/store"
  longer = "data.cleaning.min_chars=20"
  with pytest.raises(
    InputError, match=r"min_chars=20 asks .* set data\.source"
  ):
    parse(*line, longer)
  assert (
    parse(*line, longer, f"data.source={folder}/chatter.txt").data.store is None
  )


@pytest.mark.slow
def test_what_isnt_set_is_the_runs(run):
  c = parse(f"train.continue_from={run}", "train.steps=13")
  want = config.from_json(str(run / "config.json"))
  changed = {line.split(":")[0] for line in config.differences(want, c)}
  assert changed == {"data.store", "train.steps", "train.continue_from"}


@pytest.mark.slow
def test_a_key_set_to_its_default_counts_as_set(folder, run):
  path = folder / "phase.py"
  path.write_text(
    "from flaxmlm.config import defaults\n\ndef get_config():\n"
    "  c = defaults()\n  c.train.batch_size = 256\n"
    f"  c.train.continue_from = {str(run)!r}\n  return c\n"
  )
  c = parse("train.steps=13", path=path)
  assert c.train.batch_size == 256 and c.optimizer.schedule == "constant"


@pytest.mark.slow
def test_load_takes_a_run_of_before_a_key_was_there(folder, run):
  old = folder / "old"
  shutil.copytree(run, old)
  values = json.loads((old / "config.json").read_text())
  for name in ("norm_eps", "hidden_act", "global_rope_theta"):
    del values["model"][name]
  (old / "config.json").write_text(json.dumps(values))
  assert_same(old, run)


@pytest.mark.slow
def test_the_card_of_an_export_names_each_phase(folder, run):
  text = folder / "numbers.txt"
  text.write_text("".join(f"A line with the number {i}.\n" for i in range(400)))
  workdir = folder / "numbers"
  fit(
    f"train.continue_from={run}",
    f"data.source={text}",
    "data.document=line",
    "objective.rate=0.3",
    "train.batch_size=8",
    "train.steps=14",
    workdir=workdir,
  )
  out = folder / "exported"
  program(
    "export", f"--workdir={workdir}", "--format=huggingface", f"--out={out}"
  )
  card = (out / "README.md").read_text()
  first, second = card.split("## Data of phase 1")[1].split("of phase 2", 1)
  for part, where, source, rate, steps in (
    (
      first,
      run,
      "chatter.txt",
      0.15,
      "12 of 16 rows of 32 tokens, 6,144 tokens",
    ),
    (second, workdir, "numbers.txt", 0.3, "2 of 8 rows of 32 tokens, 512 to"),
  ):
    manifest = json.loads((where / "store" / "manifest.json").read_text())
    last = [x for x in lines(where / "metrics.jsonl") if "eval/loss" in x][-1]
    for want in (
      source,
      f" rate={rate} |",
      f"| steps | {steps}",
      f"| tokens | {manifest['splits']['train']['tokens']:,} for training",
      f"after step {last['step']}.",
      f" {last['eval/loss']:.4g} |",
      f" {last['eval/unigram_entropy']:.4g} |",
    ):
      assert want in part, want
  assert "count on from 12" in second and "numbers.txt" not in first


# A longer table of positions.


def test_positions_are_repeated_behind_the_rows_that_none_has():
  table = np.arange(10.0).reshape(5, 2)
  longer = starting.repeat_positions(table, 9, first=2)
  assert longer[:, 0].tolist() == [0, 2, 4, 6, 8, 4, 6, 8, 4]


# A larger model.

SMALL = {
  **config.defaults().model.to_dict(),
  "layers": 2,
  "width": 12,
  "heads": 2,
  "ffn": 20,
  "max_positions": 16,
  "norm_eps": 1e-6,
  "local_attention": 4,
  "init_stddev": 0.3,
}
V = 40


def build(options):
  return models.build(options, vocab_size=V, dtype="float32")


def small_params(options, seed=0):
  return random_params(options, vocab_size=V, seed=seed)


def logits(options, params):
  random = np.random.default_rng(1)
  ids = random.integers(0, V, (3, 16)).astype(np.int32)
  segments = np.repeat([[1] * 9 + [2] * 5 + [0] * 2], 3, 0).astype(np.int32)
  positions = np.repeat([[*range(9), *range(5), 0, 0]], 3, 0).astype(np.int32)
  inputs = Inputs(*map(jnp.asarray, (ids, segments, positions, 0 * ids)))
  model = build(options)

  @jax.jit
  def run(params):
    return model.predict(params, model.encode(params, inputs, None))

  return np.asarray(run(params))[:, :14]


FAMILIES = ["bert", "roberta", "distilbert", "albert", "electra", "modernbert"]


def family_options(family):
  narrow = {"embedding_size": 8} if family in ("albert", "electra") else {}
  return SMALL | {"family": family} | narrow


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.slow
def test_a_model_of_a_multiple_of_the_width_computes_the_same(family, times):
  old = family_options(family)
  new = old | {name: times * old[name] for name in ("width", "heads", "ffn")}
  small = small_params(old)
  large = tiling.tile(small, small_params(new), old=old, new=new, seed=0)
  want = logits(old, small)
  assert want.std() > 0.3
  np.testing.assert_allclose(logits(new, large), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.slow
def test_a_deeper_albert_is_its_layers_unrolled_and_tiled(groups):
  old = family_options("albert")
  old |= {"num_hidden_groups": groups}
  new = old | {"layers": 4}
  small = small_params(old)
  deeper = tiling.tile(small, small_params(new), old=old, new=new, seed=0)
  # The same with parameters of their own for each layer, as BERT's have.
  own = old | {"num_hidden_groups": 2}, new | {"num_hidden_groups": 4}
  encoder = dict(small["encoder"])
  for layer in range(2):
    source = layer % groups
    encoder[f"layer_{layer}"] = small["encoder"][f"layer_{source}"]
  unrolled = tiling.tile(
    small | {"encoder": encoder},
    small_params(own[1]),
    old=own[0] | {"family": "bert"},
    new=own[1] | {"family": "bert"},
    seed=0,
  )
  want = logits(own[1], unrolled)
  assert np.abs(want - logits(new, small)).max() > 0.1
  np.testing.assert_allclose(logits(new, deeper), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_no_copy_has_the_gradient_of_the_original(family):
  old = family_options(family)
  new = old | {name: 2 * old[name] for name in ("width", "heads", "ffn")}
  large = tiling.tile(
    small_params(old), small_params(new), old=old, new=new, seed=0
  )

  def loss(params):
    random = np.random.default_rng(1)
    ids = jnp.asarray(random.integers(0, V, (3, 16)), jnp.int32)
    inputs = Inputs(ids, ids * 0 + 1, jnp.arange(16) + ids * 0, ids * 0)
    model = build(new)
    hidden = model.encode(params, inputs, None)
    scores = jax.nn.log_softmax(model.predict(params, hidden))
    return -jnp.take_along_axis(scores, ids[..., None], -1).mean()

  grads = jax.jit(jax.grad(loss))(large)["encoder"]["layer_0"]
  F = tiling.centered(old["ffn"], new["ffn"])
  inner = np.asarray(grads["intermediate"]["kernel"])
  for unit in range(old["ffn"]):
    a, b = inner[:, unit == F].T
    # Exact copies differ by rounding, 1e-6 or less.
    assert np.abs(a - b).max() > 1e-3 * np.abs(a).max()


def test_each_axis_is_centred_and_wraps_around():
  old = family_options("modernbert")
  new = old | {"layers": 5, "width": 30, "heads": 5, "ffn": 33}
  small = small_params(old)
  fresh = small_params(new)
  large = tiling.tile(small, fresh, old=old, new=new, seed=0)
  table = np.asarray(small["encoder"]["embeddings"]["word"]["embedding"])
  wide = np.asarray(large["encoder"]["embeddings"]["word"]["embedding"])
  # By walking outwards from the middle, one column at a time.
  left = (30 - 12) // 2
  for column in range(30):
    source = column - left
    while source < 0:
      source += 12
    while source >= 12:
      source -= 12
    np.testing.assert_array_equal(wide[:, column], table[:, source])
  # Over the copies of an input, the parts of a weight sum to the weight.
  kernel = np.asarray(small["encoder"]["layer_1"]["intermediate"]["kernel"])
  got = np.asarray(large["encoder"]["layer_1"]["intermediate"]["kernel"])
  total = np.zeros((12, 33))
  for row in range(30):
    total[(row - left) % 12] += got[row]
  shift = (33 - 20) // 2
  want = kernel[:, [(j - shift) % 20 for j in range(33)]]
  np.testing.assert_allclose(total, want, rtol=1e-5, atol=1e-6)
  shapes = jax.tree.map(jnp.shape, large)
  assert shapes == jax.tree.map(jnp.shape, fresh)


@pytest.mark.parametrize(
  ("family", "old", "new", "want"),
  [
    ("bert", 3, 6, [0, 0, 1, 1, 2, 2]),
    ("bert", 2, 5, [0, 0, 0, 1, 1]),
    # Global ones, every third, from global ones; the first from the first.
    ("modernbert", 4, 7, [0, 1, 1, 3, 2, 2, 3]),
  ],
)
def test_layers_are_repeated_in_place(family, old, new, want):
  options = {"family": family, "global_attn_every_n_layers": 3}
  got = tiling._layer_index(old, new, options, options)
  assert got.tolist() == want


@pytest.mark.parametrize(
  ("overrides", "words"),
  [
    (["model.layers=1"], "larger, not smaller"),
    (["model.width=48"], "model.heads=3 does"),
    (["model.hidden_act=relu"], "leave the key out"),
    (["model.max_positions=16"], "larger, not smaller"),
  ],
)
@pytest.mark.slow
def test_what_no_parameters_can_be_made_for_is_named(
  run, file, overrides, words
):
  with pytest.raises(InputError) as error:
    given = [f"model.init_from={run}", "data.row_length=16", *overrides]
    parse(*given, path=file)
  assert words in str(error.value) and overrides[0][:11] in str(error.value)


@pytest.mark.slow
def test_a_larger_model_begins_far_below_a_random_one(folder, file, run):
  workdir = folder / "larger"
  out = fit(
    f"model.init_from={run}",
    f"data.store={run}/store",
    "model.width=64",
    "model.heads=4",
    "model.ffn=128",
    "model.layers=4",
    "model.max_positions=64",
    "data.row_length=64",
    "train.steps=1",
    "optimizer.warmup_steps=1",
    workdir=workdir,
    path=file,
  )
  assert "are tiled into" in out and "layers 2 -> 4" in out
  assert "32 positions are repeated to 64" in out
  small = lines(run / "metrics.jsonl")[-1]["eval/loss"]
  loss = lines(workdir / "metrics.jsonl")[0]["eval/loss"]
  assert small < np.log(300) - 0.4
  assert loss < small + 0.3
