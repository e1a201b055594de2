"""Stores and runs in a bucket, of a storage server that speaks GCS's API."""

import contextlib
import importlib.util
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, environment, lines, program

from flaxmlm import InputError
from flaxmlm.data.store import open_store
from flaxmlm.storage import manifests, remote, saves

if importlib.util.find_spec("gcsfs") is None:
  pytest.skip("no gcsfs; the extra gcs has it", allow_module_level=True)
emulator = pytest.importorskip(
  "gcp_storage_emulator.server", reason="no gcp-storage-emulator"
)

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
def bucket():
  """A bucket of a server in this process, empty at first."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  address = f"http://127.0.0.1:{port}"
  keys = {
    "STORAGE_EMULATOR_HOST": address,  # gcsfs reads it
    "TENSORSTORE_GCS_HTTP_URL": address,
    "FSSPEC_GS_TOKEN": "anon",
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
    # Else gcsfs asks Google's gRPC service, for a minute, what kind of bucket
    # it is. Read when gcsfs is imported, which is at the first use.
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
  }
  with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
    for name, value in keys.items():
      patch.setenv(name, value)
    server = emulator.create_server(
      "127.0.0.1", port, in_memory=True, default_bucket="bucket"
    )
    server.start()
    stack.callback(server.stop)
    yield "gs://bucket"


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
  path = remote.open_path(f"{url}/train/flags.bin")
  data = bytearray(path.read_bytes())
  data[7] ^= 1
  path.write_bytes(bytes(data))
  monkeypatch.setenv("FLAXMLM_CACHE", str(tmp_path / "here"))
  with pytest.raises(InputError, match=r"train/flags.bin: its sha256 isn't"):
    open_store(url)
  with pytest.raises(InputError, match="no store can be read there"):
    open_store(f"{bucket}/nothing")


def run(cache, *args: str) -> str:
  """Trains on a machine with a cache of its own."""
  done = subprocess.run(
    [sys.executable, "-m", "flaxmlm.train", *ARGS, *args],
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
  checkpoint = remote.open_path(f"{workdir}/checkpoints/4")
  deadline = time.monotonic() + 120
  while not checkpoint.exists():
    assert process.poll() is None
    assert time.monotonic() < deadline
    time.sleep(0.1)
  process.send_signal(signal.SIGKILL)
  process.wait()
  said = run(tmp_path / "second", f"--workdir={workdir}")
  assert "going on after step" in said
  assert f"report: {workdir}/report.html" in said

  run(tmp_path / "third", f"--workdir={tmp_path}/local")
  (tmp_path / "metrics").write_bytes(
    remote.open_path(f"{workdir}/metrics.jsonl").read_bytes()
  )
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


def test_a_local_run_has_no_origin(tmp_path):
  assert remote.localize(str(tmp_path)) == str(tmp_path)
  assert remote.origin(str(tmp_path)) is None
  assert remote.checkpoints(str(tmp_path)) == os.path.join(
    tmp_path, "checkpoints"
  )


def test_a_damaged_step_in_a_bucket_is_set_aside(bucket, tmp_path):
  folder = f"{bucket}/{tmp_path.name}/checkpoints"
  for step in (1, 2, 3, 4):
    data = remote.open_path(f"{folder}/{step}/state/d")
    data.mkdir(parents=True, exist_ok=True)
    (data / "array").write_bytes(bytes(range(step, 100)))
    if step < 4:  # whose save was cut off
      manifests.seal(f"{folder}/{step}", {"step": step, "loss": None})
  (remote.open_path(folder) / "3" / "state" / "d" / "array").write_bytes(
    bytes(97)
  )
  remote.forget(folder)
  with pytest.raises(InputError, match=r"/4: manifest.json is missing; .*/3: "):
    saves.find_newest(folder, strict=True, say=print)
  said = []
  facts = saves.find_newest(folder, strict=False, say=said.append)
  assert facts["step"] == 2
  assert "/3: state/d/array isn't what was written" in said[1]
  remote.forget(folder)
  names = sorted(remote.list_names(folder))
  assert names == ["1", "2", "3.broken", "4.broken"]
  assert saves.remove_old(folder, keep=1, best=0, every=0) == [1]
  remote.forget(folder)
  assert saves.list_steps(folder) == [2]


def test_a_bucket_with_nothing_but_a_save_that_was_cut_off(bucket, tmp_path):
  folder = f"{bucket}/{tmp_path.name}/checkpoints"
  data = remote.open_path(f"{folder}/4/state")
  data.mkdir(parents=True, exist_ok=True)
  (data / "array").write_bytes(b"half")
  said = []
  assert saves.find_newest(folder, strict=False, say=said.append) is None
  assert "set aside as 4.broken, nothing is taken in its place" in said[0]
