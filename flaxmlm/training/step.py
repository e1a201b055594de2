"""One optimizer step and one evaluation step, as pure jitted functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key

from flaxmlm.models.model import Model, Params
from flaxmlm.objectives.objective import Batch, Example, Objective, Sums
from flaxmlm.training import sharding


class State(NamedTuple):
  """All that changes from step to step; all that a checkpoint holds."""

  step: Int[Array, ""]
  params: Params
  opt_state: Any


TrainStep = Callable[[State, Batch, Key[Array, ""]], tuple[State, Sums]]
EvalStep = Callable[[Params, Batch], Sums]


def make_init(
  init_params: Callable[[Key[Array, ""]], Params],
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
) -> tuple[Callable[[Key[Array, ""]], State], Any]:
  """Returns a jitted `key -> State` at step 0, and the state's shardings."""

  def init(key: Key[Array, ""]) -> State:
    params = init_params(key)
    return State(jnp.zeros((), jnp.int32), params, optimizer.init(params))

  shapes = jax.eval_shape(init, jax.random.key(0))
  places = sharding.tree_sharding(mesh, shapes)
  return jax.jit(init, out_shardings=places), places


def state_shapes(
  init: Callable[[Key[Array, ""]], State], state_sharding: Any
) -> State:
  """Returns shape, dtype and sharding of every array of `make_init`'s state."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    jax.eval_shape(init, jax.random.key(0)),
    state_sharding,
  )


def make_train_step(
  model: Model,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  *,
  mesh: Mesh,
  state_sharding: Any,
  microbatches: int,
) -> TrainStep:
  """Returns the jitted train step; the state that it is given is donated.

  The loss of a task is Σ nll·w / Σ w over the whole global batch, on any mesh
  and with any number of micro-batches: rows are corrupted first, so Σ w is
  known before the first micro-batch runs. Row r is in micro-batch r mod n, so
  that each device's rows stay where they are. Where every device has all
  parameters, each sums the gradients of its own rows; these are added up once,
  in float32, after the last micro-batch.

  Where the loss or the norm of the gradient isn't finite, parameters and the
  optimizer's state stay as they are, its count of steps too, to the bit; only
  `state.step` goes on. And no element is ever set to what isn't finite: where
  the update of one overflows, this one stays.

  Returns:
    `(state, batch, key) -> (state, sums)`; `key` is the run's, the same at
    every step. Sums are the objective's, and under "step" `grad_norm` before
    clipping, the `learning_rate`, and `skipped`: 1 if the update was, else 0.
  """
  rows_sharding = sharding.batch_sharding(mesh)
  splits = mesh.shape["fsdp"] * mesh.shape["tensor"] > 1

  def split(x: Array) -> Array:
    x = x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:])
    return jnp.moveaxis(x, 1, 0)

  def own_gradients(
    params: Params, weights: Any, rows: tuple[Example, Key[Array, " B"]]
  ) -> tuple[Params, Sums]:
    def objective_loss(
      params: Params, example: Example, keys: Key[Array, " B"]
    ) -> tuple[Float[Array, ""], Sums]:
      _, sums = objective.run(model, params, example, keys)
      loss = sum(
        share * sums[task]["nll"] / jnp.maximum(weights[task], 1.0)
        for task, share in objective.shares.items()
      )
      return loss, sums

    def grad(params: Params, *part: Any) -> tuple[Params, Sums]:
      grads, sums = jax.grad(objective_loss, has_aux=True)(params, *part)
      if splits:
        # So that they are scattered as they are summed, in a loop too.
        grads = jax.lax.with_sharding_constraint(grads, state_sharding.params)
      return grads, sums

    if microbatches == 1:
      return grad(params, *rows)
    parts = jax.tree.map(split, rows)
    shapes = jax.eval_shape(grad, params, *jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(
      lambda sofar, part: (
        jax.tree.map(jnp.add, sofar, grad(params, *part)),
        None,
      ),
      zeros,
      parts,
    )
    return total

  gradients = own_gradients
  if 1 < mesh.shape["data"] == mesh.size:
    # Left to itself, XLA reduces in bfloat16, and a tied table twice.
    gradients = jax.shard_map(
      lambda *given: jax.lax.psum(own_gradients(*given), "data"),
      in_specs=(P(), P(), P("data")),
      out_specs=P(),
      axis_names={"data"},
      check_vma=False,
    )

  def train_step(
    state: State, batch: Batch, key: Key[Array, ""]
  ) -> tuple[State, Sums]:
    corrupt_keys, dropout_keys = row_keys(key, state.step, batch.example)
    example = objective.corrupt(corrupt_keys, batch, state.step)
    weights = objective.weigh(example)
    grads, sums = gradients(state.params, weights, (example, dropout_keys))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    norm = optax.global_norm(grads)
    loss = sum(
      share * sums[task]["nll"] for task, share in objective.shares.items()
    )
    fine = jnp.isfinite(norm) & jnp.isfinite(loss)
    params, opt_state = jax.tree.map(
      functools.partial(_choose, fine),
      (params, opt_state),
      (state.params, state.opt_state),
    )
    sums["step"] = {
      "grad_norm": norm,
      "learning_rate": jnp.asarray(schedule(count_updates(state)), jnp.float32),
      "skipped": 1.0 - fine,
    }
    return State(state.step + 1, params, opt_state), sums

  return jax.jit(
    _knowing(mesh, train_step),
    in_shardings=(state_sharding, rows_sharding, None),
    out_shardings=(state_sharding, NamedSharding(mesh, P())),
    donate_argnums=0,
  )


def count_updates(state: State) -> Int[Array, ""]:
  """Returns the updates that the optimizer has made, skipped ones not among.

  They are what its schedules go by.
  """
  counts = optax.tree_utils.tree_get_all_with_path(state.opt_state, "count")
  return counts[0][1] if counts else state.step


def _choose(fine: Bool[Array, ""], new: Array, old: Array) -> Array:
  """Returns what an array is after a step: new where that may be, else old.

  That no element comes out that isn't finite costs nothing, for it is looked at
  where it is written; to ask of them all before the first one is written would
  be one more pass through memory.
  """
  if jnp.issubdtype(new.dtype, jnp.floating):
    fine &= jnp.isfinite(new)
  return jnp.where(fine, new, old)


def make_eval_step(
  model: Model,
  objective: Objective,
  *,
  mesh: Mesh,
  params_sharding: Any,
  log_unigram: Float[np.ndarray, " V"],
) -> EvalStep:
  """Returns the jitted `(params, batch) -> sums`, without dropout.

  A row's masks depend on its number (`example`) alone: they are the same at
  every evaluation of every run. Sums are the objective's, and under "unigram"
  Σ -log p(target)·w with the training counts' p.
  """

  def eval_step(params: Params, batch: Batch) -> Sums:
    example = _fixed_example(objective, batch)
    _, sums = objective.run(model, params, example, None)
    unigram = -jnp.asarray(log_unigram)[example.targets]
    sums["unigram"] = {
      "nll": jnp.sum(unigram * example.weights),
      "weight": jnp.sum(example.weights),
    }
    return sums

  return jax.jit(
    _knowing(mesh, eval_step),
    in_shardings=(params_sharding, sharding.batch_sharding(mesh)),
    out_shardings=NamedSharding(mesh, P()),
  )


def make_guess_step(
  model: Model, objective: Objective, *, mesh: Mesh, params_sharding: Any
) -> Callable[[Params, Batch], tuple[Example, Array, Array]]:
  """Returns a jitted function that shows what the model fills in.

  `(params, batch) -> (example, probabilities [B M 3], tokens [B M 3])`: the
  three likeliest tokens at each slot, under the masks of `make_eval_step`.
  """

  def guess_step(
    params: Params, batch: Batch
  ) -> tuple[Example, Float[Array, "B M 3"], Int[Array, "B M 3"]]:
    example = _fixed_example(objective, batch)
    logits = objective.predict(model, params, example).astype(jnp.float32)
    return example, *jax.lax.top_k(jax.nn.softmax(logits), 3)

  return jax.jit(
    _knowing(mesh, guess_step),
    in_shardings=(params_sharding, sharding.batch_sharding(mesh)),
    out_shardings=NamedSharding(mesh, P()),
  )


def _knowing(mesh: Mesh, step: Callable[..., Any]) -> Callable[..., Any]:
  """Lets a step know its mesh: kernels are split over it by hand."""

  @functools.wraps(step)
  def knowing(*args: Any) -> Any:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return step(*args)

  return knowing


def _fixed_example(objective: Objective, batch: Batch) -> Example:
  """Corrupts rows by their number alone, the same in every run."""
  first = jnp.zeros((), jnp.int32)
  corrupt_keys, _ = row_keys(jax.random.key(0), first, batch.example)
  return objective.corrupt(corrupt_keys, batch, first)


def run_keys(seed: int) -> tuple[Key[Array, ""], Key[Array, ""]]:
  """Returns a run's key for its parameters and its key for its steps."""
  init_key, step_key = jax.random.split(jax.random.key(seed))
  return init_key, step_key


def row_keys(
  key: Key[Array, ""], step: Int[Array, ""], example: Int[Array, " B"]
) -> tuple[Key[Array, " B"], Key[Array, " B"]]:
  """Returns each row's key for its corruption and for its dropout.

  They depend on (key, step, example) alone, which is what makes a run the same
  on any mesh, with any micro-batches, and after any restart.
  """
  step_key = jax.random.fold_in(key, step)

  def split(number: Int[Array, ""]) -> Key[Array, " 2"]:
    return jax.random.split(jax.random.fold_in(step_key, number))

  keys = jax.vmap(split)(example)
  return keys[:, 0], keys[:, 1]
