"""Reading compiled programs: bytes by hand, collectives, who takes part."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT, environment

from flaxmlm import InputError
from flaxmlm.planning import chips, hlo, prediction

# A chip's program as the compiler writes it, cut down: a prefetch into VMEM, a
# product that reads it there, a loop of three turns, an all-reduce.
TEXT = """HloModule jit_step, is_scheduled=true

FileNames
1 "PACKAGE/models/bert.py"
2 "/elsewhere/jax/numpy.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=87 end_line=87 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=5 end_line=5 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}


%fused (a: bf16[16,128], b: bf16[128,100]) -> bf16[16,100] {
  %a = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[128,100]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %p = bf16[16,100]{1,0:T(8,128)(2,1)} convolution(%a, %b), dim_labels=bf
}

%body (t: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %t = (s32[], f32[8,128]{1,0:T(8,128)}) parameter(0)
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%t), index=1
  %i = s32[] get-tuple-element(%t), index=0
  %n = f32[8,128]{1,0:T(8,128)} negate(%x)
  ROOT %r = (s32[], f32[8,128]{1,0:T(8,128)}) tuple(%i, %n)
}

ENTRY %main (a: bf16[16,128], b: bf16[128,100]) -> f32[8,128] {
  %a.1 = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  %b.1 = bf16[128,100]{1,0:T(8,128)(2,1)} parameter(1)
  %copy-start = (bf16[128,100]{1,0:T(8,128)(2,1)S(1)}, \
bf16[128,100]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%b.1)
  %copy-done = bf16[128,100]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %f = bf16[16,100]{1,0:T(8,128)(2,1)} fusion(%a.1, %copy-done), \
kind=kOutput, calls=%fused, \
metadata={op_name="jit(step)/transpose(jvp(E))/layer_3/output/dot_general" \
stack_frame_id=2}, backend_config={"estimated_cycles":"1500"}
  %z = (s32[], f32[8,128]{1,0:T(8,128)}) tuple(%a.1, %f)
  %w = (s32[], f32[8,128]{1,0:T(8,128)}) while(%z), condition=%c, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %g = f32[8,128]{1,0:T(8,128)} get-tuple-element(%w), index=1
  ROOT %s = f32[8,128]{1,0:T(8,128)} all-reduce(%g), \
replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add
}
""".replace("PACKAGE", str(ROOT / "flaxmlm"))
B_BYTES, PRODUCT, TURN = 128 * 128 * 2, 2 * 16 * 128 * 2, 2 * 8 * 128 * 4


def test_bytes_are_those_of_hbm_with_padding_and_turns():
  costs = hlo.costs(hlo.parse(TEXT))
  assert [(c.kind, c.bytes, c.cycles) for c in costs] == [
    ("move", B_BYTES, 0),
    ("product", PRODUCT, 1500),
    ("elementwise", 3 * TURN, 0),
    ("collective", TURN, 0),
  ]


def test_a_cost_says_where_it_comes_from():
  product = hlo.costs(hlo.parse(TEXT))[1]
  assert product.source == "models/bert.py:87"
  (row,) = prediction.where([product], 16)
  assert row["place"] == "layer/output/dot_general, backward"
  assert row["bytes_per_token"] == PRODUCT / 16


def test_collectives_have_their_axes():
  (found,) = hlo.collectives(hlo.parse(TEXT))
  assert found.groups == ((0, 2), (1, 3))
  mesh = {"data": 2, "fsdp": 2, "tensor": 1}
  row = prediction.describe(found, mesh, chips.TPUS["v5e"])
  assert row["axes"] == "data"
  assert row["bytes"] == 8 * 128 * 4
  # 2 (n - 1) / n of it, over half of the links.
  assert row["seconds"] == pytest.approx(8 * 128 * 4 / 100e9)


@pytest.mark.parametrize(
  ("groups", "axes"),
  [
    ([(0, 1), (2, 3), (4, 5), (6, 7)], ("tensor",)),
    ([(0, 4), (1, 5), (2, 6), (3, 7)], ("data",)),
    ([(0, 1, 4, 5), (2, 3, 6, 7)], ("data", "tensor")),
    ([(0, 3), (1, 2), (4, 7), (5, 6)], ()),
    ([], ("data", "fsdp", "tensor")),
  ],
)
def test_axes_of_groups(groups, axes):
  mesh = {"data": 2, "fsdp": 2, "tensor": 2}
  assert prediction.find_axes(groups, mesh) == axes


def test_flops_and_products_of_a_real_program():
  """What XLA compiles for the CPU here is read by the same walk."""
  x = jnp.ones((64, 32))

  def loss(w):
    return jnp.tanh(x @ w).sum()

  compiled = jax.jit(jax.grad(loss)).lower(jnp.ones((32, 16))).compile()
  costs = hlo.costs(hlo.parse(compiled.as_text()))
  least = 4 * (64 * 32 + 32 * 16) + 4 * (64 * 32 + 64 * 16)
  assert sum(cost.bytes for cost in costs) >= least


def test_a_line_through_two_models():
  rows = [
    {"kind": "k", "axes": "a", "dtypes": "d", "count": 1, "operands": n}
    | {"bytes": 10 * n, "seconds": 0.1 * n}
    for n in (1, 2)
  ]
  short, long = (
    prediction.Measured(n, 2.0 * n, 3 + n, 0, {"x": 5 + n}, [row])
    for n, row in zip((1, 2), rows, strict=True)
  )
  twelve = prediction.extend(short, long, layers=(1, 2, 12))
  assert twelve[:4] == (12, 24, 15, 0)
  assert twelve.memory == {"x": 17}
  assert twelve.collectives[0]["bytes"] == 120


@pytest.mark.parametrize(
  ("argument", "said"),
  [
    ("--tpu=v9:4x4", "knows v4, v5e, v5p, v6e"),
    ("--tpu=v5e:4x4x4", "2 dimensions"),
    ("--tpu=v5e", "wants KIND:AxB"),
    ("--gpu=h100", "wants one of a100, h100, h200"),
    ("--price=1", "name the chips"),
  ],
)
def test_chips_that_arent_known_are_refused(argument, said):
  done = subprocess.run(
    [sys.executable, "-m", "flaxmlm.plan", argument],
    cwd=ROOT,
    env=environment(),
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert said in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_slice_is_its_chips():
  assert chips.parse_tpu("v5p:4x4x4").count == 64
  with pytest.raises(InputError, match="AxBxC"):
    chips.parse_tpu("v4:4")
