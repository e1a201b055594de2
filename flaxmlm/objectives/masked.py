"""Masked language modelling (Devlin et al., 2018, section 3.1, Task 1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from flaxmlm.objectives import hiding
from flaxmlm.objectives.objective import Batch, Objective


def build(options: Mapping[str, Any], **given: Any) -> Objective:
  """Returns the objective; `options` are the `objective` keys."""
  return hiding.make("masked", pick_tokens, options, **given)


def pick_tokens(
  keys: Key[Array, " B"],
  batch: Batch,
  maskable: Bool[Array, "B L"],
  budgets: Int[Array, " B"],
) -> hiding.Picked:
  """Chooses tokens, each as likely as any other: exactly the budget of a row.

  `keys` holds one key a row, so a row's choice is the same on any mesh and in
  any micro-batch.
  """
  L = maskable.shape[1]
  bits = jax.vmap(lambda key: jax.random.bits(key, (L,), "uint32"))(keys)
  # Lowest first: what may not be picked goes behind everything else. Ties are
  # broken by position, which no one will see in 2**31 values.
  order = jnp.where(maskable, bits >> 1, jnp.uint32(2**31))
  rank = jnp.argsort(jnp.argsort(order, axis=1), axis=1)
  return hiding.Picked(hiding.number(rank < budgets[:, None]))
