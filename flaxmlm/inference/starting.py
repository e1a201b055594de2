"""What a run begins with: the parameters of a folder, or the state of a run."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flaxmlm import InputError, models, objectives
from flaxmlm.config import asked_of_pairs, from_json
from flaxmlm.inference.loading import LoadedModel, load
from flaxmlm.inference.tiling import tile
from flaxmlm.models import roberta
from flaxmlm.models.model import Params, count_parameters
from flaxmlm.storage import remote
from flaxmlm.tokenizers import Tokenizer
from flaxmlm.training import checkpoints
from flaxmlm.training.optimizers import make_optimizer
from flaxmlm.training.step import State, make_init, state_shapes

# What has one row or entry a token.
_BY_TOKEN = (
  "encoder/embeddings/word/embedding",
  "mlm/bias",
  "mlm/decoder",
)


_FIT = ("encoder", "mlm")  # what is made to fit
_DIMENSIONS = ("layers", "width", "heads", "ffn")


def start_from(
  folder: str,
  tokenizer: Tokenizer,
  fresh: Params,
  say: Callable[[str], None],
  *,
  options: Mapping[str, Any],
) -> Params:
  """Returns a folder's parameters, fitted to a tokenizer and to a size.

  Where the vocabularies differ, the row of a token that both have is kept; a
  new token gets the mean of the rows of the pieces that the folder's tokenizer
  makes of its text, or of all rows if it knows nothing of it. A longer table of
  positions repeats the folder's. A larger model is tiled: see `tiling`.

  Args:
    folder: A workdir or a Hugging Face folder.
    tokenizer: The run's.
    fresh: Initial parameters of the run's model; they stand in for an MLM head
      that the folder lacks.
    say: Is told what was done.
    options: The config of the run.

  Raises:
    InputError: The folder can't be loaded, or has another vocabulary and no
      tokenizer to compare.
  """
  m = load(folder)
  params, shape = dict(m.params), options["model"]
  asked, given = asked_of_pairs(options["objective"]), m.config.get("objective")
  # Of a Hugging Face folder, the classes are those of NSP or SOP.
  same = "sentence_pair" not in asked
  if given is not None:
    same = asked == asked_of_pairs(given)
  if asked and not same and params.pop("pair", None):
    say(f"{folder}: its head of pairs was asked something else")
  new = [name for name in fresh if name not in params]
  if new:
    say(f"{folder}: has no {', '.join(new)}; that begins anew")
  left = [name for name in params if name not in fresh]
  if left:
    say(f"{folder}: {', '.join(left)} left behind; nothing here would train it")
  params = {name: tree for name, tree in params.items() if name in fresh}
  table = params["encoder"]["embeddings"]["word"]["embedding"]
  rows = None
  if m.tokenizer is None:
    if m.vocab_size != tokenizer.vocab.size:
      raise InputError(
        f"{folder}: {m.vocab_size} tokens and no tokenizer, where the run has"
        f" {tokenizer.vocab.size}; put the tokenizer there"
      )
    say(f"{folder}: has no tokenizer; each id keeps its row")
  else:
    rows, kept = _rows(m, tokenizer)
  if rows is not None:
    pieces = [min(len(row), 2) for row in rows]
    unknown, single, several = (pieces.count(n) for n in range(3))
    say(
      f"{folder}: another vocabulary, of {len(rows):,} tokens; {kept:,} keep"
      f" their rows, {single - kept:,} copy that of another token, {several:,}"
      f" are means of their pieces, {unknown:,} are unknown there and begin as"
      " the mean of all"
    )

  def fit(path: tuple, leaf: jax.Array) -> jax.Array:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if rows is None or name not in _BY_TOKEN:
      return leaf
    old = np.asarray(leaf)
    every = old[: len(table)].mean(axis=0)
    means = [old[row].mean(axis=0) if row else every for row in rows]
    return jnp.asarray(np.stack(means))

  heads = {name: params.pop(name) for name in list(params) if name not in _FIT}
  params = jax.tree_util.tree_map_with_path(fit, params)
  params = _with_positions(params, m.config["model"], shape, folder, say)
  old = m.config["model"]
  changed = [name for name in _DIMENSIONS if shape[name] != old[name]]
  if changed:
    params = tile(params, fresh, old=old, new=shape, seed=options["seed"])
  if "layers" in changed and shape["family"] == "albert":
    changed.remove("layers")
    say(
      f"{folder}: the parameters that {old['layers']} layers share serve"
      f" {shape['layers']}; what each adds is divided by as much"
    )
  if changed:
    changes = [f"{name} {old[name]} -> {shape[name]}" for name in changed]
    say(
      f"{folder}: {count_parameters(m.params):,} parameters are tiled into"
      f" {count_parameters(params):,} ({', '.join(changes)})"
    )
  # Other heads fit as they are, or not at all.
  for name, tree in heads.items():
    shapes = [jax.tree.map(lambda x: x.shape, of) for of in (tree, fresh[name])]
    if rows is None and not changed and shapes[0] == shapes[1]:
      params[name] = tree
    else:
      say(f"{folder}: its {name} doesn't fit; that begins anew")
  return fresh | params


def continue_from(
  run: str,
  shapes: State,
  mesh: Mesh,
  say: Callable[[str], None],
  *,
  step: int,
) -> State:
  """Returns the newest state of a run: parameters, optimizer state and step.

  Args:
    run: Its workdir.
    shapes: Shape, dtype and sharding of every array of the state to be. It may
      have more positions than the run's.
    mesh: Where the state is to be.
    say: Is told what was done.
    step: What the state is to be the state after.

  Raises:
    InputError: The run has saved nothing, has gone on since `step`, has other
      parameters, or its arrays are of other shapes.
  """
  here = remote.localize(run)
  config = from_json(os.path.join(here, "config.json"))
  V = shapes.params["encoder"]["embeddings"]["word"]["embedding"].shape[0]
  model = models.build(config.model, vocab_size=V, dtype="float32")
  init_params = functools.partial(
    objectives.init_params, model=model, options=config.objective
  )
  optimizer = make_optimizer(config.optimizer, steps=config.train.steps)
  theirs = state_shapes(*make_init(init_params, optimizer, mesh))
  if set(theirs.params) != set(shapes.params):
    raise InputError(
      f"{run}: objective.name={config.objective.name!r} has the parameters"
      f" {', '.join(theirs.params)}, where this run wants"
      f" {', '.join(shapes.params)}; take the parameters alone, by"
      " model.init_from"
    )
  directory = remote.checkpoints(here)
  state = checkpoints.restore_other(directory, theirs)
  if int(state.step) != step:
    raise InputError(
      f"{run}: its newest state is that of step {int(state.step):,}, not"
      f" {step:,} any more; stop it, and start this run again"
    )
  # The leaves alone: an optimizer without clipping is a level less deep.
  old = jax.tree_util.tree_flatten_with_path(state)[0]
  new, structure = jax.tree.flatten(shapes)
  lengths = set()

  def fit(path: tuple[Any, ...], leaf: Any, want: Any) -> jax.Array:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if leaf.shape != want.shape and name.endswith("position/embedding"):
      lengths.add((leaf.shape[0], want.shape[0]))
      first = _first_position(config.model)
      leaf = repeat_positions(np.asarray(leaf), want.shape[0], first)
    if leaf.shape != want.shape:
      raise InputError(
        f"{run}: {name} has shape {leaf.shape}, the model {want.shape}"
      )
    return jax.device_put(leaf, want.sharding)

  leaves = [
    fit(path, x, want) for (path, x), want in zip(old, new, strict=True)
  ]
  for before, after in lengths:
    say(f"{run}: {before} positions are repeated to {after}")
  return jax.tree.unflatten(structure, leaves)


def repeat_positions(
  table: np.ndarray, size: int, first: int = 0
) -> np.ndarray:
  """Returns a longer table of positions: the old one again and again.

  Longformer was begun from RoBERTa like this (Beltagy et al., 2020, section 5):
  what attention has learnt of nearby tokens then holds everywhere but where
  copies meet.

  Args:
    table: [P E].
    size: Rows wanted.
    first: Rows that no position has, before the others.
  """
  rows = np.arange(size - first) % (len(table) - first)
  return np.concatenate([table[:first], table[first:][rows]])


def _first_position(options: Mapping[str, Any]) -> int:
  return roberta.FIRST_POSITION if options["family"] == "roberta" else 0


def _with_positions(
  params: Params,
  old: Mapping[str, Any],
  new: Mapping[str, Any],
  folder: str,
  say: Callable[[str], None],
) -> Params:
  """Returns parameters with the number of positions that the run has."""
  before, after = old["max_positions"], new["max_positions"]
  embeddings = dict(params["encoder"]["embeddings"])
  if before == after or "position" not in embeddings:
    return params
  first = _first_position(old)
  table = np.asarray(embeddings["position"]["embedding"])
  longer = repeat_positions(table, after + first, first)
  embeddings["position"] = {"embedding": jnp.asarray(longer)}
  say(f"{folder}: {before} positions are repeated to {after}")
  encoder = params["encoder"] | {"embeddings": embeddings}
  return params | {"encoder": encoder}


def _rows(m: LoadedModel, new: Tokenizer) -> tuple[list[list[int]] | None, int]:
  """Returns for each new token the old ones it is made of; None if all are so.

  Special tokens are matched by what they are for, others by name where both
  tokenizers are of one style, else by their text.

  Returns:
    The rows; and how many tokens both have. Another one may be made of a single
    old token too, "The" of "the" where the old tokenizer lower-cases.
  """
  old = m.tokenizer
  size = new.vocab.size
  names = new.tokens(range(size))
  known = {name: i for i, name in enumerate(old.tokens(range(old.vocab.size)))}
  if m.vocab_size == size and names == list(known):
    return None, size
  alike = old.style == new.style
  special = {
    getattr(new.vocab, role): getattr(old.vocab, role)
    for role in ("pad", "unk", "cls", "sep", "mask")
  }
  rows, kept = [], 0
  for token, name in enumerate(names):
    if token in special:
      rows.append([special[token]])
      kept += 1
    elif alike and name in known:
      rows.append([known[name]])
      kept += 1
    else:
      row = _made_of(old, new.decode([token]), name, new.style)
      rows.append(row)
      if not alike and len(row) == 1:
        kept += _text(old, row[0]) == _text(new, token)
  return rows, kept


def _text(tokenizer: Tokenizer, token: int) -> str:
  """Returns a token without the marks of its tokenizer's style."""
  return tokenizer.decode([token]).strip().removeprefix("##")


def _made_of(old: Tokenizer, text: str, name: str, style: str) -> list[int]:
  """Returns the old ids of a new token, within a word if it goes on in one.

  What is unknown to the old tokenizer is left out, and so are the marks of
  spaces beside it.

  Args:
    old: The folder's tokenizer.
    text: The token as text.
    name: The token as the new vocabulary has it.
    style: Of the new tokenizer; see `Tokenizer.style`.
  """
  if style == "##":
    goes_on, text = name.startswith("##"), text.strip().removeprefix("##")
  else:
    goes_on = not name.startswith("▁" if style == "▁" else "Ġ")
  if goes_on:
    # Behind a mask that no space follows, a word goes on.
    ids = old.encode(f"[MASK]{text}").tolist()[1:]
  else:
    ids = old.encode(text).tolist()
  if old.vocab.unk not in ids:
    return ids
  return [i for i in ids if i != old.vocab.unk and _text(old, i)]
