"""Hugging Face folders of encoders: config.json and model.safetensors.

Each family has a table from our module's path to the module of
`transformers` (5.x), and one from our config keys to those of its
`config.json`. A new family is one entry in `FAMILIES`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from flaxmlm import InputError, models
from flaxmlm.models import Model
from flaxmlm.models.model import Params

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = WEIGHTS + ".index.json"


class Family(NamedTuple):
  """How a family is written in a Hugging Face folder.

  Attributes:
    architecture: The class with the MLM head.
    prefix: What the encoder's names begin with there.
    modules: Our module's path, without the leaf -> its name. `{n}` is the
      number of a layer, `{g}` and `{p}` ALBERT's group and place in it. Of a
      fused matrix: (name, part, parts).
    bias: The MLM head's bias; the decoder's matrix is beside it or named by
      `decoder`.
    decoder: The MLM head's matrix.
    keys: Our `model` key -> (its key, its default).
    fixed: Keys that must have this value, as we know no other.
  """

  architecture: str
  prefix: str
  modules: dict[str, str | tuple[str, int, int]]
  bias: str
  decoder: str
  keys: dict[str, tuple[str, Any]]
  fixed: dict[str, Any]


def _under(ours: str, theirs: str, names: Mapping[str, str]) -> dict[str, str]:
  """Returns a table of modules with what stands before the names of both."""
  return {ours + a: theirs + b for a, b in names.items()}


_EMBEDDINGS = {
  "word": "word_embeddings",
  "position": "position_embeddings",
  "token_type": "token_type_embeddings",
  "norm": "LayerNorm",
}
_LAYER = {
  "query": "attention.self.query",
  "key": "attention.self.key",
  "value": "attention.self.value",
  "attention_output": "attention.output.dense",
  "attention_norm": "attention.output.LayerNorm",
  "intermediate": "intermediate.dense",
  "output": "output.dense",
  "output_norm": "output.LayerNorm",
}
_DISTILBERT_LAYER = {
  "query": "attention.q_lin",
  "key": "attention.k_lin",
  "value": "attention.v_lin",
  "attention_output": "attention.out_lin",
  "attention_norm": "sa_layer_norm",
  "intermediate": "ffn.lin1",
  "output": "ffn.lin2",
  "output_norm": "output_layer_norm",
}
_ALBERT_LAYER = {
  "query": "attention.query",
  "key": "attention.key",
  "value": "attention.value",
  "attention_output": "attention.dense",
  "attention_norm": "attention.LayerNorm",
  "intermediate": "ffn",
  "output": "ffn_output",
  "output_norm": "full_layer_layer_norm",
}


def _bert_like(prefix: str) -> dict[str, str]:
  layer = prefix + "encoder.layer.{n}."
  return _under(
    "encoder/embeddings/", f"{prefix}embeddings.", _EMBEDDINGS
  ) | _under("encoder/layer_{n}/", layer, _LAYER)


_BERT_KEYS: dict[str, tuple[str, Any]] = {
  "layers": ("num_hidden_layers", 12),
  "width": ("hidden_size", 768),
  "heads": ("num_attention_heads", 12),
  "ffn": ("intermediate_size", 3072),
  "max_positions": ("max_position_embeddings", 512),
  "segment_types": ("type_vocab_size", 2),
  "hidden_act": ("hidden_act", "gelu"),
  "dropout": ("hidden_dropout_prob", 0.1),
  "attention_dropout": ("attention_probs_dropout_prob", 0.1),
  "norm_eps": ("layer_norm_eps", 1e-12),
  "init_stddev": ("initializer_range", 0.02),
  "tie_word_embeddings": ("tie_word_embeddings", True),
}
_ENCODER = {
  "position_embedding_type": "absolute",
  "is_decoder": False,
  "add_cross_attention": False,
  "is_encoder_decoder": False,
}

FAMILIES: dict[str, Family] = {
  "bert": Family(
    architecture="BertForMaskedLM",
    prefix="bert.",
    modules=_bert_like("bert.")
    | {
      "mlm/transform": "cls.predictions.transform.dense",
      "mlm/norm": "cls.predictions.transform.LayerNorm",
    },
    bias="cls.predictions.bias",
    decoder="cls.predictions.decoder",
    keys=_BERT_KEYS,
    fixed=_ENCODER,
  ),
  "roberta": Family(
    architecture="RobertaForMaskedLM",
    prefix="roberta.",
    modules=_bert_like("roberta.")
    | {"mlm/transform": "lm_head.dense", "mlm/norm": "lm_head.layer_norm"},
    bias="lm_head.bias",
    decoder="lm_head.decoder",
    keys=_BERT_KEYS,
    fixed=_ENCODER,
  ),
  "distilbert": Family(
    architecture="DistilBertForMaskedLM",
    prefix="distilbert.",
    modules=_under("encoder/embeddings/", "distilbert.embeddings.", _EMBEDDINGS)
    | _under(
      "encoder/layer_{n}/",
      "distilbert.transformer.layer.{n}.",
      _DISTILBERT_LAYER,
    )
    | {
      "mlm/transform": "vocab_transform",
      "mlm/norm": "vocab_layer_norm",
    },
    bias="vocab_projector.bias",
    decoder="vocab_projector",
    keys={
      "layers": ("n_layers", 6),
      "width": ("dim", 768),
      "heads": ("n_heads", 12),
      "ffn": ("hidden_dim", 3072),
      "max_positions": ("max_position_embeddings", 512),
      "hidden_act": ("activation", "gelu"),
      "dropout": ("dropout", 0.1),
      "attention_dropout": ("attention_dropout", 0.1),
      "init_stddev": ("initializer_range", 0.02),
      "tie_word_embeddings": ("tie_word_embeddings", True),
    },
    fixed={},
  ),
  "albert": Family(
    architecture="AlbertForMaskedLM",
    prefix="albert.",
    modules=_under("encoder/embeddings/", "albert.embeddings.", _EMBEDDINGS)
    | _under(
      "encoder/layer_{n}/",
      "albert.encoder.albert_layer_groups.{g}.albert_layers.{p}.",
      _ALBERT_LAYER,
    )
    | {
      "encoder/project": "albert.encoder.embedding_hidden_mapping_in",
      "mlm/transform": "predictions.dense",
      "mlm/norm": "predictions.LayerNorm",
    },
    bias="predictions.bias",
    decoder="predictions.decoder",
    keys=_BERT_KEYS
    | {
      "width": ("hidden_size", 4096),
      "heads": ("num_attention_heads", 64),
      "ffn": ("intermediate_size", 16384),
      "hidden_act": ("hidden_act", "gelu_new"),
      "dropout": ("hidden_dropout_prob", 0.0),
      "attention_dropout": ("attention_probs_dropout_prob", 0.0),
      "embedding_size": ("embedding_size", 128),
      "num_hidden_groups": ("num_hidden_groups", 1),
      "inner_group_num": ("inner_group_num", 1),
    },
    fixed=_ENCODER,
  ),
  "electra": Family(
    architecture="ElectraForMaskedLM",
    prefix="electra.",
    modules=_bert_like("electra.")
    | {
      "encoder/project": "electra.embeddings_project",
      "mlm/transform": "generator_predictions.dense",
      "mlm/norm": "generator_predictions.LayerNorm",
    },
    bias="generator_lm_head.bias",
    decoder="generator_lm_head",
    keys=_BERT_KEYS
    | {
      "width": ("hidden_size", 256),
      "heads": ("num_attention_heads", 4),
      "ffn": ("intermediate_size", 1024),
      "embedding_size": ("embedding_size", 128),
    },
    fixed=_ENCODER,
  ),
  "modernbert": Family(
    architecture="ModernBertForMaskedLM",
    prefix="model.",
    modules={
      "encoder/embeddings/word": "model.embeddings.tok_embeddings",
      "encoder/embeddings/norm": "model.embeddings.norm",
      "encoder/layer_{n}/attention_norm": "model.layers.{n}.attn_norm",
      "encoder/layer_{n}/query": ("model.layers.{n}.attn.Wqkv", 0, 3),
      "encoder/layer_{n}/key": ("model.layers.{n}.attn.Wqkv", 1, 3),
      "encoder/layer_{n}/value": ("model.layers.{n}.attn.Wqkv", 2, 3),
      "encoder/layer_{n}/attention_output": "model.layers.{n}.attn.Wo",
      "encoder/layer_{n}/ffn_norm": "model.layers.{n}.mlp_norm",
      "encoder/layer_{n}/intermediate": ("model.layers.{n}.mlp.Wi", 0, 2),
      "encoder/layer_{n}/gate": ("model.layers.{n}.mlp.Wi", 1, 2),
      "encoder/layer_{n}/output": "model.layers.{n}.mlp.Wo",
      "encoder/final_norm": "model.final_norm",
      "mlm/transform": "head.dense",
      "mlm/norm": "head.norm",
    },
    bias="decoder.bias",
    decoder="decoder",
    keys={
      "layers": ("num_hidden_layers", 22),
      "width": ("hidden_size", 768),
      "heads": ("num_attention_heads", 12),
      "ffn": ("intermediate_size", 1152),
      "max_positions": ("max_position_embeddings", 8192),
      "hidden_act": ("hidden_activation", "gelu"),
      "dropout": ("mlp_dropout", 0.0),
      "attention_dropout": ("attention_dropout", 0.0),
      "norm_eps": ("norm_eps", 1e-5),
      "init_stddev": ("initializer_range", 0.02),
      "tie_word_embeddings": ("tie_word_embeddings", True),
      "local_attention": ("local_attention", 128),
    },
    fixed={
      "norm_bias": False,
      "attention_bias": False,
      "mlp_bias": False,
      "classifier_bias": False,
      "decoder_bias": True,
      "classifier_activation": "gelu",
    },
  ),
}
# Keys that a family doesn't have; DistilBERT's norm_eps stands in its code.
_OTHERS = {"segment_types": None, "embedding_size": None, "norm_eps": 1e-12}
# RoBERTa under other names.
_SAME = {"xlm-roberta": "roberta", "camembert": "roberta"}
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_new", "swish": "silu"}
# Tensors that hold nothing learnt.
_BUFFERS = ("position_ids", "token_type_ids", "inv_freq")


class Folder(NamedTuple):
  """What a Hugging Face folder holds, in our terms.

  Attributes:
    options: The `model` keys.
    vocab_size: V.
    pad: The id of padding.
    model: The model of these options.
    params: Its parameters, float32; no "mlm" if the folder has no such head.
    left: Names of tensors that were not used: heads of other tasks.
  """

  options: dict[str, Any]
  vocab_size: int
  pad: int
  model: Model
  params: Params
  left: list[str]


def is_folder(path: str) -> bool:
  """Says whether a folder's config.json is one of Hugging Face's."""
  config = os.path.join(path, CONFIG)
  if not os.path.isfile(config):
    return False
  with open(config, encoding="utf-8") as file:
    try:
      return "model_type" in json.load(file)
    except ValueError:
      return False


def load(path: str, *, dtype: str = "float32") -> Folder:
  """Loads the encoder of a folder, and its MLM head if there is one.

  Args:
    path: A folder with config.json and model.safetensors, whole or in parts.
    dtype: Compute dtype of the model; parameters are float32 whatever the
      file's dtype.

  Raises:
    InputError: An architecture or an option that we don't have, a tensor that
      is missing or has another shape, or weights in a pickle.
  """
  with open(os.path.join(path, CONFIG), encoding="utf-8") as file:
    theirs = json.load(file)
  family, options = read_config(theirs, path)
  vocab_size = theirs.get("vocab_size") or _no_key(path, "vocab_size")
  model = models.build(options, vocab_size=vocab_size, dtype=dtype)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  tensors = read_tensors(path)
  pad = theirs.get("pad_token_id", 1 if options["family"] == "roberta" else 0)
  params, used = _take(tensors, shapes, family, options, path, pad or 0)
  left = [
    name for name in tensors if name not in used and not name.endswith(_BUFFERS)
  ]
  return Folder(options, vocab_size, pad or 0, model, params, sorted(left))


def read_config(
  theirs: Mapping[str, Any], path: str
) -> tuple[Family, dict[str, Any]]:
  """Returns the family of a config.json and our `model` keys for it.

  Raises:
    InputError: It asks for something that we don't have.
  """
  where = os.path.join(path, CONFIG)
  kind = theirs.get("model_type")
  name = _SAME.get(kind, kind)
  if name not in FAMILIES:
    raise InputError(
      f"{where}: model_type={kind!r}; known are"
      f" {', '.join([*FAMILIES, *_SAME])}"
    )
  family = FAMILIES[name]
  for key, value in family.fixed.items():
    if theirs.get(key, value) != value:
      raise InputError(f"{where}: {key}={theirs[key]!r} isn't supported")
  options = _OTHERS | {
    ours: theirs.get(key, default)
    for ours, (key, default) in family.keys.items()
  }
  act = options["hidden_act"]
  options["hidden_act"] = _ACTIVATIONS.get(act, act)
  if name == "roberta":
    options["max_positions"] -= theirs.get("pad_token_id", 1) + 1
  if name == "modernbert":
    options |= _read_rope(theirs, options["layers"], where)
  return family, {"family": name} | options


def _read_rope(
  theirs: Mapping[str, Any], layers: int, where: str
) -> dict[str, Any]:
  """Returns ModernBERT's keys of layer types and rotary bases.

  transformers 5 writes `layer_types` and `rope_parameters`, where 4 wrote
  `global_attn_every_n_layers` and two `…_rope_theta`.
  """
  every = theirs.get("global_attn_every_n_layers", 3)
  types = theirs.get("layer_types")
  if types is not None:
    full = [i for i, kind in enumerate(types) if kind == "full_attention"]
    every = full[1] if len(full) > 1 else max(layers, 1)
    if full != list(range(0, layers, every)):
      raise InputError(
        f"{where}: layer_types has full attention at layers {full}; only"
        " every n-th from the first is supported"
      )
  ropes = theirs.get("rope_parameters") or {}
  result = {"global_attn_every_n_layers": every}
  for ours, kind, default in (
    ("global_rope_theta", "full_attention", 160_000.0),
    ("local_rope_theta", "sliding_attention", 10_000.0),
  ):
    rope = ropes.get(kind) or {}
    if rope.get("rope_type", "default") != "default":
      raise InputError(
        f"{where}: rope_type={rope['rope_type']!r} isn't supported"
      )
    theta = rope.get("rope_theta", theirs.get(ours))
    result[ours] = float(default if theta is None else theta)
  return result


def _no_key(path: str, key: str) -> int:
  raise InputError(f"{os.path.join(path, CONFIG)}: no {key}")


class _Tensors(Mapping[str, np.ndarray]):
  """Tensors by name, read from their files when they are asked for.

  Old checkpoints have `gamma` and `beta` for a LayerNorm's `weight` and `bias`;
  they are found under the new names.
  """

  def __init__(self, files: Mapping[str, str]):
    """Takes the file of each tensor."""
    self._files: dict[str, tuple[str, str]] = {}
    for name, file in files.items():
      stem, _, leaf = name.rpartition(".")
      leaf = {"gamma": "weight", "beta": "bias"}.get(leaf, leaf)
      self._files[f"{stem}.{leaf}" if stem else leaf] = (name, file)

  def __getitem__(self, name: str) -> np.ndarray:
    from safetensors import safe_open

    original, path = self._files[name]
    # As JAX arrays: NumPy alone knows no bfloat16.
    with safe_open(path, framework="flax") as file:
      return np.asarray(file.get_tensor(original)).astype(np.float32)

  def __iter__(self) -> Iterator[str]:
    return iter(self._files)

  def __len__(self) -> int:
    return len(self._files)


def read_tensors(path: str) -> Mapping[str, np.ndarray]:
  """Returns a folder's tensors by name, float32; each is read when it's asked.

  Raises:
    InputError: There is no safetensors file, or it can't be read.
  """
  from safetensors import SafetensorError, safe_open

  index = os.path.join(path, INDEX)
  whole = os.path.join(path, WEIGHTS)
  try:
    if os.path.isfile(index):
      with open(index, encoding="utf-8") as file:
        parts = json.load(file)["weight_map"]
      return _Tensors({n: os.path.join(path, f) for n, f in parts.items()})
    if os.path.isfile(whole):
      with safe_open(whole, framework="flax") as file:
        return _Tensors(dict.fromkeys(file.keys(), whole))
  except (SafetensorError, ValueError, KeyError) as error:
    raise InputError(f"{path}: can't read the weights: {error}") from error
  pickle = os.path.join(path, "pytorch_model.bin")
  if os.path.isfile(pickle):
    raise InputError(
      f"{pickle}: a pickle can run any code and isn't read; convert it with"
      ' python -c "from transformers import AutoModelForMaskedLM as A;'
      f" A.from_pretrained('{path}').save_pretrained('{path}')\""
    )
  raise InputError(f"{path}: no {WEIGHTS} there")


def names_of(
  path: str, family: Family, options: Mapping[str, Any]
) -> tuple[str, int, int]:
  """Returns the tensor of one of our parameters: (name, part, parts).

  Args:
    path: As "encoder/layer_3/query/kernel".
    family: The family.
    options: The `model` keys.
  """
  if path == "mlm/bias":
    return family.bias, 0, 1
  if path == "mlm/decoder":
    return f"{family.decoder}.weight", 0, 1
  module, _, leaf = path.rpartition("/")
  words = module.split("/")
  number = 0
  if len(words) > 1 and words[1].startswith("layer_"):
    number = int(words[1].removeprefix("layer_"))
    words[1] = "layer_{n}"
  group, place = divmod(number, options.get("inner_group_num", 1))
  found = family.modules["/".join(words)]
  name, part, parts = found if isinstance(found, tuple) else (found, 0, 1)
  leaf = "bias" if leaf == "bias" else "weight"
  return f"{name.format(n=number, g=group, p=place)}.{leaf}", part, parts


def _take(
  tensors: Mapping[str, np.ndarray],
  shapes: Params,
  family: Family,
  options: Mapping[str, Any],
  path: str,
  pad: int,
) -> tuple[Params, set[str]]:
  """Returns the parameters and the names of the tensors they came from."""
  used = {f"{family.decoder}.weight", f"{family.decoder}.bias", family.bias}
  prefixed = any(name.startswith(family.prefix) for name in tensors)

  def find(name: str) -> str | None:
    if not prefixed:
      name = name.removeprefix(family.prefix)
    others = {family.bias: f"{family.decoder}.bias"}
    return next((n for n in (name, others.get(name)) if n in tensors), None)

  def take(place: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    ours = jax.tree_util.keystr(place, simple=True, separator="/")
    name, part, parts = names_of(ours, family, options)
    found = find(name)
    if found is None:
      raise InputError(f"{path}: no tensor {name}, of model.{ours}")
    used.add(found)
    value = tensors[found]
    if value.shape[0] % parts:
      raise InputError(f"{path}: {found} of {value.shape} isn't {parts} parts")
    value = np.split(value, parts)[part]
    value = value.T if ours.endswith("kernel") else value
    if _is_shifted(ours, options):
      value = _shift(value, pad, 1)
    if value.shape != leaf.shape:
      raise InputError(
        f"{path}: {found} has the shape {value.shape}, the config asks for"
        f" {leaf.shape}"
      )
    return np.ascontiguousarray(value)

  wanted = dict(shapes)
  head = [family.modules["mlm/transform"] + ".weight", family.bias]
  if not any(find(name) for name in head):
    del wanted["mlm"]
  return jax.tree_util.tree_map_with_path(take, wanted), used


def _is_shifted(path: str, options: Mapping[str, Any]) -> bool:
  """Says whether a table's rows begin behind the one of padding."""
  return options["family"] == "roberta" and "/position/" in path


def _shift(table: np.ndarray, old: int, new: int) -> np.ndarray:
  """Moves RoBERTa's positions, which begin at the id of padding plus one.

  Rows before that are padding's or never read.
  """
  return np.pad(table[max(old - new, 0) :], ((max(new - old, 0), 0), (0, 0)))


def to_tensors(
  params: Params, options: Mapping[str, Any], *, pad: int
) -> dict[str, np.ndarray]:
  """Returns our parameters (or their gradients) under Hugging Face's names.

  Args:
    params: A tree as of `Model.init`, "mlm" or not.
    options: The `model` keys.
    pad: The id of padding.

  Returns:
    Arrays, contiguous, by the names of `transformers`; a tied decoder is
    not among them.
  """
  family = FAMILIES[options["family"]]
  pieces: dict[str, dict[int, np.ndarray]] = {}
  for place, leaf in jax.tree_util.tree_leaves_with_path(params):
    ours = jax.tree_util.keystr(place, simple=True, separator="/")
    name, part, _ = names_of(ours, family, options)
    value = np.asarray(leaf)
    value = value.T if ours.endswith("kernel") else value
    value = _shift(value, 1, pad) if _is_shifted(ours, options) else value
    pieces.setdefault(name, {})[part] = value
  return {
    # safetensors writes a transposed view as it lies in memory, wrongly.
    name: np.ascontiguousarray(
      np.concatenate([parts[i] for i in sorted(parts)])
    )
    for name, parts in pieces.items()
  }


def write_config(
  options: Mapping[str, Any], *, vocab_size: int, ids: Mapping[str, int]
) -> dict[str, Any]:
  """Returns the config.json of a model of ours.

  Args:
    options: The `model` keys.
    vocab_size: V.
    ids: Ids of "pad", "cls" and "sep".
  """
  name = options["family"]
  family = FAMILIES[name]
  result: dict[str, Any] = {
    "architectures": [family.architecture],
    "model_type": name,
    "dtype": "float32",
    "vocab_size": vocab_size,
    "pad_token_id": ids["pad"],
    "bos_token_id": ids["cls"],
    "eos_token_id": ids["sep"],
  }
  given = {k: v for k, v in options.items() if v is not None}
  own = {"roberta": 1, "bert": 2, "albert": 2, "electra": 2}
  given = {"segment_types": own.get(name), "embedding_size": None} | given
  if given["embedding_size"] is None:
    given["embedding_size"] = 128 if name == "albert" else given["width"]
  for ours, (key, _) in family.keys.items():
    result[key] = given[ours]
  result |= family.fixed
  if name == "roberta":
    result["max_position_embeddings"] += ids["pad"] + 1
  if name == "modernbert":
    every = options["global_attn_every_n_layers"]
    result |= {
      "cls_token_id": ids["cls"],
      "sep_token_id": ids["sep"],
      "global_attn_every_n_layers": every,
      "layer_types": [
        "sliding_attention" if number % every else "full_attention"
        for number in range(options["layers"])
      ],
      "global_rope_theta": options["global_rope_theta"],
      "local_rope_theta": options["local_rope_theta"],
      "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": options[key]}
        for kind, key in (
          ("full_attention", "global_rope_theta"),
          ("sliding_attention", "local_rope_theta"),
        )
      },
      "embedding_dropout": options["dropout"],
    }
  return result


def save(
  path: str, params: Params, config: Mapping[str, Any], options: Mapping
) -> None:
  """Writes config.json and model.safetensors into a folder that is there."""
  from safetensors.numpy import save_file

  with open(os.path.join(path, CONFIG), "w", encoding="utf-8") as file:
    json.dump(config, file, indent=2)
    file.write("\n")
  save_file(
    to_tensors(params, options, pad=config["pad_token_id"]),
    os.path.join(path, WEIGHTS),
    metadata={"format": "pt"},
  )
