r"""Measures a trained model: on its validation split, any text, minimal pairs.

  python -m flaxmlm.evaluate --workdir=runs/quickstart --source='other/*.txt'
  python -m flaxmlm.evaluate --workdir=runs/quickstart --task=blimp \
    --source='blimp/*.jsonl'

The folder may be Hugging Face's: then --source is needed, and for the task
masked --config, or keys of it, say how it is measured (data.row_length,
objective.rate).
masked: loss, perplexity and accuracy of masked tokens. Masks depend on the row
alone: two evaluations of the same rows agree exactly.
blimp: how often the right sentence of a pair is the likelier one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from flaxmlm import InputError, config
from flaxmlm.interop import families
from flaxmlm.storage.remote import localize
from flaxmlm.training.chain import newest_step

if TYPE_CHECKING:
  from ml_collections import ConfigDict

TASKS = ("masked", "blimp")


def main(argv: list[str] | None = None) -> None:
  """Measures by the task asked for, and prints the figures."""
  parser = config.parser(__doc__)
  parser.add_argument(
    "--task",
    default=TASKS[0],
    metavar="NAME",
    help=f"{' or '.join(TASKS)}; by default {TASKS[0]}",
  )
  parser.add_argument(
    "--source",
    metavar="TEXT",
    help="text to measure on, in the forms of data.source; by default the"
    " run's validation split; for blimp .jsonl files, one a paradigm",
  )
  parser.add_argument(
    "--rows",
    type=int,
    metavar="N",
    help="rows at most, or pairs a paradigm; by default all",
  )
  parser.add_argument(
    "--skip_long",
    action="store_true",
    help="blimp: leave out pairs that are too long for the model",
  )
  parser.add_argument("--json", metavar="FILE", help="write the figures here")
  args, keys = parser.parse_known_args(argv)
  args.workdir = localize(args.workdir)
  if args.task not in TASKS:
    raise InputError(f"--task={args.task}: wants one of {', '.join(TASKS)}")
  if args.rows is not None and args.rows < 1:
    raise InputError(f"--rows={args.rows}: wants at least 1")
  if args.task == "blimp":
    compare_pairs(args, keys)
  elif args.skip_long:
    raise InputError("--skip_long is for --task=blimp; leave it out")
  else:
    measure_masked(*config.parse(parser, argv, huggingface=True))


def measure_masked(args: argparse.Namespace, c: ConfigDict) -> None:
  """Prints loss, perplexity and accuracy beside their baselines."""
  is_run = not families.is_folder(args.workdir)
  if is_run and newest_step(args.workdir) is None:
    raise InputError(f"{args.workdir}: no checkpoint there yet; train first")
  check_model(args.workdir, c)
  if not is_run and args.source is None:
    raise InputError(
      f"{args.workdir} is a Hugging Face folder, without a validation split;"
      " name a text by --source"
    )

  from flaxmlm import prepare
  from flaxmlm.data import batches
  from flaxmlm.train import check_flags, load_plan, open_data

  with contextlib.ExitStack() as stack:
    tokenizer, pair_keys = c.tokenizer.path, {}
    if is_run:
      trained, _, plan = open_data(c, args.workdir)
      spec = trained.manifest["spec"]
      if c.data.pair_field is None and "data.pair_field" in spec:
        names = ("data.pair_field", "data.label_field", "objective.labels")
        pair_keys = {name: spec[name] for name in names}
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
          }
          | pair_keys,
          where="--source",
        ),
        os.path.join(folder, "store"),
      )
      check_flags(store, c)
      plan = load_plan(store, "train", c)

    import jax
    import jax.numpy as jnp
    import numpy as np

    from flaxmlm import load, objectives
    from flaxmlm.objectives import as_batch
    from flaxmlm.training import loop, metrics, sharding
    from flaxmlm.training.step import make_eval_step

    m = load(args.workdir)
    asks = config.asked_of_pairs(c.objective)
    asked = config.asked_of_pairs(m.config.get("objective", c.objective))
    if asks and asked and asks != asked:
      raise InputError(
        f"{args.workdir}: was asked {', '.join(asked)} of pairs, not"
        f" {', '.join(asks)}; leave objective.name and objective.labels out"
      )
    needed = jax.eval_shape(
      lambda key: objectives.init_params(
        key, model=m.model, options=c.objective
      ),
      jax.random.key(0),
    )
    missing = ", ".join(
      name
      for name, tree in needed.items()
      if name not in m.params
      or jax.tree.map(jnp.shape, m.params[name])
      != jax.tree.map(jnp.shape, tree)
    )
    if missing:
      raise InputError(
        f"{args.workdir}: has no {missing} as objective.name="
        f"{c.objective.name!r} wants; nothing to measure"
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
  width = max(map(len, values)) - len("eval/")
  for name, value in values.items():
    print(f"{name.removeprefix('eval/'):>{width}}  {value:,.4f}")
  step = {"step": m.step} if is_run else {}
  write_json(args.json, step | {"rows": rows_used} | values)


def compare_pairs(args: argparse.Namespace, keys: list[str]) -> None:
  """Prints how often the right sentence of a minimal pair is the likelier."""
  if args.config is not None:
    keys = [f"--config={args.config}", *keys]
  if keys or args.print_config:
    raise InputError(
      f"--task=blimp reads no config, but {(*keys, '--print_config')[0]} is"
      " given; leave it out"
    )
  if args.source is None:
    raise InputError(
      "--task=blimp needs --source: .jsonl files of pairs, one a paradigm, such"
      " as 'blimp/*.jsonl'"
    )
  is_run = not families.is_folder(args.workdir)
  if is_run and newest_step(args.workdir) is None:
    raise InputError(f"{args.workdir}: no checkpoint there yet; train first")
  config.check_file("json", args.json)

  from flaxmlm.data import minimal_pairs

  found, others = minimal_pairs.read(args.source)
  paradigms = {name: some[: args.rows] for name, some in found.items()}
  pairs = [pair for some in paradigms.values() for pair in some]
  beyond = sum(map(len, found.values())) - len(pairs)

  import numpy as np

  from flaxmlm import load

  m = load(args.workdir)
  if "generator" in m.params:  # ELECTRA's discriminator knows no likelihoods
    m = m.generator()
  with show_progress("scoring") as update:
    scores = m.score(
      [text for pair in pairs for text in (pair.good, pair.bad)],
      names=[pair.where for pair in pairs for _ in range(2)],
      skip_long=args.skip_long,
      update=update,
    )
  gains = scores[0::2] - scores[1::2]  # NaN where one is too long
  borders = np.cumsum([len(some) for some in paradigms.values()])
  results = {}
  for name, part in zip(paradigms, np.split(gains, borders[:-1]), strict=True):
    part = part[~np.isnan(part)]
    if not len(part):
      raise InputError(f"{name}: all of its pairs are too long for the model")
    accuracy = float(np.mean(part > 0))
    results[name] = {"accuracy": accuracy, "pairs": len(part)}
  mean = float(np.mean([result["accuracy"] for result in results.values()]))
  long = np.flatnonzero(np.isnan(gains))

  seen = f", step {m.step:,}," if is_run else ""
  print(
    f"{args.workdir}{seen} on {args.source}:"
    f" {len(pairs) - len(long):,} pairs,"
    f" {len(results)} paradigms"
  )
  width = max(map(len, (*results, "paradigm")))
  print(f"{'paradigm':>{width}}  accuracy   pairs")
  for name, result in results.items():
    print(f"{name:>{width}}  {result['accuracy']:8.4f}  {result['pairs']:6,}")
  print(f"{'mean':>{width}}  {mean:8.4f}")
  if ties := int(np.sum(gains == 0)):
    print(f"{ties:,} pairs have equal scores, and count as not right")
  if beyond:
    print(f"left out: {beyond:,} pairs beyond --rows={args.rows}")
  if len(long):
    print(
      f"left out: {len(long):,} pairs longer than {m.max_length} tokens; the"
      f" first is {pairs[long[0]].where}"
    )
  for path in others:
    print(f"left out: {path}, which isn't .jsonl")
  step = {"step": m.step} if is_run else {}
  write_json(
    args.json,
    {"task": "blimp"} | step | {"accuracy": mean, "paradigms": results},
  )


@contextlib.contextmanager
def show_progress(name: str) -> Iterator[Callable[[int, int], None]]:
  """Shows a bar on a terminal, elsewhere a line each ten seconds."""
  if sys.stdout.isatty():
    from rich import progress

    columns = (
      progress.TextColumn(name),
      progress.MofNCompleteColumn(),
      progress.BarColumn(),
      progress.TimeElapsedColumn(),
      progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns) as bar:
      task = bar.add_task(name, total=None)
      yield lambda done, total: bar.update(task, completed=done, total=total)
    return
  start = last = time.perf_counter()

  def update(done: int, total: int) -> None:
    nonlocal last
    now = time.perf_counter()
    if now - last >= 10:
      last = now
      left = (now - start) * (total - done) / done
      print(
        f"{name}: {done:,} of {total:,} tokens, {left:.0f} s to go", flush=True
      )

  yield update


def write_json(path: str | None, figures: dict[str, Any]) -> None:
  """Writes figures into a `--json` file, if there is to be one."""
  if path is not None:
    with open(path, "w", encoding="utf-8") as file:
      json.dump(figures, file, indent=2)
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
