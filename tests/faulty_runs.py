"""Whole runs: killed, stopped, moved, with no room; and what they must be.

Tests and `benchmarks.faults` use it. What is drawn comes from a seed; what a
moment hits is left to the machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any, NamedTuple

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from flaxmlm.storage import manifests, saves
from flaxmlm.training import chain, incidents

ROOT = pathlib.Path(__file__).parent.parent
# Of a line of metrics, what no two runs have alike.
_TIMES = {"train/tokens_per_second", "train/host_share", "train/mfu"}


class World(NamedTuple):
  """A config of a tiny run, whose text is prepared in its workdir."""

  folder: pathlib.Path
  steps: int

  @property
  def line(self) -> list[str]:
    return [f"--config={self.folder / 'config.json'}"]


class Program(NamedTuple):
  """A process, and the file with what it prints."""

  process: subprocess.Popen
  output: IO[bytes]

  def printed(self) -> str:
    # The process writes where this file's position is: it must not be moved.
    file = self.output.fileno()
    return os.pread(file, os.fstat(file).st_size, 0).decode()

  def last_step(self) -> int:
    """The last step that it told of; 0 before the first one."""
    return int(
      (re.findall(r"^step ([\d,]+)/", self.printed(), re.M) or "0")[-1].replace(
        ",", ""
      )
    )

  def end(self, seconds: float = 3600) -> int:
    return self.process.wait(seconds)

  def kill(self) -> None:
    self.process.kill()
    self.process.wait()


class Whole(NamedTuple):
  """A run that nothing happens to."""

  result: dict[str, Any]
  store_seconds: float  # until its text has been prepared
  start_seconds: float  # until its first step has been told
  seconds: float  # all of it


def make_world(
  folder: pathlib.Path, *, steps: int = 60, **changes: dict[str, Any]
) -> World:
  """Writes a text of 0.9 MB and a config; `changes` are groups of keys."""
  folder.mkdir(parents=True)
  draw = random.Random(0)
  letters = "abcdefghijklmnopqrstuvwxyz"
  words = [
    "".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(3000)
  ]
  lines = (
    " ".join(
      words[int(3000 * draw.random() ** 3)] for _ in range(draw.randint(5, 60))
    )
    for _ in range(4000)
  )
  (folder / "text.txt").write_text("\n".join(lines) + "\n")
  values = {
    "data": {
      "source": str(folder / "text.txt"),
      "document": "line",
      "validation_fraction": 0.05,
      "row_length": 32,
      "processes": 1,
    },
    "tokenizer": {"vocab_size": 1000},
    "model": {
      "layers": 1,
      "width": 32,
      "heads": 2,
      "ffn": 64,
      "max_positions": 32,
    },
    "train": {"steps": steps, "batch_size": 8},
    "optimizer": {"warmup_steps": 5},
    "checkpoint": {"every": 5, "retry_seconds": 0.0},
    "eval": {"every": 20, "rows": 16},
    "log": {"every": 1},
  }
  for group, keys in changes.items():
    values[group] |= keys
  (folder / "config.json").write_text(json.dumps(values))
  return World(folder, steps)


def start(
  world: World,
  *args: str,
  name: str = "train",
  processes: int = 1,
  devices: int = 1,
  program: Sequence[str] = (),
) -> list[Program]:
  """Starts a program of flaxmlm, or `program`, in one process or more.

  Args:
    world: Whose config it is.
    args: What else is on the command line.
    name: Of the program.
    processes: That train together.
    devices: Of all of them.
    program: Arguments of Python, instead of a program and the config.
  """
  line = program or ("-m", f"flaxmlm.{name}", *world.line)
  variables = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(devices // processes),
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "JAX_COMPILATION_CACHE_DIR": str(world.folder / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "FLAXMLM_CACHE": str(world.folder / "cache"),
    "PYTHONPATH": str(ROOT),
    "TF_CPP_MIN_LOG_LEVEL": "3",
  }
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  started = []
  for number in range(processes):
    others = {
      "JAX_COORDINATOR_ADDRESS": address,
      "JAX_NUM_PROCESSES": str(processes),
      "JAX_PROCESS_ID": str(number),
    }
    output = tempfile.TemporaryFile()  # noqa: SIM115
    process = subprocess.Popen(
      [sys.executable, *line, *args],
      cwd=world.folder,
      env=variables | (others if processes > 1 else {}),
      stdout=output,
      stderr=subprocess.STDOUT,
    )
    started.append(Program(process, output))
  return started


def finish(
  world: World, workdir: pathlib.Path, *args: str, code: int = 0, **options: Any
) -> str:
  """Runs to the end; returns what the first process printed."""
  programs = start(world, f"--workdir={workdir}", *args, **options)
  codes = [program.end() for program in programs]
  printed = [program.printed() for program in programs]
  assert codes == [code] * len(codes), "\n\n".join(printed)
  return printed[0]


def result(workdir: pathlib.Path, world: World) -> dict[str, Any]:
  """What a run has come to: sha256 of its last state, and its metrics."""
  found = jax.tree_util.tree_flatten_with_path(_load(workdir, world.steps))[0]
  digest = hashlib.sha256()
  for path, leaf in found:
    array = np.asarray(leaf)
    digest.update(f"{path}{array.dtype}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array))
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  metrics = [
    {k: v for k, v in json.loads(line).items() if k not in _TIMES}
    for line in lines
  ]
  return {"state": digest.hexdigest(), "metrics": metrics}


def _load(workdir: pathlib.Path, step: int) -> Any:
  """A state that was saved, on one device."""
  folder = str(workdir / "checkpoints" / str(step))
  manifests.check(folder)
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    ocp.metadata(folder).metadata,
  )
  return ocp.load(folder, shapes)


def wait_for_step(program: Program) -> bool:
  """Waits for the first step of this life; False if it ended before."""
  while not program.last_step():
    if program.process.poll() is not None:
      return False
    time.sleep(0.02)
  return True


def run_whole(world: World, workdir: pathlib.Path, **options: Any) -> Whole:
  """The run that nothing happens to."""
  begin = time.perf_counter()
  programs = start(world, f"--workdir={workdir}", **options)
  while not (workdir / "store" / "manifest.json").exists():
    assert programs[0].process.poll() is None, programs[0].printed()
    time.sleep(0.02)
  store = time.perf_counter() - begin
  wait_for_step(programs[0])
  first = time.perf_counter() - begin
  for program in programs:
    assert program.end() == 0, program.printed()
  seconds = time.perf_counter() - begin
  return Whole(result(workdir, world), store, first, seconds)


# --- kills -----------------------------------------------------------------


def kill_once(
  world: World,
  whole: Whole,
  workdir: pathlib.Path,
  draw: random.Random,
  *,
  when: str,
) -> str | None:
  """Kills a run, by signal 9, at a random moment.

  Args:
    when: "any" time; "early", before it has a store; "late", after a step.

  Returns:
    What it was at; None if it had come to its end.
  """
  [program] = start(world, f"--workdir={workdir}")
  seconds = {
    "any": whole.seconds,
    "early": whole.store_seconds,
    "late": whole.seconds - whole.start_seconds,
  }
  if when == "late":
    wait_for_step(program)
  with contextlib.suppress(subprocess.TimeoutExpired):
    program.end(draw.uniform(0, seconds[when]))
  program.kill()
  if program.process.returncode == 0:
    return None
  assert program.process.returncode == -signal.SIGKILL, program.printed()
  if not (workdir / "store" / "manifest.json").exists():
    begun = (workdir / "store.partial").exists()
    return "preparing" if begun else "starting"
  if not program.last_step():
    return "compiling"
  left = {path.suffix for path in (workdir / "checkpoints").iterdir()}
  if left & {".saving", ".removing", ".orbax-checkpoint-tmp"}:
    return "saving"
  return "stepping"


class Life(NamedTuple):
  """From a start to a kill, or to the end."""

  seconds: float
  start_seconds: float  # until its first step has been told
  steps: int  # computed


def kill_often(
  world: World,
  workdir: pathlib.Path,
  draw: random.Random,
  between: tuple[float, float],
) -> list[Life]:
  """Kills a run again and again until it has come to its end.

  Args:
    between: How long each life lasts after its first step, in seconds: at
      least, at most.
  """
  lives, code = [], None
  while code != 0:
    before = last_saved(workdir)
    begin = time.perf_counter()
    [program] = start(world, f"--workdir={workdir}")
    wait_for_step(program)
    first = time.perf_counter()
    with contextlib.suppress(subprocess.TimeoutExpired):
      program.end(draw.uniform(*between))
    code = program.process.poll()
    if code is None:
      program.kill()
    assert code in (None, 0), program.printed()
    steps = max(program.last_step() - before, 0)
    lives.append(Life(time.perf_counter() - begin, first - begin, steps))
  return lives


def last_saved(workdir: pathlib.Path) -> int:
  """The newest step that has its name; 0 if there is none."""
  return max(saves.list_steps(str(workdir / "checkpoints")), default=0)


# --- signals ---------------------------------------------------------------


class Stop(NamedTuple):
  """What became of SIGTERM."""

  codes: list[int]
  seconds: float
  lost: int  # steps that were computed, and aren't in a checkpoint
  at: int  # the step; that of the config if it was done


def stop_once(
  world: World,
  whole: Whole,
  workdir: pathlib.Path,
  draw: random.Random,
  *,
  processes: int = 1,
  early: bool = False,
) -> Stop:
  """Stops a run by SIGTERM to one of its processes at a random moment.

  Args:
    early: Whether before its first step; else after that.
  """
  programs = start(
    world, f"--workdir={workdir}", processes=processes, devices=processes
  )
  if early:
    time.sleep(draw.uniform(0, whole.start_seconds))
  else:
    wait_for_step(programs[0])
    time.sleep(draw.uniform(0, (whole.seconds - whole.start_seconds) / 2))
  begin = time.perf_counter()
  draw.choice(programs).process.send_signal(signal.SIGTERM)
  codes = [program.end() for program in programs]
  seconds = time.perf_counter() - begin
  saved = last_saved(workdir)
  return Stop(codes, seconds, max(programs[0].last_step() - saved, 0), saved)


# --- no room ---------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, megabytes: int) -> Iterator[bool]:
  """Mounts a file system of its own; False where that may not be."""
  folder.mkdir(parents=True)
  line = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs"]
  if not shutil.which("mount") or subprocess.run([*line, folder]).returncode:
    yield False
    return
  try:
    yield True
  finally:
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: pathlib.Path) -> pathlib.Path:
  """Leaves not a byte of room; returns the file that takes it."""
  path = disk / "filler"
  with (
    open(path, "wb", buffering=0) as file,
    contextlib.suppress(OSError),
  ):
    while True:
      file.write(bytes(1 << 16))
  return path


def fill_once(
  world: World, workdir: pathlib.Path, disk: pathlib.Path, seconds: float
) -> tuple[int, str]:
  """Fills the disk so long after a run's start; returns its end.

  There is room again afterwards.
  """
  [program] = start(
    world, f"--workdir={workdir}", "--config.checkpoint.max_failures=3"
  )
  time.sleep(seconds)
  filler = fill(disk)
  code = program.end()
  filler.unlink()
  return code, program.printed()


def is_full(code: int, said: str) -> bool:
  """Whether a program's end is code 1 and one line that says why."""
  errors = [line for line in said.splitlines() if line.startswith("error: ")]
  return (
    code == 1
    and len(errors) == 1
    and any(
      why in errors[0] for why in ("No space left on device: '", "GB free")
    )
    and "Traceback" not in said
  )


def fill_stores(
  world: World, folder: pathlib.Path, draw: random.Random, times: int
) -> dict[str, int]:
  """Prepares on disks that are too small, and again when there is room."""

  def prepare(out: pathlib.Path) -> tuple[int, str]:
    [program] = start(world, f"--out={out}", name="prepare")
    return program.end(), program.printed()

  assert prepare(folder / "whole")[0] == 0
  want = read_folder(folder / "whole")
  size = sum(map(len, want.values()))
  counts = {"full": 0, "a_line_and_code_1": 0, "same_bytes": 0}
  for _ in range(times):
    disk = folder / "disk"
    with small_disk(disk, 64) as there:
      assert there
      filler = fill(disk)
      os.truncate(filler, (64 << 20) - draw.randrange(size))
      code, said = prepare(disk / "store")
      counts["full"] += code != 0
      counts["a_line_and_code_1"] += is_full(code, said)
      filler.unlink()
      code, said = prepare(disk / "store")
      assert code == 0, said
      counts["same_bytes"] += read_folder(disk / "store") == want
    disk.rmdir()
  return counts


def read_folder(folder: pathlib.Path) -> dict[str, bytes]:
  found = [path for path in folder.rglob("*") if path.is_file()]
  return {str(p.relative_to(folder)): p.read_bytes() for p in found}


# --- numbers ---------------------------------------------------------------

# As `train`, where some row uses have NaN for a weight, or in the gradient. Of
# these the weights are such that the objective knows them again.
_POISONED = """
import jax
import jax.numpy as jnp
from flaxmlm import config, objectives, train

build = objectives.build

@jax.custom_vjp
def poison(x, bad):
  return x

def backward(bad, gradient):
  return jnp.where(bad, jnp.nan, gradient), None

poison.defvjp(lambda x, bad: (x, bad), backward)

def poisoned(*args, **kwargs):
  objective = build(*args, **kwargs)

  def corrupt(keys, batch, step):
    example = objective.corrupt(keys, batch, step)
    bad = ((batch.example >= FIRST) & (batch.example < END))[:, None]
    weight = jnp.nan if WHAT == "batch" else 1000.0
    weights = jnp.where(bad, weight, example.weights)
    return example._replace(weights=weights)

  def run(model, params, example, keys):
    bad = (example.weights == 1000.0).any()
    params = jax.tree.map(lambda x: poison(x, bad), params)
    return objective.run(model, params, example, keys)

  return objective._replace(corrupt=corrupt, run=run)

objectives.build = poisoned
config.run(train.main)
"""


def poison(what: str, first: int, end: int) -> list[str]:
  """Arguments of Python: `train`, where row uses `first` to `end` are bad.

  Args:
    what: Where NaN is: in the "batch", or in the "gradient" alone.
    first: The first bad row use.
    end: One more than the last.
  """
  return ["-c", f"WHAT, FIRST, END = {what!r}, {first}, {end}\n{_POISONED}"]


class Divergence(NamedTuple):
  """What became of a run whose numbers went wrong."""

  printed: str
  kinds: list[str]  # of its incidents
  incidents: list[dict[str, Any]]
  steps: list[int]  # of its checkpoints
  finite: bool  # every number of all of them
  lines: int  # of its metrics, which are finite or null

  @property
  def stopped(self) -> bool:
    """Whether it stopped for that, with one line."""
    errors = re.findall(r"^error: step .*$", self.printed, re.M)
    return len(errors) == 1 and "Traceback" not in self.printed


def diverge(
  world: World,
  workdir: pathlib.Path,
  *args: str,
  code: int,
  bad: tuple[str, int, int] | None = None,
  kill: random.Random | None = None,
  processes: int = 1,
) -> Divergence:
  """Runs to the end, with bad rows or a config that can't go well.

  Args:
    code: How it must end.
    bad: See `poison`.
    kill: Kills it first, within two seconds after it has gone back; then it is
      started again.
    processes: That train together.
  """
  line = (f"--workdir={workdir}", *args)
  program = (*poison(*bad), *world.line) if bad else ()
  several = {"processes": processes, "devices": processes, "program": program}
  if kill:
    first, *others = start(world, *line, **several)
    while not (workdir / chain.ROLLBACKS).exists():
      assert first.process.poll() is None, first.printed()
      time.sleep(0.01)
    with contextlib.suppress(subprocess.TimeoutExpired):
      first.end(kill.uniform(0, 2))
    for one in (first, *others):
      one.kill()
  printed = finish(world, workdir, *args, code=code, **several)
  steps = saves.list_steps(str(workdir / "checkpoints"))
  states = [_load(workdir, step) for step in steps]
  found = []
  if (workdir / incidents.FILE).exists():
    text = (workdir / incidents.FILE).read_text()
    found = [json.loads(one) for one in text.splitlines()]
  metrics = (workdir / "metrics.jsonl").read_text().splitlines()
  return Divergence(
    printed,
    [one["kind"] for one in found],
    found,
    steps,
    all(np.isfinite(x).all() for x in jax.tree.leaves(states)),
    len([json.loads(one, parse_constant=_refuse) for one in metrics]),
  )


def _refuse(name: str) -> Any:
  raise ValueError(f"{name} is no JSON")


# --- what it costs ---------------------------------------------------------


def step_seconds(world: World, workdir: pathlib.Path) -> float:
  """Median over the lines of metrics of what a step took."""
  finish(world, workdir)
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  found = [json.loads(line) for line in lines]
  speeds = [x[k] for x in found if (k := "train/tokens_per_second") in x]
  values = json.loads((workdir / "config.json").read_text())
  tokens = values["train"]["batch_size"] * values["data"]["row_length"]
  return tokens / statistics.median(speeds)


# --- other meshes ----------------------------------------------------------


class Place(NamedTuple):
  """Where some steps are computed."""

  processes: int
  devices: int
  microbatches: int
  fsdp: int = 1


def move(
  world: World, run: pathlib.Path, places: Sequence[Place], steps: int
) -> list[list[str]]:
  """Computes so many steps at each place, from a checkpoint to the next.

  Returns:
    Of each step the sha256 of its batch, and of what is hidden in it.
  """
  hashes = []
  for number, place in enumerate(places):
    programs = start(
      world,
      *(str(run), str(number * steps), str((number + 1) * steps)),
      *(str(world.folder), str(place.microbatches), str(place.fsdp)),
      processes=place.processes,
      devices=place.devices,
      program=[str(ROOT / "tests" / "moved_steps.py")],
    )
    for program in programs:
      assert program.end() == 0, program.printed()
    hashes += json.loads(programs[0].printed().splitlines()[-1])
  return hashes


def largest_difference(a: pathlib.Path, b: pathlib.Path, step: int) -> float:
  """Of any parameter of two runs of `move`."""
  found = [np.load(f"{run}/{step}.npz") for run in (a, b)]
  assert set(found[0]) == set(found[1])
  return max(float(np.abs(found[0][k] - found[1][k]).max()) for k in found[0])
