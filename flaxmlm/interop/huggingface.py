"""Hugging Face folders of encoders: config.json and model.safetensors."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from flaxmlm import InputError, models
from flaxmlm.interop.families import (
  CONFIG,
  FAMILIES,
  Family,
  heads_of,
  read_config,
)
from flaxmlm.interop.families import is_folder as is_folder
from flaxmlm.models import Model
from flaxmlm.models.model import Params
from flaxmlm.storage import bounded, files

WEIGHTS = "model.safetensors"
INDEX = WEIGHTS + ".index.json"


# Takes no code from the pickle. Clones, for tensors that share memory (a tied
# decoder's) can't be written.
_CONVERT = (
  'python -c "import torch; from safetensors.torch import save_file;'
  " save_file({k: v.clone() for k, v in torch.load('pytorch_model.bin',"
  " map_location='cpu', weights_only=True).items()}, 'model.safetensors',"
  " {'format': 'pt'})\""
)
# Tensors that hold nothing learnt.
_BUFFERS = ("position_ids", "token_type_ids", "inv_freq")


class Folder(NamedTuple):
  """What a Hugging Face folder holds, in our terms.

  Attributes:
    options: The `model` keys.
    vocab_size: V.
    pad: The id of padding.
    model: The model of these options.
    params: Its parameters, float32; of the heads those that the folder has.
    left: Names of tensors that were not used: heads of other tasks.
  """

  options: dict[str, Any]
  vocab_size: int
  pad: int
  model: Model
  params: Params
  left: list[str]


def load(path: str, *, dtype: str = "float32") -> Folder:
  """Loads the encoder of a folder, and the heads that it has and we know.

  Args:
    path: A folder with config.json and model.safetensors, whole or in parts.
    dtype: Compute dtype of the model; parameters are float32 whatever the
      file's dtype.

  Raises:
    InputError: An architecture or an option that we don't have, a tensor that
      is missing or has another shape, or weights in a pickle.
  """
  theirs = bounded.read_object(os.path.join(path, CONFIG))
  family, options = read_config(theirs, path)
  vocab_size = theirs.get("vocab_size")
  if type(vocab_size) is not int or not 0 < vocab_size < 2**31:
    raise InputError(
      f"{os.path.join(path, CONFIG)}: vocab_size={vocab_size!r}: wants the"
      " number of tokens"
    )
  model = models.build(options, vocab_size=vocab_size, dtype=dtype)
  heads = heads_of(options["family"])
  shapes = jax.eval_shape(lambda key: model.init(key, heads), jax.random.key(0))
  tensors = read_tensors(path)
  pad = theirs.get("pad_token_id", 1 if options["family"] == "roberta" else 0)
  if pad is not None and not (type(pad) is int and 0 <= pad < vocab_size):
    raise InputError(
      f"{os.path.join(path, CONFIG)}: pad_token_id={pad!r} isn't one of"
      f" {vocab_size} tokens"
    )
  params, used = _take(tensors, shapes, family, options, path, pad or 0)
  if options["tie_word_embeddings"] and "mlm" in params:
    _check_tied(tensors, params, family, path)
  left = [
    name for name in tensors if name not in used and not name.endswith(_BUFFERS)
  ]
  return Folder(options, vocab_size, pad or 0, model, params, sorted(left))


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
    from safetensors import SafetensorError, safe_open

    original, path = self._files[name]
    try:
      # As JAX arrays: NumPy alone knows no bfloat16.
      with safe_open(path, framework="flax") as file:
        return np.asarray(file.get_tensor(original)).astype(np.float32)
    except (SafetensorError, OSError) as error:
      raise InputError(f"{path}: can't read {original}: {error}") from error

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
      parts = dict(bounded.read_object(index)["weight_map"])
      for file in set(parts.values()):
        if not files.is_inside(file):
          raise ValueError(f"{INDEX} names {file!r}")
      return _Tensors({n: os.path.join(path, f) for n, f in parts.items()})
    if os.path.isfile(whole):
      with safe_open(whole, framework="flax") as file:
        return _Tensors(dict.fromkeys(file.keys(), whole))
  except (SafetensorError, ValueError, KeyError, TypeError) as error:
    raise InputError(f"{path}: can't read the weights: {error}") from error
  pickle = os.path.join(path, "pytorch_model.bin")
  if os.path.isfile(pickle):
    raise InputError(
      f"{pickle}: a pickle can run any code and isn't read; convert it with"
      f" cd {shlex.quote(path)} && {_CONVERT}"
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
    names = [name]
    if name == family.bias:
      # Its two names are one parameter, unless the decoder isn't tied: then
      # transformers reads the decoder's own.
      names.append(f"{family.decoder}.bias")
      if not options["tie_word_embeddings"]:
        names.reverse()
    return next((n for n in names if n in tensors), None)

  def take(place: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    ours = jax.tree_util.keystr(place, simple=True, separator="/")
    name, part, parts = names_of(ours, family, options)
    found = find(name)
    if found is None:
      raise InputError(f"{path}: no tensor {name}, of model.{ours}")
    used.add(found)
    value = tensors[found]
    if not value.ndim or value.shape[0] % parts:
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
  for head in set(wanted) - {"encoder"}:
    signs = [
      f"{module}.{leaf}"
      for name, module in family.modules.items()
      for leaf in ("weight", "bias")
      if name.startswith(f"{head}/")
    ]
    if head == "mlm":
      # What nothing else has: ModernBERT's classifiers have the transform too.
      signs = [family.bias, f"{family.decoder}.weight"]
    if not any(map(find, signs)):
      del wanted[head]
  return jax.tree_util.tree_map_with_path(take, wanted), used


def _check_tied(
  tensors: Mapping[str, np.ndarray], params: Params, family: Family, path: str
) -> None:
  """Refuses a decoder that the config ties, but that isn't the embedding."""
  name = f"{family.decoder}.weight"
  table = params["encoder"]["embeddings"]["word"]["embedding"]
  if name in tensors and not np.array_equal(tensors[name], table):
    raise InputError(
      f"{path}: {name} isn't the word embedding, to which the config ties it;"
      f' if it is meant, write "tie_word_embeddings": false into {CONFIG}'
    )


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
    if name == family.bias and not options["tie_word_embeddings"]:
      pieces[f"{family.decoder}.bias"] = {part: value}
  return {
    # safetensors writes a transposed view as it lies in memory, wrongly.
    name: np.ascontiguousarray(
      np.concatenate([parts[i] for i in sorted(parts)])
    )
    for name, parts in pieces.items()
  }


def save(
  path: str, params: Params, config: Mapping[str, Any], options: Mapping
) -> None:
  """Writes config.json and model.safetensors into a folder that is there."""
  from safetensors.numpy import save_file

  with open(os.path.join(path, CONFIG), "w", encoding="utf-8") as file:
    json.dump(config, file, indent=2)
    file.write("\n")
  weights = os.path.join(path, WEIGHTS)
  save_file(
    to_tensors(params, options, pad=config["pad_token_id"]),
    weights,
    metadata={"format": "pt"},
  )
  # safetensors lets nobody else read it.
  os.chmod(weights, os.stat(os.path.join(path, CONFIG)).st_mode)
