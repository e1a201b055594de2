"""Which tokens start a word and which start a sentence.

A sentence ends at . ! ? … (with the quotes and brackets that close it) before
whitespace, at a blank line, and at the full-width stops of Chinese and
Japanese with no whitespace needed; at … before one of their characters too.
No list of abbreviations: "Mr. X" counts as two. Whitespace between two
sentences belongs to the second.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

import numpy as np

from flaxmlm import InputError

WORD_START = 1
SENTENCE_START = 2

_SPACE, _NEWLINE, _STOP, _CLOSER = 1, 3, 4, 8  # a newline is a space too
SPACES = "".join(c for c in map(chr, range(1 << 16)) if c.isspace())
"""Every white space there is."""
_STOPS = ".!?…。！？｡．"
_CLOSERS = "\"'”’»›)]}」』）】》〉］｝＂＇"
_CJK_STOPS = "。！？｡"
_CJK_END = re.compile(  # possessive: never one stop of a run
  rf"(?:[{_CJK_STOPS}][{re.escape(_STOPS)}]*+[{re.escape(_CLOSERS)}]*+"
  rf"(?=[^\s{re.escape(_STOPS)}])"
  rf"|…++[{re.escape(_CLOSERS)}]*+"
  r"(?=[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]))"
)


class Words(NamedTuple):
  """The words of a text that whitespace separates, W of them.

  `starts` and `ends` (exclusive) are character positions [W]; `opens` [W]
  says which words begin a sentence.
  """

  starts: np.ndarray
  ends: np.ndarray
  opens: np.ndarray


@functools.cache
def _kinds() -> np.ndarray:
  table = np.zeros(1 << 16, np.uint8)
  table[[ord(c) for c in SPACES]] = _SPACE
  table[ord("\n")] = _NEWLINE
  table[[ord(c) for c in _STOPS]] = _STOP
  table[[ord(c) for c in _CLOSERS]] = _CLOSER
  return table


def get_units(text: str) -> np.ndarray:
  """Returns a text's characters as numbers; uint16, faster, if they fit."""
  units = np.frombuffer(text.encode("utf-16-le"), "<u2")
  if len(units) == len(text):
    return units
  return np.frombuffer(text.encode("utf-32-le"), "<u4")


def find_words(text: str) -> Words:
  """Finds the words of a text and which of them begin a sentence.

  Sees only sentence ends before whitespace; `find_sentences` sees all.
  """
  kinds = _kinds()[np.minimum(get_units(text), 0xFFFF)]
  space = np.ones(len(kinds) + 2, bool)
  np.bitwise_and(kinds, _SPACE, out=space[1:-1], casting="unsafe")
  borders = np.flatnonzero(space[1:] != space[:-1])
  starts, ends = borders[0::2], borders[1::2]

  last = ends - 1
  walk = np.flatnonzero(kinds[last] == _CLOSER)
  while walk.size:
    last[walk] -= 1
    walk = walk[last[walk] >= starts[walk]]
    walk = walk[kinds[last[walk]] == _CLOSER]
  stops = (last >= starts) & (kinds[last] == _STOP)

  opens = np.ones(len(starts), bool)
  opens[1:] = stops[:-1]
  newlines = np.flatnonzero(kinds == _NEWLINE)
  after = np.searchsorted(starts, newlines)
  blank = after[1:][after[1:] == after[:-1]]
  opens[blank[blank < len(starts)]] = True
  return Words(starts, ends, opens)


def has_cjk_stops(text: str) -> bool:
  """Whether a sentence of the text may end without whitespace after it."""
  if text.isascii():
    return False
  return any(c in text for c in _CJK_STOPS) or (
    "…" in text and _CJK_END.search(text) is not None
  )


def find_sentences(text: str) -> np.ndarray:
  """Returns where sentences begin, ascending: right after the one before.

  The first is at 0. Whitespace that separates two sentences is the second's.
  """
  words = find_words(text)
  begins = np.append(0, words.ends[:-1][words.opens[1:]])
  if has_cjk_stops(text):
    inner = [m.end() for m in _CJK_END.finditer(text)]
    begins = np.sort(np.concatenate([begins, np.array(inner, begins.dtype)]))
  return begins


def get_sentence_flags(text: str, starts: np.ndarray) -> np.ndarray:
  """Returns SENTENCE_START flags, uint8 [T].

  Args:
    text: What was encoded.
    starts: Position of each token's first character [T], ascending.
  """
  flags = np.zeros(len(starts), np.uint8)
  first = np.searchsorted(starts, find_sentences(text))
  flags[first[first < len(starts)]] = SENTENCE_START
  return flags


def get_jieba_flags(
  text: str, starts: np.ndarray, ends: np.ndarray
) -> np.ndarray:
  """Returns WORD_START flags by jieba's words, uint8 [T].

  Two neighbours are of one word iff one jieba word holds the last character
  of the first and the first character of the second.

  Args:
    text: What was encoded.
    starts: Position of each token's first character [T], ascending.
    ends: Position after its last character [T].

  Raises:
    InputError: jieba is not installed.
  """
  flags = np.full(len(starts), WORD_START, np.uint8)
  if not len(starts) or not text:
    return flags
  lengths = [len(word) for word in _jieba().cut(text)]
  word = np.repeat(np.arange(len(lengths)), lengths)
  last = np.maximum(ends - 1, starts)[:-1]
  same = word[last] == word[np.minimum(starts[1:], len(word) - 1)]
  flags[1:][same] = 0
  return flags


@functools.cache
def _jieba():
  """Returns a jieba tokenizer, silent, built from its own dictionary.

  jieba's own start-up reads and writes a cache in the shared temporary
  folder, which another version, user or half-dead process may have written;
  building the dictionary takes a second, once a process.
  """
  import logging
  import warnings

  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it has invalid escapes, pkg_resources
    try:
      import jieba
    except ImportError as error:
      raise InputError(
        'tokenizer.words="jieba" needs jieba: pip install flaxmlm[zh]'
      ) from error
  jieba.setLogLevel(logging.WARNING)
  cutter = jieba.Tokenizer()
  cutter.FREQ, cutter.total = cutter.gen_pfdict(cutter.get_dict_file())
  cutter.initialized = True
  return cutter
