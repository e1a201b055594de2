"""Training speed against Hugging Face torch, in turns of one run.

  python -m benchmarks.train_step [--shape=NAME ...] [--quick] [--json]

Whole steps: forward, backward, clipping, AdamW; vocabulary 30,522 (ModernBERT:
50,368), 15 % masked, no dropout, full rows: of BERT's a document each, of
ModernBERT's several. The peers are `BertForMaskedLM` and
`ModernBertForMaskedLM` with SDPA attention and fused AdamW, given the same
rows, as they are and by `torch.compile`; labels are -100 where nothing is
asked. BERT there computes logits for every token, as it always does; ModernBERT
has `sparse_prediction`. torch is given ModernBERT's short documents in a row
each, which is what it is fastest at: no attention is wasted on neighbours.
Only documents' tokens are counted; model FLOPs are those of whole rows. Needs
the extra `hf`.

Each has a process of its own (`benchmarks.turns`), in huge pages, as
`flaxmlm.train` is; `--small_pages` shows what these are worth.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import report, turns
from flaxmlm import config
from flaxmlm.objectives import Batch
from flaxmlm.train import make_parts
from flaxmlm.training import metrics, sharding
from flaxmlm.training.step import state_shapes

MINE = "flaxmlm float32"
SPECIALS = {"pad": 0, "unk": 100, "cls": 101, "sep": 102, "mask": 103}
Run = Callable[[int], None]


class Shape(NamedTuple):
  """A model and its batch: `rows` of `length` tokens in `documents` each."""

  family: str
  layers: int
  width: int
  heads: int
  ffn: int
  vocab: int
  rows: int
  length: int
  documents: int


MINI = ("bert", 4, 256, 4, 1024, 30_522)
BASE = ("bert", 12, 768, 12, 3072, 30_522)
MODERN = ("modernbert", 22, 768, 12, 1152, 50_368)
SHAPES = {
  "bert_4x256_L128": Shape(*MINI, rows=32, length=128, documents=1),
  "bert_4x256_L512": Shape(*MINI, rows=8, length=512, documents=1),
  "bert_12x768_L128": Shape(*BASE, rows=8, length=128, documents=1),
  "bert_12x768_L512": Shape(*BASE, rows=2, length=512, documents=1),
  "modernbert_22x768_L1024": Shape(*MODERN, rows=1, length=1024, documents=5),
}


def main() -> None:
  parser = report.parser(__doc__)
  parser.add_argument("--small_pages", action="store_true")
  parser.add_argument(
    "--shape", action="append", choices=SHAPES, help="by default the first"
  )
  args = parser.parse_args()
  if not args.small_pages:  # see `flaxmlm.training.memory`
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
  for name in args.shape or list(SHAPES)[:1]:
    print(f"{name}")
    figures = measure(SHAPES[name], quick=args.quick)
    report.finish(
      args,
      f"train_step-{name}",
      figures | {"huge_pages": not args.small_pages},
      packages=["flaxmlm", "jax", "flax", "optax", "torch", "transformers"],
    )


def measure(shape: Shape, *, quick: bool) -> dict[str, Any]:
  """Times the peers in turn, so that a drifting machine is fair."""
  tokens = shape.rows * shape.length
  rounds, seconds = (3, 1) if quick else (5, 4)
  names = [MINE]
  for dtype in ("float32", "bfloat16") if has_bfloat16() else ("float32",):
    names += [f"flaxmlm {dtype}"] if dtype != "float32" else []
    names += [f"torch {dtype}", f"torch {dtype} compiled"]
  if not has_bfloat16():
    print("bfloat16: left out, this CPU has no instructions for it")
  peers, first = {}, {}
  for name in names:
    turn = turns.start(make_peer, shape, name)
    try:
      first[name], _ = turn(2)
    except EOFError:
      print(f"{name}: left out, its process ended")
      continue
    peers[name] = turn
  steps = max(1, round(seconds / peers[MINE](1)[0]))
  speeds: dict[str, list[float]] = {name: [] for name in peers}
  peak = 0.0  # the best of all rounds, for that of a busy moment is too low
  for _ in range(rounds):
    peak = max(peak, metrics.peak_flops("float32").flops)
    for name, turn in peers.items():
      turn(1)  # the peer before has left its own in the caches
      speeds[name].append(steps * tokens / turn(steps)[0])
  _, _, flops = make_step(shape)

  median = {name: statistics.median(s) for name, s in speeds.items()}
  mine = median[MINE]
  ours, torch = (
    max(v for name, v in median.items() if name.startswith(kind))
    for kind in ("flaxmlm", "torch")
  )
  report.table(
    [
      {
        "step": name,
        "tokens/s": median[name],
        "least": min(speed),
        "most": max(speed),
        "flaxmlm / this": mine / median[name],
      }
      for name, speed in speeds.items()
    ]
  )
  return {
    "shape": shape._asdict(),
    "tokens_per_second": median,
    "least": {name: min(speed) for name, speed in speeds.items()},
    "most": {name: max(speed) for name, speed in speeds.items()},
    "ratio_to_torch_float32": mine / median["torch float32"],
    "ratio_to_torch_best": ours / torch,
    "matmul_peak_gflops": peak / 1e9,
    "share_of_peak": mine / tokens * flops / peak,
    "first_steps_seconds": first[MINE],
    "rounds": rounds,
    "steps_a_round": steps,
  }


def make_peer(shape: Shape, name: str) -> Run:
  """Returns what runs N steps of a peer."""
  kind, dtype, *_ = name.split()
  return (
    make_ours(shape, dtype) if kind == "flaxmlm" else make_torch(shape, name)
  )


def has_bfloat16() -> bool:
  """Says whether bfloat16 products are faster than minutes a step here."""
  with open("/proc/cpuinfo", encoding="utf-8") as file:
    flags = file.read()
  return "avx512_bf16" in flags or "amx_bf16" in flags


def make_rows(shape: Shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns ids, segments and positions of full rows, [B L]."""
  random = np.random.default_rng(0)
  ids = random.integers(1000, shape.vocab, (shape.rows, shape.length))
  pieces = np.array_split(np.arange(shape.length), shape.documents)
  segments = np.repeat(range(1, shape.documents + 1), [*map(len, pieces)])
  positions = np.concatenate([np.arange(len(piece)) for piece in pieces])
  for piece in pieces:
    ids[:, piece[0]], ids[:, piece[-1]] = SPECIALS["cls"], SPECIALS["sep"]
  every = (shape.rows, 1)
  return (
    ids.astype(np.int32),
    np.tile(segments.astype(np.int32), every),
    np.tile(positions.astype(np.int32), every),
  )


def make_ours(shape: Shape, dtype: str = "float32") -> Run:
  """Returns what runs N of our steps."""
  train_step, arguments, _ = make_step(shape, dtype)
  state, *rest = arguments()

  def run(steps: int) -> None:
    nonlocal state
    for _ in range(steps):
      state, sums = train_step(state, *rest)
    jax.block_until_ready(sums)

  return run


def make_step(
  shape: Shape,
  dtype: str = "float32",
  *,
  devices: Sequence[jax.Device] | None = None,
  **model_keys: Any,
) -> tuple[Callable[..., Any], Callable[..., tuple[Any, ...]], float]:
  """Returns our step, what makes its arguments, and its model FLOPs.

  The arguments are arrays, or with `shapes=True` what stands for them where the
  devices are none of this machine's.
  """
  B, L, V = shape.rows, shape.length, shape.vocab
  keys = {
    "model.family": shape.family,
    "model.layers": shape.layers,
    "model.width": shape.width,
    "model.heads": shape.heads,
    "model.ffn": shape.ffn,
    "model.dropout": 0.0,
    "model.attention_dropout": 0.0,
    "model.max_positions": max(512, L),
    "data.row_length": L,
    "train.batch_size": B,
    "train.dtype": dtype,
    **{f"model.{name}": value for name, value in model_keys.items()},
  }
  c = config.check_keys(keys, where="benchmark")
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1, devices=devices)
  model, objective, init, places, train_step = make_parts(
    c, SPECIALS | {"size": V}, mesh
  )
  ids, segments, positions = make_rows(shape)
  batch = Batch(
    ids, segments, positions, np.ones((B, L), np.uint8), np.arange(B)
  )

  def arguments(*, shapes: bool = False) -> tuple[Any, ...]:
    if shapes:
      place = sharding.batch_sharding(mesh)
      rows = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), batch
      )
      key = jax.eval_shape(lambda: jax.random.key(1))
      return state_shapes(init, places), rows, key
    rows = sharding.put_rows(mesh, batch)
    return init(jax.random.key(0)), rows, jax.random.key(1)

  return train_step, arguments, objective.flops(model, L) * B


def make_torch(shape: Shape, name: str) -> Run:
  """Returns what runs N steps of Hugging Face's model in torch."""
  import torch
  import transformers

  shared = {
    "vocab_size": shape.vocab,
    "hidden_size": shape.width,
    "num_hidden_layers": shape.layers,
    "num_attention_heads": shape.heads,
    "intermediate_size": shape.ffn,
    "attn_implementation": "sdpa",
  }
  if shape.family == "modernbert":
    model = transformers.ModernBertForMaskedLM(
      transformers.ModernBertConfig(sparse_prediction=True, **shared)
    )
  else:
    model = transformers.BertForMaskedLM(
      transformers.BertConfig(
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **shared
      )
    )
  model.train()
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
  rows, segments, _ = make_rows(shape)
  documents = [
    row[own == number]
    for row, own in zip(rows, segments, strict=True)
    for number in range(1, shape.documents + 1)
  ]
  valid, ids = (
    torch.nn.utils.rnn.pad_sequence(
      [torch.tensor(x, dtype=torch.long) for x in some], batch_first=True
    )
    for some in ([np.ones(len(d)) for d in documents], documents)
  )
  given = {} if bool(valid.all()) else {"attention_mask": valid}
  random = torch.Generator().manual_seed(0)
  hidden = (torch.rand(ids.shape, generator=random) < 0.15) & (valid > 0)
  labels = torch.where(hidden, ids, -100)
  shown = torch.where(hidden, SPECIALS["mask"], ids)
  half = "bfloat16" in name
  called = torch.compile(model) if "compiled" in name else model

  def run(steps: int) -> None:
    for _ in range(steps):
      optimizer.zero_grad(set_to_none=True)
      with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = called(input_ids=shown, labels=labels, **given).loss
      loss.backward()
      torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
      optimizer.step()

  return run


if __name__ == "__main__":
  main()
