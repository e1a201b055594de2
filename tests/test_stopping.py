"""Runs that are stopped, killed, moved or have no room: they go on."""

import hashlib
import http.server
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_training as training
from conftest import ROOT, environment, lines, program
from test_checkpoints import small_disk

from flaxmlm import InputError, config, train
from flaxmlm.storage import saves
from flaxmlm.training import checkpoints, hosts, sharding, versions
from flaxmlm.training.step import make_init, row_keys, state_shapes

STEPS = 24
ARGS = [
  "--config=configs/quickstart.py",
  f"--config.train.steps={STEPS}",
  "--config.train.batch_size=8",
  "--config.model.layers=1",
  "--config.optimizer.warmup_steps=2",
  "--config.checkpoint.every=4",
  "--config.checkpoint.retry_seconds=0",
  "--config.eval.every=0",
  "--config.eval.rows=16",
  "--config.log.every=1",
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
  out = tmp_path_factory.mktemp("stopping") / "store"
  program("prepare", "--config=configs/quickstart.py", f"--out={out}")
  return f"--config.data.store={out}"


@pytest.fixture(scope="module")
def alone(tmp_path_factory, store):
  """The run that nothing happens to."""
  workdir = tmp_path_factory.mktemp("stopping") / "alone"
  program("train", *ARGS, store, f"--workdir={workdir}")
  return workdir


def start(*args: str, **variables: str) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, "-m", "flaxmlm.train", *ARGS, *args],
    cwd=ROOT,
    env=environment() | variables,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def wait_for(workdir, step: int, process) -> None:
  path = workdir / "metrics.jsonl"
  while not path.exists() or f'"step": {step},' not in path.read_text():
    assert process.poll() is None, process.communicate()[0]
    time.sleep(0.01)


def assert_same(workdir, alone) -> None:
  """Both have ended, with the same losses and parameters, bit for bit."""
  got, want = (
    [line["train/loss"] for line in lines(folder / "metrics.jsonl")[1:-1]]
    for folder in (workdir, alone)
  )
  assert got == want and len(got) == STEPS
  hashes = []
  for folder in (workdir, alone):
    arrays = checkpoints.ocp.load(str(folder / "checkpoints" / str(STEPS)))
    leaves = jax.tree.leaves(arrays)
    hashes.append([hashlib.sha256(np.asarray(x)).digest() for x in leaves])
  assert hashes[0] == hashes[1]


@pytest.mark.slow
def test_a_signal_at_any_moment_loses_at_most_a_step(store, alone, tmp_path):
  draw, workdir = random.SystemRandom(), tmp_path / "run"
  for number in (signal.SIGTERM, signal.SIGINT) * 2:
    process = start(store, f"--workdir={workdir}")
    before = saves.list_steps(str(workdir / "checkpoints"))
    wait_for(workdir, min((before or [0])[-1] + 1, STEPS), process)
    time.sleep(draw.random() * 0.1)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    done = max(line["step"] for line in lines(workdir / "metrics.jsonl"))
    assert saves.list_steps(str(workdir / "checkpoints"))[-1] == done
    if done == STEPS:
      break
    assert f"stopped after step {done} of {STEPS}" in out
  program("train", *ARGS, store, f"--workdir={workdir}")
  got, want = (
    [
      line["train/loss"]
      for line in lines(folder / "metrics.jsonl")
      if "train/loss" in line
    ]
    for folder in (workdir, alone)
  )
  assert got == want and len(got) == STEPS


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(store, tmp_path):
  workdir = tmp_path / "run"
  process = start(store, f"--workdir={workdir}", "--config.train.steps=9999")
  wait_for(workdir, 9, process)
  process.send_signal(signal.SIGTERM)
  process.send_signal(signal.SIGTERM)  # the two may be taken for one
  time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=60)
  assert process.returncode in (0, 128 + signal.SIGTERM, -signal.SIGTERM)
  folder = str(workdir / "checkpoints")
  assert saves.find_newest(folder, strict=True, say=print)["step"] >= 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pipe", "pipe without a signal", "terminal"])
def test_who_reads_the_output_goes(store, alone, tmp_path, kind):
  workdir = tmp_path / "run"
  reader, writer = os.openpty() if kind == "terminal" else os.pipe()
  line = [*ARGS, store, f"--workdir={workdir}", "--config.checkpoint.every=0"]
  with open(tmp_path / "errors", "w+") as errors:
    process = subprocess.Popen(
      [sys.executable, "-m", "flaxmlm.train", *line],
      cwd=ROOT,
      env=environment(),
      stdout=writer,
      stderr=errors,
    )
    os.close(writer)
    wait_for(workdir, 2, process)
    os.close(reader)  # as `tee` does, of the same Ctrl-C
    if kind != "pipe without a signal":
      process.send_signal(signal.SIGINT)
    code = process.wait(60)
    errors.seek(0)
    assert code == 0, errors.read()
  done = lines(workdir / "metrics.jsonl")[-1]["step"]
  assert done < STEPS
  assert saves.list_steps(str(workdir / "checkpoints")) == [done]
  out = program("train", *line)
  assert f"going on after step {done} of {STEPS}" in out
  assert_same(workdir, alone)


@pytest.mark.slow
def test_the_time_is_up(store, tmp_path):
  line = [store, f"--workdir={tmp_path}/run", "--config.train.max_hours=1e-9"]
  for step in (1, 2):
    out = program("train", *ARGS, *line)
    assert f"stopped after step {step} of {STEPS}" in out
  out = program("train", *ARGS, *line[:2], "--config.train.max_hours=None")
  assert "going on after step 2 " in out and "done in" in out


class _Metadata(http.server.BaseHTTPRequestHandler):
  """Answers like the metadata server of a Compute Engine machine."""

  def do_GET(self):
    path = "/computeMetadata/v1/instance/preempted"
    known = self.path == path and self.headers["Metadata-Flavor"] == "Google"
    self.send_response(200 if known else 403)
    self.end_headers()
    self.server.asked.set()
    if known:
      self.wfile.write(b"TRUE" if self.server.preempted else b"FALSE")

  def log_message(self, *args):
    pass


@pytest.fixture
def metadata(monkeypatch):
  server = http.server.HTTPServer(("127.0.0.1", 0), _Metadata)
  server.preempted, server.asked = False, threading.Event()
  threading.Thread(target=server.serve_forever, daemon=True).start()
  address = f"127.0.0.1:{server.server_address[1]}"
  monkeypatch.setenv("GCE_METADATA_HOST", address)
  yield server
  server.shutdown()
  server.server_close()


def test_a_notice_of_preemption_is_seen(metadata):
  notice = hosts.watch_preemption()
  assert metadata.asked.wait(10) and not notice()
  metadata.preempted = True
  deadline = time.monotonic() + 10
  while not notice():
    assert time.monotonic() < deadline
    time.sleep(0.01)


@pytest.mark.slow
def test_a_notice_of_preemption_stops_a_run(metadata, store, tmp_path):
  workdir = tmp_path / "run"
  process = start(store, f"--workdir={workdir}", "--config.train.steps=9999")
  wait_for(workdir, 2, process)
  metadata.preempted = True
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 0 and "stopped after step" in out


@pytest.mark.slow
def test_a_full_disk_stops_a_run_that_goes_on_when_there_is_room(
  store, alone, tmp_path
):
  with small_disk(tmp_path / "disk", 40) as disk:
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "checkpoints").symlink_to(disk)
    line = [*ARGS, store, f"--workdir={workdir}"]
    program("train", *line, "--config.train.max_hours=1e-9")
    filler = disk / "filler"
    filler.write_bytes(bytes(26 << 20))
    error = program(
      "train", *line, "--config.checkpoint.max_failures=3", code=1
    )
    said = [text for text in error.splitlines() if "no checkpoint" in text]
    assert [text.split(":")[0] for text in said] == ["WARNING"] * 2 + ["error"]
    assert "failure 3 of 3 in a row" in said[-1] and "GB free" in said[-1]
    assert saves.list_steps(str(disk)) == [1]
    filler.unlink()
    assert "going on after step 1 " in program("train", *line)
    assert_same(workdir, alone)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_done_again(store, alone, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(alone, workdir)
  newest = workdir / "checkpoints" / str(STEPS)
  path = max(newest.rglob("*"), key=lambda path: path.stat().st_size)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 4
  path.write_bytes(bytes(data))
  line = [*ARGS, store, f"--workdir={workdir}"]
  error = program("train", *line, "--config.checkpoint.strict=True", code=2)
  assert f"checkpoints/{STEPS}: " in error and error.count("\n") == 1
  assert f"going on after step {STEPS - 4} " in program("train", *line)
  assert_same(workdir, alone)
  assert (workdir / "checkpoints" / f"{STEPS}.broken").is_dir()


def record(**changes) -> dict:
  c = training.tiny(**changes)
  return {"config": json.loads(config.to_json(c)), "version": versions.find()}


def test_what_has_changed_is_refused_unless_it_is_named(capsys):
  saved, c = record(), training.tiny(optimizer__peak_lr=0.5)
  with pytest.raises(InputError, match="--allow=optimizer.peak_lr$") as error:
    train.check_unchanged("runs/a", saved, c, [])
  assert "optimizer.peak_lr: 0.01 -> 0.5;" in str(error.value)
  for allow in (["optimizer.peak_lr"], ["optimizer"]):
    train.check_unchanged("runs/a", saved, c, allow)
    said = capsys.readouterr().out
    assert said == "allowed: optimizer.peak_lr: 0.01 -> 0.5\n"
  with pytest.raises(InputError, match="optimizer.peak_lr: 0.01 -> 0.5"):
    train.check_unchanged("runs/a", saved, c, ["version"])


def test_versions_are_part_of_a_run(monkeypatch):
  saved, c = record(), training.tiny()
  assert {"code", "jax", "jaxlib", "numpy"} <= set(saved["version"])
  train.check_unchanged("runs/a", saved, c, [])
  old = saved | {"version": saved["version"] | {"jax": "0.1", "libtpu": "9"}}
  with pytest.raises(
    InputError, match=r"version.jax: 0.1 -> .*--allow=version.jax,version.lib"
  ):
    train.check_unchanged("runs/a", old, c, [])
  train.check_unchanged("runs/a", old, c, ["version"])


def test_what_the_arrays_or_rows_hang_on_cannot_be_allowed():
  saved = record()
  with pytest.raises(InputError, match="seed: 0 -> 1.*--workdir$"):
    train.check_unchanged("runs/a", saved, training.tiny(seed=1), ["seed"])
  for name in ("seed", "model.width", "train.batch_size", "sed", "model.wid"):
    with pytest.raises(InputError, match=f"--allow={name}: a run can't go on"):
      train.check_allowed([name])
  train.check_allowed(["optimizer", "version.jax", "store", "train.steps"])
  for changes in (
    {"mesh__fsdp": 2},
    {"log__every": 3},
    {"train__microbatches": 4},
    {"train__max_hours": 2.0},
    {"checkpoint__keep": 5},
  ):
    train.check_unchanged("runs/a", saved, training.tiny(**changes), [])


def run_steps(c, devices: int, steps, state=None, folder=None, **axes):
  """Trains over some steps; returns the state and a hash of each step's masks.

  It begins with the newest checkpoint if there is a folder with one, and leaves
  one there.
  """
  mesh, model, objective, init, train_step = training.parts(c, devices, **axes)
  optimizer = training.optimizers.make_optimizer(
    c.optimizer, steps=c.train.steps
  )
  shapes = state_shapes(*make_init(model.init, optimizer, mesh))
  newest = None
  if folder is not None:
    newest = saves.find_newest(folder, strict=True, say=print)
  if newest is None:
    state = init(jax.random.key(0))
  else:
    state = checkpoints.restore(folder, newest, shapes)
  key, hashes = jax.random.key(1), []

  @jax.jit
  def corrupt(rows, step):
    keys, _ = row_keys(key, step, rows.example)
    return objective.corrupt(keys, rows, step)

  for step in steps:
    assert int(state.step) == step
    rows = sharding.put_rows(mesh, training.batch(step))
    seen = jax.device_get((rows, corrupt(rows, jnp.int32(step))))
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(seen):
      digest.update(np.ascontiguousarray(leaf))
    hashes.append(digest.hexdigest())
    state, _ = train_step(state, rows, key)
  if folder is not None:
    saver = checkpoints.Saver(folder, keep=1)
    saver.close(state, None)
  return state, hashes


@pytest.mark.slow
def test_a_run_goes_on_on_any_mesh_with_any_micro_batches(tmp_path):
  options = {
    "model__dropout": 0.1,
    "model__attention_dropout": 0.1,
    "optimizer__peak_lr": 1e-3,
  }
  want, hashes = run_steps(training.tiny(**options), 1, range(8))
  folder, got = str(tmp_path / "run"), []
  for number, (devices, microbatches, axes) in enumerate(
    [(8, 1, {"fsdp": 2}), (2, 4, {}), (1, 2, {}), (4, 1, {"fsdp": 2})]
  ):
    c = training.tiny(**options, train__microbatches=microbatches)
    steps = range(2 * number, 2 * number + 2)
    state, more = run_steps(c, devices, steps, folder=folder, **axes)
    got += more
  assert got == hashes
  worst = 0.0
  for a, b in zip(
    jax.tree.leaves(state.params), jax.tree.leaves(want.params), strict=True
  ):
    worst = max(worst, float(np.abs(np.asarray(a) - np.asarray(b)).max()))
  assert 0 < worst <= 1e-5


@pytest.mark.slow
def test_on_the_same_mesh_it_is_the_same_bit_for_bit(tmp_path):
  c = training.tiny(model__dropout=0.1)
  want, hashes = run_steps(c, 2, range(4))
  folder = str(tmp_path / "run")
  got = run_steps(c, 2, range(2), folder=folder)[1]
  state, more = run_steps(c, 2, range(2, 4), folder=folder)
  assert got + more == hashes
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(want), strict=True):
    np.testing.assert_array_equal(a, b)
