"""ELECTRA's two models: what is drawn, what is asked, what learns from it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_training import SPECIALS, B, L, V, batch, tiny

from flaxmlm import models, objectives
from flaxmlm.objectives import replaced_token
from flaxmlm.training.step import row_keys

OPTIONS = {
  "model__family": "electra",
  "model__width": 32,
  "model__heads": 4,
  "model__embedding_size": 16,
  "objective__name": "replaced_token",
}


@functools.cache
def parts():
  c = tiny(**OPTIONS)
  model = models.build(c.model, vocab_size=V, dtype="float32")
  objective = objectives.build(
    c.objective, row_length=L, vocab=SPECIALS | {"size": V}, steps=10
  )
  params = objectives.init_params(
    jax.random.key(0), model=model, options=c.objective
  )

  @jax.jit
  def corrupt(batch):
    keys, _ = row_keys(jax.random.key(1), jnp.int32(0), batch.example)
    return objective.corrupt(keys, batch, jnp.int32(0))

  return c, model, objective, params, corrupt(batch(0))


def test_tokens_are_drawn_by_their_probability():
  random = np.random.default_rng(0)
  logits = random.normal(size=(1, 1, 300)).astype(np.float32) * 2
  n = 100_000
  drawn = replaced_token.draw(
    jax.random.split(jax.random.key(0), n), jnp.tile(logits, (n, 1, 1))
  )
  counts = np.bincount(np.asarray(drawn).ravel(), minlength=300)
  p = np.exp(logits[0, 0].astype(np.float64))
  expected = n * p / p.sum()
  chi2 = ((counts - expected) ** 2 / expected).sum()
  assert abs(chi2 - 299) < 5 * (2 * 299) ** 0.5


def test_a_drawn_token_that_is_the_original_counts_as_original():
  *_, example = parts()
  example = jax.device_get(example)
  # At even slots the token that was there, at odd ones another.
  drawn = example.targets.copy()
  drawn[:, 1::2] = 5 + (drawn[:, 1::2] - 4) % (V - 5)
  shown, replaced = jax.jit(replaced_token.replace)(example, drawn)
  original = np.asarray(batch(0).ids)
  for row in range(B):
    want = original[row].copy()
    for slot in range(example.slots.shape[1]):
      if example.weights[row, slot] > 0:
        want[example.slots[row, slot]] = drawn[row, slot]
    np.testing.assert_array_equal(shown.inputs.ids[row], want)
    np.testing.assert_array_equal(replaced[row], want != original[row])
  assert replaced.sum() > 0


def test_losses_are_those_of_the_two_models_written_out():
  _, model, objective, params, example = parts()
  _, sums = objective.run(model, params, example, None)
  generator = model.narrower(0.25)
  own = params["generator"]
  shared = params["encoder"]["embeddings"]
  own = {"encoder": own["encoder"] | {"embeddings": shared}, "mlm": own["mlm"]}
  hidden = generator.encode(own, example.inputs, None)
  logits = np.asarray(generator.predict(own, hidden), np.float64)
  logits = np.take_along_axis(logits, np.asarray(example.slots)[..., None], 1)
  drawn = replaced_token.draw(example.keys, jnp.asarray(logits, jnp.float32))
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  right = np.take_along_axis(p, np.asarray(example.targets)[..., None], -1)
  nll = (-np.log(right[..., 0]) * example.weights).sum()
  np.testing.assert_allclose(sums["generator"]["nll"], nll, rtol=1e-5)

  shown, replaced = jax.jit(replaced_token.replace)(example, drawn)
  hidden = model.encode(params, shown.inputs, None)
  head = params["discriminator"]
  x = np.asarray(hidden, np.float64) @ head["dense"]["kernel"]
  x = np.asarray(jax.nn.gelu(x + head["dense"]["bias"], approximate=False))
  scores = (x @ head["prediction"]["kernel"])[..., 0]
  scores += np.asarray(head["prediction"]["bias"])
  valid = np.asarray(example.inputs.segments) > 0
  q = 1 / (1 + np.exp(-scores))
  likely = np.where(np.asarray(replaced) > 0, q, 1 - q)
  found = sums["discriminator"]
  np.testing.assert_allclose(
    found["nll"], -np.log(likely[valid]).sum(), rtol=1e-5
  )
  assert found["weight"] == valid.sum()
  assert found["correct"] == ((scores > 0) == (replaced > 0))[valid].sum()
  assert found["replaced"] == np.asarray(replaced).sum()
  alarms = valid & (scores > 0)
  hits = np.asarray(replaced)[alarms].sum()
  assert 0 < hits < alarms.sum()
  assert found["precision"] == (hits, alarms.sum())
  assert found["recall"] == (hits, found["replaced"])


def test_no_gradient_goes_through_what_is_drawn():
  _, model, objective, params, example = parts()

  def loss(params, task):
    _, sums = objective.run(model, params, example, None)
    return sums[task]["nll"]

  grad = jax.jit(jax.grad(loss), static_argnums=1)
  of_one = grad(params, "discriminator")
  assert all(not np.any(x) for x in jax.tree.leaves(of_one["generator"]))
  of_other = grad(params, "generator")
  layers = {k: v for k, v in of_other["encoder"].items() if k != "embeddings"}
  own = layers, of_other["discriminator"]
  assert all(not np.any(x) for x in jax.tree.leaves(own))
  # Both teach the one table.
  for tree in (of_one, of_other):
    table = tree["encoder"]["embeddings"]["word"]["embedding"]
    assert np.abs(table).max() > 0


def test_a_generator_that_is_no_whole_size_is_refused():
  from flaxmlm import InputError, config

  c = tiny(**OPTIONS, objective__generator_size=0.3)
  with pytest.raises(InputError, match=r"objective\.generator_size=0\.3 of"):
    config.validate(c)
  c = tiny(objective__name="replaced_token")
  with pytest.raises(InputError, match="wants model.family=electra, not bert"):
    config.validate(c)
