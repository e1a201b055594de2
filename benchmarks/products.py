"""What the matrix products of a step take, each timed alone.

  python -m benchmarks.products [--shape=NAME] [--quick] [--json]

Of the steps in `benchmarks.train_step`: every product of tokens and weights
with its two gradients, and attention whole, with its softmax and its gradients.
What the step takes more than their sum is all the rest: norms, activations, the
loss, the optimizer, and arrays that have left the caches.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from benchmarks.train_step import (
  SHAPES,
  SPECIALS,
  Shape,
  make_ours,
  make_rows,
)
from flaxmlm import config, objectives
from flaxmlm.models.attention import attend
from flaxmlm.training import memory

Runs = list[Callable[[], Any]]


def main() -> None:
  parser = report.parser(__doc__)
  parser.add_argument(
    "--shape", choices=SHAPES, default="bert_12x768_L512", help="the model"
  )
  args = parser.parse_args()
  memory.use_huge_pages()
  shape, calls = SHAPES[args.shape], 3 if args.quick else 10
  products = [
    measure(name, count, *make_product(*sizes), calls)
    for name, count, sizes in list_products(shape)
  ]
  attention = [
    measure(name, count, *make_attention(shape, window), calls)
    for name, count, window in list_attention(shape)
  ]
  run = make_ours(shape)
  run(2)
  step = least(lambda: run(1), calls)
  report.table([*products, *attention])
  seconds = {
    "products_seconds": sum(row["s a step"] for row in products),
    "attention_seconds": sum(row["s a step"] for row in attention),
    "step_seconds": step,
  }
  for name, value in seconds.items():
    print(f"{name:>18}  {value:.3g}")
  report.finish(
    args,
    f"products-{args.shape}",
    {
      "shape": shape._asdict(),
      "products": products,
      "attention": attention,
      **seconds,
    },
    packages=["flaxmlm", "jax", "flax"],
  )


def list_products(
  shape: Shape,
) -> list[tuple[str, int, tuple[int, int, int]]]:
  """Returns name, times a step, and m, k, n of [m k] x [k n]."""
  T, D, F = shape.rows * shape.length, shape.width, shape.ffn
  c = config.defaults()
  objective = objectives.build(
    c.objective,
    row_length=shape.length,
    vocab=SPECIALS | {"size": shape.vocab},
    steps=1,
  )
  M, N = shape.rows * objective.slots, shape.layers
  widening = 2 if shape.family == "modernbert" else 1
  return [
    ("query, key, value, output", 4 * N, (T, D, D)),
    ("feed-forward, wider", widening * N, (T, D, F)),
    ("feed-forward, back", N, (T, F, D)),
    ("head, transform", 1, (M, D, D)),
    ("head, vocabulary", 1, (M, D, shape.vocab)),
  ]


def list_attention(shape: Shape) -> list[tuple[str, int, int | None]]:
  """Returns name, times a step, and the window of each kind of layer."""
  if shape.family != "modernbert":
    return [("attention", shape.layers, None)]
  c = config.defaults().model
  everywhere = -(-shape.layers // c.global_attn_every_n_layers)
  return [
    ("attention, global", everywhere, None),
    ("attention, local", shape.layers - everywhere, c.local_attention // 2),
  ]


def make_product(m: int, k: int, n: int) -> tuple[Runs, float]:
  """Returns what runs [m k] x [k n] and its two gradients; FLOPs of all.

  The widest one is the decoder, which is the table of embeddings: [n k].
  """
  random, sizes = np.random.default_rng(0), {"m": m, "k": k, "n": n}
  kn = "nk" if n > 10 * k else "kn"
  x, w, g = (
    jnp.asarray(random.normal(size=[sizes[a] for a in axes]), jnp.float32)
    for axes in ("mk", kn, "mn")
  )
  forward, to_x, to_w = (
    jax.jit(functools.partial(jnp.einsum, form))
    for form in (f"mk,{kn}->mn", f"mn,{kn}->mk", f"mk,mn->{kn}")
  )
  runs = [lambda: forward(x, w), lambda: to_x(g, w), lambda: to_w(x, g)]
  return runs, 3 * 2.0 * m * k * n


def make_attention(shape: Shape, window: int | None) -> tuple[Runs, float]:
  """Returns what runs attention and its gradients; FLOPs without a mask."""
  B, L, H = shape.rows, shape.length, shape.heads
  K = shape.width // H
  random = np.random.default_rng(0)
  query, key, value, g = (
    jnp.asarray(random.normal(size=(B, L, H, K)), jnp.float32) for _ in range(4)
  )
  segments = jnp.asarray(make_rows(shape)[1])

  @jax.jit
  def run(*args: jax.Array) -> Any:
    mixed, back = jax.vjp(lambda *x: attend(*x, segments, window=window), *args)
    return mixed, back(g)

  seen = L if window is None else min(L, 2 * window + 1)
  return [lambda: run(query, key, value)], 3 * 4.0 * B * L * seen * H * K


def measure(
  name: str,
  count: int,
  runs: Runs,
  flops: float,
  calls: int,
) -> dict[str, Any]:
  """Times some calls alone."""
  seconds = sum(least(run, calls) for run in runs)
  return {
    "product": name,
    "times": count,
    "GF/s": flops / seconds / 1e9,
    "s a step": count * seconds,
  }


def least(run: Callable[[], Any], calls: int) -> float:
  """Returns the least seconds of a call, the first one left out."""
  jax.block_until_ready(run())
  seconds = []
  for _ in range(calls):
    start = time.perf_counter()
    jax.block_until_ready(run())
    seconds.append(time.perf_counter() - start)
  return min(seconds)


if __name__ == "__main__":
  main()
