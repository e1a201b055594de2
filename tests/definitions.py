"""The definitions of the objectives, checked on what `preview --json` writes.

Stands alone: it reads numbers, and knows nothing of how they were drawn.
"""

import math

WORD_START, SENTENCE_START = 1, 2
WORDS = ("whole_word", "ngram", "span")


def check(rows, *, tokens, pairs, rate, specials, shares=(0.8, 0.1)):
  """Asserts that rows are what an objective says.

  Args:
    rows: Objects of `preview --json`.
    tokens: "masked", "whole_word", "ngram", "span" or "replaced_token".
    pairs: "next_sentence", "sentence_order" or None.
    rate: `objective.rate`.
    specials: Ids by "pad", "cls", "sep", "mask", "unk"; "others" a list.
    shares: Of [MASK] and of random tokens among what is hidden.
  """
  never = {v for v in specials.values() if isinstance(v, int)}
  never |= set(specials.get("others", ()))
  kinds, labels = [], []
  for row in rows:
    original, shown = row["original_ids"], row["input_ids"]
    slots = [
      slot
      for slot, weight in zip(row["slots"], row["weights"], strict=True)
      if weight > 0
    ]
    assert set(row["weights"]) <= {0.0, 1.0}
    assert slots == sorted(set(slots))
    hidden = set(slots)
    for slot, target in zip(slots, row["targets"], strict=False):
      assert original[slot] == target
    for place, (a, b) in enumerate(zip(original, shown, strict=True)):
      assert a == b or place in hidden
    maskable = [
      place
      for place, token in enumerate(original)
      if row["segments"][place] > 0 and token not in never
    ]
    assert hidden <= set(maskable)
    budget = max(1, round(rate * len(maskable))) if maskable else 0
    words = list(find_words(row, maskable))
    if tokens in WORDS:
      left = budget - len(slots)
      assert left >= 0
      for word in words:
        assert hidden >= set(word) or not hidden & set(word)
        # What was left out didn't fit.
        assert set(word) <= hidden or len(word) > left
    else:
      assert len(slots) == budget
    units = [[slot] for slot in slots]
    if tokens == "span":
      units = spans(words, hidden)
    for unit in units:
      found = {kind(original[p], shown[p], specials["mask"]) for p in unit}
      if tokens == "span":
        assert len(found) == 1 or "mask" not in found
      kinds += [found.pop()] if len(unit) == 1 or tokens != "span" else []
    random = {shown[p] for p in slots if shown[p] != original[p]}
    assert not (random - {specials["mask"]}) & never
    if pairs:
      labels.append(check_pair(row, specials))
  n = len(kinds)
  assert n > 0
  for name, share in (("mask", shares[0]), ("random", shares[1])):
    bound = 5 * math.sqrt(share * (1 - share) / n) + 1e-3
    assert abs(kinds.count(name) / n - share) < bound, (name, kinds.count(name))
  if pairs:
    asked = [label for label in labels if label >= 0]
    assert len(asked) > len(rows) / 2
    bound = 5 * 0.5 / math.sqrt(len(asked))
    assert abs(sum(asked) / len(asked) - 0.5) < bound


def kind(original, shown, mask):
  """Returns what became of a hidden token."""
  if shown == mask:
    return "mask"
  return "kept" if shown == original else "random"


def find_words(row, maskable):
  """Yields the places of each word that has no special token inside."""
  starts = [p for p, flag in enumerate(row["flags"]) if flag & WORD_START]
  allowed = set(maskable)
  for first, end in zip(starts, [*starts[1:], len(row["flags"])], strict=True):
    word = [*range(first, end)]
    if allowed >= set(word):
      yield word


def spans(words, hidden):
  """Returns hidden words; those that touch nothing else are spans of one."""
  chosen = [word for word in words if word[0] in hidden]
  alone = []
  for before, word, after in zip(
    [None, *chosen], chosen, [*chosen[1:], None], strict=False
  ):
    touched = (before and before[-1] == word[0] - 1) or (
      after and after[0] == word[-1] + 1
    )
    if not touched:
      alone.append(word)
  return alone


def check_pair(row, specials):
  """Asserts [CLS] A [SEP] B [SEP], padding; returns the label."""
  ids, used = row["original_ids"], sum(s > 0 for s in row["segments"])
  assert all(s == 0 for s in row["segments"][used:])
  assert set(ids[used:]) <= {specials["pad"]}
  if row["pair_label"] == -1 or not used:
    assert not any(row["token_types"])
    return -1
  assert ids[0] == specials["cls"]
  borders = [p for p in range(used) if ids[p] == specials["sep"]]
  middle, end = borders
  assert end == used - 1
  assert 1 < middle < end - 1
  types = [0] * (middle + 1) + [1] * (end - middle)
  assert row["token_types"] == types + [0] * (len(ids) - used)
  assert row["positions"][:used] == list(range(used))
  assert row["flags"][middle + 1] & SENTENCE_START or row["flags"][1] & (
    SENTENCE_START
  )
  assert row["flags"][1] & WORD_START
  assert row["flags"][middle + 1] & WORD_START
  return row["pair_label"]
