"""A bounded, even sample of a stream of texts, and what is common in it."""

from __future__ import annotations

import heapq
import random
import re
from collections.abc import Iterable, Iterator, Mapping

# Sampled as a whole: small against any sample, large against a sentence.
_CHUNK_CHARS = 4096
# At 4 bytes a character this stays under the 4,192 bytes of a sentence that
# SentencePiece drops.
_LINE_CHARS = 1000
_SPACE_MARK = "▁"  # SentencePiece's own
_COMMON = 10  # times, for a character
_LINE = re.compile(rf"(?s).{{1,{_LINE_CHARS}}}(?=\s|$)|.{{1,{_LINE_CHARS}}}")


def cut_lines(text: str) -> Iterator[str]:
  """Yields the lines of a text; long ones are cut, at whitespace if any is."""
  for line in text.splitlines():
    if len(line) <= _LINE_CHARS:
      if line.strip():
        yield line
    else:
      yield from (m[0] for m in _LINE.finditer(line) if m[0].strip())


def _cut_chunks(text: str) -> Iterator[str]:
  begin = 0
  while len(text) - begin > _CHUNK_CHARS:
    end = text.rfind("\n", begin, begin + _CHUNK_CHARS) + 1
    if not end:
      end = text.rfind(" ", begin, begin + _CHUNK_CHARS) + 1
    end = end or begin + _CHUNK_CHARS
    yield text[begin:end]
    begin = end
  if begin < len(text):
    yield text[begin:]


def sample(texts: Iterable[str], *, chars: int, seed: int) -> list[str]:
  """Draws chunks of texts evenly, about `chars` characters of them.

  Each chunk (a text, or a run of lines of a longer one) gets a random number;
  those with the smallest are kept. One pass, and never more than the sample
  and one text in memory.

  Args:
    texts: Any number of texts.
    chars: Size of the sample; all of the texts if they have fewer.
    seed: The same seed and texts give the same sample.

  Returns:
    The chunks, in the order of the texts.
  """
  numbers = random.Random(seed)
  kept: list[tuple[float, int, str]] = []
  total = 0
  index = 0
  for text in texts:
    for chunk in _cut_chunks(text):
      index += 1
      heapq.heappush(kept, (-numbers.random(), index, chunk))
      total += len(chunk)
      while total > chars and len(kept) > 1:
        total -= len(heapq.heappop(kept)[2])
  return [chunk for _, _, chunk in sorted(kept, key=lambda item: item[1])]


def common_characters(counts: Mapping[str, int], most: int) -> list[str]:
  """Returns the characters that occur ten times or more, by their order.

  White space and its mark aren't among them. Of more than `most`, those that
  occur most often, the first of equals in the order of Unicode.
  """
  common = [
    (-count, char)
    for char, count in counts.items()
    if count >= _COMMON and not char.isspace() and char != _SPACE_MARK
  ]
  return sorted(char for _, char in sorted(common)[:most])
