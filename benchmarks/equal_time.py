"""Which objective wins at equal time: the same model, texts and minutes.

  python -m benchmarks.equal_time [--minutes=N] [--seeds=N] [--json]

configs/bert_mini.py (BERT 4x256) on real novels (see `report.data_folder`), a
vocabulary of 8,192, one token store for all. Each objective's pace is measured
first and gives the steps that fit; reading, compiling and evaluating are not
counted. Then, of each seed:

- the objective's own figures on held-out documents;
- the loss of 15 % of their tokens hidden by BERT's rule, the same for all; of
  ELECTRA that of its generator, under its own draw of the same kind;
- accuracy on minimal pairs of BLiMP by pseudo-log-likelihood, the first 200 of
  each paradigm; of ELECTRA by its generator.

Runs that are there are not run again: --folder keeps them.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks import report
from flaxmlm import config
from flaxmlm.training import metrics

PACE_STEPS = 60
OBJECTIVES: dict[str, dict[str, Any]] = {
  "masked": {},
  "rate 0.4 to 0.15": {"objective.rate": 0.4, "objective.rate_end": 0.15},
  "whole_word": {"objective.name": "whole_word"},
  "ngram": {"objective.name": "ngram"},
  "span": {"objective.name": "span"},
  "span, boundary": {
    "objective.name": "span",
    "objective.span_boundary": True,
  },
  "replaced_token": {
    "objective.name": "replaced_token",
    "model.family": "electra",
    "model.embedding_size": 128,
  },
  "next_sentence": {"objective.name": ("masked", "next_sentence")},
  "sentence_order": {"objective.name": ("masked", "sentence_order")},
}
# A document is a paragraph: of 45 whole novels, none could be held out.
DATA = {
  "data.document": "paragraph",
  "data.cleaning.unwrap": True,
  "tokenizer.vocab_size": 8192,
}


def main() -> None:
  parser = report.parser(__doc__)
  parser.add_argument("--minutes", type=float, default=8.0, metavar="N")
  parser.add_argument("--seeds", type=int, default=2, metavar="N")
  parser.add_argument("--folder", help="where the runs are kept")
  parser.add_argument("--objective", action="append", choices=OBJECTIVES)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    measure(args, args.folder or folder)


def measure(args: Any, folder: str) -> None:
  """Runs what isn't there yet; prints each run, and means over the seeds."""
  novels, blimp = report.data_folder("novels"), report.data_folder("blimp")
  if novels is None or blimp is None:
    sys.exit("no novels/ or blimp/ in FLAXMLM_DATA")
  keys = DATA | {"data.source": novels}
  store = os.path.join(folder, "store")
  call("prepare", store, keys)
  minutes = 0.2 if args.quick else args.minutes
  runs = []
  for name in args.objective or OBJECTIVES:
    own = OBJECTIVES[name] | {"data.store": store, "eval.rows": 2048}
    steps = fit(os.path.join(folder, "pace", name), own, minutes)
    for seed in range(1 if args.quick else args.seeds):
      run = os.path.join(folder, f"{name}-{seed}-{steps}")
      found = os.path.join(run, "figures.json")
      if not os.path.exists(found):
        figures = one(run, own | {"seed": seed, "train.steps": steps}, blimp)
        with open(found, "w", encoding="utf-8") as file:
          json.dump(figures, file)
      with open(found, encoding="utf-8") as file:
        runs.append({"objective": name, "seed": seed} | json.load(file))
      report.table(runs[-1:])
  report.table([mean(runs, name) for name in dict.fromkeys(names(runs))])
  report.finish(
    args,
    "equal_time",
    {"minutes": minutes, "runs": runs},
    packages=["flaxmlm", "jax", "flax", "optax"],
  )


def names(runs: list[dict[str, Any]]) -> list[str]:
  """Returns the objective of each run."""
  return [run["objective"] for run in runs]


def mean(runs: list[dict[str, Any]], name: str) -> dict[str, Any]:
  """Returns an objective's means, each with half the range of its seeds."""
  own = [run for run in runs if run["objective"] == name]
  row: dict[str, Any] = {"objective": name, "steps": own[0]["steps"]}
  for figure in ("seconds", "own", "mlm_loss", "blimp"):
    values = [run[figure] for run in own]
    row[figure] = statistics.mean(values)
    row["+-" + figure] = (max(values) - min(values)) / 2
  return row


def fit(run: str, keys: dict[str, Any], minutes: float) -> int:
  """Returns the steps that an objective does in some minutes."""
  path = os.path.join(run, "metrics.jsonl")
  short = {"train.steps": PACE_STEPS, "log.every": PACE_STEPS // 3}
  if not os.path.exists(os.path.join(run, "report.html")):
    call("train", run, keys | short | {"eval.rows": 32})
  speeds = [
    line["train/tokens_per_second"]
    for line in metrics.read(path)
    if "train/tokens_per_second" in line
  ]
  rows = config.load("configs/bert_mini.py")
  tokens = rows.train.batch_size * rows.data.row_length
  return round(60 * minutes * max(speeds) / tokens / 10) * 10


def one(run: str, keys: dict[str, Any], blimp: str) -> dict[str, Any]:
  """Trains, and returns the figures of the run."""
  began = time.perf_counter()
  call("train", run, keys | {"eval.every": 0, "checkpoint.every": 0})
  seconds = time.perf_counter() - began
  lines = metrics.read(os.path.join(run, "metrics.jsonl"))
  values = [line for line in lines if "eval/loss" in line][-1]
  name = keys.get("objective.name", "masked")
  own, loss = values["eval/loss"], values["eval/loss"]
  if name == "replaced_token":
    own = values["eval/discriminator_loss"]
  elif isinstance(name, tuple):
    own = values[f"eval/{name[-1]}_accuracy"]
  if name != "replaced_token":
    masked = {"objective.name": "masked", "objective.rate": 0.15}
    masked |= {"objective.rate_end": None, "objective.span_boundary": False}
    loss = call("evaluate", run, masked, "--rows=2048")["eval/loss"]
  pairs = (f"--source={blimp}", "--task=blimp", "--rows=200")
  return {
    "steps": keys["train.steps"],
    "seconds": seconds,
    "own": own,
    "mlm_loss": loss,
    "blimp": call("evaluate", run, {}, *pairs)["accuracy"],
    "values": values,
  }


def call(
  program: str, folder: str, keys: dict[str, Any], *arguments: str
) -> dict[str, Any]:
  """Runs a program in a folder; returns the figures that `evaluate` writes."""
  found = os.path.join(folder, "evaluated.json")
  given = [f"--config.{key}={value}" for key, value in keys.items()]
  if program == "evaluate":
    given.append(f"--json={found}")
  else:
    given.append("--config=configs/bert_mini.py")
  where = "out" if program == "prepare" else "workdir"
  command = [sys.executable, "-m", f"flaxmlm.{program}", f"--{where}={folder}"]
  subprocess.run([*command, *given, *arguments], check=True, stdout=sys.stderr)
  if program != "evaluate":
    return {}
  with open(found, encoding="utf-8") as file:
    return json.load(file)


if __name__ == "__main__":
  main()
