"""Which objective wins at equal time: the same model, texts and minutes.

  python -m benchmarks.equal_time [--minutes=N] [--seeds=N] [--json]

configs/bert_mini.py (BERT 4x256) on paragraphs of real novels (see
`report.data_folder`), a vocabulary of 8,192, one token store for all; a
fiftieth of the paragraphs is held out, so validation has the same novels. First
the pace of each objective is measured, for which the machine must be quiet:
that gives the steps that fit. Reading, compiling and evaluating are not
counted, and a run that something disturbs later loses no step. Rows of
`next_sentence` and `sentence_order` hold a paragraph each and are less full
than the others. Then, of each seed:

- the objective's own figure on held-out paragraphs;
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
from typing import Any

from benchmarks import report
from flaxmlm.training import metrics

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
    "objective.mask_share": 0.85,
    "objective.random_share": 0.0,
    "model.family": "electra",
    "model.embedding_size": 128,
  },
  "next_sentence": {"objective.name": ("masked", "next_sentence")},
  "sentence_order": {"objective.name": ("masked", "sentence_order")},
}
# Of whole novels one or two would be held out. Short paragraphs are dialogue,
# of which no pair can be made.
DATA = {
  "data.document": "paragraph",
  "data.cleaning.unwrap": True,
  "data.cleaning.min_chars": 200,
  "tokenizer.vocab_size": 8192,
  # With BERT's 0.02 the pairs of sentences stay a coin's throw for longer than
  # minutes.
  "model.init_stddev": 0.05,
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
  store = os.path.join(folder, "store")
  call("prepare", store, DATA | {"data.source": novels})
  minutes = 0.2 if args.quick else args.minutes
  shared = DATA | {"data.store": store, "eval.rows": 2048}
  chosen = {
    name: shared | OBJECTIVES[name] for name in args.objective or OBJECTIVES
  }
  paces = {
    name: measure_pace(os.path.join(folder, "pace", name), keys)
    for name, keys in chosen.items()
  }
  runs = []
  for seed in range(1 if args.quick else args.seeds):
    for name, keys in chosen.items():
      steps = max(10, round(60 * minutes / paces[name]))
      run = os.path.join(folder, f"{name}, seed {seed}")
      found = os.path.join(run, "figures.json")
      if not os.path.exists(found):
        own = {"seed": seed, "train.steps": steps}
        own["optimizer.warmup_steps"] = min(100, steps // 10)
        figures = {"objective": name, "seed": seed} | one(
          run, keys | own, blimp
        )
        with open(found + ".tmp", "w", encoding="utf-8") as file:
          json.dump(figures, file)
        os.replace(found + ".tmp", found)
      with open(found, encoding="utf-8") as file:
        runs.append(json.load(file))
      last = runs[-1].items()
      report.table([{k: v for k, v in last if k != "values"}])
  report.table([mean(runs, name) for name in chosen])
  report.finish(
    args,
    "equal_time",
    {"minutes": minutes, "seconds_a_step": paces, "runs": runs},
    packages=["flaxmlm", "jax", "flax", "optax"],
  )


def mean(runs: list[dict[str, Any]], name: str) -> dict[str, Any]:
  """Returns an objective's means, each with half the range of its seeds."""
  own = [run for run in runs if run["objective"] == name]
  row = {key: own[0][key] for key in ("objective", "steps", "figure")}
  for key in ("own", "mlm_loss", "blimp"):
    values = [run[key] for run in own]
    row[key] = statistics.mean(values)
    row[f"{key} +-"] = (max(values) - min(values)) / 2
  return row


def measure_pace(run: str, keys: dict[str, Any]) -> float:
  """Returns the seconds of an objective's step, the median of some windows."""
  if not os.path.exists(os.path.join(run, "report.html")):
    short = {"train.steps": 120, "log.every": 20, "eval.rows": 32}
    call("train", run, keys | short)
  return statistics.median(seconds / 20 for seconds in windows(run)[1:])


def windows(run: str) -> list[float]:
  """Returns the seconds of training between the lines of a run's metrics."""
  lines = [
    line
    for line in metrics.read(os.path.join(run, "metrics.jsonl"))
    if "train/tokens_per_second" in line
  ]
  tokens = [0.0, *(line["train/tokens"] for line in lines)]
  return [
    (tokens[n + 1] - tokens[n]) / line["train/tokens_per_second"]
    for n, line in enumerate(lines)
  ]


def one(run: str, keys: dict[str, Any], blimp: str) -> dict[str, Any]:
  """Trains, and returns the figures of the run."""
  call("train", run, keys | {"eval.every": 0, "checkpoint.every": 0})
  lines = metrics.read(os.path.join(run, "metrics.jsonl"))
  values = [line for line in lines if "eval/loss" in line][-1]
  name = keys.get("objective.name", "masked")
  figure, loss = "loss", values["eval/loss"]
  if name == "replaced_token":
    figure = "discriminator_loss"
  else:
    masked = {"objective.name": "masked", "objective.rate": 0.15}
    masked |= {"objective.rate_end": None, "objective.span_boundary": False}
    loss = call("evaluate", run, masked, "--rows=2048")["eval/loss"]
    if isinstance(name, tuple):
      figure = f"{name[-1]}_accuracy"
  pairs = (f"--source={blimp}", "--task=blimp", "--rows=200")
  return {
    "steps": keys["train.steps"],
    "seconds": sum(windows(run)),
    "figure": figure,
    "own": values[f"eval/{figure}"],
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
