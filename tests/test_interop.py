"""Hugging Face folders: the same numbers as torch, and every refusal."""

import json

import jax
import numpy as np
import pytest

from flaxmlm import InputError, load
from flaxmlm.interop import families, huggingface

OPTIONS = {
  "family": "bert",
  "layers": 2,
  "width": 16,
  "heads": 2,
  "ffn": 20,
  "max_positions": 24,
  "segment_types": 2,
  "embedding_size": None,
  "hidden_act": "gelu",
  "dropout": 0.0,
  "attention_dropout": 0.0,
  "norm_eps": 1e-12,
  "init_stddev": 0.02,
  "tie_word_embeddings": True,
  "num_hidden_groups": 1,
  "inner_group_num": 1,
  "global_attn_every_n_layers": 3,
  "local_attention": 8,
  "global_rope_theta": 160_000.0,
  "local_rope_theta": 10_000.0,
}
IDS = np.arange(20, dtype=np.int32).reshape(2, 10)


@pytest.fixture
def folder(tmp_path):
  """A folder of a small BERT, and its parameters."""
  from flaxmlm import models

  model = models.build(OPTIONS, vocab_size=50, dtype="float32")
  params = jax.device_get(model.init(jax.random.key(0)))
  ids = {"pad": 0, "cls": 1, "sep": 2}
  written = families.write_config(OPTIONS, vocab_size=50, ids=ids)
  huggingface.save(str(tmp_path), params, written, OPTIONS)
  return tmp_path


def change(folder, **keys):
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def rewrite(folder, change):
  from safetensors.numpy import load_file, save_file

  path = folder / "model.safetensors"
  save_file(change(load_file(path)), path)


@pytest.mark.slow
@pytest.mark.parametrize("family", families.FAMILIES)
def test_parity_with_torch(family):
  pytest.importorskip("transformers")
  from benchmarks import parity

  for seed in range(parity.CONFIGS):
    found = parity.compare(family, seed)
    print(seed, found)
    assert found["hidden"] <= 2e-5
    assert found["logits"] <= 2e-5
    assert found["argmax"] == 0
    assert found["gradient"] <= 1e-4
    assert found["exported"] <= 2e-5


def test_old_and_bare_names_are_found(folder):
  want = load(str(folder)).encode(IDS)

  def old(tensors):
    result = {}
    for name, value in tensors.items():
      if name.startswith("bert."):
        name = name.removeprefix("bert.")
        if "LayerNorm" in name:
          name = name.replace("weight", "gamma").replace("bias", "beta")
        result[name] = value
    return result | {"classifier.weight": np.zeros((3, 16), np.float32)}

  rewrite(folder, old)
  m = load(str(folder))
  np.testing.assert_array_equal(m.encode(IDS), want)
  assert m.unused == ("classifier.weight",)
  with pytest.raises(InputError, match="no MLM head"):
    m.logits(IDS)


def test_the_pooler_is_read_and_is_a_head(folder):
  m = load(str(folder))
  with pytest.raises(InputError, match="no pooler"):
    m.pool(IDS)
  first = m.encode(IDS)[:, 0]
  rng = np.random.default_rng(0)
  weight = rng.normal(size=(16, 16)).astype(np.float32)
  bias = rng.normal(size=16).astype(np.float32)
  pooler = {"bert.pooler.dense.weight": weight}
  rewrite(folder, lambda tensors: tensors | pooler)
  with pytest.raises(InputError, match=r"no tensor bert\.pooler\.dense\.bias"):
    load(str(folder))
  pooler["bert.pooler.dense.bias"] = bias
  rewrite(folder, lambda tensors: tensors | pooler)
  got = load(str(folder)).pool(IDS)
  np.testing.assert_allclose(got, np.tanh(first @ weight.T + bias), atol=1e-6)


def test_parts_and_half_precision_are_read(folder):
  from safetensors.numpy import load_file, save_file

  want = load(str(folder)).encode(IDS)
  path = folder / "model.safetensors"
  tensors = {k: v.astype(np.float16) for k, v in load_file(path).items()}
  path.unlink()
  names = sorted(tensors)
  weight_map = {}
  for number, some in enumerate((names[:7], names[7:])):
    file = f"model-{number}.safetensors"
    save_file({name: tensors[name] for name in some}, folder / file)
    weight_map |= dict.fromkeys(some, file)
  index = {"weight_map": weight_map}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  np.testing.assert_allclose(load(str(folder)).encode(IDS), want, atol=0.01)


@pytest.mark.parametrize(
  ("keys", "message"),
  [
    ({"model_type": "gpt2"}, "model_type='gpt2'; known are bert"),
    ({"is_decoder": True}, "is_decoder=True isn't supported"),
    ({"position_embedding_type": "relative_key"}, "position_embedding_type="),
    ({"hidden_size": 18}, "has the shape .*, the config asks for"),
    ({"num_hidden_layers": 3}, "no tensor bert.encoder.layer.2"),
    ({"hidden_act": "tanh"}, "hidden_act='tanh'"),
  ],
)
def test_what_we_dont_have_is_refused_by_name(folder, keys, message):
  change(folder, **keys)
  with pytest.raises(InputError, match=message):
    load(str(folder))


def test_a_pickle_is_refused_with_the_line_that_converts_it(folder):
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
  with pytest.raises(InputError, match="convert it with python -c"):
    load(str(folder))


def test_a_damaged_file_is_refused(folder):
  path = folder / "model.safetensors"
  path.write_bytes(path.read_bytes()[:1000])
  with pytest.raises(InputError, match="can't read the weights"):
    load(str(folder))
