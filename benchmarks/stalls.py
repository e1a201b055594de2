"""How soon a process is missed by the one that trains with it.

Two processes on this machine, joined by gloo. One is killed, or stopped as by a
debugger, in the middle of training; the seconds until the other ends are
counted. With --quick, train.stall_seconds=5 is set, else nothing. And what it
costs the step loop to say what it does.
"""

from __future__ import annotations

import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
import timeit

from benchmarks import report
from flaxmlm.training.watchdog import Watch

ARGS = [
  "--config=configs/quickstart.py",
  "--config.train.steps=1000000",
  "--config.train.batch_size=16",
  "--config.model.layers=1",
  "--config.eval.every=0",
  "--config.eval.rows=16",
  "--config.checkpoint.every=0",
  "--config.log.every=1",
]


def main() -> None:
  args = report.parser(__doc__).parse_args()
  shown = []
  with tempfile.TemporaryDirectory() as folder:
    line = ["--config=configs/quickstart.py", f"--out={folder}/store"]
    subprocess.run(
      [sys.executable, "-m", "flaxmlm.prepare", *line],
      check=True,
      stdout=subprocess.DEVNULL,
    )
    more = [f"--config.data.store={folder}/store"]
    if args.quick:
      more.append("--config.train.stall_seconds=5")
    for number in (signal.SIGKILL, signal.SIGSTOP):
      for which in (1, 0):
        workdir = pathlib.Path(folder) / f"{number.name}-{which}"
        code, seconds, said = miss(workdir, which, number, more)
        shown.append(
          {
            "signal": number.name,
            "to_process": which,
            "seconds": seconds,
            "exit_code": code,
            "said_by": said,
          }
        )
  report.table(shown)
  watch, count = Watch(), 200_000

  def step() -> None:
    watch.enter("data", 1)
    watch.enter("step")

  cost = min(timeit.repeat(step, number=count, repeat=5)) / count
  print(f"in each step: {1e6 * cost:.2f} us")
  report.finish(
    args,
    "stalls",
    {"missed": shown, "us_a_step": 1e6 * cost},
    packages=("jax", "jaxlib"),
  )


def miss(
  workdir: pathlib.Path, which: int, number: signal.Signals, more: list[str]
) -> tuple[int, float, str]:
  """Sends a signal to one of two processes that train.

  Returns:
    How the other one ended, after how many seconds, and who said why.
  """
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  processes, logs = [], []
  for process in range(2):
    logs.append(workdir.with_suffix(f".{process}.log"))
    with logs[-1].open("w") as log:
      processes.append(
        subprocess.Popen(
          [
            *(sys.executable, "-m", "flaxmlm.train", *ARGS, *more),
            f"--workdir={workdir}",
          ],
          stdout=log,
          stderr=log,
          env=os.environ
          | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(process),
          },
        )
      )
  other = processes[1 - which]
  try:
    metrics = workdir / "metrics.jsonl"
    while not metrics.exists() or '"step": 20,' not in metrics.read_text():
      if other.poll() is not None:
        raise RuntimeError(logs[1 - which].read_text())
      time.sleep(0.05)
    processes[which].send_signal(number)
    begin = time.perf_counter()
    code = other.wait(timeout=600)
    seconds = time.perf_counter() - begin
  finally:
    for process in processes:
      process.kill()
      process.wait()
  text = logs[1 - which].read_text()
  said = {
    "the watchdog": "stalls: ",
    "gloo": "error: another process ended",
    "JAX": "JAX distributed service detected fatal errors",
  }
  found = [who for who, words in said.items() if words in text]
  return code, seconds, " and ".join(found) or "nobody"


if __name__ == "__main__":
  main()
