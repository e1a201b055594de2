"""Reading batches: tokens a second on one core, and how full the rows are.

The store is made of paragraphs of real novels where they are, else of the
embedded corpus, and copied to the size that is read; batches are of 256 rows.
Target at L = 512: 10 M tokens/s a core, rows at least 99.5 % full.
"""

from __future__ import annotations

import os
import tempfile
import time

import numpy as np

from benchmarks import report
from flaxmlm import config, prepare
from flaxmlm.data import batches, rows, store

BATCH = 256


def main() -> None:
  parser = report.parser(__doc__)
  args = parser.parse_args()
  novels = report.data_folder("novels")
  if novels is None:
    data = {"data.source": "embedded"}
  else:
    data = {"data.source": novels, "data.document": "paragraph"}
  if args.quick and novels is not None:
    names = sorted(os.listdir(novels))[:10]
    data["data.source"] = tuple(os.path.join(novels, name) for name in names)
  with tempfile.TemporaryDirectory() as folder:
    values = config.to_flat(config.defaults()) | data
    values["tokenizer.vocab_size"] = 8192
    values["tokenizer.sample_chars"] = 1_000_000
    made = prepare.prepare_store(
      config.from_flat(values), os.path.join(folder, "store")
    )
    results = [
      measure(made, L, steps=20 if args.quick else 200) for L in (128, 512)
    ]
  report.table(results)
  report.finish(
    args,
    "input",
    {
      "corpus": "embedded" if novels is None else "novels, by paragraph",
      "batch_size": BATCH,
      "results": results,
    },
    packages=["flaxmlm", "numpy"],
  )


def measure(made: store.TokenStore, L: int, *, steps: int) -> dict:
  """Plans and reads batches in this one thread, in the best of three runs."""
  start = time.perf_counter()
  plan = rows.plan(made.train.offsets, L)
  planned = time.perf_counter() - start
  seconds = []
  for run in range(3):
    start = time.perf_counter()
    used = 0
    for step in range(steps):
      batch = batches.at(made, plan, seed=run, step=step, batch_size=BATCH)
      used += np.count_nonzero(batch.segments)
    seconds.append(time.perf_counter() - start)
  order = np.arange(BATCH)
  start = time.perf_counter()
  for step in range(steps):
    batches.row_at(plan.rows, order + step * BATCH, seed=0)
  ordered = time.perf_counter() - start
  return {
    "L": L,
    "documents": len(made.train.sources),
    "rows": plan.rows,
    "fill_percent": 100 * plan.fill,
    "plan_seconds": planned,
    "batch_ms": 1e3 * min(seconds) / steps,
    "order_ms": 1e3 * ordered / steps,
    "million_tokens_per_second": used / min(seconds) / 1e6,
  }


if __name__ == "__main__":
  main()
