"""A larger model's parameters from those of a smaller one.

Each axis of the larger model reads the smaller one's through an index: the
small axis stands in the centre, and what is before and after it wraps around,
as ModernBERT-large was begun from base (Warner et al., 2024). Heads are kept
whole. Layers are repeated in place (0 0 1 1 2 2), as in Gopher (Rae et al.,
2021), those that see everything and those with a window each among themselves.
ALBERT's are one set of parameters, used more often.

What such copies lack is scale: a sum over an axis that is twice as long is
twice as large. So the weights of inputs that are copies of one another share
the original's between them, in random parts that sum to one (Net2Net: Chen et
al., 2015). The parts differ from output to output: copies with equal weights
would have equal gradients, and stay copies for ever. Where each index comes
equally often, a wider model computes what the smaller one does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxmlm import InputError
from flaxmlm.models.model import Params

# The axes of a module: of what it reads and of what it makes. D hidden states,
# A heads, F feed-forward, E embeddings.
_AXES: dict[str, tuple[str, str]] = {
  "word": ("", "E"),
  "position": ("", "E"),
  "token_type": ("", "E"),
  "embeddings/norm": ("", "E"),
  "project": ("E", "D"),
  "query": ("D", "A"),
  "key": ("D", "A"),
  "value": ("D", "A"),
  "attention_output": ("A", "D"),
  "attention_norm": ("", "D"),
  "intermediate": ("D", "F"),
  "gate": ("D", "F"),
  "output": ("F", "D"),
  "ffn_norm": ("", "D"),
  "output_norm": ("", "D"),
  "final_norm": ("", "D"),
  "mlm/transform": ("D", "E"),
  "mlm/norm": ("", "E"),
}
# What a layer adds to its input.
_ADDED = ("attention_output", "output")


def centered(old: int, new: int) -> np.ndarray:
  """Returns for each place of a longer axis the place that it copies.

  >>> centered(3, 8)
  array([1, 2, 0, 1, 2, 0, 1, 2])
  """
  return (np.arange(new) - (new - old) // 2) % old


def tile(
  params: Params,
  fresh: Params,
  *,
  old: Mapping[str, Any],
  new: Mapping[str, Any],
  seed: int,
) -> Params:
  """Returns the parameters of a model tiled into those of a larger one.

  Args:
    params: Of the smaller model.
    fresh: Of the larger one, for shapes, and for what the smaller one has
      nothing for.
    old: The `model` keys of the smaller one.
    new: Those of the larger one; its heads are as wide.
    seed: Of the parts that copies have.

  Raises:
    InputError: The larger model has a module that the smaller one lacks.
  """
  random = np.random.default_rng(seed)
  source = {_name(path): np.asarray(x) for path, x in _leaves(params)}
  E = [tree["encoder"]["embeddings"]["word"]["embedding"].shape[1]
       for tree in (params, fresh)]  # fmt: skip
  K = old["width"] // old["heads"]
  head = centered(old["heads"], new["heads"])
  index = {
    "D": centered(old["width"], new["width"]),
    "A": (head[:, None] * K + np.arange(K)).ravel(),
    "F": centered(old["ffn"], new["ffn"]),
    "E": centered(*E),
  }
  layer = _layer_index(_layers(params), _layers(fresh), old, new)
  repeats = np.bincount(layer)[layer] * _uses(new) / _uses(old)

  def fill(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
    name = _name(path)
    parts = name.split("/")
    share = 1.0
    if parts[1].startswith("layer_"):
      number = int(parts[1].removeprefix("layer_"))
      parts[1] = f"layer_{layer[number]}"
      if parts[2] in _ADDED:
        share = 1.0 / repeats[number]
    value = source.get("/".join(parts))
    if parts[0] not in params:
      return leaf
    if value is None and parts[2:] == ["attention_norm", "scale"]:
      return leaf  # ModernBERT's layer 0 has none
    if value is None:
      raise InputError(
        f"model.init_from has no {'/'.join(parts)} to tile into {name}; leave"
        " model.embedding_size out"
      )
    if name == "mlm/bias":
      return jnp.asarray(value)
    if name == "mlm/decoder":
      return jnp.asarray(value[:, index["E"]])
    short = "/".join(parts[-3:-1])
    reads, makes = _AXES.get(short) or _AXES[parts[-2]]
    value = value[..., index[makes]]
    if parts[-1] == "kernel":
      rows = index[reads]
      value = value[rows] * _parts(rows, value.shape[1], random)
    if short == "mlm/norm":
      # The decoder is the table of embeddings, and that must stay as it is.
      value = value / np.bincount(index["E"])[index["E"]]
    return jnp.asarray(value * share, leaf.dtype)

  return jax.tree_util.tree_map_with_path(fill, fresh)


def _parts(index: np.ndarray, outputs: int, random: Any) -> np.ndarray:
  """Returns float64 [inputs outputs]: what each copy has of the original.

  Over the copies of an input, the parts sum to one for each output.
  """
  drawn = random.uniform(0.5, 1.5, (len(index), outputs))
  drawn[np.bincount(index)[index] == 1] = 1.0
  total = np.zeros((index.max() + 1, outputs))
  np.add.at(total, index, drawn)
  return drawn / total[index]


def _layer_index(
  before: int, after: int, old: Mapping[str, Any], new: Mapping[str, Any]
) -> np.ndarray:
  """Returns for each layer with parameters the smaller model's."""

  def kinds(count: int, options: Mapping[str, Any]) -> np.ndarray:
    if options["family"] != "modernbert":
      return np.zeros(count, int)
    every = options["global_attn_every_n_layers"]
    kind = (np.arange(count) % every > 0).astype(int)
    kind[0] = 2  # it has no norm before attention
    return kind

  theirs, ours = kinds(before, old), kinds(after, new)
  index = np.arange(after) * before // after
  for kind in np.unique(ours):
    given, wanted = np.flatnonzero(theirs == kind), np.flatnonzero(ours == kind)
    if len(given):
      index[wanted] = given[np.arange(len(wanted)) * len(given) // len(wanted)]
  return index


def _uses(options: Mapping[str, Any]) -> np.ndarray | float:
  """Returns how often each layer with parameters is used."""
  if options["family"] != "albert":
    return 1.0
  layers, groups = options["layers"], options["num_hidden_groups"]
  group = (np.arange(layers) / (layers / groups)).astype(int)
  return np.repeat(np.bincount(group), options["inner_group_num"])


def _layers(params: Params) -> int:
  return sum(name.startswith("layer_") for name in params["encoder"])


def _leaves(params: Params) -> list[tuple[Any, Any]]:
  return jax.tree_util.tree_flatten_with_path(params)[0]


def _name(path: tuple[Any, ...]) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")
