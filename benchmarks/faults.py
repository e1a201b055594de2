"""What becomes of faults: the table of docs/reliability.md, as JSON.

  python -m benchmarks.faults [--quick] [--json] [--only ROW ...]

A function a row. Each returns counts: how many faults there were, and how many
of them were answered as they must be. What makes the faults is what the tests
use: broken_configs.py, corrupt_inputs.py, saved_steps.py, faulty_runs.py there.
Rows with whole runs take minutes each, kills_in_a_loop half an hour; --quick
takes some of each. --json keeps the figures of the rows that aren't run.
"""

from __future__ import annotations

import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from benchmarks import report
from flaxmlm import InputError
from flaxmlm.data import store
from flaxmlm.storage import hashes, remote, saves

TESTS = str(pathlib.Path(__file__).parent.parent / "tests")
sys.path.insert(0, TESTS)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
import broken_configs  # noqa: E402
import faulty_runs  # noqa: E402
import saved_steps  # noqa: E402


def main() -> None:
  parser = report.parser(__doc__)
  parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
  args = parser.parse_args()
  figures = {}
  for name in args.only:
    with tempfile.TemporaryDirectory() as folder:
      os.environ[remote.CACHE] = os.path.join(folder, "cache")
      start = time.perf_counter()
      figures[name] = ROWS[name](pathlib.Path(folder), args.quick)
      figures[name]["row_seconds"] = time.perf_counter() - start
    print(f"{name}: {json.dumps(figures[name])}", flush=True)
  path = pathlib.Path(report.RESULTS, "faults.json")
  if args.json and not args.quick and path.exists():
    every = json.loads(path.read_text()) | figures
    figures = {name: every[name] for name in ROWS if name in every}
  report.finish(args, "faults", figures, packages=["flaxmlm", "jax"])


def broken(folder: pathlib.Path, quick: bool) -> dict:
  """300 broken configs: code 2, one line, the key's name, under 2 s."""
  world = broken_configs.make_world(folder / "world")
  outcomes = [
    (fault, broken_configs.attempt(fault.argv))
    for fault in broken_configs.make(world, 100 if quick else 300, seed=0)
  ]
  right = [broken_configs.is_right(*pair) for pair in outcomes]
  seconds = []
  alone = 0
  some = list(broken_configs.make(world, 60, seed=3))[:: 12 if quick else 3]
  for fault in some:
    start = time.perf_counter()
    done = subprocess.run(
      [sys.executable, "-m", "flaxmlm.train", *fault.argv],
      capture_output=True,
      text=True,
    )
    seconds.append(time.perf_counter() - start)
    outcome = broken_configs.Outcome(done.returncode, done.stderr, seconds[-1])
    alone += broken_configs.is_right(fault, outcome)
  return {
    "configs": len(right),
    "right": sum(right),
    "processes": len(some),
    "processes_right": alone,
    "process_seconds_most": max(seconds),
  }


def corrupt(folder: pathlib.Path, quick: bool) -> dict:
  """1,000 corrupt inputs, and small files that are large inside."""
  found = []
  for place, count in (("drawn", 200 if quick else 1000), ("bombs", -1)):
    if quick and count < 0:
      continue
    done = subprocess.run(
      [
        *(sys.executable, os.path.join(TESTS, "corrupt_inputs.py")),
        *(str(folder / place), str(count), "1"),
      ],
      capture_output=True,
      text=True,
      check=True,
    )
    lines = map(json.loads, done.stdout.splitlines())
    found += [facts for facts in lines if "result" in facts]
  results = Counter(facts["result"] for facts in found)
  good = {name: results.pop(name, 0) for name in ("named", "skipped", "read")}
  return {
    "inputs": len(found),
    **good,
    "faults": sum(results.values()),
    "seconds_most": max(facts["seconds"] for facts in found),
    "memory_gib_most": max(facts["rss"] for facts in found) / 2**30,
  }


def stores(folder: pathlib.Path, quick: bool) -> dict:
  """200 flipped bits, 50 truncations, 50 files that are gone, in stores."""
  made = broken_configs.make_world(folder / "world") / "store"
  draw = random.Random(0)
  every = [p for p in made.rglob("*") if p.is_file() and p.stat().st_size]
  paths = sorted(p for p in every if "rows" not in p.parts)
  counts: Counter[str] = Counter()
  part = 10 if quick else 1
  for fault, number in (("flipped", 200), ("cut", 50), ("gone", 50)):
    for _ in range(number // part):
      path = draw.choice(paths)
      good = path.read_bytes()
      place = draw.randrange(len(good))
      if fault == "flipped":
        changed = bytearray(good)
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
      elif fault == "cut":
        path.write_bytes(good[:place])
      else:
        path.unlink()
      counts[fault] += 1
      try:
        store.open_store(str(made))
        counts["silently_wrong"] += 1
      except InputError as error:
        counts["named"] += str(path) in str(error)
      path.write_bytes(good)
  return {"silently_wrong": 0, **counts}


def hashing(folder: pathlib.Path, quick: bool) -> dict:
  """What checking a large store costs: at its first use, and after."""
  size = (1 << 28) if quick else (1 << 30)
  block = random.Random(0).randbytes(1 << 24)
  paths = []
  for name, share in (("ids", 2), ("flags", 1)):
    path = folder / f"{name}.bin"
    with open(path, "wb") as file:
      for _ in range(share * size // len(block)):
        file.write(block)
    paths.append(str(path))
  time.sleep(2.1)  # what was written a moment ago isn't remembered
  seconds = []
  for _ in range(2):
    start = time.perf_counter()
    hashes.hash_files(paths)
    seconds.append(time.perf_counter() - start)
  gigabytes = sum(map(os.path.getsize, paths)) / 1e9
  for path in paths:
    os.unlink(path)
  shutil.rmtree(os.environ[remote.CACHE], ignore_errors=True)
  return {
    "gigabytes": gigabytes,
    "first_seconds": seconds[0],
    "first_gigabytes_per_second": gigabytes / seconds[0],
    "second_seconds": seconds[1],
  }


def kills(folder: pathlib.Path, quick: bool) -> dict:
  """50 runs, killed once each at any moment, and started again.

  A fifth of the moments are before there is a store, two fifths are after the
  first step, where every fifth step is saved.
  """
  world = faulty_runs.make_world(folder / "world")
  faulty_runs.finish(world, folder / "first")  # what is compiled is kept
  whole = faulty_runs.run_whole(world, folder / "whole")
  draw, same, number = random.Random(), 0, 0
  at: Counter[str] = Counter()
  while at.total() < (3 if quick else 50):
    when = ("early", "late", "any", "late", "any")[number % 5]
    workdir, number = folder / str(number), number + 1
    moment = faulty_runs.kill_once(world, whole, workdir, draw, when=when)
    if moment is not None:  # else it had come to its end
      at[moment] += 1
      faulty_runs.finish(world, workdir)
      same += faulty_runs.result(workdir, world) == whole.result
    shutil.rmtree(workdir)
  return {"kills": at.total(), "same_bits": same, "at": dict(at)}


def kills_in_saves(folder: pathlib.Path, quick: bool) -> dict:
  """A kill at each point of a save: a whole step is there, and one goes on."""
  counts: Counter[str] = Counter()
  points = list(saved_steps.POINTS.items())
  for point, (*_, step) in points[:: 3 if quick else 1]:
    workdir = folder / point
    done = subprocess.run(
      [sys.executable, os.path.join(TESTS, "saved_steps.py"), workdir, point],
      env=os.environ | {"PYTHONPATH": str(faulty_runs.ROOT)},
      capture_output=True,
    )
    counts["kills"] += done.returncode == 9
    saved_steps.assert_whole(workdir, step)
    saved_steps.save(workdir, step + 1, keep=1, newest=step)
    saved_steps.assert_whole(workdir, step + 1)
    counts["whole"] += os.listdir(workdir) == [str(step + 1)]
  return dict(counts)


def checkpoints(folder: pathlib.Path, quick: bool) -> dict:
  """200 flipped bits, 50 truncations, 50 files that are gone, in checkpoints.

  And runs that go on from one that is damaged.
  """
  steps, draw = folder / "steps", random.Random(0)
  saved_steps.save(steps, 1, 2, 3)
  counts: Counter[str] = Counter()
  drawn = saved_steps.draw_damages(steps / "3", draw, 10 if quick else 1)
  for number, (name, how) in enumerate(drawn):
    refused, said, step = saved_steps.find_after_damage(
      steps, folder / str(number), name, how, draw
    )
    counts[how] += 1
    counts["named"] += [f"/3: {name} " in line for line in said] == [True]
    counts["refused_under_strict"] += f"/3: {name} " in refused
    counts["silently_wrong"] += step != 2
  world = faulty_runs.make_world(folder / "world")
  whole = faulty_runs.run_whole(world, folder / "whole")
  for number in range(1 if quick else 10):
    workdir = folder / f"run{number}"
    shutil.copytree(folder / "whole", workdir)
    newest = workdir / "checkpoints" / str(world.steps)
    name, how = draw.choice([*saved_steps.draw_damages(newest, draw)])
    saved_steps.damage(newest / name, how, draw)
    said = faulty_runs.finish(world, workdir)
    counts["runs"] += 1
    counts["runs_same_bits"] += (
      f"going on after step {world.steps - 5} " in said
      and faulty_runs.result(workdir, world) == whole.result
    )
  return {"silently_wrong": 0, **counts}


def signals(folder: pathlib.Path, quick: bool) -> dict:
  """SIGTERM at 20 moments, with one process and with two; before a first step.

  Each run is stopped again and again until it is done, and must have come to
  the same bits as one that wasn't.
  """
  world, draw = faulty_runs.make_world(folder / "world"), random.Random()
  figures = {}
  for processes in (1, 2):
    options = {"processes": processes, "devices": processes}
    faulty_runs.finish(world, folder / f"first{processes}", **options)
    whole = faulty_runs.run_whole(
      world, folder / f"whole{processes}", **options
    )
    stops, same, runs = [], 0, 0
    while len(stops) < (2 if quick else 20):
      workdir, at = folder / f"{processes} {runs}", 0
      while at < world.steps and len(stops) < (2 if quick else 20):
        stop = faulty_runs.stop_once(
          world, whole, workdir, draw, processes=processes
        )
        stops.append(stop)
        at = stop.at
      faulty_runs.finish(world, workdir, **options)
      same += faulty_runs.result(workdir, world) == whole.result
      runs += 1
    figures[f"processes_{processes}"] = {
      "signals": len(stops),
      "code_0": sum(set(stop.codes) == {0} for stop in stops),
      "steps_lost_most": max(stop.lost for stop in stops),
      "seconds_most": max(stop.seconds for stop in stops),
      "runs": runs,
      "runs_same_bits": same,
    }
    if processes == 1:
      early = [
        faulty_runs.stop_once(
          world, whole, folder / f"early {number}", draw, early=True
        )
        for number in range(2 if quick else 10)
      ]
      figures["before_the_first_step"] = {
        "signals": len(early),
        "codes": dict(Counter(str(*stop.codes) for stop in early)),
        "steps_lost_most": max(stop.lost for stop in early),
        "seconds_most": max(stop.seconds for stop in early),
      }
  return figures


def full_disks(folder: pathlib.Path, quick: bool) -> dict:
  """A small disk that fills up: of checkpoints, of a whole run, of a store.

  All must end with one line that names the disk's fault; what was saved is
  whole; with room again, the same line comes to the same bits.
  """
  world, draw = faulty_runs.make_world(folder / "world"), random.Random()
  faulty_runs.finish(world, folder / "first")
  whole = faulty_runs.run_whole(world, folder / "whole")
  figures = {}
  for kind in ("checkpoints", "workdir"):
    counts: Counter[str] = Counter()
    while counts["full"] < (1 if quick else 5):
      disk = folder / "disk"
      with faulty_runs.small_disk(disk, 64) as there:
        if not there:
          return {"skipped": "no file system can be mounted here"}
        workdir = disk / "run"
        if kind == "checkpoints":
          workdir = folder / "run"
          workdir.mkdir()
          (workdir / "checkpoints").symlink_to(disk)
        code, said = faulty_runs.fill_once(
          world, workdir, disk, draw.uniform(0, whole.seconds)
        )
        if code:  # else it had come to its end
          counts["full"] += 1
          counts["a_line_and_code_1"] += faulty_runs.is_full(code, said)
          saves.find_newest(
            str(workdir / "checkpoints"), strict=True, say=print
          )
          counts["checkpoints_whole"] += 1
          faulty_runs.finish(world, workdir)
          counts["same_bits"] += (
            faulty_runs.result(workdir, world) == whole.result
          )
      shutil.rmtree(folder / "run", ignore_errors=True)
      disk.rmdir()
    figures[kind] = dict(counts)
  figures["store"] = faulty_runs.fill_stores(
    world, folder / "store", draw, 2 if quick else 10
  )
  return figures


def moves(folder: pathlib.Path, quick: bool) -> dict:
  """Other numbers of devices, processes, micro-batches from each save on."""
  dropout = {"dropout": 0.1, "attention_dropout": 0.1}
  world = faulty_runs.make_world(folder / "world", model=dropout)
  store = f"--out={world.folder / 'store'}"
  [program] = faulty_runs.start(world, store, name="prepare")
  assert program.end() == 0, program.printed()
  places = [
    *((1, 8, 1, 2), (1, 2, 4), (1, 1, 2), (1, 4, 1, 2)),
    *((2, 4, 1), (1, 1, 4), (2, 4, 2, 2)),
  ]
  places = [faulty_runs.Place(*place) for place in places]
  places, steps = places[:: 3 if quick else 1], 2 if quick else 4
  total = steps * len(places)
  one = [faulty_runs.Place(1, 1, 1)]
  want = faulty_runs.move(world, folder / "one", one, total)
  got = faulty_runs.move(world, folder / "many", places, steps)
  pairs = list(zip(got, want, strict=True))
  return {
    "places": [place._asdict() for place in places],
    "steps": total,
    "same_batches": sum(a[0] == b[0] for a, b in pairs),
    "same_masks": sum(a[1] == b[1] for a, b in pairs),
    "parameters_differ_most": faulty_runs.largest_difference(
      folder / "one", folder / "many", total
    ),
  }


def numbers(folder: pathlib.Path, quick: bool) -> dict:
  """NaN in batches and in gradients, learning rates far too high.

  Of 40 steps one is bad, or three in a row, which are too many. Some of the
  runs that go back are killed after that, and started again.
  """
  world = faulty_runs.make_world(
    folder / "world",
    steps=40,
    train={"max_bad_steps": 3, "max_rollbacks": 2},
    checkpoint={"keep": 99},
    optimizer={"warmup_steps": 30},
    eval={"every": 0},
  )
  back = "--config.train.on_divergence=rollback"
  draw, counts = random.Random(0), Counter()

  def run(what: str, *args: str, **options: Any) -> faulty_runs.Divergence:
    workdir = folder / "runs" / f"{counts['runs']} {what}"
    got = faulty_runs.diverge(world, workdir, *args, **options)
    counts["runs"] += 1
    counts["finite"] += bool(got.steps) and got.finite
    counts["incident_recorded"] += bool(got.kinds)
    return got

  rounds = [("batch", 1), ("gradient", 2)]
  if not quick:
    rounds = [(w, n) for w in ("batch", "gradient") for n in (1, 2)] * 3
  for what, processes in rounds:
    step = draw.randint(7, 36)
    first = 8 * (step - 1)
    last_good = (step - 1) // 5 * 5
    several = {"processes": processes}
    got = run(what, code=0, bad=(what, first, first + 1), **several)
    bad = [x for x in got.incidents if x["kind"] == "non_finite"]
    where = {"batch": "loss", "gradient": "grad_norm"}[what]
    counts["policy_obeyed"] += got.steps[-1] == 40 and [
      (x["step"], x["examples"], x["what"]) for x in bad
    ] == [(step, f"{first}:{first + 8}", where)]

    rows = (what, first, first + 24)
    got = run(what, code=1, bad=rows, **several)
    counts["policy_obeyed"] += (
      got.stopped
      and got.steps[-1] == last_good
      and [x for x in got.kinds if x != "loss_spike"]
      == ["non_finite"] * 3 + ["stop"]
    )
    counts["killed_after_it"] += 1
    results = []
    for kill in (None, draw):
      got = run(what, back, code=0, bad=rows, kill=kill, **several)
      to = [x["to"] for x in got.incidents if x["kind"] == "rollback"]
      counts["policy_obeyed"] += to == [last_good] and got.steps[-1] == 40
      workdir = folder / "runs" / f"{counts['runs'] - 1} {what}"
      results.append(faulty_runs.result(workdir, world))
    counts["killed_same_bits"] += results[0] == results[1]

  # At 0.05 this model still learns. A thousand times as much is told of, but
  # isn't too much for float32.
  for rate in (50.0, 1e17):
    for policy in ((), (back,)):
      absurd = rate > 1e3
      every = "--config.checkpoint.every=1"  # it comes to nothing at step 3
      peak = f"--config.optimizer.peak_lr={rate:g}"
      got = run("rate", peak, every, *policy, code=int(absurd))
      backs = 2 if absurd and policy else 0
      counts["policy_obeyed"] += (
        got.kinds.count("rollback") == backs and got.stopped == absurd
      )
  return dict(counts)


def kill_loop(folder: pathlib.Path, quick: bool) -> dict:
  """A run that is killed each 15 s or so for ten minutes.

  Goodput is what the run would have taken undisturbed, from its first step on,
  by what it took, less the time from each start to its first step.
  """
  log = {"every": 10}
  brief = faulty_runs.make_world(
    folder / "brief", steps=400, log=log, checkpoint={"every": 100}
  )
  faulty_runs.finish(brief, folder / "first")
  whole = faulty_runs.run_whole(brief, folder / "brief" / "run")
  pace = (whole.seconds - whole.start_seconds) / brief.steps
  world = faulty_runs.make_world(
    folder / "world",
    steps=round((12 if quick else 200) / pace / 100) * 100,
    # Between two lines of metrics, one would begin at a checkpoint.
    checkpoint={"every": 10 * max(round(0.15 / pace), 1)},
    eval={"every": 0},
    log=log,
  )
  whole = faulty_runs.run_whole(world, folder / "whole")
  between = (2, 4) if quick else (5, 12)
  workdir = folder / "run"
  lives = faulty_runs.kill_often(world, workdir, random.Random(), between)
  took = sum(life.seconds - life.start_seconds for life in lives)
  got = faulty_runs.result(workdir, world)
  return {
    "minutes": sum(life.seconds for life in lives) / 60,
    "kills": len(lives) - 1,
    "steps": world.steps,
    "steps_computed": sum(life.steps for life in lives),
    "restart_seconds_mean": sum(x.start_seconds for x in lives) / len(lives),
    "undisturbed_seconds": whole.seconds - whole.start_seconds,
    "seconds": took,
    "goodput": (whole.seconds - whole.start_seconds) / took,
    "same_state": got["state"] == whole.result["state"],
    "same_metrics": got["metrics"] == whole.result["metrics"],
  }


def cost(folder: pathlib.Path, quick: bool) -> dict:
  """What the loop does beside the step, by a step of 4 x 256; and a save.

  A model of next to nothing has the loop, its checks, its data and its logging
  as any other: what a step of it takes is more than these.
  """
  nothing = faulty_runs.make_world(
    folder / "nothing",
    steps=400 if quick else 4000,
    model={"width": 8, "heads": 1, "ffn": 8},
    train={"batch_size": 1},
    checkpoint={"every": 0},
    eval={"every": 0},
    log={"every": 50},
  )
  four = faulty_runs.make_world(
    folder / "four",
    steps=4 if quick else 24,
    data={"row_length": 128},
    tokenizer={"vocab_size": 8192},
    model={
      "layers": 4,
      "width": 256,
      "heads": 4,
      "ffn": 1024,
      "max_positions": 128,
    },
    train={"batch_size": 32},
    checkpoint={"every": 0},
    eval={"every": 0},
  )
  seconds = [
    faulty_runs.step_seconds(world, folder / "runs" / world.folder.name)
    for world in (nothing, four)
  ]
  saved = subprocess.run(
    [
      *(sys.executable, "-m", "benchmarks.checkpoints", f"--folder={folder}"),
      *(["--quick"] if quick else []),
    ],
    capture_output=True,
    text=True,
    check=True,
  )
  figures = json.loads(saved.stdout.splitlines()[-1])
  return {
    "loop_ms_at_most": 1e3 * seconds[0],
    "step_ms": 1e3 * seconds[1],
    "share_at_most": seconds[0] / seconds[1],
    "save_mb": figures["state_mb"],
    "save_blocks_ms": figures["blocked_ms"],
    "save_blocks_ms_worst": figures["blocked_ms_worst"],
  }


ROWS: dict[str, Callable[[pathlib.Path, bool], dict]] = {
  "broken_configs": broken,
  "corrupt_inputs": corrupt,
  "damaged_stores": stores,
  "checking_a_store": hashing,
  "kills": kills,
  "kills_in_saves": kills_in_saves,
  "damaged_checkpoints": checkpoints,
  "signals": signals,
  "full_disks": full_disks,
  "moves": moves,
  "numbers": numbers,
  "kills_in_a_loop": kill_loop,
  "cost": cost,
}

if __name__ == "__main__":
  main()
