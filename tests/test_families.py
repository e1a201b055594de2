"""What every family keeps: documents of a row don't know of each other."""

import jax
import numpy as np
import pytest
from conftest import random_params

from flaxmlm import config, models
from flaxmlm.models import MODELS, Inputs

V, L, B = 50, 24, 2
OPTIONS = config.defaults().model.to_dict() | {
  "layers": 2,
  "width": 16,
  "heads": 2,
  "ffn": 20,
  "max_positions": L,
  "dropout": 0.0,
  "attention_dropout": 0.0,
  "init_stddev": 0.2,
  "local_attention": 4,
  "global_attn_every_n_layers": 2,
}
OWN = {
  "albert": {"embedding_size": 8, "num_hidden_groups": 2},
  "electra": {"embedding_size": 8},
}
FIRST, SECOND = slice(0, 9), slice(9, 19)  # and 5 of padding


@pytest.fixture(scope="module", params=MODELS)
def encode(request):
  """A family's hidden states; the same random parameters each time."""
  options = OPTIONS | {"family": request.param} | OWN.get(request.param, {})
  model = models.build(options, vocab_size=V, dtype="float32")
  params = random_params(options, vocab_size=V)
  run = jax.jit(lambda inputs: model.encode(params, inputs, None))
  return lambda inputs: np.asarray(run(inputs))


def packed() -> Inputs:
  """Rows of two documents, of 9 and of 10 tokens, and padding."""
  ids = np.random.default_rng(1).integers(5, V, (B, L)).astype(np.int32)
  segments = np.repeat([[1] * 9 + [2] * 10 + [0] * 5], B, 0).astype(np.int32)
  positions = [[*range(9), *range(10), *[0] * 5]]
  positions = np.repeat(positions, B, 0).astype(np.int32)
  return Inputs(ids, segments, positions, np.zeros_like(ids))


def test_a_document_alone_has_the_hidden_states_that_it_has_packed(encode):
  inputs = packed()
  alone = Inputs(*map(np.zeros_like, inputs))
  for field, source in zip(alone, inputs, strict=True):
    field[:, :10] = source[:, SECOND]
  # No difference was measured; another machine may sum in another order.
  np.testing.assert_allclose(
    encode(alone)[:, :10], encode(inputs)[:, SECOND], atol=2e-6
  )


def test_a_document_sees_itself_and_nothing_else_of_its_row(encode):
  inputs = packed()
  other = inputs._replace(ids=inputs.ids.copy())
  other.ids[:, SECOND] = V - inputs.ids[:, SECOND]
  before, after = encode(inputs), encode(other)
  np.testing.assert_array_equal(before[:, FIRST], after[:, FIRST])
  assert (before[:, SECOND] != after[:, SECOND]).any(axis=-1).all()
