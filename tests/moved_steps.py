"""Some steps of a run on this mesh, with a hash of each batch and its masks.

  python moved_steps.py FOLDER FIRST LAST WORLD MICROBATCHES FSDP

FOLDER has the checkpoint of step FIRST, unless that is 0, and gets that of step
LAST, and its parameters in LAST.npz. Several processes are joined by their
environment.
"""

from __future__ import annotations

import hashlib
import json
import sys

from flaxmlm.training import hosts

process, processes = hosts.join()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import multihost_utils  # noqa: E402

from flaxmlm import config, train  # noqa: E402
from flaxmlm.data import batches, store  # noqa: E402
from flaxmlm.objectives import as_batch  # noqa: E402
from flaxmlm.storage import saves  # noqa: E402
from flaxmlm.training import checkpoints, sharding  # noqa: E402
from flaxmlm.training.step import row_keys, run_keys, state_shapes  # noqa: E402

folder, first, last, world, microbatches, fsdp = sys.argv[1:]
c = config.parse(
  config.parser(__doc__),
  [
    f"--config={world}/config.json",
    "--workdir=",
    f"--config.train.microbatches={microbatches}",
  ],
)[1]
text = store.open_store(f"{world}/store")
plans = [train.load_plan(text, "train", c)]
mesh = sharding.make_mesh(data=-1, fsdp=int(fsdp), tensor=1)
parts = train.make_parts(c, text.vocab, mesh)
init_key, step_key = run_keys(c.seed)
if first == "0":
  state = parts.init(init_key)
else:
  facts = saves.find_newest(folder, strict=True, say=print)
  shapes = state_shapes(parts.init, parts.state_sharding)
  state = checkpoints.restore(folder, facts, shapes)


@jax.jit
def corrupt(rows, step):
  keys, _ = row_keys(step_key, step, rows.example)
  return parts.objective.corrupt(keys, rows, step)


def gather(tree) -> list[np.ndarray]:
  """Leaves whole, whatever lies in other processes."""
  every = multihost_utils.process_allgather(tree, tiled=True)
  return jax.tree.leaves(every)


def digest(tree) -> str:
  found = hashlib.sha256()
  for leaf in gather(tree):
    found.update(np.ascontiguousarray(leaf))
  return found.hexdigest()


hashes = []
for step in range(int(first), int(last)):
  assert int(state.step) == step
  rows = batches.at(
    text,
    plans,
    seed=c.seed,
    step=step,
    batch_size=c.train.batch_size,
    others=config.wants_others(c),
    shard=sharding.row_shard(mesh),
  )
  rows = sharding.put_rows(mesh, as_batch(rows))
  hashes.append([digest(rows), digest(corrupt(rows, jnp.int32(step)))])
  state, _ = parts.train_step(state, rows, step_key)
checkpoints.Saver(folder, keep=1).close(state, None)
params = gather(state.params)
if process == 0:
  np.savez(f"{folder}/{last}.npz", *params)
hosts.wait("the end", processes)
print(json.dumps(hashes))
