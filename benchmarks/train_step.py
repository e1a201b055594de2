"""Training speed against Hugging Face torch, interleaved in one run.

  python -m benchmarks.train_step [--quick] [--json]

BERT 4x256, vocabulary 30,522, rows of 128, 15 % masked, AdamW with clipping,
no dropout, float32. The peer is `BertForMaskedLM` with fused AdamW and SDPA
attention, given the same rows; its labels are -100 where nothing is asked. It
computes logits for every token, as it always does. Needs the extra `hf`.

Both run in huge pages, as `flaxmlm.train` does; `--small_pages` shows what that
is worth.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from benchmarks import report
from flaxmlm import config, models, objectives
from flaxmlm.objectives import Batch
from flaxmlm.training import memory, metrics, optimizers, sharding
from flaxmlm.training.step import make_init, make_train_step

V, L, B = 30_522, 128, 32
SPECIALS = {"pad": 0, "unk": 100, "cls": 101, "sep": 102, "mask": 103}
SHAPE = {
  "model.layers": 4,
  "model.width": 256,
  "model.heads": 4,
  "model.ffn": 1024,
  "model.dropout": 0.0,
  "model.attention_dropout": 0.0,
  "data.row_length": L,
  "train.batch_size": B,
}


def main() -> None:
  parser = report.parser(__doc__)
  parser.add_argument("--small_pages", action="store_true")
  args = parser.parse_args()
  if not args.small_pages:
    memory.use_huge_pages()
  rounds, steps = (3, 4) if args.quick else (9, 10)

  ours, flops = make_ours()
  peers = {"flaxmlm float32": ours}
  peers["torch float32"] = make_torch("float32")
  if has_bfloat16():
    peers["torch bfloat16"] = make_torch("bfloat16")
  else:
    print("torch bfloat16: left out, this CPU has no instructions for it")
  speeds: dict[str, list[float]] = {name: [] for name in peers}
  for _ in range(rounds):  # in turn, so that a drifting machine is fair
    for name, run in peers.items():
      start = time.perf_counter()
      run(steps)
      speeds[name].append(steps * B * L / (time.perf_counter() - start))
  peak = metrics.peak_flops("float32").flops

  median = {name: statistics.median(s) for name, s in speeds.items()}
  mine = median["flaxmlm float32"]
  best = max(v for name, v in median.items() if name.startswith("torch"))
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
  report.finish(
    args,
    "train_step",
    {
      "tokens_per_second": median,
      "ratio_to_torch_float32": mine / median["torch float32"],
      "ratio_to_torch_best": mine / best,
      "matmul_peak_gflops": peak / 1e9,
      "share_of_peak": mine / (B * L) * flops / peak,
      "huge_pages": not args.small_pages,
      "rounds": rounds,
      "steps_a_round": steps,
    },
    packages=["flaxmlm", "jax", "flax", "optax", "torch", "transformers"],
  )


def has_bfloat16() -> bool:
  """Says whether bfloat16 products are faster than minutes a step here."""
  with open("/proc/cpuinfo", encoding="utf-8") as file:
    flags = file.read()
  return "avx512_bf16" in flags or "amx_bf16" in flags


def rows() -> tuple[np.ndarray, np.ndarray]:
  """Returns ids and segments of full rows of two documents."""
  random = np.random.default_rng(0)
  ids = random.integers(1000, V, (B, L)).astype(np.int32)
  ids[:, [0, 64]], ids[:, [63, L - 1]] = SPECIALS["cls"], SPECIALS["sep"]
  return ids, np.repeat([[1] * 64 + [2] * 64], B, 0).astype(np.int32)


def make_ours() -> tuple[Callable[[int], None], float]:
  """Returns what runs N of our steps, and the model FLOPs of one."""
  c = config.check_keys(SHAPE, where="benchmark")
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  model = models.build(c.model, vocab_size=V, dtype="float32")
  objective = objectives.build(
    c.objective, row_length=L, vocab=SPECIALS | {"size": V}
  )
  optimizer = optimizers.make_optimizer(c.optimizer, steps=c.train.steps)
  init, places = make_init(model, optimizer, mesh)
  train_step = make_train_step(
    model,
    objective,
    optimizer,
    optimizers.make_schedule(c.optimizer, steps=1000, peak=1e-4),
    mesh=mesh,
    state_sharding=places,
    microbatches=1,
  )
  ids, segments = rows()
  positions = np.tile(np.arange(64, dtype=np.int32), (B, 2))
  batch = Batch(
    ids, segments, positions, np.ones((B, L), np.uint8), np.arange(B)
  )
  state, key = init(jax.random.key(0)), jax.random.key(1)

  def run(steps: int) -> None:
    nonlocal state
    for _ in range(steps):
      state, sums = train_step(state, sharding.put_rows(mesh, batch), key)
    jax.block_until_ready(sums)

  run(2)
  return run, model.flops(L, objective.slots) * B


def make_torch(dtype: str) -> Callable[[int], None]:
  """Returns what runs N steps of Hugging Face's BERT in torch."""
  import torch
  from transformers import BertConfig, BertForMaskedLM

  model = BertForMaskedLM(
    BertConfig(
      vocab_size=V,
      hidden_size=256,
      num_hidden_layers=4,
      num_attention_heads=4,
      intermediate_size=1024,
      hidden_dropout_prob=0.0,
      attention_probs_dropout_prob=0.0,
      attn_implementation="sdpa",
    )
  ).train()
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
  ids = torch.tensor(rows()[0], dtype=torch.long)
  random = torch.Generator().manual_seed(0)
  hidden = torch.rand(ids.shape, generator=random) < 0.15
  labels = torch.where(hidden, ids, -100)
  shown = torch.where(hidden, SPECIALS["mask"], ids)
  half = dtype == "bfloat16"

  def run(steps: int) -> None:
    for _ in range(steps):
      optimizer.zero_grad(set_to_none=True)
      with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = model(input_ids=shown, labels=labels).loss
      loss.backward()
      torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
      optimizer.step()

  run(2)
  return run


if __name__ == "__main__":
  main()
