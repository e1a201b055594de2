"""What more devices, processes, layers, hosts and documents cost.

  python -m benchmarks.scaling [--quick] [--json]

The devices are emulated and share this machine's cores: what is measured is
what it costs to split a step, and no speed-up. Each measurement has a process
of its own.

- devices: seconds of a step of BERT 2x128 (32 rows of 128, float32) on 1, 2, 4
  and 8, by mesh; its collectives, read off the compiled program.
- processes: the same on 8 devices of one process, and of two.
- compiling: seconds for 2 to 12 layers, on 1 and 8 devices.
- input: milliseconds in which a host reads its part of a batch of 4,096 rows of
  512, from a store of a billion tokens, when there are 1 to 256 hosts. The
  store's files are sparse: the disk isn't measured.
- rows: memory and seconds in which 10**8 documents are planned.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import report

MESHES = ((1, {}), (2, {}), (4, {}), (8, {}), (8, {"fsdp": 8}))
MESHES += ((8, {"data": 2, "fsdp": 2, "tensor": 2}),)
TOKENS, LENGTH, BATCH = 10**9, 512, 4096
DOCUMENTS = 10**8


def main() -> None:
  parser = report.parser(__doc__)
  parser.add_argument("--child", help="NAME ARGUMENTS, as JSON")
  args = parser.parse_args()
  if args.child:
    name, given = json.loads(args.child)
    print(json.dumps(CHILDREN[name](**given)))
    return
  few = args.quick
  found: dict[str, list[dict[str, Any]]] = {}
  found["devices"] = [
    run("step", devices=devices, mesh=mesh)
    for devices, mesh in MESHES[: 2 if few else None]
  ]
  report.table(found["devices"])
  found["processes"] = [
    run("step", devices=8, mesh={}, processes=count) for count in (1, 2)
  ]
  report.table(found["processes"])
  found["compiling"] = [
    run("step", devices=devices, mesh={}, layers=layers, steps=0)
    for layers in ((2,) if few else (2, 4, 8, 12))
    for devices in (1, 8)
  ]
  report.table(found["compiling"])
  found["input"] = run("read", tokens=TOKENS // (100 if few else 1))
  report.table(found["input"])
  found["rows"] = [run("plan", documents=DOCUMENTS // (100 if few else 1))]
  report.table(found["rows"])
  report.finish(args, "scaling", found, packages=["flaxmlm", "jax", "numpy"])


def run(name: str, **given: Any) -> Any:
  """Runs a measurement in processes of its own; returns what it says."""
  count, devices = given.get("processes", 1), given.get("devices", 1)
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  command = [sys.executable, "-m", "benchmarks.scaling", "--child"]
  command.append(json.dumps([name, given]))
  children = []
  for number in range(count):
    keys = {"JAX_PLATFORMS": "cpu"}
    keys["JAX_NUM_CPU_DEVICES"] = str(devices // count)
    if count > 1:
      keys["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
      keys["JAX_NUM_PROCESSES"] = str(count)
      keys["JAX_PROCESS_ID"] = str(number)
    children.append(
      subprocess.Popen(command, env=os.environ | keys, stdout=subprocess.PIPE)
    )
  said = [child.communicate()[0].decode() for child in children]
  if any(child.returncode for child in children):
    sys.exit(f"{name} {given}: failed")
  return json.loads(said[0].splitlines()[-1])


def measure_step(
  devices: int,
  mesh: dict[str, int],
  processes: int = 1,
  layers: int = 2,
  steps: int = 20,
) -> dict[str, Any]:
  """Returns the seconds of a step, of compiling it, and its collectives."""
  from flaxmlm.training import hosts

  hosts.join()
  import jax

  from flaxmlm import config
  from flaxmlm.objectives import Batch
  from flaxmlm.planning import chips, hlo, prediction
  from flaxmlm.train import make_parts
  from flaxmlm.training import sharding

  B, L, V = 32, 128, 8192
  c = config.check_keys(
    {f"mesh.{name}": size for name, size in mesh.items()}
    | {"mesh.data": mesh.get("data", -1)}
    | {"model.layers": layers, "model.width": 128, "model.heads": 8}
    | {"model.ffn": 512, "data.row_length": L, "train.batch_size": B}
    | {"model.dropout": 0.0, "model.attention_dropout": 0.0},
    where="benchmark",
  )
  grid = sharding.make_mesh(**c.mesh)
  special = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4, "size": V}
  parts = make_parts(c, special, grid)
  index, count = sharding.row_shard(grid)
  ids = np.random.default_rng(index).integers(5, V, (B // count, L), np.int32)
  ones = np.ones_like(ids)
  positions = ones.cumsum(1, dtype=np.int32) - 1
  rows = Batch(ids, ones, positions, ones.astype(np.uint8), ids[:, 0])
  batch = sharding.put_rows(grid, rows)
  state, key = parts.init(jax.random.key(0)), jax.random.key(1)
  began = time.perf_counter()
  step = parts.train_step.lower(state, batch, key).compile()
  compiled = time.perf_counter() - began
  seconds = []
  for _ in range(steps):
    began = time.perf_counter()
    state, sums = step(state, batch, key)
    jax.block_until_ready(sums)
    seconds.append(time.perf_counter() - began)
  program = hlo.parse(step.as_text())
  sent = prediction.merge(
    [
      prediction.describe(one, dict(grid.shape), chips.TPUS["v5e"])
      for one in hlo.collectives(program)
    ]
  )
  return {
    "devices": devices,
    "processes": processes,
    "mesh": " x ".join(str(size) for size in grid.shape.values()),
    "layers": layers,
    "step ms": 1e3 * float(np.median(seconds)) if seconds else 0.0,
    "compile s": compiled,
    "collectives": sum(int(row["count"]) for row in sent),
    "MB": sum(row["bytes"] for row in sent) / 1e6,
  }


def measure_input(tokens: int) -> list[dict[str, Any]]:
  """Returns how long a host takes for its part of a batch."""
  from flaxmlm.data import batches, rows
  from flaxmlm.data.store import Split, TokenStore

  random = np.random.default_rng(0)
  lengths = random.geometric(1 / 400, tokens // 400)
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  with tempfile.TemporaryDirectory() as folder:

    def sparse(name: str, dtype: str) -> np.ndarray:
      path = os.path.join(folder, name)
      return np.memmap(path, dtype, "w+", shape=(int(offsets[-1]),))

    split = Split(
      ids=sparse("ids", "<u2"),
      flags=sparse("flags", "u1"),
      offsets=offsets,
      sources=np.zeros(len(lengths), np.uint16),
    )
    vocab = {"size": 32768, "pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    store = TokenStore(folder, "", {}, vocab, np.ones(32768), split, split)
    plan = rows.plan(offsets, LENGTH)
    found = []
    for hosts in (1, 4, 16, 64, 256):
      seconds = []
      for step in range(5):
        began = time.perf_counter()
        batches.at(
          store,
          plan,
          seed=0,
          step=step,
          batch_size=BATCH,
          shard=(hosts - 1, hosts),
        )
        seconds.append(time.perf_counter() - began)
      spent = float(np.median(seconds))
      found.append(
        {
          "hosts": hosts,
          "rows a host": BATCH // hosts,
          "ms": 1e3 * spent,
          "million tokens/s a host": BATCH // hosts * LENGTH / spent / 1e6,
        }
      )
  return found


def measure_rows(documents: int) -> dict[str, Any]:
  """Returns what planning the rows of many documents takes."""
  from flaxmlm.data import rows

  random = np.random.default_rng(0)
  offsets = np.zeros(documents + 1, np.int64)
  np.cumsum(random.geometric(1 / 200, documents), out=offsets[1:])
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  began = time.perf_counter()
  plan = rows.plan(offsets, LENGTH)
  spent = time.perf_counter() - began
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return {
    "documents": documents,
    "rows": plan.rows,
    "fill %": 100 * plan.fill,
    "seconds": spent,
    "peak GB": peak * 1024 / 1e9,
    "of it before planning GB": before * 1024 / 1e9,
  }


CHILDREN: dict[str, Callable[..., Any]] = {
  "step": measure_step,
  "read": measure_input,
  "plan": measure_rows,
}


if __name__ == "__main__":
  main()
