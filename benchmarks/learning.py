"""Whether each objective is learnt within minutes, from raw text on.

  python -m benchmarks.learning [--objective=NAME ...] [--json]

Runs `python -m flaxmlm.train` on the texts that come with Python, once for each
objective, with configs/quickstart.py and the keys below: the seconds are those
of the whole program, from text to report. What is reached on held-out documents
stands beside chance: the frequencies of tokens alone for hidden ones, a coin
for sentences, the share of replaced tokens alone for ELECTRA's discriminator,
the commonest label for labelled pairs. Of the discriminator's alarms, too, the
share that is right stands beside that of replaced tokens.

`sentence_pair` has labels of its own: of a docstring, its first paragraph and
the rest, and whether that is about a class or anything else, as many of the one
as of the other. Left out are those of a single paragraph, and long ones.
"""

from __future__ import annotations

import collections
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks import report
from flaxmlm import config
from flaxmlm.data import sources
from flaxmlm.training import metrics

STEPS = 700
MOST = 350  # characters of a labelled pair
# Many documents are a sentence, which is no pair. Whether two texts belong
# together is a product of what either is about: from small first parameters, it
# is found late.
PAIRS = {
  "data.row_length": 128,
  "data.cleaning.min_chars": 200,
  "data.validation_fraction": 0.2,
  "eval.rows": 4096,
  "model.layers": 2,
  "model.max_positions": 128,
  "model.init_stddev": 0.1,
  "objective.weights": (0.3, 1.0),
  "optimizer.peak_lr": 4e-3,
  "train.steps": 1500,
}
OBJECTIVES: dict[str, dict[str, Any]] = {
  "masked": {},
  "whole_word": {},
  "ngram": {},
  "span": {"objective.span_boundary": True},
  "replaced_token": {
    "model.family": "electra",
    "model.init_stddev": 0.05,
    "objective.mask_share": 0.85,
    "objective.random_share": 0.0,
    "train.steps": 1600,
  },
  "next_sentence": PAIRS,
  "sentence_order": PAIRS,
  "sentence_pair": {
    "data.pair_field": "second",
    "data.row_length": 160,
    "tokenizer.vocab_size": 1024,
    "train.steps": 400,
    "model.max_positions": 160,
    "model.init_stddev": 0.1,
    "objective.weights": (0.3, 1.0),
    "objective.labels": ("class", "other"),
    "eval.rows": 4096,
  },
}


def main() -> None:
  parser = report.parser(__doc__)
  parser.add_argument("--objective", action="append", choices=OBJECTIVES)
  args = parser.parse_args()
  rows = []
  for name in args.objective or OBJECTIVES:
    found = measure(name, quick=args.quick)
    report.table(found)
    rows += found
  report.table(rows)
  report.finish(
    args, "learning", {"results": rows}, packages=["flaxmlm", "jax", "flax"]
  )


def measure(name: str, *, quick: bool) -> list[dict[str, Any]]:
  """Trains with an objective; returns what each of its questions came to."""
  pairs = name in config.PAIR_OBJECTIVES
  keys = {
    "objective.name": ("masked", name) if pairs else name,
    "train.steps": STEPS,
    "eval.every": 0,
    "checkpoint.every": 0,
  } | OBJECTIVES[name]
  commonest = 0.0
  with tempfile.TemporaryDirectory() as folder:
    if name == "sentence_pair":
      files = [os.path.join(folder, f"{n}.jsonl") for n in ("train", "held")]
      keys["data.source"], keys["data.validation_source"] = files
      commonest = write_pairs(*files)
    if quick:
      keys |= {"train.steps": 20, "optimizer.warmup_steps": 5}
    run = os.path.join(folder, "run")
    begin = time.perf_counter()
    subprocess.run(
      [
        *(sys.executable, "-m", "flaxmlm.train", f"--workdir={run}"),
        "--config=configs/quickstart.py",
        *(f"--config.{key}={value}" for key, value in keys.items()),
      ],
      check=True,
      stdout=sys.stderr,
    )
    seconds = time.perf_counter() - begin
    lines = metrics.read(os.path.join(run, "metrics.jsonl"))
  values = {
    key.removeprefix("eval/"): value
    for key, value in lines[-1].items()
    if key.startswith("eval/")
  }
  ran = {"objective": name, "steps": keys["train.steps"], "seconds": seconds}
  unigram = {"figure": "loss", "chance": values["unigram_entropy"]}
  hidden = {"asked": "hidden tokens", "reached": values["loss"]}
  found = [ran | hidden | unigram | {"targets": values["targets"]}]
  tasks = [
    key.removesuffix("_targets") for key in values if key.endswith("_targets")
  ]
  for task in tasks:
    losses = ("discriminator", "span_boundary")
    figure = "loss" if task in losses else "accuracy"
    chance = metrics.chance(task, values).get(figure, commonest)
    row = {"asked": task, "figure": figure, "chance": chance}
    row["reached"] = values[f"{task}_{figure}"]
    found.append(ran | row | {"targets": values[f"{task}_targets"]})
    share = values.get("discriminator_replaced")
    precision = values.get("discriminator_precision")
    if task == "discriminator" and precision:
      hits = share * values["discriminator_recall"] * found[-1]["targets"]
      row = {"asked": "its alarms", "figure": "precision", "chance": share}
      row |= {"reached": precision, "targets": round(hits / precision)}
      found.append(ran | row)
  for row in found:
    chance, targets = row["chance"], row["targets"]
    row["standard errors"] = (
      (row["reached"] - chance) / math.sqrt(chance * (1 - chance) / targets)
      if row["figure"] != "loss"
      else ""
    )
  return found


def write_pairs(train: str, held_out: str) -> float:
  """Writes labelled pairs, as many of a class as of other things.

  Returns:
    The larger share of the labels in the third that is held out.
  """
  found: dict[str, list[Any]] = {"class": [], "other": []}
  for document in sources.read(["embedded"]):
    first, _, rest = document.text.partition("\n\n")
    if rest and len(document.text) <= MOST and "topics." not in document.where:
      last = document.where.rpartition(".")[2]
      label = "class" if last[:1].isupper() else "other"
      pair = {"text": first, "second": rest, "label": label}
      found[label].append(pair)
  draw = random.Random(0)
  pairs = [*found["class"], *draw.sample(found["other"], len(found["class"]))]
  draw.shuffle(pairs)
  border = len(pairs) // 3
  for path, some in ((held_out, pairs[:border]), (train, pairs[border:])):
    with open(path, "w", encoding="utf-8") as file:
      file.writelines(json.dumps(pair) + "\n" for pair in some)
  counts = collections.Counter(pair["label"] for pair in pairs[:border])
  return max(counts.values()) / border


if __name__ == "__main__":
  main()
