"""What hangs ends, and says where; what is slow, or was stopped, doesn't."""

import collections
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, environment, program

from flaxmlm.training.watchdog import FIRST_SECONDS, STALLED, Watch

# Something that hangs, the second time that it is done.
HANG = """
import ctypes, os, sys, threading
from flaxmlm.training.watchdog import Watch
folder, how = sys.argv[1:]
watch = Watch(1.0)
watch.begin(folder, 3)
watch.enter("data", 6)
watch.enter("data", 7)
print("there", flush=True)

def hang_here():
  if how == "read":
    os.read(os.pipe()[0], 1)
  elif how == "lock":
    threading.Lock().acquire() and threading.Event().wait()
  elif how == "c":
    ctypes.CDLL(None).pause()
  elif how == "line":
    sys.stdin.readline()
    watch.enter("")
    print("goes on", flush=True)

hang_here()
"""


def start(folder: pathlib.Path, how: str) -> subprocess.Popen:
  process = subprocess.Popen(
    [sys.executable, "-c", HANG, folder, how],
    cwd=ROOT,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "there\n"
  return process


@pytest.mark.parametrize("how", ["read", "lock", "c"])
@pytest.mark.slow
def test_what_hangs_is_ended_and_says_where(tmp_path, how):
  process = start(tmp_path / "stalls", how)
  _, error = process.communicate(timeout=60)
  assert process.returncode == STALLED
  [path] = (tmp_path / "stalls").iterdir()
  assert path.name.endswith("-process-3.txt")
  assert error.startswith(
    "error: process 3 stalls: reading the batch of step 7"
  )
  assert str(path) in error and error.count("\n") == 1
  text = path.read_text()
  assert error.partition(";")[0] in text and "in hang_here" in text


@pytest.mark.slow
def test_stacks_that_have_no_place_are_printed(tmp_path):
  (tmp_path / "stalls").write_text("a file")
  process = start(tmp_path / "stalls", "read")
  _, error = process.communicate(timeout=60)
  assert process.returncode == STALLED
  assert "in hang_here" in error
  assert "stalls can't be written; " in error.splitlines()[-1]


@pytest.mark.slow
def test_a_process_that_was_stopped_is_no_stall(tmp_path):
  process = start(tmp_path / "stalls", "line")
  for _ in range(2):
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    process.send_signal(signal.SIGCONT)
  out, error = process.communicate("\n", timeout=60)
  assert (process.returncode, out, error) == (0, "goes on\n", "")
  assert not (tmp_path / "stalls").exists()


@pytest.mark.parametrize("step_seconds", [0.3, 4.0, 16.0, 100.0, 900.0])
@pytest.mark.parametrize("log_every", [1, 2, 3, 4, 7, 50])
def test_slow_devices_are_no_stall(step_seconds, log_every):
  # The loop's waits, on a device that takes so long for each step: it is told
  # of three steps, and waits for the first; or for all of them, to log.
  watch, now, free = Watch(), 0.0, 0.0
  window: collections.deque[float] = collections.deque()
  for step in range(1, 200):
    began = now
    now += 0.01
    free = max(free, now) + step_seconds * (1.2 if step % 5 else 0.6)
    window.append(free)
    if step == 1:
      now = free + 60.0  # compiles
    if len(window) > 2:
      now = max(now, window[-3])
    if step % log_every == 0:
      now = max(now, free)
      window.clear()
    assert now - began <= watch.bound("step"), (step, now - began)
    watch.ended("step", now - began)
  if step_seconds < 1:
    assert watch.bound("step") == 300
  assert step_seconds < watch.bound("step") <= 300 + 80 * step_seconds


def test_the_first_of_a_kind_has_its_time():
  watch = Watch(2.0)
  assert watch.bound("evaluation") == FIRST_SECONDS
  watch.enter("evaluation", 1)
  watch.enter("data")
  assert watch.bound("evaluation") == 2.0
  assert watch.bound("save") == FIRST_SECONDS
  assert Watch(9999.0).bound("save") == 9999.0


ARGS = [
  "--config=configs/quickstart.py",
  "--config.train.steps=99999",
  "--config.train.batch_size=8",
  "--config.model.layers=1",
  "--config.eval.every=0",
  "--config.eval.rows=16",
  "--config.log.every=1",
  "--config.train.stall_seconds=3",
]


@pytest.mark.slow
def test_a_run_whose_store_hangs_is_ended(tmp_path):
  if not (os.access("/dev/fuse", os.W_OK) and os.geteuid() == 0):
    pytest.skip("wants root and /dev/fuse")
  store, disk, workdir = (tmp_path / name for name in ("store", "disk", "run"))
  config = ARGS[0]
  program("prepare", config, f"--out={store}")
  program(
    *("train", config, f"--config.data.store={store}"),
    *(f"--workdir={tmp_path / 'brief'}", "--config.train.max_hours=1e-9"),
    *ARGS[2:],
  )  # plans rows, for a disk that can't be written
  disk.mkdir()
  daemon = subprocess.Popen(
    [sys.executable, ROOT / "tests" / "hanging_disk.py", store, disk],
    stdout=subprocess.PIPE,
    text=True,
  )
  process = None
  try:
    assert daemon.stdout.readline() == "there\n"
    process = subprocess.Popen(
      [
        *(sys.executable, "-m", "flaxmlm.train", *ARGS),
        *(f"--config.data.store={disk}", f"--workdir={workdir}"),
      ],
      cwd=ROOT,
      env=environment(),
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    said = ""
    while "step 9/" not in said:
      line = process.stdout.readline()
      assert line, said
      said += line
    daemon.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == STALLED, out
    last = out.splitlines()[-1]
    assert last.startswith("error: process 0 stalls: reading the batch of step")
    [path] = (workdir / "stalls").iterdir()
    assert 'data/batches.py", line' in path.read_text()
  finally:
    daemon.kill()  # what still waits for the disk fails now
    daemon.wait()
    subprocess.run(["umount", "-l", disk], check=True)
    if process is not None:
      process.kill()
