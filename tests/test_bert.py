"""BERT against its formula, and documents that mustn't see each other."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxmlm import config, models
from flaxmlm.models import Inputs
from flaxmlm.models.layers import dropout

V, L, B = 50, 24, 3
OPTIONS = config.defaults().model.to_dict() | {
  "family": "bert",
  "layers": 2,
  "width": 16,
  "heads": 4,
  "ffn": 40,
  "max_positions": 32,
  "segment_types": 2,
  "dropout": 0.0,
  "attention_dropout": 0.0,
  "norm_eps": 1e-12,
  "init_stddev": 0.2,
}


@pytest.fixture(scope="module")
def bert():
  model = models.build(OPTIONS, vocab_size=V, dtype="float32")
  params = model.init(jax.random.key(0))
  # Biases and norms start at 0 and 1, where a mistake could hide.
  noise = iter(jax.random.split(jax.random.key(1), 200))
  params = jax.tree.map(
    lambda x: x + 0.1 * jax.random.normal(next(noise), x.shape), params
  )
  return jax.jit(model.encode), jax.jit(model.predict), params


def packed() -> Inputs:
  """Rows of documents of 9 and 8 tokens and 7 of padding."""
  random = np.random.default_rng(0)
  segments = np.repeat([[1] * 9 + [2] * 8 + [0] * 7], B, 0)
  positions = np.repeat([[*range(9), *range(8), *[0] * 7]], B, 0)
  return Inputs(
    random.integers(0, V, (B, L)),
    segments,
    positions,
    random.integers(0, 2, (B, L)),
  )


def reference(params, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
  """Hidden states and logits by the formulas, in float64, token by token."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  e = p["encoder"]

  def norm(x, w):
    centred = x - x.mean()
    sigma = np.sqrt((centred**2).mean() + OPTIONS["norm_eps"])
    return centred / sigma * w["scale"] + w["bias"]

  def linear(x, w):
    return x @ w["kernel"] + w["bias"]

  def gelu(x):
    erf = np.vectorize(math.erf)
    return x * 0.5 * (1 + erf(x / np.sqrt(2)))

  hidden = np.zeros((B, L, OPTIONS["width"]))
  for b in range(B):
    table = e["embeddings"]
    x = [
      norm(
        table["word"]["embedding"][inputs.ids[b, i]]
        + table["position"]["embedding"][inputs.positions[b, i]]
        + table["token_type"]["embedding"][inputs.token_types[b, i]],
        table["norm"],
      )
      for i in range(L)
    ]
    for n in range(OPTIONS["layers"]):
      w = e[f"layer_{n}"]
      K = OPTIONS["width"] // OPTIONS["heads"]
      q, k, v = (
        [linear(t, w[name]).reshape(-1, K) for t in x]
        for name in ("query", "key", "value")
      )
      mixed = []
      for i in range(L):
        seen = [
          j for j in range(L) if inputs.segments[b, i] == inputs.segments[b, j]
        ]
        heads = []
        for h in range(OPTIONS["heads"]):
          scores = np.array([q[i][h] @ k[j][h] for j in seen]) / np.sqrt(K)
          weights = np.exp(scores) / np.exp(scores).sum()
          heads.append(
            sum(a * v[j][h] for a, j in zip(weights, seen, strict=True))
          )
        mixed.append(linear(np.concatenate(heads), w["attention_output"]))
      x = [
        norm(t + m, w["attention_norm"]) for t, m in zip(x, mixed, strict=True)
      ]
      x = [
        norm(
          t + linear(gelu(linear(t, w["intermediate"])), w["output"]),
          w["output_norm"],
        )
        for t in x
      ]
    hidden[b] = x
  head = p["mlm"]
  y = np.apply_along_axis(
    lambda t: norm(gelu(linear(t, head["transform"])), head["norm"]), -1, hidden
  )
  return hidden, y @ e["embeddings"]["word"]["embedding"].T + head["bias"]


def test_bert_is_its_formula(bert):
  encode, predict, params = bert
  inputs = packed()
  hidden = encode(params, inputs)
  want_hidden, want_logits = reference(params, inputs)
  np.testing.assert_allclose(hidden, want_hidden, atol=5e-6)
  np.testing.assert_allclose(predict(params, hidden), want_logits, atol=1e-5)


def test_nothing_leaks_between_documents_and_from_padding(bert):
  encode, _, params = bert
  inputs = packed()
  before = np.asarray(encode(params, inputs))
  for segment in (0, 1, 2):
    here = inputs.segments == segment
    other = inputs._replace(
      ids=np.where(here, (inputs.ids + 7) % V, inputs.ids)
    )
    after = np.asarray(encode(params, other))
    np.testing.assert_array_equal(before[~here], after[~here])
    assert (before[here] != after[here]).all(axis=-1).all()


def test_a_document_alone_in_a_row_has_the_same_hidden_states(bert):
  encode, _, params = bert
  inputs = packed()
  before = encode(params, inputs)
  alone = Inputs(*(np.zeros((B, L), np.int64) for _ in range(4)))
  for field, source in zip(alone, inputs, strict=True):
    field[:, :8] = source[:, 9:17]
  after = encode(params, alone)
  np.testing.assert_allclose(after[:, :8], before[:, 9:17], atol=2e-6)


def test_initial_parameters_follow_the_paper():
  model = models.build(
    OPTIONS | {"width": 64, "init_stddev": 0.02},
    vocab_size=500,
    dtype="float32",
  )
  params = model.init(jax.random.key(3))
  table = np.asarray(params["encoder"]["embeddings"]["word"]["embedding"])
  # A normal cut at two deviations has 0.8796 of its deviation.
  assert abs(table.std() / 0.02 - 0.8796) < 0.01
  assert np.abs(table).max() <= 0.04
  assert not np.any(params["encoder"]["layer_0"]["query"]["bias"])


def test_a_rows_dropout_is_its_own_and_has_the_rate():
  keys = jax.random.split(jax.random.key(0), 8)
  x = jnp.ones((8 * 50, 40))
  whole = np.asarray(dropout(x, keys, 0.1, site=3)).reshape(8, 50, 40)
  part = np.asarray(dropout(x[:100], keys[4:6], 0.1, site=3))
  np.testing.assert_array_equal(whole[4:6], part.reshape(2, 50, 40))
  assert not np.array_equal(whole[4], whole[5])
  kept = whole > 0
  n, share = kept.size, 230 / 256
  assert abs(kept.sum() - n * share) < 5 * np.sqrt(n * share * (1 - share))
  np.testing.assert_allclose(whole[kept], 256 / 230, rtol=1e-6)


def test_flops_are_those_that_xla_counts():
  wide = OPTIONS | {"width": 512, "ffn": 2048, "max_positions": 64}
  model = models.build(wide, vocab_size=1000, dtype="float32")
  params = jax.eval_shape(model.init, jax.random.key(0))
  rows, length, slots = 2, 64, 10

  def forward(params, inputs):
    hidden = model.encode(params, inputs, None)
    return model.predict(params, hidden[:, :slots])

  inputs = Inputs(*(jnp.zeros((rows, length), jnp.int32) for _ in range(4)))
  cost = jax.jit(forward).lower(params, inputs).cost_analysis()
  ratio = cost["flops"] / (model.flops(length, slots) * rows / 3)
  # XLA counts the elementwise work too, which is little at this width.
  assert 1.0 < ratio < 1.05


def test_gelu_and_its_gradient_are_those_of_float64():
  from flaxmlm.models.layers import ACTIVATIONS

  x = np.linspace(-6, 6, 1201)
  cdf = np.array([0.5 * math.erfc(-v * math.sqrt(0.5)) for v in x])
  density = np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
  gelu, given = ACTIVATIONS["gelu"], jnp.asarray(x, jnp.float32)
  np.testing.assert_allclose(gelu(given), x * cdf, atol=5e-7)
  slope = jax.vmap(jax.grad(gelu))(given)
  np.testing.assert_allclose(slope, cdf + x * density, atol=5e-7)
