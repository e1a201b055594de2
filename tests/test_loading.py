"""`load`: rows of any shape, guesses in order, and every refusal."""

import dataclasses

import jax
import jaxtyping
import numpy as np
import pytest

from flaxmlm import InputError, config, load, models
from flaxmlm.inference import loading
from flaxmlm.interop import families, huggingface

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstu"]
V, L = len(WORDS), 50
OPTIONS = config.defaults().model.to_dict() | {
  "family": "bert",
  "layers": 1,
  "width": 16,
  "heads": 2,
  "ffn": 20,
  "max_positions": L,
  "segment_types": 2,
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
  """A small BERT of random weights with its vocabulary."""
  folder = tmp_path_factory.mktemp("bert")
  (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
  model = models.build(OPTIONS, vocab_size=V, dtype="float32")
  random = np.random.default_rng(0)
  params = jax.tree.map(
    lambda s: random.normal(size=s.shape).astype(np.float32),
    jax.eval_shape(model.init, jax.random.key(0)),
  )
  ids = {"pad": 0, "cls": 2, "sep": 3}
  written = families.write_config(
    OPTIONS, vocab_size=V, ids=ids, heads=("mlm",)
  )
  huggingface.save(str(folder), params, written, OPTIONS)
  return load(str(folder))


@pytest.fixture
def unchecked():
  """Without the checks of types, which only tests have."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


def test_lengths_are_rounded_up_to_powers_of_two_and_between():
  sizes = sorted([2**i for i in range(11)] + [3 * 2**i for i in range(9)])
  for n in range(1, 1025):
    least = min(size for size in sizes if size >= n)
    assert loading._round_up(n) == least


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (3, 17), (2, 33), (1, L)])
def test_a_row_is_the_same_in_any_shape(loaded, rows, length):
  ids = np.random.default_rng(length).integers(5, V, (rows, length))
  # As long as the model has positions, nothing is filled up.
  valid = np.pad(np.ones_like(ids), ((0, 0), (0, L - length)))
  want = loaded.encode(np.pad(ids, ((0, 0), (0, L - length))), valid)
  np.testing.assert_allclose(
    loaded.encode(ids), want[:, :length], rtol=1e-5, atol=1e-5
  )


def test_lists_and_jax_arrays_are_taken(loaded, unchecked):
  rows, valid, types = (
    [[2, 5, 6, 3]],
    [[True, True, True, False]],
    [[0, 0, 1, 1]],
  )
  want = loaded.encode(*map(np.array, (rows, valid, types)))
  np.testing.assert_array_equal(loaded.encode(rows, valid, types), want)
  given = [jax.numpy.asarray(x) for x in (rows, valid, types)]
  np.testing.assert_array_equal(loaded.encode(*given), want)


@pytest.mark.parametrize("top_k", [1, 4, V])
def test_guesses_are_the_best_of_the_logits_in_order(loaded, top_k):
  text = "a b [MASK] d [MASK]"
  ids = np.array([[2, 5, 6, 4, 8, 4, 3]])
  order = np.argsort(-loaded.logits(ids)[0, [3, 5]], axis=-1)
  got = [[g["token"] for g in gs] for gs in loaded.fill_mask(text, top_k)]
  assert got == order[:, :top_k].tolist()


def test_of_equal_guesses_the_first_ids_come_first(loaded):
  params = jax.tree.map(np.copy, loaded.params)
  # All logits are 0, but for the bias.
  params["mlm"] = jax.tree.map(np.zeros_like, params["mlm"])
  params["mlm"]["bias"][[7, 9]] = 1
  level = dataclasses.replace(loaded, params=params)
  got = [guess["token"] for guess in level.fill_mask("a [MASK]", top_k=5)]
  assert got == [7, 9, 0, 1, 2]


def test_a_model_that_is_broken_still_has_its_guesses(loaded):
  params = jax.tree.map(np.copy, loaded.params)
  params["mlm"]["bias"][3] = np.nan
  broken = dataclasses.replace(loaded, params=params)
  scores = [guess["score"] for guess in broken.fill_mask("a [MASK]", top_k=3)]
  assert np.isnan(scores).tolist() == [True] * 3


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"input_ids": [5, 6]}, r"input_ids: wants a shape \[B, L\], has \(2,\)"),
    ({"input_ids": ["a"]}, r"input_ids: a text; tokenizer\.encode"),
    ({"input_ids": [[5], [5, 6]]}, "input_ids: rows of different lengths"),
    ({"input_ids": [[]]}, r"input_ids: wants a shape \[B, L\]"),
    ({"input_ids": [[5, V]]}, f"input_ids: outside of .* 0 … {V - 1}"),
    ({"input_ids": [[-1, 5]]}, "input_ids: outside of the vocabulary"),
    ({"input_ids": [[5] * (L + 1)]}, f"rows of {L + 1} tokens; .* {L} pos"),
    (
      {"attention_mask": [[1]]},
      r"attention_mask: shape \(1, 1\), not \(1, 2\)",
    ),
    ({"attention_mask": [[1, 2]]}, "attention_mask: wants 0 to 1"),
    ({"attention_mask": [[1, -1]]}, "attention_mask: wants 0 to 1"),
    ({"attention_mask": [[1, 0.5]]}, "attention_mask: wants integers, has f"),
    ({"input_ids": [[5, 6.7]]}, "input_ids: wants integers, has float64"),
    ({"token_type_ids": [[0, 2]]}, "token_type_ids: wants 0 to 1"),
  ],
)
def test_what_cant_be_encoded_is_refused(loaded, unchecked, given, message):
  with pytest.raises(InputError, match=message):
    loaded.encode(**({"input_ids": [[5, 6]]} | given))
