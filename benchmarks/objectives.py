"""What an objective costs: hiding and pairing, beside the step that they serve.

  python -m benchmarks.objectives [--quick] [--json] [--v5e]

The step is that of BERT 4x256 with `masked`, forward, backward and AdamW, as in
`benchmarks.train_step`; corruption is timed alone, on the same rows, with words
of one to four tokens and sentences of about twenty.

`--v5e` compiles the same for a chip of a TPU v5e (bfloat16; no chip is needed,
but libtpu is) and compares the bytes that go to and from HBM, each loop with as
many turns as a row has tokens, which is more than there are.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import report
from benchmarks.train_step import (
  SHAPES,
  SPECIALS,
  Shape,
  make_ours,
  make_rows,
  make_step,
)
from flaxmlm import config, objectives
from flaxmlm.objectives import Batch, hiding, replaced_token
from flaxmlm.plan import ENVIRONMENT, find_devices
from flaxmlm.planning import chips, hlo
from flaxmlm.training import memory, sharding

NAMES = (
  "masked",
  "whole_word",
  "ngram",
  "span",
  "replaced_token",
  "next_sentence",
  "sentence_order",
  "sentence_pair",
)


def main() -> None:
  parser = report.parser(__doc__)
  parser.add_argument("--v5e", action="store_true", help="bytes, by compiling")
  args = parser.parse_args()
  if args.v5e:
    compare_bytes(args)
    return
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


def compare_bytes(args: argparse.Namespace) -> None:
  """Prints the bytes of corruption beside those of a step, on a v5e."""
  os.environ |= ENVIRONMENT
  devices = find_devices(chips.parse_tpu("v5e:2x2"))[:1]
  rows = [
    {"shape": name} | row
    for name in ("bert_4x256_L128", "bert_4x256_L512")
    for row in count_bytes(SHAPES[name], devices)
  ]
  report.table(rows)
  report.finish(
    args, "objectives_v5e", {"results": rows}, packages=["flaxmlm", "jax"]
  )


def count_bytes(
  shape: Shape, devices: Sequence[jax.Device]
) -> Iterator[dict[str, Any]]:
  """Yields the bytes of each objective for rows of a shape."""
  mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=devices)
  place = sharding.batch_sharding(mesh)

  def moved(function: Any, *arguments: Any) -> float:
    text = function.lower(*arguments).compile().as_text()
    costs = hlo.costs(hlo.parse(text), turns=shape.length)
    return sum(cost.bytes for cost in costs) / 1e6

  step, make_arguments, _ = make_step(shape, "bfloat16", devices=devices)
  whole = moved(step, *make_arguments(shapes=True))
  keys, batch = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    (jax.random.split(jax.random.key(0), shape.rows), make_batch(shape)),
  )
  for name in NAMES:
    corrupt = jax.jit(make_objective(shape, name).corrupt)
    part = moved(corrupt, keys, batch, 0)
    yield {
      "objective": name,
      "corruption MB": part,
      "step MB": whole,
      "share %": 100 * part / whole,
    }


def make_corrupt(shape: Shape, name: str) -> Callable[[], Any]:
  """Returns what corrupts one batch of a shape."""
  batch = make_batch(shape)
  keys = jax.random.split(jax.random.key(0), shape.rows)
  corrupt = jax.jit(make_objective(shape, name).corrupt)
  return lambda: corrupt(keys, batch, 0)


def make_objective(shape: Shape, name: str) -> objectives.Objective:
  """Returns an objective for rows of a shape."""
  return objectives.build(
    config.defaults().objective.to_dict() | {"name": name},
    row_length=shape.length,
    vocab=SPECIALS | {"size": shape.vocab},
    steps=1000,
  )


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
