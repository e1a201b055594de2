"""What an objective costs: hiding and pairing, beside the step that they serve.

  python -m benchmarks.objectives [--quick] [--json]

The step is that of BERT 4x256 with `masked`, forward, backward and AdamW, as in
`benchmarks.train_step`; corruption is timed alone, on the same rows, with words
of one to four tokens and sentences of about twenty.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import report
from benchmarks.train_step import SHAPES, SPECIALS, Shape, make_ours, make_rows
from flaxmlm import config, objectives
from flaxmlm.objectives import Batch, hiding, replaced_token
from flaxmlm.training import memory

NAMES = (
  "masked",
  "whole_word",
  "ngram",
  "span",
  "replaced_token",
  "next_sentence",
  "sentence_order",
)


def main() -> None:
  args = report.parser(__doc__).parse_args()
  memory.use_huge_pages()
  rows = []
  for name in ("bert_4x256_L128", "bert_4x256_L512"):
    shape = SHAPES[name]
    step = make_ours(shape)
    turns = 3 if args.quick else 15
    whole = measure(lambda step=step: step(1), turns)
    runs = {name: make_corrupt(shape, name) for name in NAMES}
    runs["replaced_token, drawing"] = make_draw(shape)
    for objective, run in runs.items():
      spent = measure(run, turns)
      rows.append(
        {
          "shape": name,
          "objective": objective,
          "corruption ms": 1e3 * spent,
          "step ms": 1e3 * whole,
          "share %": 100 * spent / whole,
        }
      )
  report.table(rows)
  report.finish(
    args, "objectives", {"results": rows}, packages=["flaxmlm", "jax"]
  )


def make_corrupt(shape: Shape, name: str) -> Callable[[], Any]:
  """Returns what corrupts one batch of a shape."""
  options = config.defaults().objective.to_dict() | {"name": name}
  objective = objectives.build(
    options,
    row_length=shape.length,
    vocab=SPECIALS | {"size": shape.vocab},
    steps=1000,
  )
  batch = make_batch(shape)
  keys = jax.random.split(jax.random.key(0), shape.rows)
  corrupt = jax.jit(objective.corrupt)
  return lambda: corrupt(keys, batch, 0)


def make_draw(shape: Shape) -> Callable[[], Any]:
  """Returns what draws ELECTRA's tokens for one batch."""
  slots = int(hiding.budgets(shape.length, 0.15)[-1])
  size = (shape.rows, slots, shape.vocab)
  logits = jax.random.normal(jax.random.key(1), size)
  keys = jax.random.split(jax.random.key(0), shape.rows)
  draw = jax.jit(replaced_token.draw)
  return lambda: draw(keys, logits)


def make_batch(shape: Shape) -> Batch:
  """Returns rows of one document, and others of another, with flags."""
  random = np.random.default_rng(0)
  ids, segments, positions = make_rows(shape)
  starts = random.random(ids.shape) < 0.7
  starts[:, [0, 1, -2]] = True
  sentences = random.random(ids.shape) < 0.05
  flags = (starts | sentences) + 2 * sentences
  # Room for one more [SEP].
  ids[:, -2:], segments[:, -1] = (SPECIALS["sep"], SPECIALS["pad"]), 0
  numbers = np.arange(shape.rows)
  batch = Batch(ids, segments, positions, flags.astype(np.uint8), numbers)
  return jax.device_put(batch._replace(other=batch))


def measure(run: Callable[[], Any], turns: int) -> float:
  """Returns the median time of a run, in seconds."""
  jax.block_until_ready(run())
  times = []
  for _ in range(turns):
    begin = time.perf_counter()
    jax.block_until_ready(run())
    times.append(time.perf_counter() - begin)
  return statistics.median(times)


if __name__ == "__main__":
  main()
