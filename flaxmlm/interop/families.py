"""Hugging Face's families: the names of their tensors, the keys of config.json.

Each family has a table from our module's path to the module of
`transformers` (5.x), and one from our config keys to theirs. A new family is
one entry in `FAMILIES`. Nothing here imports JAX: a config is read before.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from flaxmlm import InputError
from flaxmlm.storage import bounded

CONFIG = "config.json"


class Family(NamedTuple):
  """How a family is written in a Hugging Face folder.

  Attributes:
    architecture: The class with the MLM head.
    pretraining: The class that has, beside it or instead, the heads of pairs or
      of replaced tokens; None if there is none.
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
  pretraining: str | None
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
    pretraining="BertForPreTraining",
    prefix="bert.",
    modules=_bert_like("bert.")
    | {
      "pooler/dense": "bert.pooler.dense",
      "pair/dense": "cls.seq_relationship",
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
    pretraining=None,
    prefix="roberta.",
    modules=_bert_like("roberta.")
    | {
      "pooler/dense": "roberta.pooler.dense",
      "mlm/transform": "lm_head.dense",
      "mlm/norm": "lm_head.layer_norm",
    },
    bias="lm_head.bias",
    decoder="lm_head.decoder",
    keys=_BERT_KEYS,
    fixed=_ENCODER,
  ),
  "distilbert": Family(
    architecture="DistilBertForMaskedLM",
    pretraining=None,
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
    pretraining="AlbertForPreTraining",
    prefix="albert.",
    modules=_under("encoder/embeddings/", "albert.embeddings.", _EMBEDDINGS)
    | _under(
      "encoder/layer_{n}/",
      "albert.encoder.albert_layer_groups.{g}.albert_layers.{p}.",
      _ALBERT_LAYER,
    )
    | {
      "encoder/project": "albert.encoder.embedding_hidden_mapping_in",
      "pooler/dense": "albert.pooler",
      "pair/dense": "sop_classifier.classifier",
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
    pretraining="ElectraForPreTraining",
    prefix="electra.",
    modules=_bert_like("electra.")
    | {
      "encoder/project": "electra.embeddings_project",
      "mlm/transform": "generator_predictions.dense",
      "mlm/norm": "generator_predictions.LayerNorm",
      "discriminator/dense": "discriminator_predictions.dense",
      "discriminator/prediction": "discriminator_predictions.dense_prediction",
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
    pretraining=None,
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
_OTHERS = {
  "segment_types": None,
  "embedding_size": None,
  "attention": "auto",
  "remat": "none",
  "scan_layers": False,
  "norm_eps": 1e-12,
}
# More than any model has; to draw the shapes of more would take for ever.
_MOST = {
  "layers": 1000,
  "width": 1 << 17,
  "ffn": 1 << 20,
  "max_positions": 1 << 24,
  "segment_types": 1 << 10,
  "embedding_size": 1 << 17,
}
_MAY_BE_ZERO = ("dropout", "attention_dropout", "segment_types")
# RoBERTa under other names.
_SAME = {"xlm-roberta": "roberta", "camembert": "roberta"}
# Ours by theirs.
_ACTIVATIONS = {
  "gelu": "gelu",
  "gelu_new": "gelu_new",
  "gelu_pytorch_tanh": "gelu_new",
  "relu": "relu",
  "silu": "silu",
  "swish": "silu",
}


def is_folder(path: str) -> bool:
  """Says whether a folder's config.json is one of Hugging Face's."""
  config = os.path.join(path, CONFIG)
  if not os.path.isfile(config):
    return False
  try:
    data = bounded.read_json(config)
  except InputError:
    return False
  return isinstance(data, dict) and "model_type" in data


def read_config(
  theirs: Mapping[str, Any], path: str
) -> tuple[Family, dict[str, Any]]:
  """Returns the family of a config.json and our `model` keys for it.

  Raises:
    InputError: It asks for something that we don't have.
  """
  where = os.path.join(path, CONFIG)
  kind = str(theirs.get("model_type"))
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
  for ours, (key, default) in family.keys.items():
    value = options[ours]
    if not _is_usable(value, default, zero=ours in _MAY_BE_ZERO):
      raise InputError(f"{where}: {key}={value!r}, where {default!r} is usual")
  for ours, most in _MOST.items():
    if options[ours] is not None and options[ours] > most:
      key = family.keys[ours][0]
      raise InputError(
        f"{where}: {key}={options[ours]!r}: at most {most:,} are supported"
      )
  if options["width"] % options["heads"]:
    width, heads = (family.keys[name][0] for name in ("width", "heads"))
    raise InputError(
      f"{where}: {heads}={options['heads']} doesn't divide"
      f" {width}={options['width']}"
    )
  act = options["hidden_act"]
  if act not in _ACTIVATIONS:
    raise InputError(f"{where}: hidden_act={act!r} isn't supported")
  options["hidden_act"] = _ACTIVATIONS[act]
  if name == "roberta":
    pad = theirs.get("pad_token_id", 1)
    if type(pad) is not int:
      raise InputError(
        f"{where}: pad_token_id={pad!r}: positions begin behind it"
      )
    options["max_positions"] -= pad + 1
  if name == "modernbert":
    options |= _read_rope(theirs, options["layers"], where)
  return family, {"family": name} | options


def _is_usable(value: Any, default: Any, *, zero: bool) -> bool:
  """Says whether a value is of the default's type and, a number, above 0."""
  if isinstance(default, (bool, str)):
    return type(value) is type(default)
  kinds = (int, float) if isinstance(default, float) else (int,)
  return type(value) in kinds and (value > 0 or (zero and value == 0))


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
    if not isinstance(types, list):
      raise InputError(f"{where}: layer_types={types!r}: wants a list")
    full = [i for i, kind in enumerate(types) if kind == "full_attention"]
    every = full[1] if len(full) > 1 else max(layers, 1)
    if full != list(range(0, layers, every)):
      raise InputError(
        f"{where}: layer_types has full attention at layers {full}; only"
        " every n-th from the first is supported"
      )
  if not _is_usable(every, 3, zero=False):
    raise InputError(
      f"{where}: global_attn_every_n_layers={every!r}: wants a number above 0"
    )
  if theirs.get("rope_scaling") is not None:
    raise InputError(
      f"{where}: rope_scaling={theirs['rope_scaling']!r} isn't supported"
    )
  ropes = theirs.get("rope_parameters") or {}
  kinds = ("full_attention", "sliding_attention")
  if not isinstance(ropes, dict) or not all(
    isinstance(ropes.get(kind) or {}, dict) for kind in kinds
  ):
    raise InputError(f"{where}: rope_parameters={ropes!r}: wants an object")
  if ropes and not any(kind in ropes for kind in kinds):
    raise InputError(
      f"{where}: rope_parameters={ropes!r} isn't supported: wants"
      f" {' and '.join(kinds)}"
    )
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
    theta = default if theta is None else theta
    if not _is_usable(theta, default, zero=False):
      raise InputError(f"{where}: {ours}={theta!r}: wants a number above 0")
    result[ours] = float(theta)
  return result


def heads_of(name: str) -> tuple[str, ...]:
  """Returns our heads that a family's folders may have."""
  modules = FAMILIES[name].modules
  heads = ("mlm", "pooler", "pair", "discriminator")
  return tuple(
    head for head in heads if any(m.startswith(f"{head}/") for m in modules)
  )


def write_config(
  options: Mapping[str, Any],
  *,
  vocab_size: int,
  ids: Mapping[str, int],
  heads: Collection[str],
) -> dict[str, Any]:
  """Returns the config.json of a model of ours.

  Args:
    options: The `model` keys.
    vocab_size: V.
    ids: Ids of "pad", "cls" and "sep".
    heads: Of those of `heads_of`.
  """
  name = options["family"]
  family = FAMILIES[name]
  further = {"pair", "discriminator"} & set(heads)
  result: dict[str, Any] = {
    "architectures": [family.pretraining if further else family.architecture],
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
