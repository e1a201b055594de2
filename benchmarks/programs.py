"""Whole programs: the quickstart, the host's share of a step, `--help`.

  python -m benchmarks.programs [--quick] [--json]

`quickstart` is the README's line after installation, in a folder of its own:
tokenizer, store, training, report. `host_share` is the share of a step of
`configs/bert_mini.py` (4x256, rows 32x128) in which Python is busy, as
`metrics.jsonl` has it, the median over 60 steps; the text is real novels where
they are, else the quickstart's. `help` is the best of five.

Targets: 5 minutes, 1.5 nats under the unigram entropy; 2 %; 1 second.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks import report


def main() -> None:
  args = report.parser(__doc__).parse_args()
  with tempfile.TemporaryDirectory() as folder:
    helped = [seconds("--help") for _ in range(5)]
    quickstart = os.path.join(folder, "quickstart")
    steps = ["--config.train.steps=100"] if args.quick else []
    took = seconds(
      "--config=configs/quickstart.py", f"--workdir={quickstart}", *steps
    )
    last = lines(quickstart)[-1]
    mini = os.path.join(folder, "mini")
    novels = report.data_folder("novels")
    text = [f"--config.data.source={novels}"]
    if novels is None:
      text = ["--config.tokenizer.vocab_size=8192"]
    seconds(
      "--config=configs/bert_mini.py",
      f"--workdir={mini}",
      f"--config.train.steps={10 if args.quick else 60}",
      "--config.optimizer.warmup_steps=10",
      "--config.eval.rows=32",
      "--config.log.every=5",
      *text,
    )
    key = "train/host_share"
    shares = [line[key] for line in lines(mini) if key in line]
  figures = {
    "quickstart_seconds": took,
    "quickstart_eval_loss": last["eval/loss"],
    "quickstart_unigram_entropy": last["eval/unigram_entropy"],
    "quickstart_nats_under": last["eval/unigram_entropy"] - last["eval/loss"],
    "host_share": statistics.median(shares),
    "host_share_most": max(shares),
    "help_seconds": min(helped),
  }
  report.table([{"figure": k, "value": v} for k, v in figures.items()])
  report.finish(args, "programs", figures, packages=["flaxmlm", "jax"])


def seconds(*arguments: str) -> float:
  """Runs `train` and returns how long it took."""
  start = time.perf_counter()
  subprocess.run(
    [sys.executable, "-m", "flaxmlm.train", *arguments],
    check=True,
    stdout=subprocess.DEVNULL if arguments == ("--help",) else None,
  )
  return time.perf_counter() - start


def lines(workdir: str) -> list[dict]:
  with open(os.path.join(workdir, "metrics.jsonl"), encoding="utf-8") as file:
    return [json.loads(line) for line in file]


if __name__ == "__main__":
  main()
