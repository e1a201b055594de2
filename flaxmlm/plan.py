r"""Says what a run will take on a TPU slice or GPUs that aren't here.

  python -m flaxmlm.plan --config=configs/bert_base.py --tpu=v5e:16x16

The train step of the config is compiled for the chips, by the compiler that
they have themselves (the package libtpu; no chip is needed). It says the memory
of a chip, FLOPs, bytes, collectives and cycles; from these follow bounds of
time. --search compares ways to split and to recompute. For GPUs (--gpu=h100x8)
the step is compiled for a CPU, and bytes and memory are rough.
docs/tpu.md says how to read it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flaxmlm import InputError, config

if TYPE_CHECKING:
  import jax
  from ml_collections import ConfigDict

  from flaxmlm.planning.chips import Slice
  from flaxmlm.planning.prediction import Measured

# To be set before JAX is imported: it is to see no device of this machine, and
# libtpu to ask no server for the TPU that it has not.
ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  # Of some TPU; what is compiled for is said later. Without, libtpu complains.
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans at once
}
# Ids of the special tokens: which they are costs nothing.
_SPECIALS = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
_TOO_LARGE = re.compile(r"Used ([\d.]+)([KMGT])\S* of ([\d.]+)([KMGT])")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SAVINGS = (
  *({"model.remat": remat} for remat in ("none", "dots", "full")),
  *({"model.remat": "full", "train.microbatches": n} for n in (2, 4, 8, 16)),
)


class TooLargeError(Exception):
  """The step wants more memory than a chip has: bytes wanted, bytes there."""


def main(argv: list[str] | None = None) -> None:
  """Compiles the train step for chips and prints what it takes."""
  parser = config.parser(__doc__, workdir=False)
  parser.add_argument(
    "--tpu",
    metavar="KIND:AxB",
    help="a slice: v5e:16x16, v6e:4x4, v5p:4x4x4; several: 2xv5e:16x16",
  )
  parser.add_argument("--gpu", metavar="KINDxN", help="GPUs: h100x8, a100x8")
  parser.add_argument(
    "--search",
    action="store_true",
    help="compare meshes, what is recomputed, micro-batches and attention",
  )
  parser.add_argument(
    "--where",
    action="store_true",
    help="print where in the model bytes and cycles go",
  )
  parser.add_argument(
    "--price", type=float, metavar="X", help="of one chip for an hour"
  )
  parser.add_argument("--json", metavar="FILE", help="write the figures here")
  args, c = config.parse(parser, argv, sources=False)
  if (args.tpu is None) == (args.gpu is None):
    raise InputError("name the chips: --tpu=v5e:4x4 or --gpu=h100x8")

  os.environ |= ENVIRONMENT
  from flaxmlm.planning import chips

  chosen = chips.parse_tpu(args.tpu) if args.tpu else chips.parse_gpu(args.gpu)
  devices = find_devices(chosen)
  config.validate(c, devices=len(devices), sources=False)
  if args.search:
    values = search(c, chosen, devices, price=args.price)
  else:
    values = plan(c, chosen, devices, price=args.price, where=args.where)
  if args.json:
    with open(args.json, "w", encoding="utf-8") as file:
      json.dump(values, file, indent=2)
      file.write("\n")


def find_devices(chosen: Slice) -> Sequence[jax.Device]:
  """Returns the devices of a slice that isn't here.

  Raises:
    InputError: libtpu isn't installed, or knows no such slice.
  """
  if chosen.chip.clock is None:
    import jax

    jax.config.update("jax_num_cpu_devices", chosen.count)
    return jax.devices()
  if importlib.util.find_spec("libtpu") is None:
    wanted = [
      line.split(";")[0].strip()
      for line in importlib.metadata.requires("jax") or ()
      if line.startswith("libtpu") and "tpu" in line.split(";")[-1]
    ]
    raise InputError(
      "--tpu wants the TPU's compiler, which isn't installed: pip install"
      f" '{wanted[0] if wanted else 'libtpu'}'"
    )
  from jax.experimental import topologies

  # To JAX on a v4 or v5p, both cores of a chip are one device; libtpu has to be
  # told so of a v4.
  whole = chosen.name.startswith("v4:")
  options = {"chip_config_name": "megacore"} if whole else {}
  try:
    return topologies.get_topology_desc(
      platform="tpu",
      topology_name=chosen.name,
      num_slices=chosen.slices,
      **options,
    ).devices
  except Exception as error:  # whatever the plugin raises, of its own kinds
    first = str(error).splitlines()[0]
    raise InputError(f"--tpu={chosen.name}: {first}") from error


def plan(
  c: ConfigDict,
  chosen: Slice,
  devices: Sequence[jax.Device],
  *,
  price: float | None,
  where: bool,
) -> dict[str, Any]:
  """Prints and returns what one config takes."""
  from flaxmlm.planning import hlo, prediction

  joined = f"{chosen.slices} x " if chosen.slices > 1 else ""
  print(
    f"{joined}{chosen.name}: {len(devices)} chips, {describe(c)}", flush=True
  )
  try:
    measured, program = compile_step(c, chosen, devices)
  except TooLargeError as error:
    wanted, there = error.args
    print(
      f"doesn't fit: {wanted / 2**30:.1f} GiB a chip, which has"
      f" {there / 2**30:.1f} for it"
    )
    found = find_fitting(c, chosen, devices)
    return {"fits": False, "memory_total": wanted, "would_fit": found}
  values = foresee(measured, c, chosen, devices, price)
  print_plan(values)
  if not values["fits"]:
    values["would_fit"] = find_fitting(c, chosen, devices)
  if where:
    own = c.data.row_length * c.train.batch_size / len(devices)
    rows = prediction.where(hlo.costs(program), own)
    print_where(rows, sum(row["cycles"] for row in rows))
    values["where"] = rows
  return values


def describe(c: ConfigDict) -> str:
  """Returns the keys that a plan may change, in a line."""
  keys = ("mesh.data", "mesh.fsdp", "mesh.tensor", "train.batch_size")
  keys += ("train.microbatches", "model.remat", "model.attention")
  flat = config.to_flat(c)
  return " ".join(f"{key}={flat[key]}" for key in keys)


def foresee(
  measured: Measured,
  c: ConfigDict,
  chosen: Slice,
  devices: Sequence[jax.Device],
  price: float | None,
) -> dict[str, Any]:
  """Returns the figures of a config (`prediction.predict`)."""
  from flaxmlm.planning import prediction

  parts = make(c, devices)[0]
  L = c.data.row_length
  return prediction.predict(
    measured,
    chosen.chip,
    chips=len(devices),
    tokens=L * c.train.batch_size,
    formula=parts.objective.flops(parts.model, L) / L,
    steps=c.train.steps,
    price=price,
  )


def make(c: ConfigDict, devices: Sequence[jax.Device]) -> tuple[Any, Any]:
  """Returns the parts of training (`train.make_parts`), and the mesh."""
  from flaxmlm.train import make_parts
  from flaxmlm.training import sharding

  mesh = sharding.make_mesh(**c.mesh, devices=devices)
  return make_parts(c, _SPECIALS | {"size": find_vocab_size(c)}, mesh), mesh


def find_vocab_size(c: ConfigDict) -> int:
  """Returns V: the store's, the tokenizer's, or the one to be trained."""
  if c.data.store is not None:
    from flaxmlm.data.store import open_store

    return open_store(c.data.store).vocab["size"]
  if c.tokenizer.path is not None:
    from flaxmlm import tokenizers

    return tokenizers.load(c.tokenizer.path).vocab.size
  return c.tokenizer.vocab_size


def compile_step(
  c: ConfigDict, chosen: Slice, devices: Sequence[jax.Device]
) -> tuple[Measured, Any]:
  """Returns what the compiler says of a config's train step, and the program.

  Raises:
    TooLargeError: It wants more memory than a chip has.
  """
  import jax
  import numpy as np

  from flaxmlm.objectives import Batch
  from flaxmlm.planning import hlo, prediction
  from flaxmlm.training import sharding
  from flaxmlm.training.step import state_shapes

  parts, mesh = make(c, devices)
  place = sharding.batch_sharding(mesh)
  B, L = c.train.batch_size, c.data.row_length

  def rows(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

  batch = Batch(
    ids=rows(np.int32, B, L),
    segments=rows(np.int32, B, L),
    positions=rows(np.int32, B, L),
    flags=rows(np.uint8, B, L),
    example=rows(np.int32, B),
  )
  if config.wants_others(c):
    batch = batch._replace(other=batch)
  shapes = state_shapes(parts.init, parts.state_sharding)
  key = jax.eval_shape(lambda: jax.random.key(0))
  with waiting(f"compiling {c.model.layers} layers"):
    lowered = parts.train_step.lower(shapes, batch, key)
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      found = _TOO_LARGE.search(str(error))
      if "RESOURCE_EXHAUSTED" not in str(error) or found is None:
        raise
      raise TooLargeError(
        float(found[1]) * _UNITS[found[2]], float(found[3]) * _UNITS[found[4]]
      ) from error
  program = hlo.parse(compiled.as_text())
  state = {
    "parameters": shard_bytes(shapes.params),
    "optimizer": shard_bytes(shapes.opt_state),
  }
  own = dict(mesh.shape)
  own["data"] //= chosen.slices  # each slice has a program of its own
  measured = prediction.measure(
    compiled, program, chosen.chip, mesh=own, state=state
  )
  return measured, program


def shard_bytes(shapes: Any) -> int:
  """Returns the bytes of a tree on one device."""
  import jax

  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(shapes)
  )


def estimate(
  c: ConfigDict, chosen: Slice, devices: Sequence[jax.Device]
) -> Measured:
  """Returns about what `compile_step` would, from two short models.

  Raises:
    TooLargeError: It would want more memory than a chip has.
  """
  from flaxmlm.planning import prediction

  period = 1
  if c.model.family == "modernbert":
    period = c.model.global_attn_every_n_layers
  elif c.model.family == "albert":
    period = c.model.num_hidden_groups
  # Of scanned layers, one and two would be programs of other kinds.
  short, long = (
    changed(c, {"model.layers": n * period, "model.scan_layers": False})
    for n in (1, 2)
  )
  if c.model.layers <= long.model.layers:
    measured = compile_step(c, chosen, devices)[0]
  else:
    measured = prediction.extend(
      compile_step(short, chosen, devices)[0],
      compile_step(long, chosen, devices)[0],
      layers=(period, 2 * period, c.model.layers),
    )
  used = sum(measured.memory.values())
  if used > chosen.chip.memory:
    raise TooLargeError(used, chosen.chip.memory)
  return measured


def changed(c: ConfigDict, keys: Mapping[str, Any]) -> ConfigDict:
  """Returns the config with other values of some keys."""
  return config.check_keys(config.to_flat(c) | dict(keys), where="plan")


def find_fitting(
  c: ConfigDict, chosen: Slice, devices: Sequence[jax.Device]
) -> dict[str, Any] | None:
  """Looks for what saves enough memory at the least cost, and prints it."""
  for keys in savings(c, devices):
    if all(config.to_flat(c)[key] == value for key, value in keys.items()):
      continue
    try:
      option = changed(c, keys)
      config.validate(option, devices=len(devices), sources=False)
      estimate(option, chosen, devices)
    except (TooLargeError, InputError):
      continue
    shown = " ".join(f"--config.{key}={value}" for key, value in keys.items())
    print(f"would fit, from a shorter model's figures: {shown}")
    return keys
  print("nothing that this program knows makes it fit; take more chips")
  return None


def savings(
  c: ConfigDict, devices: Sequence[jax.Device]
) -> Iterator[dict[str, Any]]:
  """Yields keys that save memory, the cheapest first."""
  ways = len(devices) // max(c.mesh.tensor, 1)
  for keys in _SAVINGS:
    yield keys
    if c.mesh.fsdp == 1 and ways > 1:
      yield keys | {"mesh.data": -1, "mesh.fsdp": min(ways, 16)}


def search(
  c: ConfigDict,
  chosen: Slice,
  devices: Sequence[jax.Device],
  *,
  price: float | None,
) -> dict[str, Any]:
  """Prints and returns ways to run a config, the fastest first."""
  found = []
  for keys in candidates(len(devices), c):
    for saving in _SAVINGS:
      tried = {"train.microbatches": 1} | keys | saving
      try:
        option = changed(c, tried)
        config.validate(option, devices=len(devices), sources=False)
        measured = estimate(option, chosen, devices)
      except InputError as error:
        print(f"left out: {error}", flush=True)
        break
      except TooLargeError as error:
        size = error.args[0] / 2**30
        print(f"{describe(option)}: {size:.1f} GiB, too large", flush=True)
        continue
      values = foresee(measured, option, chosen, devices, price)
      found.append({"keys": tried} | values)
      break
  found.sort(key=lambda row: row["step_seconds"])
  print("\nfrom models of one and two layers, the fastest first:")
  for row in found:
    keys = " ".join(f"--config.{k}={v}" for k, v in row["keys"].items())
    print(
      f"{1e3 * row['step_seconds']:9.1f} ms  MFU {row['mfu']:5.1%}"
      f"  {row['memory_total'] / 2**30:5.1f} GiB  {row['bound_by']:8}{keys}"
    )
  if not found:
    print("nothing fits; take more chips, or a smaller batch")
  return {"search": found}


def candidates(chips: int, c: ConfigDict) -> Iterator[dict[str, Any]]:
  """Yields meshes and attention backends that are worth a try."""
  sizes = [n for n in (1, 4, 16, 64, 256) if chips % n == 0 and n <= chips]
  for attention in ("auto", "xla"):
    for fsdp in sizes:
      mesh = {"mesh.data": -1, "mesh.fsdp": fsdp, "mesh.tensor": 1}
      yield mesh | {"model.attention": attention}
  if chips % 4 == 0 and c.model.heads % 4 == 0:
    mesh = {"mesh.data": -1, "mesh.fsdp": 1, "mesh.tensor": 4}
    yield mesh | {"model.attention": "auto"}


def print_plan(values: Mapping[str, Any]) -> None:
  """Prints a plan for people."""
  gib = 2**30
  total, there = values["memory_total"], values["memory_of_chip"]
  fits = "" if values["fits"] else ": it doesn't fit"
  print(f"\nmemory of a chip  {total / gib:.2f} GiB of {there / gib:.0f}{fits}")
  for name, size in values["memory"].items():
    print(f"{name:>18}  {size / gib:.2f} GiB")
  print(
    f"\nFLOPs a token     {values['flops_per_token'] / 1e6:,.1f} M,"
    f" {values['flops_ratio']:.3f} of the formula"
  )
  print(f"HBM a token       {values['bytes_per_token'] / 1e6:,.2f} MB")
  if values["cycles_ratio"] != 1:  # else the compiler said nothing of them
    print(f"cycles            {values['cycles_ratio']:.2f} x pure products")
  if values["collectives"]:
    print("\ncollectives of a step")
  for row in values["collectives"]:
    print(
      f"{row['kind']:>18}  over {row['axes']}: {row['bytes'] / 1e6:,.1f} MB of"
      f" {row['dtypes']} in {row['count']:.0f}"
      f" ({row['operands']:.0f} arrays), {1e3 * row['seconds']:.2f} ms"
    )
  times = ", ".join(
    f"{name} {1e3 * seconds:.1f} ms"
    for name, seconds in values["seconds"].items()
  )
  print(f"\nbound by {values['bound_by']}   ({times})")
  print(
    f"at best           {1e3 * values['step_seconds']:.1f} ms a step,"
    f" {values['tokens_per_second']:,.0f} tokens/s, MFU {values['mfu']:.1%}"
  )
  line = f"{values['days']:.2f} days, {values['chip_hours']:,.0f} chip-hours"
  if "cost" in values:
    line += f", {values['cost']:,.2f} at that price"
  print(f"the run           {line}")


def print_where(rows: Sequence[Mapping[str, Any]], cycles: float) -> None:
  """Prints where bytes and cycles go: what has a hundredth of either."""
  moved = sum(row["bytes_per_token"] for row in rows)
  print("\nKB a token  cycles  kind        line, and place in the model")
  for row in rows:
    share = row["cycles"] / cycles if cycles else 0.0
    if max(share, row["bytes_per_token"] / moved) >= 0.01:
      print(
        f"{row['bytes_per_token'] / 1e3:10.1f}  {share:6.1%}"
        f"  {row['kind']:<11} {row['source'] or '-'}  {row['place']}"
      )


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
  """Says each 15 seconds that it still goes on, and at the end how long."""
  began, done = time.perf_counter(), threading.Event()

  def say() -> None:
    while not done.wait(15):
      seconds = time.perf_counter() - began
      print(f"{what}: {seconds:.0f} s so far", flush=True)

  thread = threading.Thread(target=say, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()
    print(f"{what}: {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
  config.run(main)
