"""Several processes train one model: real ones, joined by gloo."""

import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import FLAGS, ROOT, lines, program

from flaxmlm.storage import saves

STEPS = 8
PROGRAM = ("-m", "flaxmlm.train")
# A flip of the last bit of a sum of float32 grows over the steps.
TOLERANCE = 2e-4
ARGS = [
  "--config=configs/quickstart.py",
  f"--config.train.steps={STEPS}",
  "--config.train.batch_size=16",
  "--config.model.layers=1",
  "--config.optimizer.warmup_steps=2",
  "--config.checkpoint.every=2",
  "--config.eval.every=0",
  "--config.eval.rows=48",
  "--config.log.every=1",
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
  out = tmp_path_factory.mktemp("hosts") / "store"
  program("prepare", "--config=configs/quickstart.py", f"--out={out}")
  return f"--config.data.store={out}"


def start(
  count: int, *args: str, devices: int = 8, each=(), what=PROGRAM
) -> list[subprocess.Popen]:
  """Starts `count` processes that share so many devices.

  `each` are arguments of a process's own.
  """
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  return [
    subprocess.Popen(
      [sys.executable, *what, *args, *own],
      cwd=ROOT,
      env=os.environ
      | {
        "XLA_FLAGS": FLAGS,
        "JAX_NUM_CPU_DEVICES": str(devices // count),
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(number),
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for number, own in enumerate(each or [[]] * count)
  ]


def finish(processes, codes=None) -> list[str]:
  """Waits for processes; returns what each printed."""
  printed = [p.communicate(timeout=300)[0] for p in processes]
  found = [p.returncode for p in processes]
  assert found == (codes or [0] * len(found)), "\n\n".join(printed)
  return printed


def losses(workdir) -> np.ndarray:
  """Losses of a run, each step once, validation last."""
  metrics = lines(workdir / "metrics.jsonl")
  train = [line for line in metrics if "train/loss" in line]
  assert [line["step"] for line in train] == list(range(1, STEPS + 1))
  evals = [line["eval/loss"] for line in metrics if "eval/loss" in line]
  assert len(evals) == 2
  return np.array([line["train/loss"] for line in train] + evals)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, store) -> np.ndarray:
  """Losses of the run in one process of eight devices."""
  workdir = tmp_path_factory.mktemp("hosts") / "alone"
  finish(start(1, *ARGS, store, f"--workdir={workdir}"))
  return losses(workdir)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("count", "mesh"),
  [
    (2, {}),
    (4, {"fsdp": 4}),
    # Both hosts hold all rows.
    (2, {"data": 1, "tensor": 8, "heads": 8}),
    # Two hosts hold the same half of them.
    (4, {"tensor": 4, "heads": 8}),
  ],
)
def test_any_number_of_processes_is_the_same_run(
  count, mesh, alone, store, tmp_path
):
  keys = [f"--config.mesh.{k}={v}" for k, v in mesh.items() if k != "heads"]
  if mesh.get("heads"):
    keys.append(f"--config.model.heads={mesh['heads']}")
    finish(start(1, *ARGS, keys[-1], store, f"--workdir={tmp_path}/alone"))
    alone = losses(tmp_path / "alone")
  workdir = tmp_path / "run"
  first, *others = finish(
    start(count, *ARGS, *keys, store, f"--workdir={workdir}")
  )
  np.testing.assert_allclose(losses(workdir), alone, atol=TOLERANCE, rtol=0)
  assert first.count(f"step {STEPS}/{STEPS}  loss") == 1
  assert not any("step " in printed for printed in others)


@pytest.mark.slow
def test_one_is_killed_and_the_same_line_goes_on(alone, store, tmp_path):
  line = [*ARGS, store, f"--workdir={tmp_path}/run"]
  processes = start(2, *line)
  while not (tmp_path / "run" / "checkpoints" / "4").exists():
    assert processes[0].poll() is None
    time.sleep(0.02)
  processes[1].send_signal(signal.SIGKILL)
  processes[0].communicate(timeout=150)
  assert processes[0].returncode != 0
  first, _ = finish(start(2, *line))
  assert "going on after step" in first
  np.testing.assert_allclose(
    losses(tmp_path / "run"), alone, atol=TOLERANCE, rtol=0
  )


def wait_for_steps(workdir, process) -> None:
  path = workdir / "metrics.jsonl"
  while not path.exists() or '"step": 4,' not in path.read_text():
    assert process.poll() is None
    time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_one_that_is_stopped_ends_the_others(which, store, tmp_path):
  line = [*ARGS, store, f"--workdir={tmp_path}/run"]
  line += ["--config.train.steps=99999", "--config.train.stall_seconds=5"]
  processes = start(2, *line)
  wait_for_steps(tmp_path / "run", processes[0])
  processes[which].send_signal(signal.SIGSTOP)
  out, _ = processes[1 - which].communicate(timeout=100)
  assert processes[1 - which].returncode == 75, out
  last = out.splitlines()[-1]
  assert last.startswith(f"error: process {1 - which} stalls: ")
  [path] = (tmp_path / "run" / "stalls").iterdir()
  assert str(path) in last and "training/loop.py" in path.read_text()
  # It can't go on alone, and ends too once it can.
  processes[which].send_signal(signal.SIGCONT)
  processes[which].communicate(timeout=150)
  assert processes[which].returncode not in (0, None)


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_one_that_is_killed_ends_the_others(which, store, tmp_path):
  line = [*ARGS, store, f"--workdir={tmp_path}/run"]
  processes = start(2, *line, "--config.train.steps=99999")
  wait_for_steps(tmp_path / "run", processes[0])
  processes[which].send_signal(signal.SIGKILL)
  out, _ = processes[1 - which].communicate(timeout=100)
  assert processes[1 - which].returncode not in (0, None)
  # Ours, or JAX's if that was faster.
  assert "error: another process ended" in out or "another task died" in out


@pytest.mark.slow
def test_one_is_asked_to_stop_and_all_stop_at_the_same_step(
  alone, store, tmp_path
):
  line = [*ARGS, store, f"--workdir={tmp_path}/run"]
  processes = start(2, *line)
  while '"step": 2,' not in (
    (tmp_path / "run" / "metrics.jsonl").read_text()
    if (tmp_path / "run" / "metrics.jsonl").exists()
    else ""
  ):
    assert processes[0].poll() is None
    time.sleep(0.02)
  processes[1].send_signal(signal.SIGTERM)
  first, _ = finish(processes)
  assert "stopped after step" in first
  finish(start(2, *line))
  np.testing.assert_allclose(
    losses(tmp_path / "run"), alone, atol=TOLERANCE, rtol=0
  )


@pytest.mark.slow
def test_other_numbers_of_processes_go_on(alone, store, tmp_path):
  line = [*ARGS, store, f"--workdir={tmp_path}/run"]
  brief = "--config.train.max_hours=1e-9"
  parts = "--config.train.microbatches=2"
  first, _ = finish(start(2, *line, brief))
  # All of them heard of it two steps later.
  assert "stopped after step 3 of" in first
  [second] = finish(start(1, *line, brief, parts, devices=4))
  assert "going on after step 3 " in second
  assert "stopped after step 4 of" in second
  first, _ = finish(start(2, *line))
  assert "going on after step 4 " in first
  np.testing.assert_allclose(
    losses(tmp_path / "run"), alone, atol=TOLERANCE, rtol=0
  )


# The first process, which seals what all have written, finds no room for that.
NO_ROOM = """
import errno, os
from flaxmlm import config, train
from flaxmlm.storage import manifests
def seal(folder, facts):
  raise OSError(errno.ENOSPC, "No space left on device", folder)
if os.environ["JAX_PROCESS_ID"] == "0":
  manifests.seal = seal
config.run(train.main)
"""


@pytest.mark.slow
def test_all_stop_when_one_can_save_no_more(store, tmp_path):
  line = [*ARGS, store, f"--workdir={tmp_path}/run"]
  line += ["--config.checkpoint.max_failures=2"]
  line += ["--config.checkpoint.retry_seconds=0"]
  first, second = finish(start(2, *line, what=("-c", NO_ROOM)), [1, 1])
  assert "No space left on device" in first
  for said in (first, second):
    assert "failure 2 of 2 in a row" in said
  assert os.listdir(tmp_path / "run" / "checkpoints") == []


@pytest.mark.slow
@pytest.mark.parametrize("other", ["--config.seed=1", "--workdir=elsewhere"])
def test_another_config_or_folder_is_refused(other, store, tmp_path):
  line = [*ARGS, store, f"--workdir={tmp_path}/run"]
  given = other.replace("elsewhere", f"{tmp_path}/elsewhere")
  first, second = start(2, *line, each=[[], [given]])
  said = second.communicate(timeout=120)[0]
  assert second.returncode == 2
  assert "take one on a disk that all of them see" in said.splitlines()[-1]
  first.communicate(timeout=150)
  assert first.returncode != 0


@pytest.mark.parametrize(
  ("environment", "said"),
  [
    ({"JAX_NUM_PROCESSES": "2"}, "without JAX_COORDINATOR_ADDRESS"),
    (
      {
        "JAX_COORDINATOR_ADDRESS": "127.0.0.1:1",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "2",
      },
      "JAX_PROCESS_ID=2 of JAX_NUM_PROCESSES=2",
    ),
  ],
)
def test_half_an_environment_is_refused(environment, said, tmp_path):
  done = subprocess.run(
    [sys.executable, "-m", "flaxmlm.train", *ARGS, f"--workdir={tmp_path}/a"],
    cwd=ROOT,
    env=os.environ | environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert said in done.stderr
  assert len(done.stderr.splitlines()) == 1


def test_a_signal_before_the_loop_ends_a_process(tmp_path):
  """JAX's own handler would note it, and let the process live."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  process = subprocess.Popen(
    [
      *(sys.executable, "-c"),
      "from flaxmlm.training import hosts\n"
      "import time\n"
      "hosts.join()\n"
      "print('joined', flush=True)\n"
      "time.sleep(20)",
    ],
    cwd=ROOT,
    env=os.environ
    | {
      "JAX_COORDINATOR_ADDRESS": address,
      "JAX_NUM_PROCESSES": "1",
      "JAX_PROCESS_ID": "0",
    },
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "joined\n"
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=60)
  assert process.returncode == -signal.SIGTERM


# One process alone can't write its part, once: files of a megabyte are too big
# for it. The others wait for it in Orbax' barrier.
ONE_FAILS = """
import os, resource
from flaxmlm import config, train
from flaxmlm.training import checkpoints
if os.environ["JAX_PROCESS_ID"] == "{process}":
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
  count_failure = checkpoints.Saver.count_failure
  def make_room(self, *args):
    count_failure(self, *args)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  checkpoints.Saver.count_failure = make_room
config.run(train.main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_none_waits_for_one_that_cannot_write_its_part(
  process, alone, store, tmp_path
):
  workdir = tmp_path / "run"
  line = [*ARGS, store, f"--workdir={workdir}"]
  line += ["--config.checkpoint.retry_seconds=0"]
  what = ("-c", ONE_FAILS.format(process=process))
  said = finish(start(2, *line, devices=2, what=what))
  assert "File too large" in said[process]
  assert "another process can't write its part" in said[0] or process == 0
  for text in said:
    assert "failure 2" not in text
  assert saves.list_steps(str(workdir / "checkpoints")) == [6, 8]
  np.testing.assert_allclose(losses(workdir), alone, atol=TOLERANCE, rtol=0)
