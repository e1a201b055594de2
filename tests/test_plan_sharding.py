"""What a TPU's compiler makes of parameters that are split over its chips."""

import importlib.util
import json
import math
import subprocess
import sys

import jax
import pytest
from conftest import ROOT, environment

from flaxmlm import config, models, objectives
from flaxmlm.planning import chips, hlo, prediction
from flaxmlm.training import sharding

CONFIG = str(ROOT / "configs" / "bert_1b.py")
V, D, F, L, M = 32_768, 2_048, 8_192, 1_024, 153
# In a process of its own: there the compiler sees no flags for the CPU's.
COMPILE = """
import json, sys
from flaxmlm import config, plan
from flaxmlm.planning import chips

path, tpu, *keys = sys.argv[1:]
c = config.load(path, keys)
chosen = chips.parse_tpu(tpu)
devices = plan.find_devices(chosen)
measured, program = plan.compile_step(c, chosen, devices)
_, mesh = plan.make(c, devices)
print(json.dumps({
  "collectives": measured.collectives,
  "shapes": sorted({
    array.shape
    for body in program.computations.values()
    for instruction in body
    for array in instruction.results
  }),
  "slices": [
    [getattr(d, "slice_index", 0) for d in row.flat] for row in mesh.devices
  ],
}))
"""


def compiled(tpu: str, *keys: str) -> dict:
  """Returns what one layer of the config is compiled to."""
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("the TPU's compiler (libtpu) isn't installed")
  keys = ("--config.model.layers=1", *keys)
  done = subprocess.run(
    [sys.executable, "-c", COMPILE, CONFIG, tpu, *keys],
    cwd=ROOT,
    env=environment()
    | {
      "XLA_FLAGS": "",
      "TPU_SKIP_MDS_QUERY": "1",
      # Else two of them, at once, are an error.
      "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    },
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


def total(rows: list[dict], **keys) -> int:
  """Returns the bytes of the collectives that are like this."""
  chosen = [row for row in rows if keys.items() <= row.items()]
  return sum(row["bytes"] for row in chosen)


def test_every_matrix_of_a_billion_parameters_is_split():
  c = config.load(CONFIG, [])
  model = models.build(c.model, vocab_size=V, dtype=c.train.dtype)
  shapes = jax.eval_shape(
    lambda key: objectives.init_params(key, model=model, options=c.objective),
    jax.random.key(0),
  )
  mesh = sharding.make_mesh(data=1, fsdp=8, tensor=1)
  places = sharding.tree_sharding(mesh, shapes)
  assert 1.0e9 < sum(x.size for x in jax.tree.leaves(shapes)) < 1.2e9

  def check(leaf, place):
    if leaf.ndim > 1:
      assert math.prod(place.shard_shape(leaf.shape)) * 8 == leaf.size

  jax.tree.map(check, shapes, places)


@pytest.mark.slow
def test_the_table_is_gathered_once_and_no_chip_has_all_logits():
  """Of one layer on 4 x 4 chips that are split in both ways."""
  n, rows = 4, 4  # chips that share the parameters, rows a chip
  found = compiled(
    "v5e:4x4", f"--config.mesh.fsdp={n}", "--config.train.batch_size=64"
  )
  shapes = {tuple(shape) for shape in found["shapes"]}
  assert (n * rows * M, V // n) in shapes
  # The table and its gradient, padded or not, on their way.
  of_the_table = {shape for shape in shapes if max(shape, default=0) >= V}
  assert {shape[-1] for shape in of_the_table if len(shape) > 1} <= {D}
  sums = found["collectives"]
  layer = 2 * (4 * D * D + 2 * D * F)
  gathered = total(sums, kind="all-gather", axes="fsdp")
  once = 2 * (V * D + n * rows * M * D)
  # Besides the table and the slots' hidden states, each way: a layer, which is
  # computed twice, and what is small.
  assert once + 2 * layer < gathered < once + 3.5 * layer
  # Nothing as large as a matrix is summed on all chips that share them.
  assert total(sums, kind="all-reduce", axes="fsdp") < 2 * D * D
  scattered = total(sums, kind="reduce-scatter", axes="fsdp")
  # Of the table and the feed-forward in float32; padded by up to a tenth.
  assert scattered > 4 * (V * D + 2 * D * F) / n
  whole = 4 * (2 * V * D + 4 * D * D + 2 * D * F)
  assert total(sums, kind="all-reduce", axes="data") < whole / n


@pytest.mark.slow
def test_slices_exchange_their_parts_of_the_gradients_alone():
  n = 4
  found = compiled(
    "2xv5e:2x2", f"--config.mesh.fsdp={n}", "--config.train.batch_size=32"
  )
  # Devices along `data` are the two slices.
  assert found["slices"] == [[0] * n, [1] * n]
  sums = found["collectives"]
  assert {row["axes"] for row in sums} == {"fsdp", "slices"}
  sent = total(sums, axes="slices")
  gradients = V * D + 5 * D * D + 2 * D * F
  assert 2 * gradients / n < sent < 4 * (gradients + 2 * V * D) / n


def test_a_slice_holds_a_whole_copy_of_the_parameters():
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("the TPU's compiler (libtpu) isn't installed")
  done = subprocess.run(
    [sys.executable, "-m", "flaxmlm.plan", f"--config={CONFIG}"]
    + ["--tpu=2xv5e:2x2", "--config.mesh.fsdp=8"],
    cwd=ROOT,
    env=environment() | {"XLA_FLAGS": "", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert "mesh.data=1 doesn't divide by 2 slices" in done.stderr


# As the compiler writes them, cut down: a gather in three pieces beside other
# work, a reduce-scatter, what goes to the other slice.
TEXT = """HloModule jit_step, is_scheduled=true

%begin (a: bf16[64,128]) -> bf16[128,128] {
  %a = bf16[64,128]{1,0} parameter(0)
  ROOT %g.1 = bf16[128,128]{1,0} all-gather(%a), channel_id=7, \
replica_groups=mesh['x'=2,'y'=2] {'y'}, \
backend_config={"async_collective_fusion_config":{}}
}

%beside (b: bf16[64,128]) -> bf16[128,128] {
  %b = bf16[64,128]{1,0} parameter(0)
  ROOT %g.2 = bf16[128,128]{1,0} all-gather(%b), channel_id=7, \
replica_groups=mesh['x'=2,'y'=2] {'y'}, \
backend_config={"async_collective_fusion_config":{}}
}

%all-reduce-scatter (c: f32[64,128]) -> f32[32,128] {
  %c = f32[64,128]{1,0} parameter(0)
  %r = f32[64,128]{1,0} all-reduce(%c), replica_groups={{0,1},{2,3}}
  ROOT %d = f32[32,128]{1,0} dynamic-slice(%r)
}

ENTRY %main (x: bf16[64,128], y: f32[64,128]) -> f32[32,128] {
  %x = bf16[64,128]{1,0} parameter(0)
  %y = f32[64,128]{1,0} parameter(1)
  %f.1 = bf16[128,128]{1,0} fusion(%x), kind=kCustom, calls=%begin
  %f.2 = bf16[128,128]{1,0} fusion(%x), kind=kOutput, calls=%beside
  %t = token[] after-all()
  %send = (f32[8,128]{1,0}, u32[], token[]) send(%y, %t), \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  ROOT %f.3 = f32[32,128]{1,0} fusion(%y), kind=kCustom, \
calls=%all-reduce-scatter
}
"""


def test_collectives_in_pieces_are_one():
  mesh = {"data": 2, "fsdp": 2, "tensor": 1}
  rows = [
    prediction.describe(found, mesh, chips.TPUS["v5e"])
    for found in hlo.collectives(hlo.parse(TEXT))
  ]
  assert {(row["kind"], row["axes"], row["bytes"]) for row in rows} == {
    ("all-gather", "fsdp", 128 * 128 * 2),
    ("reduce-scatter", "fsdp", 32 * 128 * 4),
    ("send", "slices", 8 * 128 * 4),
  }
  assert len(rows) == 3
