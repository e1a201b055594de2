"""A model with its tokenizer, as `flaxmlm.load(folder)` returns it."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from flaxmlm import InputError, models, objectives, tokenizers
from flaxmlm.config import from_json
from flaxmlm.inference import scoring
from flaxmlm.interop import huggingface
from flaxmlm.models import Inputs, Model, electra
from flaxmlm.models.model import Params
from flaxmlm.objectives.replaced_token import generator_params
from flaxmlm.storage import remote
from flaxmlm.tokenizers import Tokenizer
from flaxmlm.training import checkpoints

MASK = "[MASK]"
_ROWS = 32  # rows that go through the model at a time


@dataclasses.dataclass(frozen=True)
class LoadedModel:
  """A model with its parameters, its tokenizer and the config of its run.

  Attributes:
    tokenizer: None for a Hugging Face folder that has none.
    config: The run's config, as nested dicts; of a Hugging Face folder the
      `model` keys.
    step: Training steps that the parameters have seen; of a Hugging Face folder
      it isn't known, and is 0.
    max_length: Longest text, in tokens with [CLS] and [SEP]: the row length of
      the training, for positions beyond it were never learnt; of a Hugging Face
      folder what the model has positions for.
    vocab_size: V of the model. A tokenizer may have fewer.
    pad: The id of padding.
    unused: Tensors of a Hugging Face folder that no part of the model took.
  """

  tokenizer: Tokenizer | None
  config: dict[str, Any]
  step: int
  max_length: int
  vocab_size: int
  pad: int
  model: Model
  params: Params
  unused: tuple[str, ...] = ()

  def encode(
    self,
    input_ids: Int[np.ndarray, "B L"],
    attention_mask: Int[np.ndarray, "B L"] | None = None,
    token_type_ids: Int[np.ndarray, "B L"] | None = None,
  ) -> Float[np.ndarray, "B L D"]:
    """Returns the hidden states of the last layer, float32.

    Args:
      input_ids: Token ids, [CLS] and [SEP] included.
      attention_mask: 1 for tokens, 0 for padding; all 1 by default. Hidden
        states of padding mean nothing.
      token_type_ids: Segment A or B (0, 1) of pairs; all 0 by default.

    Raises:
      InputError: Rows longer than the model's positions, ids outside of its
        vocabulary, shapes that differ, or numbers that aren't integers.
    """
    return self._run(_encode, input_ids, attention_mask, token_type_ids)

  def pool(
    self,
    input_ids: Int[np.ndarray, "B L"],
    attention_mask: Int[np.ndarray, "B L"] | None = None,
    token_type_ids: Int[np.ndarray, "B L"] | None = None,
  ) -> Float[np.ndarray, "B D"]:
    """Returns the pooler's output, float32: `pooler_output` in transformers.

    Arguments and errors are those of `encode`. Masked language modelling trains
    no pooler: a run has one if its objective asks about pairs.
    """
    if "pooler" not in self.params:
      raise InputError("pool: there is no pooler in the folder")
    return self._run(_pooled, input_ids, attention_mask, token_type_ids)

  def logits(
    self,
    input_ids: Int[np.ndarray, "B L"],
    attention_mask: Int[np.ndarray, "B L"] | None = None,
    token_type_ids: Int[np.ndarray, "B L"] | None = None,
  ) -> Float[np.ndarray, "B L V"]:
    """Returns the masked-language-model logits at every token, float32.

    Arguments and errors are those of `encode`; a folder without an MLM head has
    no logits either.
    """
    self._need_head("logits")
    return self._run(_logits, input_ids, attention_mask, token_type_ids)

  def detect(
    self,
    input_ids: Int[np.ndarray, "B L"],
    attention_mask: Int[np.ndarray, "B L"] | None = None,
    token_type_ids: Int[np.ndarray, "B L"] | None = None,
  ) -> Float[np.ndarray, "B L"]:
    """Returns ELECTRA's logits, float32: above 0 where a token seems replaced.

    Arguments and errors are those of `encode`.
    """
    if "discriminator" not in self.params:
      raise InputError("detect: there is no discriminator in the folder")
    scores = self._run(_detected, input_ids, attention_mask, token_type_ids)
    return scores[:, : np.shape(input_ids)[1]]

  def generator(self) -> LoadedModel:
    """Returns the generator of a run of `replaced_token`, which fills in masks.

    Raises:
      InputError: There is none: it isn't such a run.
    """
    if "generator" not in self.params:
      raise InputError("generator: there is none in the folder")
    share = self.config["objective"]["generator_size"]
    options = electra.narrow(self.config["model"], share)
    return dataclasses.replace(
      self,
      config=self.config | {"model": options},
      model=self.model.narrower(share),
      params=generator_params(self.params),
    )

  def fill_mask(
    self, texts: str | Sequence[str], top_k: int = 5
  ) -> list[dict[str, Any]] | list[Any]:
    """Returns the likeliest tokens for each [MASK], as Hugging Face does.

    Args:
      texts: A text, or several; each holds at least one `[MASK]`, or what the
        vocabulary calls it (`<mask>`).
      top_k: How many tokens.

    Returns:
      For a text with one [MASK]: a list of dicts, best first, with `score` (a
      probability), `token` (its id), `token_str` and `sequence` (the text with
      the token in place). For several [MASK]: a list of such lists, where the
      other ones stay [MASK] in `sequence`. For several texts: a list of these.

    Raises:
      InputError: A text is empty, has no [MASK], or is longer than
        `max_length` (nothing is cut off silently).
    """
    single = isinstance(texts, str)
    texts = [texts] if isinstance(texts, str) else list(texts)
    self._need_head("fill_mask")
    vocab = self._need_tokenizer("fill_mask").vocab
    if not 1 <= top_k <= vocab.size:
      raise InputError(f"top_k={top_k}: wants 1 to {vocab.size}")
    rows = [self._with_masks(text) for text in texts]
    results = []
    for first in range(0, len(rows), _ROWS):
      part = rows[first : first + _ROWS]
      ids = _pad(part, vocab.pad)
      slots = _pad([np.flatnonzero(row == vocab.mask) for row in part], 0)
      logits = self._run(_logits_at, ids, ids != vocab.pad, None, slots)
      for row, scores in zip(part, logits, strict=True):
        results.append(self._fill(row, scores, top_k))
    return results[0] if single else results

  def score(
    self,
    texts: Sequence[str],
    *,
    names: Sequence[str] | None = None,
    skip_long: bool = False,
    update: Callable[[int, int], None] | None = None,
  ) -> Float[np.ndarray, " S"]:
    """Returns how likely each text is: pseudo-log-likelihoods, in nats.

    See `scoring.score`, also for the arguments.

    Raises:
      InputError: A text is empty, or longer than `max_length`; the folder has
        no MLM head or no tokenizer.
    """
    self._need_head("score")
    if isinstance(texts, str):
      raise InputError("score: wants a list of texts, not one text")
    return scoring.score(
      self.model,
      self.params,
      self._need_tokenizer("score"),
      texts,
      max_length=self.max_length,
      names=names,
      skip_long=skip_long,
      update=update,
    )

  def _need_head(self, name: str) -> None:
    if "mlm" not in self.params:
      hint = "; its generator() has one" if "generator" in self.params else ""
      raise InputError(
        f"{name}: the folder has an encoder, but no MLM head{hint}"
      )

  def _need_tokenizer(self, name: str) -> Tokenizer:
    if self.tokenizer is None:
      raise InputError(f"{name}: the folder has no tokenizer; put one there")
    return self.tokenizer

  def _with_masks(self, text: str) -> np.ndarray:
    vocab, shown = self.tokenizer.vocab, text[:40]
    if not text.strip():
      raise InputError(f"fill_mask: empty text; write one with a {MASK}")
    ids = self.tokenizer.encode(text)
    if vocab.mask not in ids:
      raise InputError(f"fill_mask: no {MASK} in {shown!r}")
    if len(ids) + 2 > self.max_length:
      raise InputError(
        f"fill_mask: {shown!r}… has {len(ids)} tokens; at most"
        f" {self.max_length - 2} fit the model; shorten it"
      )
    return np.concatenate([[vocab.cls], ids, [vocab.sep]]).astype(np.int32)

  def _fill(self, row: np.ndarray, logits: np.ndarray, top_k: int) -> list[Any]:
    filled = []
    places = np.flatnonzero(row == self.tokenizer.vocab.mask)
    # A model may have more rows than the vocabulary has tokens.
    logits = logits[:, : self.tokenizer.vocab.size].astype(np.float64)
    for place, scores in zip(places, logits, strict=False):
      scores = np.exp(scores - scores.max())
      scores /= scores.sum()
      # Sorting the whole vocabulary would take longer than a small model does.
      last = np.partition(scores, -top_k)[-top_k]
      good = np.flatnonzero(~(scores < last))
      best = good[np.argsort(-scores[good], kind="stable")][:top_k]
      guesses = []
      for token in best:
        sequence = row.copy()
        sequence[place] = token
        guesses.append(
          {
            "score": float(scores[token]),
            "token": int(token),
            "token_str": self.tokenizer.decode([token]),
            "sequence": self.tokenizer.decode(sequence),
          }
        )
      filled.append(guesses)
    return filled[0] if len(filled) == 1 else filled

  def _run(
    self, function, input_ids, attention_mask, token_type_ids, slots=None
  ) -> np.ndarray:
    try:
      ids = np.asarray(input_ids)
    except ValueError as error:
      raise InputError(
        "input_ids: rows of different lengths; pad them, and say so by"
        " attention_mask"
      ) from error
    if ids.dtype.kind in "US":
      raise InputError(
        "input_ids: a text; tokenizer.encode makes integers of it"
      )
    if ids.ndim != 2 or ids.size == 0:
      raise InputError(f"input_ids: wants a shape [B, L], has {ids.shape}")
    valid, types = (
      np.full(ids.shape, value) if given is None else np.asarray(given)
      for given, value in ((attention_mask, 1), (token_type_ids, 0))
    )
    B, L = ids.shape
    options = self.config["model"]
    for name, array in (
      ("input_ids", ids),
      ("attention_mask", valid),
      ("token_type_ids", types),
    ):
      if array.shape != ids.shape:
        raise InputError(f"{name}: shape {array.shape}, not {ids.shape}")
      if array.dtype.kind not in "iub":
        raise InputError(f"{name}: wants integers, has {array.dtype}")
    if options["max_positions"] < L:
      raise InputError(
        f"input_ids: rows of {L} tokens; the model has"
        f" {options['max_positions']} positions"
      )
    size = self.vocab_size
    if ids.min() < 0 or ids.max() >= size:
      raise InputError(f"input_ids: outside of the vocabulary 0 … {size - 1}")
    most_type = max(self.model.token_types - 1, 0)
    for name, array, most in (
      ("attention_mask", valid, 1),
      ("token_type_ids", types, most_type),
    ):
      if array.min() < 0 or array.max() > most:
        raise InputError(f"{name}: wants 0 to {most}")
    # A few static shapes, so that few programs are compiled.
    rows = _round_up(B)
    length = min(max(16, _round_up(L)), options["max_positions"])
    # NumPy's arrays as they are: a jitted function takes them fastest itself.
    inputs = Inputs(
      ids=_fill_up(ids, rows, length),
      segments=_fill_up(valid, rows, length),
      positions=_fill_up(self._positions(ids), rows, length),
      token_types=_fill_up(types, rows, length),
    )
    if slots is None:
      found = np.asarray(function(self.model, self.params, inputs))
      return found[:B, :L] if found.ndim == 3 else found[:B]
    slots = _fill_up(slots, rows, _round_up(slots.shape[1]))
    return np.asarray(function(self.model, self.params, inputs, slots))[:B]

  def _positions(self, ids: np.ndarray) -> np.ndarray:
    """Returns int32 [B L]: from 0; see `Model.skips_padding`."""
    if not self.model.skips_padding:
      return np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    valid = ids != self.pad
    return np.where(valid, np.cumsum(valid, axis=1) - 1, -1).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _encode(model: Model, params: Params, inputs: Inputs) -> jax.Array:
  return model.encode(params, inputs, None).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _pooled(model: Model, params: Params, inputs: Inputs) -> jax.Array:
  hidden = model.encode(params, inputs, None)
  return model.pool(params, hidden).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _detected(model: Model, params: Params, inputs: Inputs) -> jax.Array:
  hidden = model.encode(params, inputs, None)
  return model.detect(params, hidden).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: Model, params: Params, inputs: Inputs) -> jax.Array:
  hidden = model.encode(params, inputs, None)
  return model.predict(params, hidden).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _logits_at(
  model: Model, params: Params, inputs: Inputs, slots: jax.Array
) -> jax.Array:
  hidden = model.encode(params, inputs, None)
  hidden = jnp.take_along_axis(hidden, slots[..., None], axis=1)
  return model.predict(params, hidden).astype(jnp.float32)


def _round_up(n: int) -> int:
  """Returns the next of 1, 2, 3, 4, 6, 8, 12, 16, 24 …; n if it is one."""
  power = 1 << (n - 1).bit_length()
  return power * 3 // 4 if 1 < n <= power * 3 // 4 else power


def _fill_up(array: np.ndarray, rows: int, length: int) -> np.ndarray:
  """Returns an array [B L] with zeros after its rows and below, int32."""
  result = np.zeros((rows, length), np.int32)
  result[: array.shape[0], : array.shape[1]] = array
  return result


def _pad(rows: Sequence[np.ndarray], value: int) -> np.ndarray:
  """Returns rows filled up with a value to the longest, int32 [B L]."""
  result = np.full((len(rows), max(map(len, rows))), value, np.int32)
  for number, row in enumerate(rows):
    result[number, : len(row)] = row
  return result


def load(folder: str) -> LoadedModel:
  """Loads a model from the workdir of a run or from a Hugging Face folder.

  Args:
    folder: Workdir of a `train` run: its newest checkpoint is taken. Or a
      folder with Hugging Face's config.json and model.safetensors, of a family
      in `interop.huggingface.FAMILIES`.

  Raises:
    InputError: The folder is none of these, has no checkpoint, or asks for
      something that we don't have.
  """
  folder = remote.localize(folder)
  path = os.path.join(folder, "config.json")
  if not os.path.isfile(path):
    raise InputError(
      f"{folder}: neither a workdir of a run nor a Hugging Face folder (no"
      " config.json there)"
    )
  if huggingface.is_folder(folder):
    return _load_huggingface(folder)
  config = from_json(path).to_dict()
  # The backend was chosen for the machine that trained.
  config["model"].update(attention="auto", scan_layers=False)
  tokenizer = tokenizers.load(os.path.join(folder, "tokenizer"))
  model = models.build(
    config["model"],
    vocab_size=tokenizer.vocab.size,
    dtype=config["train"]["dtype"],
  )
  init_params = functools.partial(
    objectives.init_params, model=model, options=config["objective"]
  )
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
    jax.eval_shape(init_params, jax.random.key(0)),
  )
  directory = remote.checkpoints(folder)
  step, params = checkpoints.restore_params(directory, shapes)
  return LoadedModel(
    tokenizer=tokenizer,
    config=config,
    step=step,
    max_length=config["data"]["row_length"],
    vocab_size=tokenizer.vocab.size,
    pad=tokenizer.vocab.pad,
    model=model,
    params=params,
  )


def _load_huggingface(folder: str) -> LoadedModel:
  found = huggingface.load(folder)
  tokenizer = None
  if tokenizers.has_tokenizer(folder):
    tokenizer = tokenizers.load(folder)
    if tokenizer.vocab.size > found.vocab_size:
      raise InputError(
        f"{folder}: the tokenizer has {tokenizer.vocab.size} tokens"
        f" (added: {', '.join(tokenizer.added) or 'none'}), the model"
        f" {found.vocab_size}"
      )
    pad = tokenizer.vocab.pad
    if found.model.skips_padding and pad != found.pad:
      raise InputError(
        f"{folder}: [PAD] is {pad} to the tokenizer, {found.pad} to the model,"
        " and positions begin there; the tokenizer is not the model's"
      )
  return LoadedModel(
    tokenizer=tokenizer,
    config={"model": found.options},
    step=0,
    max_length=found.options["max_positions"],
    vocab_size=found.vocab_size,
    pad=found.pad,
    model=found.model,
    params=jax.tree.map(jnp.asarray, found.params),
    unused=tuple(found.left),
  )
