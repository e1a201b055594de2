"""Measures a trained model on its validation split, or on any text.

  python -m flaxmlm.evaluate --workdir=runs/quickstart --source='other/*.txt'

The folder may be Hugging Face's: then --source is needed, and --config, or keys
of it, say how it is measured (data.row_length, objective.rate).
Masks depend on the row alone: two evaluations of the same rows agree exactly.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from typing import TYPE_CHECKING

from flaxmlm import InputError, config
from flaxmlm.interop import families
from flaxmlm.training.chain import newest_step

if TYPE_CHECKING:
  from ml_collections import ConfigDict


def main(argv: list[str] | None = None) -> None:
  """Prints loss, perplexity and accuracy beside their baselines."""
  parser = config.parser(__doc__)
  parser.add_argument(
    "--source",
    metavar="TEXT",
    help="text to measure on, in the forms of data.source; by default the"
    " run's validation split",
  )
  parser.add_argument(
    "--rows", type=int, metavar="N", help="rows at most; by default all"
  )
  parser.add_argument("--json", metavar="FILE", help="write the figures here")
  args, c = config.parse(parser, argv, huggingface=True)
  is_run = not families.is_folder(args.workdir)
  if is_run and newest_step(args.workdir) is None:
    raise InputError(f"{args.workdir}: no checkpoint there yet; train first")
  check_model(args.workdir, c)
  if not is_run and args.source is None:
    raise InputError(
      f"{args.workdir} is a Hugging Face folder, without a validation split;"
      " name a text by --source"
    )
  if args.rows is not None and args.rows < 1:
    raise InputError(f"--rows={args.rows}: wants at least 1")

  from flaxmlm import prepare
  from flaxmlm.data import batches, rows
  from flaxmlm.train import open_data

  with contextlib.ExitStack() as stack:
    tokenizer = c.tokenizer.path
    if is_run:
      trained, _, plan = open_data(c, args.workdir)
      tokenizer = os.path.join(trained.folder, "tokenizer")
    if args.source is None:
      store = trained
    else:
      folder = stack.enter_context(tempfile.TemporaryDirectory())
      store = prepare.prepare_store(
        config.check_keys(
          config.to_flat(c)
          | {
            "data.source": args.source,
            "data.weights": (),
            "data.validation_source": None,
            "data.validation_fraction": 0.0,
            "tokenizer.path": tokenizer,
          },
          where="--source",
        ),
        os.path.join(folder, "store"),
      )
      plan = rows.load(
        store,
        "train",
        c.data.row_length,
        sentences=config.asks_about_pairs(c),
      )

    import jax
    import numpy as np

    from flaxmlm import load, objectives
    from flaxmlm.objectives import as_batch
    from flaxmlm.training import loop, metrics, sharding
    from flaxmlm.training.step import make_eval_step

    m = load(args.workdir)
    needed = jax.eval_shape(
      lambda key: objectives.init_params(
        key, model=m.model, options=c.objective
      ),
      jax.random.key(0),
    )
    missing = ", ".join(name for name in needed if name not in m.params)
    if missing:
      raise InputError(
        f"{args.workdir}: has no {missing}; nothing to measure of"
        f" objective.name={c.objective.name!r}"
      )
    # The frequencies of a Hugging Face folder's training aren't known.
    counts = (trained if is_run else store).counts
    mesh = sharding.make_mesh(**c.mesh)
    places = sharding.tree_sharding(mesh, m.params)
    objective = objectives.build(
      c.objective,
      row_length=c.data.row_length,
      vocab=store.vocab,
      steps=c.train.steps,
    )
    eval_step = make_eval_step(
      m.model,
      objective,
      mesh=mesh,
      params_sharding=places,
      log_unigram=metrics.log_unigram(
        counts, objectives.special_ids(store.vocab)
      ),
    )
    size = sharding.whole_rows(mesh, c.train.batch_size // c.train.microbatches)
    every = batches.in_order(
      store,
      plan,
      batch_size=size,
      rows=args.rows,
      others=config.wants_others(c),
    )
    values = loop.evaluate(
      eval_step,
      jax.device_put(m.params, places),
      (sharding.put_rows(mesh, as_batch(batch)) for batch in every),
      shares=objective.shares,
    ) | {"eval/uniform_entropy": float(np.log(store.vocab["size"]))}

  rows_used = min(plan.rows, args.rows or plan.rows)
  seen = f", step {m.step:,}," if is_run else ""
  print(
    f"{args.workdir}{seen} on {args.source or 'its validation split'}:"
    f" {rows_used:,} rows"
  )
  for name, value in values.items():
    print(f"{name.removeprefix('eval/'):>18}  {value:,.4f}")
  if args.json is not None:
    with open(args.json, "w", encoding="utf-8") as file:
      step = {"step": m.step} if is_run else {}
      json.dump(step | {"rows": rows_used} | values, file, indent=2)
      file.write("\n")


def check_model(folder: str, c: ConfigDict) -> None:
  """Raises InputError if a key asks for another model than the folder's."""
  own, names = config.defaults(), ["train.dtype"]
  if not families.is_folder(folder):  # of those, the config has been checked
    own = config.from_json(os.path.join(folder, "config.json"))
    names += [name for name in config.KEYS if name.startswith("model.")]
  asked, there = config.to_flat(c), config.to_flat(own)
  for name in names:
    if asked[name] != there[name]:
      raise InputError(
        f"{name}={asked[name]!r}: {folder} is measured as it is, with"
        f" {there[name]!r}; leave the key out"
      )


if __name__ == "__main__":
  config.run(main)
