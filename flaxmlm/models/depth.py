"""Layers one after the other: what they keep, and how often they are compiled.

docs/training.md says what each choice costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# What is kept of a layer for the backward pass, besides its input.
KEPT = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def run_layers(
  layers: Sequence[nn.Module],
  x: Float[Array, "T D"],
  *context: Any,
  options: Mapping[str, Any],
  first: int = 0,
  skip: int = 0,
  period: int = 1,
) -> Float[Array, "T D"]:
  """Calls `x = layer(x, *context, number)` for each layer.

  The parameters are those of the layers' own names whatever the options are:
  a scan stacks them at each step, and no checkpoint, optimizer or converter
  sees it.

  Args:
    layers: Modules made within the module that calls this. The same one several
      times is one set of parameters.
    x: Flat tokens.
    context: What all layers are called with; trees of arrays.
    options: The keys `remat` and `scan_layers` are read.
    first: Number of the first layer.
    skip: So many layers at the beginning are unlike the rest: they are never
      scanned.
    period: After so many layers, the rest repeats itself.
  """
  if not layers:
    return x
  if layers[0].is_initializing():
    for number, layer in enumerate(layers, first):
      x = layer(x, *context, number)
    return x
  trees = [layer.variables["params"] for layer in layers]

  def run(place: int, tree: Any, x: Array, number: int | Int[Array, ""]):
    layer = layers[place].clone(parent=None)

    def call(tree: Any, x: Array, number: int | Int[Array, ""]) -> Array:
      return layer.apply({"params": tree}, x, *context, number)

    if options["remat"] != "none":
      call = jax.checkpoint(call, policy=KEPT[options["remat"]])
    return call(tree, x, number)

  end = skip + (len(layers) - skip) // period * period
  if not options["scan_layers"] or end - skip < 2 * period:
    skip = end = len(layers)
  for place in range(skip):
    x = run(place, trees[place], x, first + place)
  if skip < end:
    column = range(skip, skip + period)
    # A scan over parameters that are shared would copy them for each layer.
    stacked = [
      None
      if layers[place] is layers[place + period]
      else jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *trees[place:end:period]
      )
      for place in column
    ]

    def again(x: Array, given: tuple[Array, list[Any]]) -> tuple[Array, None]:
      number, parts = given
      for place, part in zip(column, parts, strict=True):
        tree = trees[place] if part is None else part
        x = run(place, tree, x, number + place)
      return x, None

    numbers = first + jnp.arange(0, end - skip, period)
    x, _ = jax.lax.scan(again, x, (numbers, stacked))
  for place in range(end, len(layers)):
    x = run(place, trees[place], x, first + place)
  return x
