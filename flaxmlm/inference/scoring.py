"""Pseudo-log-likelihoods: how likely a masked language model finds a text.

Each token of a text is hidden in a copy of it, and asked for. Copies of many
texts go through the model together, in batches of a few static shapes.

Dimension key beside the models': S texts, C copies of them.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from flaxmlm import InputError
from flaxmlm.models import Inputs, Model
from flaxmlm.models.model import Params
from flaxmlm.tokenizers import WORD_START, Encoded, Tokenizer, Vocab
from flaxmlm.tokenizers.vocab import check_text

_TOKENS = 4096  # of a batch, padding included
_IN_FLIGHT = 2  # batches that the device has, while the host makes the next


class Copies(NamedTuple):
  """One copy of a text for each of its tokens.

  Attributes:
    texts: Number of the text.
    slots: Place of the token asked for; [CLS] stands at 0.
    ends: Place after the last token of its word: these are hidden too.
  """

  texts: Int[np.ndarray, " C"]
  slots: Int[np.ndarray, " C"]
  ends: Int[np.ndarray, " C"]


def score(
  model: Model,
  params: Params,
  tokenizer: Tokenizer,
  texts: Sequence[str],
  *,
  max_length: int,
  names: Sequence[str] | None = None,
  skip_long: bool = False,
  update: Callable[[int, int], None] | None = None,
) -> Float[np.ndarray, " S"]:
  """Returns the pseudo-log-likelihood of each text, in nats.

  The sum over its tokens of log p(token | the others) (Salazar et al., 2020,
  "Masked Language Model Scoring", equation 1), where the tokens after it in its
  own word are hidden too (Kauf and Ivanova, 2023, "A Better Way to Do Masked
  Language Model Scoring", PLL-word-l2r): else the end of a word gives away its
  beginning, and long rare words look likely. A word is what the tokenizer's
  flags say, as in whole-word masking.

  Equal texts are computed once, so that their scores are the same to the bit.

  Args:
    model: Its head is "mlm".
    params: Parameters, on one device.
    tokenizer: The model's. "[MASK]" in a text is plain text to it.
    texts: Sentences, as a rule.
    max_length: Tokens of a text at most, [CLS] and [SEP] included.
    names: What to call each text in errors; by default "text 1" and so on.
    skip_long: Whether a text longer than that has the score NaN, instead of
      being an error.
    update: Called with how many tokens went through the model, of how many.

  Raises:
    InputError: A text is empty, too long, or not Unicode; or a score isn't
      finite, so that the parameters are broken.
  """
  if names is None:
    names = [f"text {number}" for number in range(1, len(texts) + 1)]
  encoded = _encode(tokenizer, texts, names)
  numbers: dict[tuple[bytes, bytes], int] = {}
  which, distinct = [], []
  for name, text, (ids, flags) in zip(names, texts, encoded, strict=True):
    if len(ids) + 2 > max_length:
      if not skip_long:
        raise InputError(
          f"{name}: {text[:40]!r}… has {len(ids)} tokens; at most"
          f" {max_length - 2} fit the model; shorten it, or set skip_long"
        )
      which.append(-1)
      continue
    key = (ids.tobytes(), (flags & WORD_START).tobytes())
    if key not in numbers:
      numbers[key] = len(distinct)
      distinct.append(Encoded(ids, flags))
    which.append(numbers[key])
  if not distinct:
    return np.full(len(texts), np.nan)

  copies = make_copies(distinct)
  found = _run(
    model, params, tokenizer.vocab, distinct, copies, max_length, update
  )
  sums = np.bincount(copies.texts, weights=found, minlength=len(distinct))
  if not np.isfinite(sums).all():
    worst = which.index(int(np.flatnonzero(~np.isfinite(sums))[0]))
    raise InputError(
      f"{names[worst]}: its score is {sums[which[worst]]}; the model's"
      " parameters are broken"
    )
  return np.append(sums, np.nan)[which]  # the last, -1, is what's too long


def make_copies(encoded: Sequence[Encoded]) -> Copies:
  """Returns a copy for each token, texts and tokens in order."""
  lengths = [len(text.ids) for text in encoded]
  texts = np.repeat(np.arange(len(lengths)), lengths)
  begins = np.cumsum(lengths) - lengths
  starts = np.concatenate([text.flags & WORD_START for text in encoded]) != 0
  starts[begins] = True
  # Where the word after each token's own begins.
  borders = np.append(np.flatnonzero(starts), len(starts))
  ends = borders[np.cumsum(starts)]
  slots = np.arange(len(starts)) - begins[texts] + 1
  return Copies(texts, slots, ends - begins[texts] + 1)


def _encode(
  tokenizer: Tokenizer, texts: Sequence[str], names: Sequence[str]
) -> list[Encoded]:
  for name, text in zip(names, texts, strict=True):
    try:
      check_text(text)
    except InputError as error:
      raise InputError(f"{name}: {error}") from None
  encoded = tokenizer.encode_batch(texts)
  for name, text, (ids, _) in zip(names, texts, encoded, strict=True):
    if not len(ids):
      raise InputError(f"{name}: {text!r} has no token; leave it out")
  return encoded


def _run(
  model: Model,
  params: Params,
  vocab: Vocab,
  encoded: Sequence[Encoded],
  copies: Copies,
  max_length: int,
  update: Callable[[int, int], None] | None,
) -> Float[np.ndarray, " C"]:
  """Returns the log-probability of each copy's token."""
  result = np.zeros(len(copies.texts))
  # Tokens of each copy: a text has as many copies as tokens.
  costs = np.bincount(copies.texts)[copies.texts] + 2
  total, done = int(costs.sum()), 0
  in_flight = collections.deque()

  def land() -> None:
    nonlocal done
    part, found = in_flight.popleft()
    result[part] = np.asarray(found)[: len(part)]
    done += int(costs[part].sum())
    if update is not None:
      update(done, total)

  mask = np.int32(vocab.mask)
  for part, batch in _batches(vocab, encoded, copies, max_length):
    in_flight.append((part, _log_probabilities(model, params, *batch, mask)))
    if len(in_flight) > _IN_FLIGHT:
      land()
  while in_flight:
    land()
  return result


def _batches(
  vocab: Vocab, encoded: Sequence[Encoded], copies: Copies, max_length: int
) -> Iterator[tuple[np.ndarray, tuple[np.ndarray, ...]]]:
  """Yields numbers of copies, and what `_log_probabilities` reads of them.

  The longest texts go first, so that a batch is little longer than any of its
  rows. All batches of a length have as many rows, so that it is compiled once.
  """
  lengths = np.array([len(text.ids) + 2 for text in encoded])
  rows = np.full(lengths.sum(), vocab.sep, np.int32)  # one after another
  first = np.cumsum(lengths) - lengths
  for begin, text in zip(first, encoded, strict=True):
    rows[begin] = vocab.cls
    rows[begin + 1 : begin + 1 + len(text.ids)] = text.ids

  order = np.argsort(-lengths[copies.texts], kind="stable")
  begin = 0
  while begin < len(order):
    L = min(_round_up(int(lengths[copies.texts[order[begin]]])), max_length)
    B = max(_TOKENS // L, 1)
    if len(order) <= B:  # all in one batch: no larger than need be
      B = 1 << (len(order) - 1).bit_length()
    part = order[begin : begin + B]
    begin += B
    # A batch that isn't full repeats its first copy.
    filled = np.append(part, np.full(B - len(part), part[0]))
    texts, slots, ends = (x[filled].astype(np.int32) for x in copies)
    places = np.arange(L)
    valid = places < lengths[texts][:, None]
    ids = rows.take(first[texts][:, None] + places, mode="clip")
    ids = np.where(valid, ids, vocab.pad).astype(np.int32)
    yield part, (ids, valid, slots, ends)


@functools.partial(jax.jit, static_argnums=0)
def _log_probabilities(
  model: Model,
  params: Params,
  ids: Int[Array, "B L"],
  valid: Bool[Array, "B L"],
  slots: Int[Array, " B"],
  ends: Int[Array, " B"],
  mask: Int[Array, ""],
) -> Float[Array, " B"]:
  """Returns log p of the token at each row's slot; slot to end is hidden."""
  places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
  hidden = (places >= slots[:, None]) & (places < ends[:, None])
  inputs = Inputs(
    ids=jnp.where(hidden, mask, ids),
    segments=valid.astype(jnp.int32),
    positions=places,
    token_types=jnp.zeros_like(ids),
  )
  states = model.encode(params, inputs, None)
  states = jnp.take_along_axis(states, slots[:, None, None], axis=1)
  logits = model.predict(params, states)[:, 0].astype(jnp.float32)
  asked = jnp.take_along_axis(ids, slots[:, None], axis=1)
  own = jnp.take_along_axis(logits, asked, axis=1)[:, 0]
  return own - jax.nn.logsumexp(logits, axis=-1)


def _round_up(length: int) -> int:
  """Returns the next of 8, 12, 16 … 32, then 40, 48, 56, 64, 80, 96 ….

  Finer than `loading` does it: of short rows, a quarter would be padding.
  """
  length = max(length, 8)
  step = max(4, 1 << (length - 1).bit_length() - 3)
  return -(-length // step) * step
