"""Looks at a run, or at a config, and says what is wrong and what to do.

  python -m flaxmlm.doctor runs/mine
  python -m flaxmlm.doctor configs/mine.py --config.train.batch_size=64

Of a run it reads config.json, metrics.jsonl, incidents.jsonl and the store; of
a config the keys, and the store if data.store names one. Nothing is changed,
and nothing is trained. The exit code is 1 if there is a warning, else 0.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from flaxmlm import InputError, config
from flaxmlm.storage import remote

if TYPE_CHECKING:
  from ml_collections import ConfigDict

  from flaxmlm.data.store import TokenStore

Lines = Sequence[Mapping[str, float]]
"""Of metrics.jsonl."""

# A share of documents, or of the rows of a plan.
_MOST_COPIES, _LEAST_FULL = 0.01, 0.7
_MOST_UNKNOWN = 0.005  # of tokens; trained tokenizers have less than 0.0005
_FEW_TOKENS = 2048  # of a batch, where a run is long
_HIDDEN = 0.7  # of the tokens that objective.rate asks for
_SAMPLE, _BEGINNING = 20_000, 32  # documents looked at, tokens of each
_NATS = 0.1  # so much better than knowing frequencies, or worse than the best
_GROWTH = 5.0  # of the gradient's norm, from the middle of the run to its end
_HOST = 0.2  # of a step's time; well-fed steps have less than 0.05
# Of the rate that Kaplan et al. take: BERT-base's published ones are a fifth of
# it, RoBERTa's as much, small models on a laptop take five times as much.
_RATES = (1 / 50, 10)


class Finding(NamedTuple):
  """What is seen, and what to do about it."""

  name: str
  level: str
  """`warning`: the run is worse for it; `note`: it may be meant."""
  seen: str
  advice: str


def main(argv: list[str] | None = None) -> None:
  """Prints what is found; exits with 1 if there is a warning."""
  parser = config.Parser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("what", metavar="RUN|CONFIG", help="a workdir, or a file")
  parser.add_argument("--json", metavar="FILE", help="write the findings here")
  args, overrides = parser.parse_known_args(argv)
  config.check_file("json", args.json)
  found = list(examine(args.what, overrides))
  for finding in found:
    print(f"{finding.level}: {finding.name}: {finding.seen}")
    print(f"  {finding.advice}")
  if not found:
    print(f"{args.what}: nothing is wrong, as far as can be seen from here")
  if args.json is not None:
    with open(args.json, "w", encoding="utf-8") as file:
      json.dump([finding._asdict() for finding in found], file, indent=2)
      file.write("\n")
  if any(finding.level == "warning" for finding in found):
    raise SystemExit(1)


def examine(what: str, overrides: Sequence[str] = ()) -> Iterator[Finding]:
  """Yields what is found in a run or a config.

  Args:
    what: The workdir of a run, or a config file.
    overrides: Arguments like `--config.train.steps=5`, for a config.

  Raises:
    InputError: It is neither.
  """
  here = remote.localize(what)
  if not os.path.isdir(here):
    c = config.load(what, overrides)
    yield from _of_machine()
    yield from _of_config(c)
    if c.data.store is not None:
      yield from _of_store(c, c.data.store)
    return
  if overrides:
    raise InputError(f"{overrides[0]}: {what} is a run, and has its own config")
  path = os.path.join(here, "config.json")
  if not os.path.isfile(path):
    raise InputError(
      f"{what}: no run there (no config.json); name a workdir or a config file"
    )
  c = config.from_json(path)
  from flaxmlm.training import metrics

  lines = metrics.read(os.path.join(here, "metrics.jsonl"))
  yield from _of_machine()
  yield from _of_config(c)
  yield from _of_store(c, c.data.store or os.path.join(here, "store"))
  yield from _of_metrics(c, lines)
  yield from _of_masks(c, c.data.store or os.path.join(here, "store"), lines)
  incidents = metrics.read(os.path.join(here, "incidents.jsonl"))
  yield from _of_incidents(here, incidents)


def _of_machine() -> Iterator[Finding]:
  """Sums that JAX gets wrong on CPUs; see `versions.adds_up`."""
  import jax

  from flaxmlm.training import versions

  if jax.default_backend() == "cpu" and not versions.adds_up():
    said = versions.WRONG_SUMS.format(versions.find()["jaxlib"])
    seen, _, advice = said.partition("; ")
    yield Finding("wrong sums", "warning", seen, advice)


def _of_config(c: ConfigDict) -> Iterator[Finding]:
  if c.optimizer.name == "adamw":
    usual = usual_rate(count_matrices(c))
    low, high = (share * usual for share in _RATES)
    if not low <= c.optimizer.peak_lr <= high:
      yield Finding(
        "learning rate",
        "warning",
        f"optimizer.peak_lr={c.optimizer.peak_lr:g}; for a model of this size"
        f" {usual:.1g} is usual",
        f"take something between {low:.1g} and {high:.1g}",
      )
  tokens = c.train.batch_size * c.data.row_length
  if c.train.steps >= 10_000 and tokens < _FEW_TOKENS:
    yield Finding(
      "small batch",
      "note",
      f"a batch has {tokens:,} tokens; BERT had 131,072, RoBERTa 4 million",
      "raise train.batch_size; train.microbatches keeps it in memory",
    )
  hidden = c.objective.rate * (c.data.row_length - 2)
  if hidden < 1:
    yield Finding(
      "masks",
      "warning",
      f"objective.rate={c.objective.rate:g} of rows of"
      f" {c.data.row_length} tokens is less than one token",
      "raise objective.rate (0.15 is BERT's) or data.row_length",
    )
  if c.optimizer.schedule != "constant" and c.optimizer.warmup_steps == 0:
    yield Finding(
      "no warm-up",
      "note",
      "optimizer.warmup_steps=0",
      "a tenth of train.steps is usual; without it, first steps may diverge",
    )


def usual_rate(parameters: float) -> float:
  """Returns the learning rate that Adam is usually given for a model.

  Kaplan et al., 2020, "Scaling Laws for Neural Language Models", equation D.1,
  of the parameters without embeddings; not less than a tenth of BERT's 1e-4.

  >>> round(usual_rate(85e6), 6)
  0.000692
  """
  return max(0.003239 - 0.0001395 * math.log(max(parameters, 1.0)), 1e-5)


def count_matrices(c: ConfigDict) -> float:
  """Returns the parameters of all layers' matrices, roughly."""
  width = c.model.width
  return c.model.layers * (4 * width**2 + 2 * width * c.model.ffn)


def _of_store(c: ConfigDict, folder: str) -> Iterator[Finding]:
  """What the text and its tokens are like."""
  from flaxmlm.data import rows
  from flaxmlm.data.store import open_store

  if not _has_store(folder):
    yield Finding(
      "no store",
      "note",
      f"{folder}: no store there, so nothing of the text was looked at",
      "make it by python -m flaxmlm.prepare, or start the run",
    )
    return
  store = open_store(folder)
  total = max(int(store.counts.sum()), 1)
  unknown = int(store.counts[store.vocab["unk"]]) / total
  if unknown > _MOST_UNKNOWN:
    yield Finding(
      "unknown tokens",
      "warning",
      f"{unknown:.1%} of the training tokens are unknown to the tokenizer",
      "train one on this text (leave tokenizer.path out), with a larger"
      " tokenizer.vocab_size, or one with bytes; look at data.encoding too",
    )
  copies = find_copies(store)
  if copies > _MOST_COPIES:
    yield Finding(
      "copies",
      "warning",
      f"{copies:.1%} of the training documents begin like another one"
      f" ({_BEGINNING} tokens)",
      "set data.cleaning.deduplicate=True, and take out of the text what is in"
      " every document",
    )
  plan = rows.load(
    store, "train", c.data.row_length, kind=config.row_kind(c.objective)
  )
  if plan.rows and plan.fill < _LEAST_FULL:
    yield Finding(
      "empty rows",
      "warning" if not len(plan.pairs) else "note",
      f"rows of {c.data.row_length} are {plan.fill:.0%} full",
      "take a smaller data.row_length; the rest of each row is padding",
    )
  epochs = c.train.steps * c.train.batch_size / max(plan.rows, 1)
  if epochs > 100:
    yield Finding(
      "epochs",
      "note",
      f"each row is seen {epochs:,.0f} times",
      "more text, or a smaller model; watch eval/loss",
    )


def find_copies(store: TokenStore) -> float:
  """Returns the share of training documents that begin like one before.

  Of a sample, spread evenly; those that are shorter than what is looked at are
  left out.
  """
  import numpy as np

  split = store.train
  lengths = np.diff(split.offsets)
  long = np.flatnonzero(lengths >= _BEGINNING)
  if not len(long):
    return 0.0
  chosen = long[:: max(len(long) // _SAMPLE, 1)]
  starts = split.offsets[chosen]
  ids = split.ids[starts[:, None] + np.arange(_BEGINNING)]
  return 1 - len(np.unique(ids, axis=0)) / len(ids)


def _of_metrics(c: ConfigDict, lines: Lines) -> Iterator[Finding]:
  """How the run learns, and how fast."""
  evals = [line for line in lines if "eval/loss" in line]
  trained = [line for line in lines if "train/loss" in line]
  if len(evals) > 1:
    yield from _of_evaluations(c, evals)
  norms = [line["train/grad_norm"] for line in trained]
  if len(norms) >= 20:
    quarter = len(norms) // 4
    middle = statistics.median(norms[quarter : 2 * quarter])
    last = statistics.median(norms[-quarter:])
    if last > _GROWTH * middle:
      yield Finding(
        "growing gradients",
        "warning",
        f"the gradient's norm went from {middle:.3g} to {last:.3g}",
        "lower optimizer.peak_lr, or go back to a checkpoint from before"
        " (docs/reliability.md)",
      )
  shares = [x for line in trained if (x := line.get("train/host_share", 0.0))]
  if len(shares) >= 4 and statistics.median(shares[1:]) > _HOST:
    yield Finding(
      "host-bound steps",
      "warning",
      f"{statistics.median(shares[1:]):.0%} of a step the devices wait for the"
      " host",
      "put the store on a local disk; raise log.every; a larger batch or model"
      " has more work a row",
    )


def _of_evaluations(c: ConfigDict, evals: Lines) -> Iterator[Finding]:
  last = evals[-1]
  loss, step = last["eval/loss"], int(last["step"])
  unigram = last.get("eval/unigram_entropy", math.inf)
  patience = max(2 * c.optimizer.warmup_steps, min(c.train.steps // 4, 5000))
  if loss > unigram - _NATS and step >= patience:
    yield Finding(
      "unigram line",
      "warning",
      f"after {step:,} steps the validation loss is {loss:.2f}; knowing the"
      f" token frequencies alone gives {unigram:.2f}",
      "nothing is learnt from context yet: try another optimizer.peak_lr (both"
      " ways), a larger batch, a lower objective.rate",
    )
  best = min(evals, key=lambda line: line["eval/loss"])
  later = [line for line in evals if line["step"] > best["step"]]
  if len(later) >= 3 and loss > best["eval/loss"] + _NATS:
    yield Finding(
      "rising validation loss",
      "warning",
      f"{best['eval/loss']:.3f} at step {int(best['step']):,}, {loss:.3f} at"
      f" step {step:,}",
      "more text, dropout or a smaller model if the training loss still falls;"
      " if it rises too, a lower optimizer.peak_lr; checkpoint.keep_best keeps"
      " the best",
    )


def _of_masks(c: ConfigDict, folder: str, lines: Lines) -> Iterator[Finding]:
  """Whether as many tokens are hidden as is asked for."""
  from flaxmlm.data import rows
  from flaxmlm.data.store import open_store

  asked = [line["eval/targets"] for line in lines if "eval/targets" in line]
  if not asked or not _has_store(folder):
    return
  kind = config.row_kind(c.objective)
  plan = rows.load(
    open_store(folder), "validation", c.data.row_length, kind=kind
  )
  pieces = int(plan.row_start[min(plan.rows, c.eval.rows)])
  tokens = int(plan.piece_length[:pieces].sum())
  share = asked[-1] / max(tokens, 1)
  if share < _HIDDEN * c.objective.rate:
    yield Finding(
      "few masks",
      "warning",
      f"{share:.1%} of the tokens are hidden, where objective.rate asks for"
      f" {c.objective.rate:.1%}",
      "words or spans may be longer than the share of a row: raise"
      " objective.rate or data.row_length, or take objective.name=masked",
    )


def _has_store(folder: str) -> bool:
  manifest = os.path.join(folder, "manifest.json")
  return remote.is_remote(folder) or os.path.isfile(manifest)


def _of_incidents(
  workdir: str, incidents: Sequence[Mapping[str, Any]]
) -> Iterator[Finding]:
  kinds: dict[str, int] = {}
  for incident in incidents:
    kinds[incident["kind"]] = kinds.get(incident["kind"], 0) + 1
  if kinds:
    said = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
    serious = {"rollback", "stop", "overflow"} & set(kinds)
    yield Finding(
      "incidents",
      "warning" if serious else "note",
      f"{said} in {os.path.join(workdir, 'incidents.jsonl')}",
      "look at their batches by the commands there; a lower"
      " optimizer.peak_lr or optimizer.clip_norm helps if they go on",
    )
  stalls = os.path.join(workdir, "stalls")
  if os.path.isdir(stalls) and os.listdir(stalls):
    yield Finding(
      "stalls",
      "note",
      f"the run hung {len(os.listdir(stalls))} times: {stalls}",
      "the stacks there show where (docs/reliability.md, Stalls)",
    )


if __name__ == "__main__":
  config.run(main)
