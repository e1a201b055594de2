"""Hugging Face folders: the same numbers as torch, and every refusal."""

import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params

from flaxmlm import InputError, config, load
from flaxmlm.interop import families, huggingface
from flaxmlm.models import Inputs

OPTIONS = config.defaults().model.to_dict() | {
  "family": "bert",
  "layers": 2,
  "width": 16,
  "heads": 2,
  "ffn": 20,
  "max_positions": 24,
  "segment_types": 2,
  "dropout": 0.0,
  "attention_dropout": 0.0,
  "local_attention": 8,
}
IDS = np.arange(20, dtype=np.int32).reshape(2, 10)


@pytest.fixture
def folder(tmp_path):
  """A folder of a small BERT, and its parameters."""
  params = random_params(OPTIONS, vocab_size=50)
  ids = {"pad": 0, "cls": 1, "sep": 2}
  written = families.write_config(
    OPTIONS, vocab_size=50, ids=ids, heads=("mlm",)
  )
  huggingface.save(str(tmp_path), params, written, OPTIONS)
  return tmp_path


def change(folder, **keys):
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def rewrite(folder, change):
  from safetensors.numpy import load_file, save_file

  path = folder / "model.safetensors"
  save_file(change(load_file(path)), path)


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
    ({"model_type": "t5"}, "model_type='t5'; known are bert"),
    ({"position_embedding_type": "relative_key"}, "position_embedding_type="),
    ({"is_encoder_decoder": True}, "is_encoder_decoder=True isn't supported"),
    ({"hidden_size": 18}, "has the shape .*, the config asks for"),
    ({"num_hidden_layers": 3}, "no tensor bert.encoder.layer.2"),
    ({"hidden_act": "tanh"}, "hidden_act='tanh'"),
    ({"hidden_size": None}, "hidden_size=None, where 768 is usual"),
    ({"layer_norm_eps": "x"}, "layer_norm_eps='x'"),
    ({"num_attention_heads": 3}, "num_attention_heads=3 doesn't divide"),
    ({"model_type": ["bert"]}, "known are bert"),
  ],
)
def test_what_we_dont_have_is_refused_by_name(folder, keys, message):
  change(folder, **keys)
  with pytest.raises(InputError, match=message):
    load(str(folder))


@pytest.mark.parametrize(
  ("keys", "message"),
  [
    ({"norm_bias": True}, "norm_bias=True isn't supported"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling=.*'yarn'"),
    (
      {"rope_parameters": {"full_attention": {"rope_type": "linear"}}},
      "rope_type='linear'",
    ),
    (
      {"layer_types": ["sliding_attention", "full_attention"]},
      "full attention at layers",
    ),
    ({"layer_types": 5}, "layer_types=5: wants a list"),
    (
      {"layer_types": None, "global_attn_every_n_layers": 0},
      "global_attn_every_n_layers=0: wants a number above 0",
    ),
    ({"rope_parameters": [1]}, r"rope_parameters=\[1\]: wants an object"),
    ({"rope_parameters": {"rope_theta": 5.0}}, "wants full_attention and"),
    (
      {"rope_parameters": {"full_attention": {"rope_theta": "x"}}},
      "global_rope_theta='x': wants a number above 0",
    ),
  ],
)
def test_what_modernbert_doesnt_have_is_refused_by_name(
  tmp_path, keys, message
):
  options = OPTIONS | {"family": "modernbert", "norm_eps": 1e-5}
  ids = {"pad": 0, "cls": 1, "sep": 2}
  written = families.write_config(
    options, vocab_size=50, ids=ids, heads=("mlm",)
  )
  (tmp_path / "config.json").write_text(json.dumps(written | keys))
  with pytest.raises(InputError, match=message):
    load(str(tmp_path))


def test_a_decoder_of_its_own_isnt_taken_for_a_tied_one(folder):
  name = "cls.predictions.decoder.weight"
  rewrite(folder, lambda t: t | {name: np.ones((50, 16), np.float32)})
  with pytest.raises(InputError, match=f"{name} isn't the word embedding"):
    load(str(folder))


def test_half_a_head_is_refused_by_name(folder):
  name = "cls.predictions.transform.dense.weight"
  rewrite(folder, lambda t: {n: v for n, v in t.items() if n != name})
  with pytest.raises(InputError, match=f"no tensor {name}"):
    load(str(folder))


def test_a_pickle_is_refused_with_the_line_that_converts_it(folder):
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
  with pytest.raises(InputError, match="convert it with cd .* && python -c"):
    load(str(folder))


def test_a_damaged_file_is_refused(folder):
  path = folder / "model.safetensors"
  path.write_bytes(path.read_bytes()[:1000])
  with pytest.raises(InputError, match="can't read the weights"):
    load(str(folder))


# From here on, folders that transformers writes.


@pytest.fixture(scope="session")
def certified(tmp_path_factory):
  """The last line of `python -m benchmarks.parity`, as a dict."""
  pytest.importorskip("transformers")
  done = subprocess.run(
    [sys.executable, "-m", "benchmarks.parity"],
    capture_output=True,
    text=True,
    cwd=pathlib.Path(__file__).parent.parent,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("family", families.FAMILIES)
def test_twenty_configs_are_those_of_torch(certified, family):
  found = certified["families"][family]
  assert found["configs"] >= 20
  targets = certified["targets"]
  over = {name: found[name] for name in targets if found[name] > targets[name]}
  assert not over


@pytest.mark.slow
def test_a_config_is_that_of_torch_as_xla_compiles_by_default():
  pytest.importorskip("transformers")
  code = """
from benchmarks import parity
for family in parity.FAMILIES:
  found = parity.compare(family, seed=100)
  over = {k: found[k] for k, most in parity.TARGETS.items() if found[k] > most}
  assert not over, (family, over)
"""
  root = pathlib.Path(__file__).parent.parent
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=root, env=env, capture_output=True
  )
  assert done.returncode == 0, done.stderr.decode()[-3000:]


def torch_model(name: str, kind: str = "bert", **keys):
  """Returns a small torch model, all of its parameters random."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  config = transformers.AutoConfig.for_model(
    kind,
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=20,
    max_position_embeddings=24,
    **keys,
  )
  torch.manual_seed(0)
  model = getattr(transformers, name)(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  return model


def torch_outputs(model):
  """Returns torch's hidden states of IDS, and the model's own output."""
  import torch

  with torch.no_grad():
    ids = torch.tensor(IDS, dtype=torch.long)
    base = getattr(model, model.base_model_prefix, model)
    return base(ids).last_hidden_state.numpy(), model(ids)


@pytest.mark.slow
def test_a_folder_in_many_parts_is_read(tmp_path):
  model = torch_model("BertForMaskedLM")
  model.save_pretrained(tmp_path, max_shard_size="5KB")
  assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
  hidden, out = torch_outputs(model)
  m = load(str(tmp_path))
  np.testing.assert_allclose(m.encode(IDS), hidden, atol=2e-5)
  np.testing.assert_allclose(m.logits(IDS), out.logits, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "kind", "unused"),
  [
    ("BertModel", "bert", []),
    (
      "BertForSequenceClassification",
      "bert",
      ["classifier"],
    ),
    ("ElectraForPreTraining", "electra", []),
    (
      "ModernBertForTokenClassification",
      "modernbert",
      ["classifier", "head.dense", "head.norm"],
    ),
  ],
)
def test_an_encoder_without_an_mlm_head_is_read(tmp_path, name, kind, unused):
  model = torch_model(name, kind, pad_token_id=0)
  model.save_pretrained(tmp_path)
  m = load(str(tmp_path))
  np.testing.assert_allclose(m.encode(IDS), torch_outputs(model)[0], atol=2e-5)
  assert {n.rpartition(".")[0] for n in m.unused} == set(unused)
  with pytest.raises(InputError, match="no MLM head"):
    m.logits(IDS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "roberta", "albert"])
def test_the_pooler_is_that_of_torch(tmp_path, kind):
  name = {"bert": "Bert", "roberta": "Roberta", "albert": "Albert"}[kind]
  model = torch_model(f"{name}Model", kind)
  model.save_pretrained(tmp_path)
  want = torch_outputs(model)[1].pooler_output
  np.testing.assert_allclose(load(str(tmp_path)).pool(IDS), want, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_read_as_it_is(tmp_path, dtype):
  torch = pytest.importorskip("torch")
  model = torch_model("BertForMaskedLM").to(getattr(torch, dtype))
  model.save_pretrained(tmp_path)
  got = load(str(tmp_path)).encode(IDS)
  want = torch_outputs(model.float())[0]
  np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.slow
def test_old_names_of_norms_in_a_folder_of_torch(tmp_path):
  model = torch_model("BertForMaskedLM")
  model.save_pretrained(tmp_path)

  def old(name):
    if "LayerNorm" not in name:
      return name
    return name.replace(".weight", ".gamma").replace(".bias", ".beta")

  rewrite(tmp_path, lambda t: {old(n): v for n, v in t.items()})
  got = load(str(tmp_path)).encode(IDS)
  np.testing.assert_allclose(got, torch_outputs(model)[0], atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "kind", "keys", "message"),
  [
    ("GPT2LMHeadModel", "gpt2", {}, "model_type='gpt2'"),
    ("BertLMHeadModel", "bert", {"is_decoder": True}, "is_decoder=True"),
    (
      "ModernBertForMaskedLM",
      "modernbert",
      {"attention_bias": True, "pad_token_id": 0},
      "attention_bias=True",
    ),
  ],
)
def test_folders_of_torch_that_we_dont_have(
  tmp_path, name, kind, keys, message
):
  torch_model(name, kind, **keys).save_pretrained(tmp_path)
  with pytest.raises(InputError, match=message):
    load(str(tmp_path))


@pytest.mark.slow
def test_the_line_that_converts_a_pickle_works(tmp_path):
  torch = pytest.importorskip("torch")
  model = torch_model("BertForMaskedLM")
  model.save_pretrained(tmp_path)
  (tmp_path / "model.safetensors").unlink()
  torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
  with pytest.raises(InputError) as refused:
    load(str(tmp_path))
  line = str(refused.value).partition("convert it with ")[2]
  path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
  subprocess.run(
    ["bash", "-c", line],
    check=True,
    capture_output=True,
    env=os.environ | {"PATH": path},
  )
  got = load(str(tmp_path)).encode(IDS)
  np.testing.assert_allclose(got, torch_outputs(model)[0], atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Bert", "Albert", "Electra"])
def test_heads_of_pretraining_are_transformers(tmp_path, name):
  """Next sentence, sentence order, replaced tokens: in, and out again."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  sizes = {
    "vocab_size": 60,
    "hidden_size": 24,
    "embedding_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
    "initializer_range": 0.3,
  }
  made = getattr(transformers, f"{name}Config")(**sizes)
  torch.manual_seed(0)
  model = getattr(transformers, f"{name}ForPreTraining")(made).eval()
  model.save_pretrained(tmp_path / "theirs")
  m = load(str(tmp_path / "theirs"))
  assert m.unused == ()
  random = np.random.default_rng(0)
  ids = random.integers(5, 60, (4, 17))
  types = np.sort(random.integers(0, 2, (4, 17)))
  with torch.no_grad():
    want = model(torch.tensor(ids), token_type_ids=torch.tensor(types))
  row = np.broadcast_to(np.arange(17, dtype=np.int32), ids.shape)
  inputs = Inputs(
    *(jnp.asarray(x, "int32") for x in (ids, np.ones_like(ids), row, types))
  )
  hidden = m.model.encode(m.params, inputs, None)
  if name == "Electra":
    pairs = [(m.detect(ids, None, types), want.logits)]
  else:
    order = "seq_relationship" if name == "Bert" else "sop"
    pairs = [
      (m.model.classify(m.params, hidden), want[f"{order}_logits"]),
      (m.logits(ids, None, types), want.prediction_logits),
    ]
  for ours, theirs in pairs:
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-5)
  again = huggingface.to_tensors(m.params, m.config["model"], pad=0)
  state = model.state_dict()
  for key, value in again.items():
    np.testing.assert_array_equal(value, state[key].numpy())
