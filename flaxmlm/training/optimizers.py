"""Optimizers and schedules, by Optax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import optax

_LOGITS = ("pair/dense/kernel", "discriminator/prediction/kernel")


def make_schedule(
  options: Mapping[str, Any], *, steps: int, peak: float
) -> optax.Schedule:
  """Returns learning rate by step: warm-up from 0 to the peak, then a decay.

  Args:
    options: The `optimizer` keys.
    steps: Steps of the whole run.
    peak: Learning rate at the end of the warm-up.
  """
  end = peak * options["end_lr_ratio"]
  warmup = options["warmup_steps"]
  rest = max(steps - warmup, 1)
  name = options["schedule"]
  if name == "linear":
    parts = [optax.linear_schedule(peak, end, rest)]
    borders = []
  elif name == "cosine":
    parts = [optax.cosine_decay_schedule(peak, rest, options["end_lr_ratio"])]
    borders = []
  elif name == "constant":
    parts, borders = [optax.constant_schedule(peak)], []
  elif name == "wsd":
    # Warm-up, stable, decay: Hu et al., 2024 (MiniCPM), section 4.
    decay = options["decay_steps"]
    parts = [
      optax.constant_schedule(peak),
      optax.linear_schedule(peak, end, max(decay, 1)),
    ]
    borders = [steps - decay]
  else:
    raise ValueError(f"no schedule {name}")
  if warmup:
    parts = [optax.linear_schedule(0.0, peak, warmup), *parts]
    borders = [warmup, *borders]
  return optax.join_schedules(parts, borders)


def make_optimizer(
  options: Mapping[str, Any], *, steps: int
) -> optax.GradientTransformation:
  """Returns the optimizer of the `optimizer` keys, clipping included.

  AdamW: Loshchilov and Hutter, 2017. LAMB: You et al., 2019. Muon: Jordan,
  2024, for the matrices of the layers; AdamW for embeddings, norms, biases and
  the rest of the head. Weight decay is never on vectors (norms and biases).

  Args:
    options: The `optimizer` keys.
    steps: Steps of the whole run.
  """
  schedule = make_schedule(options, steps=steps, peak=options["peak_lr"])
  adam = {
    "b1": options["b1"],
    "b2": options["b2"],
    "eps": options["eps"],
    "weight_decay": options["weight_decay"],
    "mask": lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
  }
  name = options["name"]
  if name == "adamw":
    optimizer = optax.adamw(schedule, **adam)
  elif name == "lamb":
    optimizer = optax.lamb(schedule, **adam)
  elif name == "muon":
    optimizer = optax.partition(
      {
        "muon": optax.contrib.muon(
          make_schedule(options, steps=steps, peak=options["muon_peak_lr"]),
          weight_decay=options["weight_decay"],
        ),
        "adamw": optax.adamw(schedule, **adam),
      },
      _muon_labels,
    )
  else:
    raise ValueError(f"no optimizer {name}")
  if options["clip_norm"] is None:
    return optimizer
  return optax.chain(optax.clip_by_global_norm(options["clip_norm"]), optimizer)


def _muon_labels(params: Any) -> Any:
  """Labels the matrices of layers and of heads' transforms `muon`.

  What gives logits isn't: of a matrix for two classes Muon would make steps of
  one size in two directions, whatever the gradient.
  """

  def label(path: tuple[Any, ...], leaf: jax.Array) -> str:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    inner = name.endswith("kernel") and not name.endswith(_LOGITS)
    return "muon" if inner and leaf.ndim == 2 else "adamw"

  return jax.tree_util.tree_map_with_path(label, params)
