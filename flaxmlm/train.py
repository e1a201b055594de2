"""Pretrains an encoder: raw text in, a masked language model out.

The workdir gets config.json, tokenizer/, store/ (unless data.store names one),
checkpoints/, metrics.jsonl, tensorboard/ and report.html. The same line again
goes on where the run stopped. train.continue_from begins the next phase of
another run (docs/continue.md).
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import itertools
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from flaxmlm import InputError, config
from flaxmlm.storage import files, lease, manifests, remote, saves
from flaxmlm.training import hosts, memory, versions, watchdog
from flaxmlm.training.chain import Phase, newest_step

if TYPE_CHECKING:
  from jax.sharding import Mesh
  from ml_collections import ConfigDict

  from flaxmlm.data.rows import RowPlan
  from flaxmlm.data.store import TokenStore
  from flaxmlm.models.model import Model
  from flaxmlm.objectives import Objective
  from flaxmlm.tokenizers import Tokenizer
  from flaxmlm.training.step import State, TrainStep


_LONGEST_WORD = 12  # tokens on average; longer ones are no words


def main(argv: list[str] | None = None) -> None:
  """Trains a model in a workdir."""
  with contextlib.ExitStack() as claims:
    try:
      train(argv, claims)
    except (RuntimeError, ValueError) as error:
      if not hosts.is_lost(error):
        raise
      what = str(error).strip().splitlines()[0]
      warn(
        f"error: another process ended, or can't be reached: {what}; the same"
        " line again goes on"
      )
      claims.close()
      os._exit(1)  # a proper end would wait for the other


def train(argv: list[str] | None, claims: contextlib.ExitStack) -> None:
  """As `main`, with what is to be given back at the end on a stack."""
  began = time.perf_counter()
  parser = config.parser(__doc__)
  parser.add_argument(
    "--allow",
    metavar="NAMES",
    default="",
    help="what the run may go on with changed, like"
    " optimizer.peak_lr,version.jax; see docs/reliability.md",
  )
  args, c = config.parse(parser, argv)
  allow = [name for name in args.allow.split(",") if name]
  check_allowed(allow)
  process, processes = hosts.join()
  workdir = os.path.abspath(args.workdir)
  push = remote.make_push(workdir)
  claims.enter_context(files.named(workdir))
  if process == 0:
    alone = processes == 1
    check_claim = claims.enter_context(remote.claim(workdir, alone=alone))
    lock, saved = claim_workdir(workdir, c, allow)
  else:  # the first one writes, and the others find it there
    hosts.wait("the data", processes)
    check_shared(workdir, c)
  held = None
  if c.train.continue_from is not None and newest_step(workdir) is None:
    held = hold_run(c.train.continue_from)
    check_tokenizer(c)

  # Text to token store, before JAX takes threads and memory.
  store, plans, validation = open_data(c, workdir)
  from flaxmlm import tokenizers
  from flaxmlm.data import batches

  tokenizer = tokenizers.load(os.path.join(store.folder, "tokenizer"))
  if process == 0:
    claim_store(workdir, store, tokenizer, saved, allow)
    tokenizer.save(os.path.join(workdir, "tokenizer"))
    push(must=True)
    hosts.wait("the data", processes)
  watch = watchdog.Watch(c.train.stall_seconds)
  watch.enter("start")
  watch.begin(os.path.join(workdir, "stalls"), process)
  if validation.rows == 0:
    raise InputError(
      f"{store.folder} has no validation document; make another store with a"
      " data.validation_fraction above 0 or a data.validation_source"
    )

  import jax
  import numpy as np

  from flaxmlm import objectives
  from flaxmlm.inference.starting import continue_from, start_from
  from flaxmlm.models.model import count_parameters
  from flaxmlm.objectives import Batch, as_batch
  from flaxmlm.training import (
    chain,
    checkpoints,
    incidents,
    loop,
    metrics,
    report,
    sharding,
  )
  from flaxmlm.training.step import (
    make_eval_step,
    make_guess_step,
    run_keys,
    state_shapes,
  )

  config.validate(c, devices=jax.device_count())
  versions.check_sums()
  newest = chain.newest_step(workdir)
  alike = {"the store": store.hash, "the newest checkpoint": newest}
  hosts.check_alike(alike | {"JAX": jax.__version__})

  # The runs that this one goes on from, and itself.
  run, begun = c.train.continue_from, newest is not None
  *before, phase = chain.find_chain(args.workdir, c.to_dict(), store.hash)
  hosts.check_alike({"the place in the chain": phase.place})
  other = phase.store != store.hash  # --allow=store
  phase = phase._replace(store=store.hash)
  if process == 0 and (other or not begun):
    chain.write_chain(workdir, [*before, phase])
    push(must=True)

  # The parts.
  V, L, B = tokenizer.vocab.size, c.data.row_length, c.train.batch_size
  mesh = sharding.make_mesh(**c.mesh)
  model, objective, init, state_sharding, train_step = make_parts(
    c, store.vocab, mesh
  )
  log_unigram = metrics.log_unigram(
    store.counts, objectives.special_ids(store.vocab)
  )
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
  shard = sharding.row_shard(mesh)
  others = config.wants_others(c)

  def put(batch: batches.HostBatch) -> Batch:
    return sharding.put_rows(mesh, as_batch(batch))

  def batch_at(step: int) -> Batch:
    return put(
      batches.at(
        store,
        plans,
        seed=c.seed,
        step=step,
        batch_size=B,
        weights=c.data.weights,
        offset=phase.row_offset(step),
        others=others,
        shard=shard,
      )
    )

  def put_to_evaluate(batch: batches.HostBatch) -> Batch:
    watch.enter("evaluation")  # batch by batch: they may be many
    return put(batch)

  def evaluate(params: Any) -> dict[str, float]:
    # As much memory as a micro-batch of training.
    size = sharding.whole_rows(mesh, B // c.train.microbatches)
    every = batches.in_order(
      store,
      validation,
      batch_size=size,
      rows=c.eval.rows,
      others=others,
      shard=shard,
    )
    values = loop.evaluate(
      eval_step, params, map(put_to_evaluate, every), shares=objective.shares
    )
    return values | {"eval/uniform_entropy": float(np.log(V))}

  def guesses(params: Any) -> list[dict[str, Any]]:
    size = sharding.whole_rows(mesh, 4)
    some = batches.in_order(
      store, validation, batch_size=size, rows=4, others=others, shard=shard
    )
    batch = next(iter(some))
    shown = jax.device_get(guess_step(params, put(batch)))
    return report.guesses(*shown, tokens=tokenizer.tokens)

  def before_save() -> None:
    check_claim()
    push(must=False)  # a checkpoint comes after what belongs to it

  is_asked, notice = loop.catch_signals(), hosts.watch_preemption()

  def stop() -> bool:
    hours, limit = (time.perf_counter() - began) / 3600, c.train.max_hours
    return is_asked() or notice() or (limit is not None and hours > limit)

  # The state: the newest checkpoint's, or a new one.
  init_key, step_key = run_keys(c.seed)
  shapes = state_shapes(init, state_sharding)
  peak = metrics.peak_flops(c.train.dtype)
  flops = objective.flops(model, L) * B
  train_rows = sum(plan.rows for plan in plans)
  steps = c.train.steps - phase.first_step

  def count(plans: list[RowPlan]) -> int:
    return sum(int(p.piece_length.sum(dtype=np.int64)) for p in plans)

  facts = {
    "parameters": f"{count_parameters(shapes.params):,}",
    "vocabulary": f"{V:,}",
    "training tokens": f"{count(plans):,} in {train_rows:,} rows of"
    f" {L}, {sum(p.fill * p.rows for p in plans) / train_rows:.1%} full",
    "validation tokens": f"{count([validation]):,} in {validation.rows:,} rows",
    "steps": f"{steps:,} of {B} rows = {B * L:,} tokens",
    "epochs": f"{steps * B / train_rows:.2f}",
    "FLOPs a token": f"{flops / (B * L):,.0f}",
    "peak": "unknown device, no MFU"
    if peak is None
    else f"{peak.flops / 1e12:,.3g} TFLOP/s ({peak.source})",
    "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    + (f" of {processes} processes" if processes > 1 else ""),
    "mesh": " x ".join(f"{n} {size}" for n, size in mesh.shape.items()),
    "versions": f"jax {jax.__version__}, Python {sys.version.split()[0]}",
  }
  if before:
    facts["goes on from"] = (
      f"{before[-1].workdir}, step {phase.first_step:,} of {c.train.steps:,}"
    )
    order = "goes on" if phase.first_row else "begins anew"
    facts["order of the rows"] = f"{order}, at row use {phase.first_row:,}"
  for name, value in facts.items():
    print(f"{name:>18}  {value}")

  examples_path = os.path.join(workdir, "examples.json")
  folder = remote.checkpoints(workdir)
  saver = checkpoints.Saver(
    folder,
    newest=newest,
    keep=c.checkpoint.keep,
    best=c.checkpoint.keep_best,
    every=c.checkpoint.keep_every,
    record={
      "config": c.to_dict(),
      "version": versions.find(),
      "store": store.hash,
      "tokenizer": tokenizer.fingerprint,
      "phase": phase.place,
    },
    max_failures=c.checkpoint.max_failures,
    retry_seconds=c.checkpoint.retry_seconds,
    before=before_save,
    watch=watch,
    check=lambda: check_claim(),  # which the first process alone has
  )
  if processes == 1:  # of several, one may wait for others that are gone
    claims.callback(saver.wait)
  known: Mapping[str, Any] = {}  # of `incidents.Guard`
  if newest is not None:
    try:
      manifest = manifests.read(f"{folder}/{newest}")
    except manifests.BrokenError as error:
      raise InputError(
        f"{folder}/{newest}: {error}, though it was whole a moment ago; does"
        " somebody else write there? The same line again looks anew"
      ) from error
    noted = manifest["run"].get("phase")
    chain.check_place(args.workdir, phase, newest, noted)
    known = recall(manifest["run"], phase)
    state = checkpoints.restore(folder, manifest, shapes)
    print(f"going on after step {newest:,} of {c.train.steps:,}")
  elif run is not None:
    state = continue_from(run, shapes, mesh, print, step=phase.first_step)
  else:
    state = init(init_key)
    if c.model.init_from is not None:
      given = start_from(
        c.model.init_from,
        tokenizer,
        state.params,
        print,
        options=c,
      )
      # Of host arrays: what lies on one host's device can't go to all hosts.
      given = jax.tree.map(np.asarray, given)
      placed = jax.device_put(given, state_sharding.params)
      state = state._replace(params=placed)
  if held is not None:
    held.close()
  incidents.check_finite(state, f"the state after step {int(state.step):,}")
  first_guesses = []
  if not begun:
    first_guesses = guesses(state.params)
    if process == 0:
      write_text(examples_path, json.dumps(first_guesses))
  elif os.path.exists(examples_path):
    with open(examples_path, encoding="utf-8") as file:
      first_guesses = json.load(file)

  tell = incidents.discard
  if process == 0:
    tell = incidents.open_book(workdir, anew=not begun, say=warn)

  def note(incident: Mapping[str, Any]) -> None:
    step, back = incident["step"] - 1, len(phase.skips)
    first = phase.row_offset(step) + step * B
    preview = (
      f"--workdir={remote.origin(workdir) or args.workdir}",
      *(f"--steps={step}:{step + 1}", f"--rows={B}", f"--rollbacks={back}"),
    )
    more = {
      "examples": f"{first}:{first + B}",
      "rollbacks": back,
      "preview": shlex.join(["python", "-m", "flaxmlm.preview", *preview]),
    }
    tell({**incident, **more})

  while True:  # once, and once more for each time that it goes back
    diverged = None
    with contextlib.ExitStack() as stack:
      write = metrics.discard
      if process == 0:
        step = int(state.step)
        writer = metrics.open_writer(workdir, step=step, first=phase.first_step)
        write = stack.enter_context(writer).write
      try:
        state = loop.run(
          state,
          step_key,
          train_step=train_step,
          batch_at=batch_at,
          evaluate=evaluate,
          saver=saver,
          guard=incidents.Guard(
            limit=c.train.max_bad_steps,
            shares=objective.shares,
            tell=note,
            memory=known,
          ),
          write=write,
          stop=stop,
          vote=hosts.make_vote(),
          schedule=loop.Schedule(
            steps=c.train.steps,
            log_every=c.log.every,
            eval_every=c.eval.every,
            save_every=c.checkpoint.every,
            first=phase.first_step,
          ),
          cost=loop.Cost(
            tokens=B * L,
            flops=flops,
            peak=peak,
            tokens_before=sum(phase.tokens for phase in before),
          ),
          shares=objective.shares,
          watch=watch,
        )
        break
      except incidents.DivergedError as error:
        # Without what it holds on to, the state among it.
        diverged = error.with_traceback(None)
        watch.enter("rollback")
        newest = saver.newest()
      except checkpoints.SaveError as error:
        warn(
          f"error: {error}; once it can be saved, the same line again goes on"
        )
        hosts.leave()
        sys.exit(1)
    refused = check_rollback(c, folder, newest, len(phase.skips))
    if refused is not None:
      note({"step": diverged.step, "kind": "stop", "why": diverged.why})
      if process == 0:
        push(must=False)
        warn(f"error: {diverged}; {refused}")
      hosts.leave()
      sys.exit(1)
    # Back, and past the rows of the steps that led here.
    rows = (diverged.step - newest) * B
    note(
      {"step": diverged.step, "kind": "rollback", "to": newest, "rows": rows}
    )
    phase = phase._replace(skips=[*phase.skips, (newest, rows)])
    if process == 0:
      chain.write_skips(workdir, phase)
      push(must=True)
    saver.note({"phase": phase.place})
    manifest = manifests.read(f"{folder}/{newest}")
    state = checkpoints.restore(folder, manifest, shapes)
    known = recall(manifest["run"], phase)

  # The page, and what to do next.
  watch.enter("end")
  after = guesses(state.params)
  page = os.path.join(workdir, "report.html")
  if process == 0:
    both = itertools.zip_longest(first_guesses, after, fillvalue={})
    report.write(
      page,
      title=os.path.basename(workdir),
      facts=facts,
      metrics=metrics.read(os.path.join(workdir, "metrics.jsonl")),
      config=config.to_flat(c),
      tasks=list(objective.shares)[1:],
      examples=[
        new | {"before": old.get("guesses", []), "after": new["guesses"]}
        for old, new in both
      ],
    )
    check_claim()
    push(must=True)
    lock.close()
  hosts.wait("the end", processes)
  hosts.leave()
  watch.enter("")
  shown = remote.origin(workdir)
  print(f"\nreport: {f'{shown}/report.html' if shown else page}")
  if int(state.step) < c.train.steps:
    print(
      f"stopped after step {int(state.step):,} of {c.train.steps:,}; the same"
      " line again goes on"
    )
    return
  print(f"done in {loop.clock(time.perf_counter() - began)}; try it:")
  print(f"  python -m flaxmlm.fill_mask --workdir={shown or args.workdir}")


class Parts(NamedTuple):
  """What training is made of, apart from the data; see `make_parts`."""

  model: Model
  objective: Objective
  init: Callable[..., State]
  state_sharding: Any
  train_step: TrainStep


def make_parts(c: ConfigDict, vocab: Mapping[str, Any], mesh: Mesh) -> Parts:
  """Returns model, objective and train step of a config, on a mesh.

  Args:
    c: The config.
    vocab: See `objectives.build`.
    mesh: Of `sharding.make_mesh`; its devices may be none of this machine's.
  """
  from flaxmlm import models, objectives
  from flaxmlm.training import optimizers
  from flaxmlm.training.step import make_init, make_train_step

  steps = c.train.steps
  model = models.build(c.model, vocab_size=vocab["size"], dtype=c.train.dtype)
  objective = objectives.build(
    c.objective, row_length=c.data.row_length, vocab=vocab, steps=steps
  )
  optimizer = optimizers.make_optimizer(c.optimizer, steps=steps)
  schedule = optimizers.make_schedule(
    c.optimizer, steps=steps, peak=c.optimizer.peak_lr
  )
  init_params = functools.partial(
    objectives.init_params, model=model, options=c.objective
  )
  init, state_sharding = make_init(init_params, optimizer, mesh)
  train_step = make_train_step(
    model,
    objective,
    optimizer,
    schedule,
    mesh=mesh,
    state_sharding=state_sharding,
    microbatches=c.train.microbatches,
  )
  return Parts(model, objective, init, state_sharding, train_step)


def check_rollback(
  c: ConfigDict, folder: str, newest: int | None, rollbacks: int
) -> str | None:
  """Returns why a run can't go back to its newest checkpoint, and what to do.

  Args:
    c: The config.
    folder: Of the checkpoints.
    newest: The newest step there; None: there is none.
    rollbacks: How often it has gone back.

  Returns:
    None if it can: it is to, and the checkpoint is whole.
  """
  import jax

  if newest is None:
    return (
      "there is no checkpoint to go back to: begin again, with a lower"
      " optimizer.peak_lr"
    )
  there = (
    f"the checkpoint of step {newest:,} is there: go on from it with a lower"
    " optimizer.peak_lr and --allow=optimizer.peak_lr"
  )
  if c.train.on_divergence != "rollback":
    return f"{there}, or with train.on_divergence=rollback"
  most = c.train.max_rollbacks
  if rollbacks >= most:
    return f"the run has gone back train.max_rollbacks={most} times; {there}"
  broken = None
  if jax.process_index() == 0:
    try:
      manifests.check(f"{folder}/{newest}")
    except (manifests.BrokenError, OSError) as error:
      broken = str(error)
  if hosts.any_of(broken is not None):
    return f"{folder}/{newest}: {broken or 'damaged'}; start again, as before"
  return None


def recall(saved: Mapping[str, Any], phase: Phase) -> dict[str, Any]:
  """Returns what an `incidents.Guard` knew at a checkpoint.

  Where the run has gone back to it, the steps that were skipped before it are
  no reason any more to go back.

  Args:
    saved: What the checkpoint says of the run.
    phase: The run, as it goes on.
  """
  known = dict(saved.get("guard", {}))
  if saved.get("phase") != phase.place:
    known["skipped"] = 0
  return known


def check_allowed(allow: Sequence[str]) -> None:
  """Raises InputError at a name of --allow that nothing can be changed by."""
  for name in allow:
    if not any(
      config.is_named(known, [name]) or config.is_named(name, [known])
      for known in (*config.ALLOWED_ON_RESUME, "version", "store", "tokenizer")
    ):
      raise InputError(
        f"--allow={name}: a run can't go on with that changed"
        " (docs/reliability.md lists what can be); begin a phase of its own, by"
        " train.continue_from"
      )


def claim_workdir(
  workdir: str, c: ConfigDict, allow: Sequence[str]
) -> tuple[IO[bytes], Mapping[str, Any] | None]:
  """Writes the config into the workdir, unless a run of another is there.

  A workdir without a checkpoint has nothing to lose: its config is replaced.
  Damaged checkpoints are set aside; see `saves.find_newest`.

  Returns:
    An open file that holds the lock on the workdir: until it is closed or this
    process ends, nobody else can claim it. And what the manifest of the newest
    checkpoint says, if there is one.

  Raises:
    InputError: Another process trains there, the run that is there was made
      with another config or versions that aren't allowed, has no checkpoint
      that is whole, the folder is something else or can't be made.
  """
  from flaxmlm.data.store import lock_file

  try:
    os.makedirs(workdir, exist_ok=True)
    lock = lock_file(os.path.join(workdir, "lock"))
  except BlockingIOError as error:
    raise InputError(
      f"{workdir}: another process trains there, or begins to go on from it;"
      " wait for it, or take another --workdir"
    ) from error
  except OSError as error:
    raise InputError(f"--workdir={workdir}: {error.strerror}") from error
  path = os.path.join(workdir, "config.json")
  if os.path.exists(path):
    try:
      config.from_json(path)
    except InputError as error:
      raise InputError(
        f"--workdir={workdir} isn't the folder of a run: {error}; take another"
      ) from error
  folder = remote.checkpoints(workdir)
  saved = saves.find_newest(folder, strict=c.checkpoint.strict, say=warn)
  if saved is not None:
    check_unchanged(workdir, saved["run"], c, allow)
  try:
    write_text(path, config.to_json(c))
  except OSError as error:
    raise InputError(f"--workdir={workdir}: {error.strerror}") from error
  return lock, saved


def check_unchanged(
  workdir: str, saved: Mapping[str, Any], c: ConfigDict, allow: Sequence[str]
) -> None:
  """Raises InputError if the config or a version isn't that of the run.

  What isn't refused, because it is free or allowed, is printed.
  """
  before = config.check_keys(
    config.to_flat(saved["config"]), where=f"{workdir}: its checkpoint"
  )
  changed = [
    line
    for line in config.differences(before, c)
    if not config.is_named(line.partition(":")[0], config.FREE_ON_RESUME)
  ]
  old, new = saved["version"], versions.find()
  changed += [
    f"version.{name}: {old.get(name)} -> {new.get(name)}"
    for name in sorted({*old, *new})
    if old.get(name) != new.get(name)
  ]
  refuse_changes(workdir, changed, allow)


def refuse_changes(
  workdir: str, changed: Sequence[str], allow: Sequence[str]
) -> None:
  """Raises InputError with the changes that aren't allowed.

  Args:
    workdir: Of the run.
    changed: Lines like "KEY: OLD -> NEW".
    allow: Names of --allow.
  """
  known = (*config.ALLOWED_ON_RESUME, "version", "store", "tokenizer")
  names = {line: line.partition(":")[0] for line in changed}
  possible = [n for n in names.values() if config.is_named(n, known)]
  refused = [
    line
    for line, name in names.items()
    if name not in possible or not config.is_named(name, allow)
  ]
  for line in changed:
    if line not in refused:
      print(f"allowed: {line}")
  if refused:
    hint = "take these back, or another --workdir"
    if all(names[line] in possible for line in refused):
      hint += f", or go on with them: --allow={','.join(possible)}"
    raise InputError(
      f"{workdir} has a run with another config: {'; '.join(refused)}; {hint}"
    )


def check_shared(workdir: str, c: ConfigDict) -> None:
  """Raises InputError if the first process's workdir isn't seen from here."""
  url = remote.origin(workdir)
  if url is not None:
    workdir = remote.localize(url)
  path = os.path.join(workdir, "config.json")
  if not os.path.exists(path) or config.differences(config.from_json(path), c):
    raise InputError(
      f"--workdir={url or workdir} isn't the folder that the first process"
      " writes to, or that has another config; take one on a disk that all of"
      " them see"
    )


def claim_store(
  workdir: str,
  store: TokenStore,
  tokenizer: Tokenizer,
  saved: Mapping[str, Any] | None,
  allow: Sequence[str],
) -> None:
  """Notes which store the run reads; a resumed run must read the same.

  Raises:
    InputError: The run that is there was made with another store or tokenizer,
      and that isn't allowed.
  """
  if saved is not None:
    now = {"store": store.hash, "tokenizer": tokenizer.fingerprint}
    changed = [
      f"{name}: {saved['run'][name][:16]} -> {hash[:16]} (in {store.folder})"
      for name, hash in now.items()
      if saved["run"][name] != hash
    ]
    refuse_changes(workdir, changed, allow)
  path = os.path.join(workdir, "store.json")
  write_text(path, json.dumps({"manifest_sha256": store.hash}) + "\n")


def warn(line: str) -> None:
  """Prints a line that nobody should miss."""
  print(line, file=sys.stderr, flush=True)


def hold_run(run: str) -> IO[bytes] | None:
  """Keeps a run as it is until its state has been read.

  Returns:
    An open file that holds a lock on the run's workdir: until it is closed,
    nobody can train there, but others may hold it too. None where there are no
    locks: in a copy without the file, on a file system that knows none, in a
    bucket.

  Raises:
    InputError: A process trains there.
  """
  if remote.is_remote(run):
    lease.check_free(run.rstrip("/"))
    return None
  try:
    lock = open(os.path.join(run, "lock"), "rb")  # noqa: SIM115
  except OSError:
    return None
  try:
    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
  except BlockingIOError as error:
    lock.close()
    raise InputError(
      f"train.continue_from={run}: a process still trains there; stop it first"
    ) from error
  except OSError:
    lock.close()
    return None
  return lock


def check_tokenizer(c: ConfigDict) -> None:
  """Raises InputError if the text isn't to be of the tokenizer of a run.

  The run is `train.continue_from`. A store that is still to be made gets the
  tokenizer of `tokenizer.path`.
  """
  from flaxmlm import prepare, tokenizers
  from flaxmlm.data.store import open_store

  run = c.train.continue_from
  theirs = os.path.join(run, "tokenizer")
  fingerprint = tokenizers.load(remote.localize(theirs)).fingerprint
  if c.data.store is not None:
    ours = open_store(c.data.store).manifest["tokenizer"]
    where = f"{c.data.store} was made with"
    instead = f"make a store with tokenizer.path={theirs}"
  else:
    ours = prepare.load_tokenizer(c).fingerprint
    where = f"tokenizer.path={c.tokenizer.path} is"
    instead = "leave the key out"
  if ours != fingerprint:
    raise InputError(
      f"{where} another tokenizer than that of train.continue_from={run};"
      f" {instead}, or take the parameters alone by model.init_from"
    )


def write_text(path: str, text: str) -> None:
  """Writes a file that is there whole or not at all."""
  files.write(path, text.encode(), sync=True)


def open_data(
  c: ConfigDict, workdir: str
) -> tuple[TokenStore, list[RowPlan], RowPlan]:
  """Returns a run's store, its training plans and its validation plan.

  The store is made when it is missing. That of a run with a checkpoint is
  taken as it is, so that the run can be used where its text isn't. There is one
  training plan, or one a source if the sources have weights.

  Raises:
    InputError: The store was made with another text, or a key about the text or
      the tokenizer was set to something else than what `data.store` was made
      with, or the weights don't fit its sources.
  """
  from flaxmlm import prepare
  from flaxmlm.data.store import open_store

  own, url = os.path.join(workdir, "store"), remote.origin(workdir)
  if c.data.store is not None:
    store = open_store(c.data.store)
  elif url is not None and "manifest.json" in remote.list_names(f"{url}/store"):
    store = open_store(f"{url}/store")
    if newest_step(workdir) is None:
      wanted = prepare.store_spec(c, prepare.load_tokenizer(c))
      prepare.check_same(store.manifest["spec"], wanted, f"{url}/store")
  elif newest_step(workdir) is not None:
    store = open_store(own)
  else:
    store = prepare.prepare_store(c, own)
    if url is not None:
      remote.push_store(own, f"{url}/store")
  spec = store.manifest["spec"]
  if c.data.store is not None:
    check_spec(spec, c)
  weights, texts = c.data.weights, spec["data.source"]
  if weights and len(weights) != len(texts):
    raise InputError(
      f"data.weights has {len(weights)} numbers, the store {len(texts)} sources"
    )
  check_flags(store, c)
  sources = range(len(weights)) if weights else [None]
  plans = [load_plan(store, "train", c, source=s) for s in sources]
  return store, plans, load_plan(store, "validation", c)


def load_plan(
  store: TokenStore, split: str, c: ConfigDict, *, source: int | None = None
) -> RowPlan:
  """Returns the rows that the objective wants; see `data.rows.load`.

  Says how many pairs are left out for their length.

  Raises:
    InputError: All are; or there is nothing to take another document from.
  """
  from flaxmlm.data import rows

  L, kind = c.data.row_length, config.row_kind(c.objective)
  plan = rows.load(store, split, L, source=source, kind=kind)
  if kind == "pairs":
    numbers = getattr(store, split).sources
    pairs = len(numbers) if source is None else (numbers == source).sum()
    left = f"{pairs - plan.rows:,} of {pairs:,} {split} pairs in {store.folder}"
    why = f"have more than {L - 3} tokens"
    if pairs and not plan.rows:
      raise InputError(f"{left} {why}; raise data.row_length={L}")
    if pairs > plan.rows:
      print(f"{left} {why} and are left out; data.row_length decides")
  if config.wants_others(c) and plan.rows:
    check_others(store, plan)
  return plan


def check_others(store: TokenStore, plan: RowPlan) -> None:
  """Raises InputError if a plan's rows are of fewer than two documents.

  Rows of several sentences alone count.
  """
  import numpy as np

  first = plan.piece_start[: int(plan.pairs[0])]
  offsets = getattr(store, plan.split).offsets
  ends = np.searchsorted(offsets, first[[0, -1]] if len(first) else [], "right")
  if len(set(ends.tolist())) < 2:
    raise InputError(
      f"{store.folder}: a source's {plan.split} split has several sentences in"
      " fewer than two documents, and next_sentence wants rows of another one;"
      " make a store of more, by data.document=paragraph"
    )


def check_flags(store: TokenStore, c: ConfigDict) -> None:
  """Raises InputError if an objective wants borders that a store has not.

  The first million tokens are looked at.
  """
  import numpy as np

  from flaxmlm.data.store import SENTENCE_START, WORD_START

  flags, offsets = store.train.flags[: 1 << 20], store.train.offsets
  asked = f"objective.name={c.objective.name!r}"
  if config.row_kind(c.objective) == "pairs":
    if "data.pair_field" not in store.manifest["spec"]:
      raise InputError(
        f"{asked}: {store.folder} has no pairs with labels; make a store of"
        " them by data.pair_field, data.label_field and objective.labels"
      )
  elif config.row_kind(c.objective) == "sentences":
    first = flags[offsets[offsets < len(flags)]]
    inner = np.count_nonzero(flags & SENTENCE_START) - np.count_nonzero(
      first & SENTENCE_START
    )
    if inner == 0:
      raise InputError(
        f"{asked}: no document of {store.folder} has two sentences; make a"
        " store of longer ones, by data.document=file or paragraph"
      )
  if {"ngram", "span", "whole_word"} & set(config.as_tuple(c.objective.name)):
    words = max(np.count_nonzero(flags & WORD_START), 1)
    length = len(flags) / words
    budget = min(c.objective.rate * c.data.row_length, _LONGEST_WORD)
    if length > budget:
      raise InputError(
        f"{asked}: {store.folder} has {length:.0f} tokens a word, more than"
        f" {budget:.0f}; make a store with words, for Chinese by"
        " tokenizer.words=jieba"
      )


def check_spec(spec: Mapping[str, Any], c: ConfigDict) -> None:
  """Raises InputError if a key contradicts what `data.store` was made with."""
  if c.data.pair_field is not None and "data.pair_field" not in spec:
    raise InputError(
      f"{c.data.store} was made without data.pair_field; leave the key out, or"
      " make another store"
    )
  for name, value in config.to_flat(c).items():
    if (
      name in spec
      and name not in ("data.source", "data.validation_source")
      and name != "tokenizer.path"
      and value != config.KEYS[name].default
      and (list(value) if isinstance(value, tuple) else value) != spec[name]
    ):
      raise InputError(
        f"{c.data.store} was made with {name}={spec[name]!r}, not {value!r};"
        " leave the key out, or make another store"
      )


if __name__ == "__main__":
  memory.use_huge_pages()
  config.run(main)
