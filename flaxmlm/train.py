"""Pretrains an encoder: raw text in, a masked language model out.

The workdir gets config.json, tokenizer/, store/ (unless data.store names one),
checkpoints/, metrics.jsonl, tensorboard/ and report.html. The same line again
goes on where the run stopped.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from flaxmlm import InputError, config

if TYPE_CHECKING:
  from ml_collections import ConfigDict

  from flaxmlm.data.rows import RowPlan
  from flaxmlm.data.store import TokenStore


def main(argv: list[str] | None = None) -> None:
  """Trains a model in a workdir."""
  began = time.perf_counter()
  args, c = config.parse(config.parser(__doc__), argv)
  workdir = os.path.abspath(args.workdir)
  claim_workdir(workdir, c)

  # Text to token store, before JAX takes threads and memory.
  store, plans, validation = open_data(c, workdir)
  from flaxmlm import tokenizers
  from flaxmlm.data import batches

  tokenizer = tokenizers.load(os.path.join(store.folder, "tokenizer"))
  tokenizer.save(os.path.join(workdir, "tokenizer"))
  if validation.rows == 0:
    raise InputError(
      "no validation document; raise data.validation_fraction="
      f"{c.data.validation_fraction} or name a data.validation_source"
    )

  import jax
  import numpy as np

  from flaxmlm import models, objectives
  from flaxmlm.models.model import count_parameters
  from flaxmlm.objectives import Batch
  from flaxmlm.training import (
    checkpoints,
    loop,
    metrics,
    optimizers,
    report,
    sharding,
  )
  from flaxmlm.training.step import (
    make_eval_step,
    make_guess_step,
    make_init,
    make_train_step,
    run_keys,
  )

  config.validate(c, devices=jax.device_count())

  # The parts.
  V, L, B = tokenizer.vocab.size, c.data.row_length, c.train.batch_size
  specials = {n: store.vocab[n] for n in ("pad", "unk", "cls", "sep", "mask")}
  mesh = sharding.make_mesh(**c.mesh)
  model = models.build(c.model, vocab_size=V, dtype=c.train.dtype)
  objective = objectives.build(
    c.objective, row_length=L, vocab_size=V, specials=specials
  )
  optimizer = optimizers.make_optimizer(c.optimizer, steps=c.train.steps)
  init, state_sharding = make_init(model, optimizer, mesh)
  train_step = make_train_step(
    model,
    objective,
    optimizer,
    optimizers.make_schedule(
      c.optimizer, steps=c.train.steps, peak=c.optimizer.peak_lr
    ),
    mesh=mesh,
    state_sharding=state_sharding,
    microbatches=c.train.microbatches,
  )
  log_unigram = metrics.log_unigram(store.counts, list(specials.values()))
  eval_step = make_eval_step(
    model,
    objective,
    mesh=mesh,
    params_sharding=state_sharding.params,
    log_unigram=log_unigram,
  )
  guess_step = make_guess_step(
    model, objective, mesh=mesh, params_sharding=state_sharding.params
  )
  shard = (jax.process_index(), jax.process_count())

  def put(batch: batches.HostBatch) -> Batch:
    return sharding.put_rows(mesh, Batch(*batch))

  def batch_at(step: int) -> Batch:
    return put(
      batches.at(
        store,
        plans,
        seed=c.seed,
        step=step,
        batch_size=B,
        weights=c.data.weights,
        shard=shard,
      )
    )

  def evaluate(params: Any) -> dict[str, float]:
    every = batches.in_order(
      store, validation, batch_size=B, rows=c.eval.rows, shard=shard
    )
    values = loop.evaluate(eval_step, params, map(put, every))
    return values | {"eval/uniform_entropy": float(np.log(V))}

  def guesses(params: Any) -> list[dict[str, Any]]:
    some = batches.in_order(
      store, validation, batch_size=B, rows=4, shard=shard
    )
    batch = next(iter(some))
    shown = jax.device_get(guess_step(params, put(batch)))
    return report.guesses(batch, *shown, tokens=tokenizer.tokens)

  # The state: the newest checkpoint's, or a new one.
  init_key, step_key = run_keys(c.seed)
  shapes = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    jax.eval_shape(init, init_key),
    state_sharding,
  )
  peak = metrics.peak_flops(c.train.dtype)
  flops = model.flops(L, objective.slots) * B
  train_rows = sum(plan.rows for plan in plans)
  facts = {
    "parameters": f"{count_parameters(shapes.params):,}",
    "vocabulary": f"{V:,}",
    "training tokens": f"{len(store.train.ids):,} in {train_rows:,} rows of"
    f" {L}, {sum(p.fill * p.rows for p in plans) / train_rows:.1%} full",
    "validation tokens": f"{len(store.validation.ids):,} in"
    f" {validation.rows:,} rows",
    "steps": f"{c.train.steps:,} of {B} rows = {B * L:,} tokens",
    "epochs": f"{c.train.steps * B / train_rows:.2f}",
    "FLOPs a token": f"{flops / (B * L):,.0f}",
    "peak": "unknown device, no MFU"
    if peak is None
    else f"{peak.flops / 1e12:,.3g} TFLOP/s ({peak.source})",
    "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "mesh": " x ".join(f"{n} {size}" for n, size in mesh.shape.items()),
    "versions": f"jax {jax.__version__}, Python {sys.version.split()[0]}",
  }
  for name, value in facts.items():
    print(f"{name:>18}  {value}")

  examples_path = os.path.join(workdir, "examples.json")
  checkpointer = checkpoints.open_folder(
    os.path.join(workdir, "checkpoints"), keep=c.checkpoint.keep
  )
  state = checkpoints.restore(checkpointer, shapes)
  if state is None:
    state = init(init_key)
    before = guesses(state.params)
    with open(examples_path, "w", encoding="utf-8") as file:
      json.dump(before, file)
  else:
    print(f"going on after step {int(state.step):,}")
    with open(examples_path, encoding="utf-8") as file:
      before = json.load(file)

  with metrics.open_writer(workdir, step=int(state.step)) as writer:
    state = loop.run(
      state,
      step_key,
      train_step=train_step,
      batch_at=batch_at,
      evaluate=evaluate,
      save=lambda state: checkpoints.save(checkpointer, state),
      write=writer.write,
      schedule=loop.Schedule(
        steps=c.train.steps,
        log_every=c.log.every,
        eval_every=c.eval.every,
        save_every=c.checkpoint.every,
      ),
      cost=loop.Cost(tokens=B * L, flops=flops, peak=peak),
    )
  checkpointer.close()

  # The page, and what to do next.
  after = guesses(state.params)
  page = os.path.join(workdir, "report.html")
  report.write(
    page,
    title=os.path.basename(workdir),
    facts=facts,
    metrics=metrics.read(os.path.join(workdir, "metrics.jsonl")),
    config=config.to_flat(c),
    examples=[
      row | {"before": row["guesses"], "after": new["guesses"]}
      for row, new in zip(before, after, strict=True)
    ],
  )
  print(f"\nreport: {page}")
  if int(state.step) < c.train.steps:
    print(
      f"stopped after step {int(state.step):,} of {c.train.steps:,}; the same"
      " line again goes on"
    )
    return
  print(f"done in {loop.clock(time.perf_counter() - began)}; try it:")
  print(f"  python -m flaxmlm.fill_mask --workdir={args.workdir}")


def claim_workdir(workdir: str, c: ConfigDict) -> None:
  """Writes the config into a new workdir, or compares it with the one there.

  Raises:
    InputError: The run that is there was made with another config.
  """
  path = os.path.join(workdir, "config.json")
  if os.path.exists(path):
    changed = [
      line
      for line in config.differences(config.from_json(path), c)
      if not line.startswith(config.FREE_ON_RESUME)
    ]
    if changed:
      raise InputError(
        f"{workdir} has a run with another config: {'; '.join(changed)}; take"
        " these back, or another --workdir"
      )
  os.makedirs(workdir, exist_ok=True)
  with open(path + ".tmp", "w", encoding="utf-8") as file:
    file.write(config.to_json(c))
  os.replace(path + ".tmp", path)


def open_data(
  c: ConfigDict, workdir: str
) -> tuple[TokenStore, list[RowPlan], RowPlan]:
  """Returns a run's store, its training plans and its validation plan.

  The store is made when it is missing. There is one training plan, or one a
  source if the sources have weights.
  """
  from flaxmlm import prepare
  from flaxmlm.data import rows
  from flaxmlm.data.store import open_store

  if c.data.store is None:
    store = prepare.prepare_store(c, os.path.join(workdir, "store"))
  else:
    store = open_store(c.data.store)
  L = c.data.row_length
  sources = range(len(c.data.weights)) if c.data.weights else [None]
  plans = [rows.load(store, "train", L, source=s) for s in sources]
  return store, plans, rows.load(store, "validation", L)


if __name__ == "__main__":
  config.run(main)
