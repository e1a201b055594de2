"""Two segments a row, `[CLS] A [SEP] B [SEP]`, and a question about them.

`next_sentence` (Devlin et al., 2018, section 3.1, Task 2): is B what follows A
(0), or a part of another document (1)?  `sentence_order` (Lan et al., 2019,
section 3.1): are two segments that follow one another in order (0), or swapped
(1)? Both are half and half, and stand beside an objective that hides tokens.

The host sends a row as a piece of whole sentences of one document, with room
for one more [SEP]. It is split at one of its sentence starts, each as likely.

`sentence_pair` asks for the label that came with a pair of texts, one of any
number of classes. The host sends both behind one another, the label in a flag.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from flaxmlm.models.model import Model, Params
from flaxmlm.objectives.cross_entropy import cross_entropy
from flaxmlm.objectives.objective import (
  LABEL_SHIFT,
  PAIR_START,
  SENTENCE_START,
  WORD_START,
  Batch,
  Example,
  Objective,
  Pairs,
  Sums,
)

Arranged = tuple[Batch, Int[Array, "B L"], Pairs]
"""Rows, their segments A and B, and what is asked."""


class Part(NamedTuple):
  """Tokens `first` to `first + length` of each row of two arrays."""

  ids: Int[Array, "B L"]
  flags: Array
  first: Int[Array, " B"]
  length: Int[Array, " B"]


def beside(
  objective: Objective, name: str, *, vocab: Mapping[str, Any]
) -> Objective:
  """Returns an objective with a task of pairs beside it.

  Args:
    objective: What hides tokens; it is given rows that are pairs already.
    name: One of `ARRANGE`.
    vocab: See `objectives.build`.
  """

  def corrupt(
    keys: Key[Array, " B"], batch: Batch, step: Int[Array, ""]
  ) -> Example:
    keys = jax.vmap(jax.random.split)(keys)
    arranged, counts = ARRANGE[name](keys[:, 0], batch, vocab=vocab)
    batch, token_types, pairs = arranged
    example = objective.corrupt(keys[:, 1], batch, step)
    # A row of padding alone, which fills up a batch, is none that lacks a pair.
    single = (batch.segments[:, 0] > 0) & (pairs.weights == 0)
    return example._replace(
      inputs=example.inputs._replace(token_types=token_types),
      counts={
        **example.counts,
        **counts,
        "rows_without_pair": single.astype(jnp.float32),
      },
      pairs=pairs,
    )

  def run(
    model: Model,
    params: Params,
    example: Example,
    dropout_keys: Key[Array, " B"] | None,
  ) -> tuple[Float[Array, "B L D"], Sums]:
    hidden, sums = objective.run(model, params, example, dropout_keys)
    logits = model.classify(params, hidden)
    labels, weights = example.pairs
    nll = cross_entropy(logits, jnp.maximum(labels, 0))
    correct = jnp.argmax(logits, axis=-1) == labels
    pair = {
      "nll": jnp.sum(nll * weights),
      "weight": jnp.sum(weights),
      "correct": jnp.sum(correct * weights),
    }
    return hidden, sums | {name: pair}

  def weigh(example: Example) -> dict[str, Float[Array, ""]]:
    return objective.weigh(example) | {name: jnp.sum(example.pairs.weights)}

  return objective._replace(
    shares=objective.shares | {name: 1.0},
    corrupt=corrupt,
    run=run,
    weigh=weigh,
  )


def continue_or_not(
  keys: Key[Array, " B"], batch: Batch, *, vocab: Mapping[str, Any]
) -> tuple[Arranged, dict[str, Float[Array, " B"]]]:
  """Returns rows in which B follows A, or comes from `batch.other`.

  Both rows are split alike, and the longer B is cut to the length of the
  shorter one, whichever is taken: the lengths say nothing about the label, nor
  does whether B ends where its piece does.
  """
  keys = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
  other = batch.other
  split, good = choose_split(keys[:, 0], batch)
  other_split, other_good = choose_split(keys[:, 1], other)
  labels = jax.vmap(jax.random.bernoulli)(keys[:, 2])
  own = count_tokens(batch) + 1 - split
  theirs = count_tokens(other) + 1 - other_split
  length = jnp.minimum(own, theirs)
  first = Part(batch.ids, batch.flags, jnp.ones_like(split), split - 1)
  second = Part(
    jnp.where(labels[:, None], other.ids, batch.ids),
    jnp.where(labels[:, None], other.flags, batch.flags),
    jnp.where(labels, other_split, split),
    length,
  )
  good = good & other_good
  cut = jnp.where(good, jnp.where(labels, theirs, own) - length, 0)
  made = join(batch, first, second, labels, good, vocab=vocab)
  return made, {"tokens_cut": cut.astype(jnp.float32)}


def swap_or_not(
  keys: Key[Array, " B"], batch: Batch, *, vocab: Mapping[str, Any]
) -> tuple[Arranged, dict[str, Float[Array, " B"]]]:
  """Returns rows whose two segments are in order, or swapped."""
  keys = jax.vmap(jax.random.split)(keys)
  split, good = choose_split(keys[:, 0], batch)
  labels = jax.vmap(jax.random.bernoulli)(keys[:, 1])
  before, after = split - 1, count_tokens(batch) + 1 - split
  first = Part(
    batch.ids,
    batch.flags,
    jnp.where(labels, split, 1),
    jnp.where(labels, after, before),
  )
  second = Part(
    batch.ids,
    batch.flags,
    jnp.where(labels, 1, split),
    jnp.where(labels, before, after),
  )
  made = join(batch, first, second, labels, good, vocab=vocab)
  return made, {}


def take_label(
  keys: Key[Array, " B"], batch: Batch, *, vocab: Mapping[str, Any]
) -> tuple[Arranged, dict[str, Float[Array, " B"]]]:
  """Returns rows split where the second text begins; draws nothing."""
  del keys
  starts = batch.flags & PAIR_START > 0
  split = jnp.argmax(starts, axis=1)
  found = jnp.take_along_axis(batch.flags, split[:, None], axis=1)[:, 0]
  first = Part(batch.ids, batch.flags, jnp.ones_like(split), split - 1)
  second = first._replace(first=split, length=count_tokens(batch) + 1 - split)
  labels = (found >> LABEL_SHIFT).astype(jnp.int32)
  good = starts.any(axis=1)
  made = join(batch, first, second, labels, good, vocab=vocab)
  return made, {}


# Each returns the rows, and numbers a row that are logged by name.
ARRANGE = {
  "next_sentence": continue_or_not,
  "sentence_order": swap_or_not,
  "sentence_pair": take_label,
}


def count_tokens(batch: Batch) -> Int[Array, " B"]:
  """Returns the tokens of each row between [CLS] and [SEP]."""
  return jnp.maximum((batch.segments > 0).sum(axis=1) - 2, 0)


def choose_split(
  keys: Key[Array, " B"], batch: Batch
) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
  """Chooses the place where the second part of each row begins.

  Returns:
    The place, a sentence start that isn't the first token; and whether a row
    has one.
  """
  L = batch.ids.shape[1]
  places = jnp.arange(L)
  starts = (
    (batch.flags & SENTENCE_START > 0)
    & (places > 1)
    & (places <= count_tokens(batch)[:, None])
  )
  bits = jax.vmap(lambda key: jax.random.bits(key, (L,), "uint32"))(keys)
  order = jnp.where(starts, bits >> 1, jnp.uint32(2**31))
  return jnp.argmin(order, axis=1), starts.any(axis=1)


def join(
  batch: Batch,
  first: Part,
  second: Part,
  labels: Bool[Array, " B"] | Int[Array, " B"],
  good: Bool[Array, " B"],
  *,
  vocab: Mapping[str, Any],
) -> Arranged:
  """Returns rows [CLS] first [SEP] second [SEP], and their segments A and B.

  The second [SEP] belongs to B (0 and 1, as in google-research/bert). A row
  that isn't good stays as it is.
  """
  B, L = batch.ids.shape
  places = jnp.arange(L)[None]
  middle = first.length[:, None] + 1  # the place of the first [SEP]
  end = middle + second.length[:, None] + 1

  def take(name: str) -> Array:
    a = jnp.clip(first.first[:, None] + places - 1, 0, L - 1)
    b = jnp.clip(second.first[:, None] + places - middle - 1, 0, L - 1)
    return jnp.where(
      places < middle,
      jnp.take_along_axis(getattr(first, name), a, axis=1),
      jnp.take_along_axis(getattr(second, name), b, axis=1),
    )

  special = (places == 0) | (places == middle) | (places == end)
  begins = (places == 1) | (places == middle + 1)
  ids = jnp.where(places == 0, vocab["cls"], take("ids"))
  ids = jnp.where((places == middle) | (places == end), vocab["sep"], ids)
  flags = take("flags") | jnp.where(begins, WORD_START, 0).astype(jnp.uint8)
  flags = jnp.where(special, jnp.uint8(WORD_START), flags)
  valid = places <= end
  keep = ~good[:, None]
  made = Batch(
    ids=jnp.where(keep, batch.ids, jnp.where(valid, ids, vocab["pad"])),
    segments=jnp.where(keep, batch.segments, valid.astype(jnp.int32)),
    positions=jnp.where(keep, batch.positions, jnp.where(valid, places, 0)),
    flags=jnp.where(keep, batch.flags, jnp.where(valid, flags, 0)),
    example=batch.example,
  )
  token_types = (good[:, None] & valid & (places > middle)).astype(jnp.int32)
  pairs = Pairs(
    jnp.where(good, labels.astype(jnp.int32), -1), good.astype(jnp.float32)
  )
  return made, token_types, pairs
