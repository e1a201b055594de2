"""Words, and the choice of some of them until a budget of tokens is used up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from flaxmlm.objectives.objective import WORD_START, Batch


class Words(NamedTuple):
  """The words of each row, in order; W = L of them at most.

  Attributes:
    count: How many there are.
    end: Maskable tokens up to and with the n-th word; the last one's from
      `count` on.
    run: Number of the run of the n-th word: words of one run stand beside one
      another, in one document, with nothing between them.
    word: Number of each token's word, from 1; 0 for what may not be hidden.
    broken: How many words have a special token inside, and so aren't here.
  """

  count: Int[Array, " B"]
  end: Int[Array, "B L"]
  run: Int[Array, "B L"]
  word: Int[Array, "B L"]
  broken: Int[Array, " B"]


def find_words(batch: Batch, maskable: Bool[Array, "B L"]) -> Words:
  """Returns the words of each row, those of maskable tokens alone.

  A word begins where the flags say so. One with a special token inside, [UNK]
  for one, can't be hidden whole, and so isn't hidden at all.
  """
  B, L = maskable.shape
  rows = jnp.arange(B)[:, None]
  starts = batch.flags & WORD_START > 0
  every = jnp.cumsum(starts, axis=1)
  nothing = jnp.zeros((B, L + 1), bool)
  special = nothing.at[rows, every].max(~maskable)
  broken = special & nothing.at[rows, every].max(maskable)
  maskable = maskable & ~jnp.take_along_axis(special, every, axis=1)
  before = jnp.pad(maskable[:, :-1], ((0, 0), (1, 0)))
  breaks = maskable & ~before
  begins = breaks | (maskable & starts)
  word = jnp.cumsum(begins, axis=1) * maskable
  place = jnp.where(maskable, word - 1, L)
  zeros = jnp.zeros((B, L), jnp.int32)
  lengths = zeros.at[rows, place].add(1, mode="drop")
  run = zeros.at[rows, place].max(jnp.cumsum(breaks, axis=1), mode="drop")
  end = jnp.cumsum(lengths, axis=1)
  return Words(begins.sum(axis=1), end, run, word, broken.sum(axis=1))


def pick_words(
  keys: Key[Array, " B"],
  words: Words,
  budget: Int[Array, " B"],
  shares: Sequence[float],
) -> Int[Array, "B L"]:
  """Chooses spans of whole words of each row, as far as a budget goes.

  The words are gone through in random order. At each that is free, a length of
  n words is drawn, and the longest span of up to n words is taken that begins
  there, stays in its run, overlaps no other span and fits what is left of the
  budget; if there is none, the word is passed over. So google-research/bert
  (`create_masked_lm_predictions`) takes words, and google-research/albert (the
  same name) n-grams.

  Args:
    keys: One a row.
    words: Of `find_words`.
    budget: Tokens to pick, at most.
    shares: How often a length of 1, 2, … words is drawn; they sum to 1.

  Returns:
    The number of each token's span, from 1 in the order of choice; 0 for what
    isn't picked.
  """
  N = len(shares)
  steps = jnp.asarray(np.cumsum(shares)[:-1], jnp.float32)
  ahead = jnp.arange(N)

  def pick(
    key: Key[Array, ""], words: Words, budget: Int[Array, ""]
  ) -> Int[Array, " L"]:
    (L,) = words.end.shape
    order_key, length_key = jax.random.split(key)
    bits = jax.random.bits(order_key, (L,), "uint32") >> 1
    bits = jnp.where(jnp.arange(L) < words.count, bits, jnp.uint32(2**31))
    order = jnp.argsort(bits)
    drawn = jax.random.uniform(length_key, (L,))
    most = 1 + jnp.searchsorted(steps, drawn, side="right")
    # So that a span may be looked for beyond the last word.
    end = jnp.pad(words.end, (1, N), mode="edge").at[0].set(0)
    run = jnp.pad(words.run, (0, N))

    def go_on(state: tuple[Array, ...]) -> Bool[Array, ""]:
      turn, left, _, _ = state
      return (left > 0) & (turn < words.count)

    def take(state: tuple[Array, ...]) -> tuple[Array, ...]:
      turn, left, number, span = state
      first = order[turn]
      there = first + ahead
      good = (
        (ahead < most[first])
        & (run[there] == run[first])
        & (span[there] == 0)
        & (end[there + 1] - end[first] <= left)
      )
      length = jnp.cumprod(good).sum()
      number += length > 0
      span = span.at[there].set(jnp.where(ahead < length, number, span[there]))
      return turn + 1, left - end[first + length] + end[first], number, span

    zero = jnp.zeros((), jnp.int32)
    start = zero, budget, zero, jnp.zeros(L + N, jnp.int32)
    *_, span = jax.lax.while_loop(go_on, take, start)
    return jnp.where(words.word > 0, span[words.word - 1], 0)

  return jax.vmap(pick)(keys, words, budget)


def count_left_out(
  words: Words, budget: Int[Array, " B"]
) -> dict[str, Float[Array, " B"]]:
  """Returns how many words of each row can't be hidden, by the reason."""
  lengths = jnp.diff(words.end, axis=1, prepend=0)
  too_long = (lengths > budget[:, None]).sum(axis=1)
  return {
    "words_too_long": too_long.astype(jnp.float32),
    "words_with_unknown": words.broken.astype(jnp.float32),
  }
