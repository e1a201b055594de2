"""Parameters to begin a run with, from a workdir or a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from flaxmlm import InputError
from flaxmlm.inference.loading import LoadedModel, load
from flaxmlm.models.model import Params
from flaxmlm.tokenizers import Tokenizer

# What has one row or entry a token.
_BY_TOKEN = (
  "encoder/embeddings/word/embedding",
  "mlm/bias",
  "mlm/decoder",
)


def start_from(
  folder: str, tokenizer: Tokenizer, fresh: Params, say: Callable[[str], None]
) -> Params:
  """Returns a folder's parameters, fitted to a tokenizer.

  Where the vocabularies differ, the row of a token that both have is kept; a
  new token gets the mean of the rows of the pieces that the folder's tokenizer
  makes of its text, or of all rows if it makes none.

  Args:
    folder: A workdir or a Hugging Face folder.
    tokenizer: The run's.
    fresh: Initial parameters of the same architecture; they stand in for an
      MLM head that the folder lacks.
    say: Is told what was done.

  Raises:
    InputError: The folder can't be loaded, or has another vocabulary and no
      tokenizer to compare.
  """
  m = load(folder)
  params = dict(m.params)
  if "mlm" not in params:
    say(f"{folder}: has no MLM head; it begins anew")
  if params.pop("pooler", None):
    say(f"{folder}: its pooler is left behind; nothing here would train it")
  table = params["encoder"]["embeddings"]["word"]["embedding"]
  rows = None
  if m.tokenizer is None:
    if m.vocab_size != tokenizer.vocab.size:
      raise InputError(
        f"{folder}: {m.vocab_size} tokens and no tokenizer, where the run has"
        f" {tokenizer.vocab.size}; put the tokenizer there"
      )
  else:
    rows = _rows(m, tokenizer)
  if rows is not None:
    shared = sum(len(row) == 1 for row in rows)
    say(
      f"{folder}: another vocabulary; {shared:,} of {len(rows):,} tokens keep"
      f" their rows, {len(rows) - shared:,} are means of their pieces"
    )

  def fit(path: tuple, leaf: jax.Array) -> jax.Array:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if rows is None or name not in _BY_TOKEN:
      return leaf
    old = np.asarray(leaf)
    every = old[: len(table)].mean(axis=0)
    means = [old[row].mean(axis=0) if row else every for row in rows]
    return jnp.asarray(np.stack(means))

  fitted = jax.tree_util.tree_map_with_path(fit, params)
  return fresh | fitted


def _rows(m: LoadedModel, new: Tokenizer) -> list[list[int]] | None:
  """Returns for each new token the old ones it is made of; None if all are so.

  Special tokens are matched by what they are for, others by name where both
  tokenizers are of one style, else by their text.
  """
  old = m.tokenizer
  size = new.vocab.size
  names = new.tokens(range(size))
  known = {name: i for i, name in enumerate(old.tokens(range(old.vocab.size)))}
  if m.vocab_size == size and names == list(known):
    return None
  alike = old.style == new.style
  special = {
    getattr(new.vocab, role): getattr(old.vocab, role)
    for role in ("pad", "unk", "cls", "sep", "mask")
  }
  rows = []
  for token, name in enumerate(names):
    if token in special:
      rows.append([special[token]])
    elif alike and name in known:
      rows.append([known[name]])
    else:
      rows.append(old.encode(new.decode([token])).tolist())
  return rows
