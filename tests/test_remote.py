"""Stores and runs in a bucket, of a storage server that speaks GCS's API."""

import concurrent.futures
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, environment, lines, program
from saved_steps import state

from flaxmlm import InputError
from flaxmlm.data.store import open_store
from flaxmlm.storage import files, lease, manifests, remote, saves
from flaxmlm.training import checkpoints

ARGS = [
  "--config=configs/quickstart.py",
  "--config.train.steps=10",
  "--config.train.batch_size=8",
  "--config.model.layers=1",
  "--config.optimizer.warmup_steps=2",
  "--config.checkpoint.every=2",
  "--config.eval.every=0",
  "--config.eval.rows=16",
  "--config.log.every=1",
]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> pathlib.Path:
  out = tmp_path_factory.mktemp("remote") / "store"
  program("prepare", "--config=configs/quickstart.py", f"--out={out}")
  return out


def test_a_store_is_copied_once_and_checked(
  bucket, store, tmp_path, monkeypatch
):
  url = f"{bucket}/{tmp_path.name}"
  remote.push_store(str(store), url)
  monkeypatch.setenv("FLAXMLM_CACHE", str(tmp_path / "here"))
  said = []
  folder = remote.fetch(url, say=said.append)
  assert open_store(url).hash == open_store(str(store)).hash
  assert (open_store(url).train.ids == open_store(str(store)).train.ids).all()
  assert remote.fetch(url, say=said.append) == folder
  assert len(said) == 1 and "copying gs://" in said[0]


def test_a_damaged_file_is_named(bucket, store, tmp_path, monkeypatch):
  url = f"{bucket}/{tmp_path.name}"
  remote.push_store(str(store), url)
  path = f"{url}/train/flags.bin"
  data = bytearray(files.read(path))
  data[7] ^= 1
  files.write(path, bytes(data))
  monkeypatch.setenv("FLAXMLM_CACHE", str(tmp_path / "here"))
  with pytest.raises(InputError, match=r"train/flags.bin: its sha256 isn't"):
    open_store(url)
  with pytest.raises(InputError, match="no store can be read there"):
    open_store(f"{bucket}/nothing")


def run(cache, *args: str, config: bool = True) -> str:
  """Trains on a machine with a cache of its own."""
  args = (*ARGS, *args) if config else args
  done = subprocess.run(
    [sys.executable, "-m", "flaxmlm.train", *args],
    cwd=ROOT,
    env=environment() | {"FLAXMLM_CACHE": str(cache)},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


@pytest.mark.slow
def test_a_run_in_a_bucket_goes_on_on_another_machine(bucket, tmp_path):
  workdir = f"{bucket}/runs/one"
  process = subprocess.Popen(
    [sys.executable, "-m", "flaxmlm.train", *ARGS, f"--workdir={workdir}"],
    cwd=ROOT,
    env=environment() | {"FLAXMLM_CACHE": str(tmp_path / "first")},
    stdout=subprocess.DEVNULL,
  )
  checkpoint = f"{workdir}/checkpoints/4/manifest.json"
  deadline = time.monotonic() + 120
  while not files.exists(checkpoint):
    assert process.poll() is None
    assert time.monotonic() < deadline
    time.sleep(0.1)
  process.send_signal(signal.SIGKILL)
  process.wait()
  # As its message says, for who won't wait three minutes.
  files.remove_folder(f"{workdir}/lease.json")
  said = run(tmp_path / "second", f"--workdir={workdir}")
  assert "going on after step" in said
  assert f"report: {workdir}/report.html" in said

  run(tmp_path / "third", f"--workdir={tmp_path}/local")
  (tmp_path / "metrics").write_bytes(files.read(f"{workdir}/metrics.jsonl"))
  got, want = (
    [line["train/loss"] for line in lines(path) if "train/loss" in line]
    for path in (tmp_path / "metrics", tmp_path / "local" / "metrics.jsonl")
  )
  assert got == want and len(got) == 10
  done = subprocess.run(
    [sys.executable, "-m", "flaxmlm.evaluate", f"--workdir={workdir}"],
    cwd=ROOT,
    env=environment() | {"FLAXMLM_CACHE": str(tmp_path / "fourth")},
    capture_output=True,
    text=True,
    check=True,
  )
  assert "unigram_entropy" in done.stdout


@pytest.mark.slow
def test_a_run_begins_from_runs_in_a_bucket(bucket, tmp_path):
  """What it takes from them is what it takes from their copies here."""
  run(tmp_path / "first", f"--workdir={bucket}/runs/base")
  here = tmp_path / "base"
  url = f"{bucket}/runs/base"
  files.copy_here(files.list_tree(url), url, str(here))
  got = {}
  for name, base, root in (
    ("bucket", url, f"{bucket}/runs"),
    ("here", here, tmp_path / "runs"),
  ):
    run(
      tmp_path / name,
      f"--config.model.init_from={base}",
      "--config.train.steps=2",
      f"--workdir={root}/begun",
    )
    run(
      tmp_path / name,
      f"--config.train.continue_from={base}",
      "--config.train.steps=12",
      f"--workdir={root}/next",
      config=False,
    )
    for workdir in (f"{root}/begun", f"{root}/next"):
      path = f"{workdir}/metrics.jsonl"
      (tmp_path / "metrics").write_bytes(files.read(path))
      got[name, workdir.rpartition("/")[2]] = [
        line["train/loss"]
        for line in lines(tmp_path / "metrics")
        if "train/loss" in line
      ]
    chain = json.loads(files.read(f"{root}/next/chain.json"))
    assert [phase["workdir"] for phase in chain] == [
      str(base),
      f"{root}/next",
    ]
  assert len(got["here", "begun"]) == len(got["here", "next"]) == 2
  for name in ("begun", "next"):
    assert got["here", name] == got["bucket", name]


def test_a_local_run_has_no_origin(tmp_path):
  assert remote.localize(str(tmp_path)) == str(tmp_path)
  assert remote.origin(str(tmp_path)) is None
  assert remote.checkpoints(str(tmp_path)) == os.path.join(
    tmp_path, "checkpoints"
  )


def test_many_that_read_a_run_at_once_all_get_it(bucket, tmp_path, monkeypatch):
  url = f"{bucket}/{tmp_path.name}"
  files.write(f"{url}/config.json", b"{}")
  monkeypatch.setenv("FLAXMLM_CACHE", str(tmp_path / "here"))
  begin = threading.Barrier(8)

  def read(_: int) -> bytes:
    begin.wait()
    for _ in range(4):
      folder = remote.localize(url)
      assert remote.origin(folder) == url
    return files.read(os.path.join(folder, "config.json"))

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert list(pool.map(read, range(8))) == [b"{}"] * 8


@pytest.fixture
def quick(monkeypatch):
  """Leases that are stale after seconds."""
  monkeypatch.setattr(lease, "RENEWED_EVERY", 0.1)
  monkeypatch.setattr(lease, "STALE_AFTER", 3.0)
  monkeypatch.setattr(lease, "_LOOK_EVERY", 0.05)


def test_of_many_that_begin_at_once_one_gets_the_lease(bucket, tmp_path, quick):
  url = f"{bucket}/{tmp_path.name}"
  begin, done = threading.Barrier(6), threading.Barrier(6)
  got = []

  def take(number: int) -> None:
    begin.wait()
    try:
      with lease.hold(
        url, str(tmp_path / str(number)), say=got.append
      ) as check:
        got.append(number)
        done.wait()
        check()
    except InputError as error:
      assert "lives" in str(error) and f"process {os.getpid()} on" in str(error)
      done.wait()

  threads = [threading.Thread(target=take, args=(n,)) for n in range(6)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  numbers = [each for each in got if isinstance(each, int)]
  said = [each for each in got if isinstance(each, str)]
  assert len(numbers) == 1
  assert len(said) == 5 and all(f"rm {url}/lease.json" in s for s in said)
  assert not files.exists(f"{url}/lease.json")
  lease.check_free(url)


def test_a_lease_of_the_dead_is_taken_over_after_some_time(
  bucket, tmp_path, quick, monkeypatch
):
  url = f"{bucket}/{tmp_path.name}"
  path = f"{url}/lease.json"
  said = []
  with lease.hold(url, str(tmp_path / "first")) as check:
    check()
    left = files.read(path)
  # As after kill -9: it is there, and nobody renews it.
  files.write(path, left)
  with pytest.raises(InputError, match="stop it first"):
    lease.check_free(url)
  began = time.monotonic()
  with lease.hold(url, str(tmp_path / "second"), say=said.append):
    assert time.monotonic() - began >= 3
  assert len(said) == 1 and "waiting 3 s" in said[0]
  # In the folder that it was held in, it is known to be gone.
  monkeypatch.setattr(lease, "STALE_AFTER", 1000.0)
  files.write(path, left)
  with lease.hold(url, str(tmp_path / "first"), say=said.append):
    pass
  assert len(said) == 1


@pytest.mark.parametrize("arrives", [True, False])
def test_a_lease_whose_writing_may_have_failed_is_known(
  bucket, tmp_path, quick, monkeypatch, arrives
):
  """Whether the old one is there or the new one, the next try has it."""
  url, memo = f"{bucket}/{tmp_path.name}", str(tmp_path / "memo")
  with lease.hold(url, memo):
    left = files.read(f"{url}/lease.json")
  files.write(f"{url}/lease.json", left)  # as after kill -9
  put = lease._put

  def cut_off(url, facts, generation):
    if arrives:
      put(url, facts, generation)
    raise files.BucketError(5, "no answer", url)

  with monkeypatch.context() as patch:
    patch.setattr(lease, "_put", cut_off)
    with pytest.raises(InputError, match="no answer"), lease.hold(url, memo):
      pass
  assert (files.read(f"{url}/lease.json") != left) == arrives
  monkeypatch.setattr(lease, "STALE_AFTER", 1000.0)
  with lease.hold(url, memo, say=pytest.fail):
    pass


def test_a_failure_leaves_the_lease_to_the_others_that_may_write(
  bucket, tmp_path, quick
):
  url = f"{bucket}/{tmp_path.name}"
  for alone in (True, False):
    with (
      pytest.raises(RuntimeError),
      lease.hold(url, str(tmp_path / "first"), alone=alone),
    ):
      raise RuntimeError
    assert files.exists(f"{url}/lease.json") == (not alone)
  # On this machine, with the same folder, one goes on at once.
  with lease.hold(url, str(tmp_path / "first"), alone=False):
    pass
  assert not files.exists(f"{url}/lease.json")


# A run that fails while a checkpoint is being written.
FAILS = """
import sys, time
from flaxmlm import config, train
from flaxmlm.data import batches
from flaxmlm.storage import files
from flaxmlm.training import checkpoints

lease, *argv = sys.argv[1:]
at, finish_step = batches.at, checkpoints.finish_step

def fail(*args, step, **options):
  if step == 2:
    raise RuntimeError("a failure")
  return at(*args, step=step, **options)

def slowly(*args):
  time.sleep(2)
  finish_step(*args)
  print("held at the end of the save:", files.exists(lease))

batches.at, checkpoints.finish_step = fail, slowly
config.run(lambda: train.main(argv))
"""


@pytest.mark.slow
def test_a_run_that_fails_has_the_lease_until_it_writes_no_more(
  bucket, tmp_path
):
  workdir = f"{bucket}/runs/fails"
  done = subprocess.run(
    [sys.executable, "-c", FAILS, f"{workdir}/lease.json", *ARGS]
    + [f"--workdir={workdir}"],
    cwd=ROOT,
    env=environment() | {"FLAXMLM_CACHE": str(tmp_path / "cache")},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1 and "a failure" in done.stderr
  assert "held at the end of the save: True" in done.stdout
  assert files.exists(f"{workdir}/checkpoints/2/manifest.json")
  assert not files.exists(f"{workdir}/lease.json")


def test_who_was_suspended_too_long_writes_nothing_more(
  bucket, tmp_path, quick, monkeypatch
):
  url = f"{bucket}/{tmp_path.name}"
  monkeypatch.setattr(lease, "RENEWED_EVERY", 1000.0)
  with lease.hold(url, str(tmp_path / "first")) as first:
    first()
    with lease.hold(url, str(tmp_path / "second"), say=str) as second:
      with pytest.raises(InputError, match="another process has taken over"):
        first()
      second()
    # Nor does it take it back.
    with pytest.raises(InputError, match="another process has taken over"):
      first()
  with (
    lease.hold(url, str(tmp_path / "one"), say=str),
    pytest.raises(InputError, match="another process of this machine"),
    lease.hold(url, str(tmp_path / "one"), say=str),
  ):
    pass


def test_a_push_that_fails_is_tried_again(
  bucket, tmp_path, monkeypatch, capsys
):
  url = f"{bucket}/{tmp_path.name}"
  monkeypatch.setenv("FLAXMLM_CACHE", str(tmp_path / "here"))
  workdir = remote.localize(url)
  push = remote.make_push(workdir)
  names = ("a.json", "deep/b.json", "c.json")
  (pathlib.Path(workdir) / "deep").mkdir()
  for name in names:
    (pathlib.Path(workdir) / name).write_text(name)
  write = files.write

  def refuse(path, data):
    if path.endswith("c.json"):
      raise files.BucketError(5, "Forbidden", path)
    write(path, data)

  with monkeypatch.context() as patch:
    patch.setattr(files, "write", refuse)
    push(must=False)
    said = capsys.readouterr().err
    assert said.startswith("WARNING: ") and said.count("\n") == 1
    assert workdir in said
    with pytest.raises(InputError, match=f"Forbidden.*are in {workdir}"):
      push(must=True)
  push(must=True)
  assert {files.read(f"{url}/{n}").decode() for n in names} == set(names)
  assert not {"lock", "origin.txt"} & set(files.list_names(url))


@pytest.mark.slow
def test_two_machines_that_train_in_one_bucket_are_kept_apart(bucket, tmp_path):
  workdir = f"{bucket}/runs/two"
  process = subprocess.Popen(
    [sys.executable, "-m", "flaxmlm.train", *ARGS]
    + [f"--workdir={workdir}", "--config.train.steps=100000"],
    cwd=ROOT,
    env=environment() | {"FLAXMLM_CACHE": str(tmp_path / "first")},
    stdout=subprocess.DEVNULL,
  )
  deadline = time.monotonic() + 120
  while not files.exists(f"{workdir}/checkpoints/2/manifest.json"):
    assert process.poll() is None
    assert time.monotonic() < deadline
    time.sleep(0.1)
  second = subprocess.run(
    [sys.executable, "-m", "flaxmlm.train", *ARGS]
    + [f"--workdir={workdir}", "--config.train.steps=100000"],
    cwd=ROOT,
    env=environment() | {"FLAXMLM_CACHE": str(tmp_path / "second")},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert second.returncode == 2
  assert f"process {process.pid} on" in second.stderr
  assert second.stderr.count("\n") == 1
  assert process.poll() is None
  process.send_signal(signal.SIGTERM)
  assert process.wait(120) == 0
  assert not files.exists(f"{workdir}/lease.json")


def test_a_damaged_step_in_a_bucket_is_set_aside(bucket, tmp_path):
  folder = f"{bucket}/{tmp_path.name}/checkpoints"
  for step in (1, 2, 3, 4):
    files.write(f"{folder}/{step}/state/d/array", bytes(range(step, 100)))
    if step < 4:  # whose save was cut off
      manifests.seal(f"{folder}/{step}", {"step": step, "loss": None})
  # What is cut off is no damage: it goes, under strict too.
  said = []
  assert saves.find_newest(folder, strict=True, say=said.append)["step"] == 3
  assert len(said) == 1 and "/4: its save, or its removal, was cut" in said[0]
  assert saves.list_steps(folder) == [1, 2, 3]
  files.write(f"{folder}/3/state/d/array", bytes(97))
  with pytest.raises(InputError, match=r"/3: state/d/array isn't what.*strict"):
    saves.find_newest(folder, strict=True, say=print)
  facts = saves.find_newest(folder, strict=False, say=said.append)
  assert facts["step"] == 2
  assert "/3: state/d/array isn't what was written" in said[1]
  names = sorted(files.list_names(folder))
  assert names == ["1", "2", "3.broken"]
  assert saves.remove_old(folder, keep=1, best=0, every=0) == [1]
  assert saves.list_steps(folder) == [2]


@pytest.mark.parametrize("learns", [True, False])
def test_who_has_lost_the_lease_removes_no_step_of_its_successor(
  bucket, tmp_path, monkeypatch, learns
):
  """Also if it can't learn of that, since the bucket doesn't answer."""
  folder = f"{bucket}/{tmp_path.name}/checkpoints"
  lost = False

  def check() -> None:
    if lost and learns:
      raise InputError("another process has taken over")

  def seal(step: int) -> None:
    files.write(f"{folder}/{step}/array", b"all")
    manifests.seal(f"{folder}/{step}", {"step": step, "loss": None})

  class Woken:
    def result(self) -> None:
      nonlocal lost
      seal(2)
      lost = True
      raise OSError("suspended for minutes")

  seal(1)
  saver = checkpoints.Saver(folder, newest=1, keep=1, check=check)
  with monkeypatch.context() as patch:
    patch.setattr(checkpoints.ocp, "save_async", lambda *args: Woken())
    saver.save(state(2), None)
    saver.wait()
  assert saver.failed() == 2
  for step in (1, 2):
    assert manifests.check(f"{folder}/{step}")["step"] == step


def test_who_loses_the_lease_in_a_save_seals_and_removes_nothing(
  bucket, tmp_path
):
  folder = f"{bucket}/{tmp_path.name}/checkpoints"
  files.write(f"{folder}/1/array", b"all")
  manifests.seal(f"{folder}/1", {"step": 1, "loss": None})

  def check() -> None:
    raise InputError("another process has taken over")

  saver = checkpoints.Saver(folder, newest=1, keep=1, check=check)
  saver.save(state(2), None)
  saver.wait()
  assert saver.failed() == 2
  assert saves.list_steps(folder) == [1, 2]
  assert not manifests.is_sealed(f"{folder}/2")
  assert manifests.check(f"{folder}/1")["step"] == 1


def test_a_bucket_with_nothing_but_a_save_that_was_cut_off(bucket, tmp_path):
  folder = f"{bucket}/{tmp_path.name}/checkpoints"
  files.write(f"{folder}/4/state/array", b"half")
  said = []
  assert saves.find_newest(folder, strict=False, say=said.append) is None
  assert len(said) == 1 and "/4: its save, or its removal, was" in said[0]
  assert files.list_names(folder) == []


def test_a_run_in_a_bucket_that_lost_its_manifests_never_begins_anew(
  bucket, tmp_path
):
  """Or never had one, of an older version; Orbax had written all of it."""
  folder = f"{bucket}/{tmp_path.name}/checkpoints"
  for step, names in ((4, ("array", "commit_success.txt")), (6, ("array",))):
    for name in names:
      files.write(f"{folder}/{step}/{name}", b"all")
  before = files.list_tree(folder)
  for strict in (False, True):
    with pytest.raises(InputError, match=r"/4: man.*no step there is whole"):
      saves.find_newest(folder, strict=strict, say=print)
  assert files.list_tree(folder) == before
  # Nor is it removed behind newer ones.
  files.write(f"{folder}/9/array", b"all")
  manifests.seal(f"{folder}/9", {"step": 9, "loss": None})
  assert saves.find_newest(folder, strict=True, say=print)["step"] == 9
  assert saves.remove_old(folder, keep=1, best=0, every=0) == []
  assert saves.list_steps(folder) == [4, 9]
