"""SentencePiece models: reading, training."""

from __future__ import annotations

import functools
import io
import itertools
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, SupportsIndex

import numpy as np
import sentencepiece

from flaxmlm import InputError
from flaxmlm.tokenizers import flags as token_flags
from flaxmlm.tokenizers.flags import SENTENCE_START, WORD_START
from flaxmlm.tokenizers.model_proto import ModelProto
from flaxmlm.tokenizers.sampling import common_characters
from flaxmlm.tokenizers.vocab import (
  SPECIAL_NAMES,
  Encoded,
  Settings,
  Vocab,
  check_ids,
  check_text,
  find_specials,
  get_fingerprint,
  save_files,
  split_at_masks,
)

# A private-use character: no piece has it, so what follows is encoded as the
# rest of a word.
_ANCHOR = "\ue000"
# Characters that are encoded together: bounds the memory of the flags.
_GROUP_CHARS = 1 << 21
# What is remembered: 2**18 words and their ids are some 50 MB.
_KNOWN_WORDS = 1 << 18
_KNOWN_CHARS = 32


@dataclass(frozen=True, eq=False)
class SentencePiece:
  """A SentencePiece model as a `Tokenizer`.

  A word starts at a piece that starts with "▁".
  """

  vocab: Vocab
  added: tuple[str, ...]
  fingerprint: str
  settings: Settings
  model: sentencepiece.SentencePieceProcessor
  names: tuple[str, ...] = field(repr=False)
  # Special ids that the model makes of raw text (user-defined pieces).
  leaks: tuple[int, ...] = field(repr=False)
  # A text that has one of these isn't the sum of its words to the model.
  whole: tuple[str, ...] = field(repr=False)
  style: ClassVar[str] = "▁"

  @functools.cached_property
  def _starts(self) -> np.ndarray:
    marks = [name.startswith("▁") for name in self.names]
    return np.array(marks, np.uint8) * WORD_START

  @functools.cached_property
  def _known(self) -> dict[str, bytes]:
    """The ids (uint32) of words that were encoded before."""
    return {}

  @functools.cached_property
  def _text(self) -> list[bytes]:
    """What each id adds to a text."""
    result = [
      bytes([int(name[3:5], 16)])
      if i < len(self.model) and self.model.is_byte(i)
      else name.replace("▁", " ").encode()
      for i, name in enumerate(self.names)
    ]
    for i in self.vocab.specials:
      result[i] = b""
    result[self.vocab.unk] = SPECIAL_NAMES["unk"][0].encode()
    result[self.vocab.mask] = b" " + self.names[self.vocab.mask].encode()
    return result

  def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
    """See `Tokenizer.encode_batch`."""
    if self.settings.lowercase:
      texts = [text.lower() for text in texts]
    for text in texts:
      check_text(text)
    if self.settings.words == "jieba":
      return [self._encode_with_offsets(text) for text in texts]
    result: list[Encoded] = []
    for group in _group(texts):
      result += self._encode_group(group)
    return result

  def _encode_group(self, texts: list[str]) -> list[Encoded]:
    whole = [
      any(c in text for c in self.whole) or token_flags.has_cjk_stops(text)
      for text in texts
    ]
    parts = zip(texts, whole, strict=True)
    rest = iter(self._encode_by_words([t for t, odd in parts if not odd]))
    return [
      self._encode_with_offsets(text) if odd else next(rest)
      for text, odd in zip(texts, whole, strict=True)
    ]

  def _encode_by_words(self, texts: list[str]) -> list[Encoded]:
    """Encodes texts whose tokens are those of their words, one by one.

    Each distinct word is encoded once: several times as fast as the model, and
    the k-th word's first token is where its flags belong. (Offsets would cost
    several times the encoding.)
    """
    text = "\n\n".join(texts)
    words = token_flags.find_words(text)
    numbers, distinct = _number(text, words)
    pieces = self._encode_words(distinct)
    table = np.frombuffer(b"".join(pieces), np.uint32)
    sizes = np.fromiter(map(len, pieces), np.int64, len(pieces)) // 4
    shift = np.cumsum(sizes) - sizes

    sizes = sizes[numbers]
    first = np.cumsum(np.append(0, sizes))  # token of each word, and the end
    shift = shift[numbers] - first[:-1]
    ids = table[np.repeat(shift, sizes) + np.arange(first[-1])]
    flags = self._starts[ids]
    opens = first[:-1][words.opens]
    flags[opens[opens < len(flags)]] |= SENTENCE_START

    ids = self._without_leaks(ids)
    begins = np.cumsum([0, *(len(text) + 2 for text in texts)])
    ends = first[np.searchsorted(words.starts, begins)].tolist()
    return [
      Encoded(ids[a:b], flags[a:b])
      for a, b in zip(ends[:-1], ends[1:], strict=True)
    ]

  def _encode_words(self, words: list[str]) -> list[bytes]:
    """Returns the ids (uint32) of each word."""
    known = self._known
    if len(known) > _KNOWN_WORDS:
      known.clear()
    result = list(map(known.get, words))
    missing = [i for i, ids in enumerate(result) if ids is None]
    new = [words[i] for i in missing]
    found = self.model.encode(new, out_type=int, num_threads=1)
    ids = np.fromiter(itertools.chain.from_iterable(found), np.uint32)
    data = ids.tobytes()
    begin = 0
    for i, word, pieces in zip(missing, new, found, strict=True):
      end = begin + 4 * len(pieces)
      result[i] = data[begin:end]
      if len(word) <= _KNOWN_CHARS:
        known[word] = result[i]
      begin = end
    return result

  def _encode_with_offsets(self, text: str) -> Encoded:
    ids, starts, ends = self._encode_offsets(text)
    if self.settings.words == "jieba":
      flags = token_flags.get_jieba_flags(text, starts, ends)
      # A "▁" that the model put before the text holds no character.
      flags[1:] |= ends[:-1] == 0
    else:
      flags = self._starts[ids]
    flags[:1] |= WORD_START
    flags |= token_flags.get_sentence_flags(text, starts)
    return Encoded(self._without_leaks(ids), flags)

  def _encode_offsets(
    self, text: str
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    found = self.model.encode(text, out_type="offset_mapping")
    offsets = np.array(found["offsets"], np.int64).reshape(-1, 2)
    return np.array(found["ids"], np.uint32), offsets[:, 0], offsets[:, 1]

  def _without_leaks(self, ids: np.ndarray) -> np.ndarray:
    if self.leaks:
      ids[np.isin(ids, self.leaks)] = self.vocab.unk
    return ids

  def encode(self, text: str) -> np.ndarray:
    """See `Tokenizer.encode`."""
    check_text(text)
    parts = split_at_masks(text, self.names[self.vocab.mask])
    if self.settings.lowercase:
      parts = [part.lower() for part in parts]
    prefixed = self.model.normalize("a") != "a"
    result: list[np.ndarray] = []
    for i, part in enumerate(parts):
      if i:
        result.append(np.array([self.vocab.mask], np.uint32))
      if i and prefixed:
        ids, _, ends = self._encode_offsets(_ANCHOR + part)
        ids = ids[ends > 1]
      else:
        ids = np.array(self.model.encode(part), np.uint32)
      result.append(self._without_leaks(ids))
    return np.concatenate(result)

  def decode(self, ids: Iterable[SupportsIndex]) -> str:
    """See `Tokenizer.decode`."""
    table = self._text
    data = b"".join(table[i] for i in check_ids(ids, self.vocab.size))
    return data.decode("utf-8", "replace").removeprefix(" ")

  def tokens(self, ids: Iterable[SupportsIndex]) -> list[str]:
    """See `Tokenizer.tokens`."""
    return [self.names[i] for i in check_ids(ids, self.vocab.size)]

  def save(self, folder: str) -> None:
    """See `Tokenizer.save`."""
    model = self.model.serialized_model_proto()
    save_files(folder, "tokenizer.model", model, self.settings)


def read(model: bytes, where: str) -> sentencepiece.SentencePieceProcessor:
  """Reads a model file; raises InputError where that fails."""
  sentencepiece.set_min_log_level(_QUIET)
  try:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    # Each of these fails for a damaged model that could be loaded.
    processor.id_to_piece(list(range(len(processor))))
    processor.encode("a")
  except (RuntimeError, ValueError, IndexError) as error:
    raise InputError(f"{where}: not a SentencePiece model") from error
  return processor


def build(model: bytes, settings: Settings, where: str) -> SentencePiece:
  """Returns the tokenizer of a SentencePiece model file.

  A user-defined special piece that the model would make of raw text becomes
  [UNK] there.

  Args:
    model: Contents of the file.
    settings: See `Settings`.
    where: The file's name, for errors.

  Raises:
    InputError: It is not a SentencePiece model.
  """
  processor = read(model, where)
  size = len(processor)
  names = [processor.id_to_piece(i) for i in range(size)]
  controls = [
    i for i in range(size) if processor.is_control(i) or processor.is_unused(i)
  ]
  ids = {name: i for i, name in enumerate(names)}
  if processor.unk_id() >= 0:
    ids[SPECIAL_NAMES["unk"][0]] = processor.unk_id()
  if processor.pad_id() >= 0:
    ids[SPECIAL_NAMES["pad"][0]] = processor.pad_id()
  vocab, added = find_specials(ids, size, controls)
  names += added
  leaks = tuple(
    i
    for i in vocab.specials
    if i < size and i != vocab.unk and i in processor.encode(names[i])
  )
  return SentencePiece(
    vocab,
    added,
    get_fingerprint(processor.serialized_model_proto(), settings),
    settings,
    processor,
    tuple(names),
    leaks,
    _find_whole(processor, names[:size]),
  )


def _find_whole(
  model: sentencepiece.SentencePieceProcessor, names: Sequence[str]
) -> tuple[str, ...]:
  """Returns what a text must not have to be the sum of its words.

  Words are what `str.split` gives. No piece may go from one into the next, and
  the model must take every white space between them for one space. "" (which
  every text has) if no text is.
  """
  apart = (
    "▁" in names
    and not any("▁" in name[1:] for name in names)
    and model.normalize("  a  b ") == "▁a▁b"
  )
  if not apart:
    return ("",)
  kept = (c for c in token_flags.SPACES if model.normalize(f"a{c}b") != "▁a▁b")
  return ("▁", *kept)


def _number(
  text: str, words: token_flags.Words
) -> tuple[np.ndarray, list[str]]:
  """Returns each word's number [W], and the words by number.

  Equal words have one number for each white space that follows them.
  """
  import pyarrow

  units = token_flags.get_units(text)
  borders = np.append(words.starts, len(units)) * units.itemsize
  buffers = [None, *map(pyarrow.py_buffer, (borders.astype(np.int32), units))]
  count = len(words.starts)
  array = pyarrow.Array.from_buffers(pyarrow.binary(), count, buffers)
  numbers = np.asarray(array.dictionary_encode().indices)
  some = np.zeros(numbers.max(initial=-1) + 1, np.int64)
  some[numbers] = np.arange(count)  # any of the equal ones
  places = zip(
    words.starts[some].tolist(), words.ends[some].tolist(), strict=True
  )
  return numbers, [text[a:b] for a, b in places]


def _group(texts: Iterable[str]) -> Iterator[list[str]]:
  group: list[str] = []
  chars = 0
  for text in texts:
    if group and chars + len(text) > _GROUP_CHARS:
      yield group
      group, chars = [], 0
    group.append(text)
    chars += len(text)
  if group:
    yield group


_QUIET = 3  # fatal errors only; the rest comes as exceptions
# Fixed, not the number of cores: sums of the EM steps depend on it. More
# threads than cores do no harm.
_TRAINING_THREADS = 8
# As published models for scripts with many characters (SentencePiece's README
# advises it for Chinese and Japanese); the rarest 0.05 % become [UNK], but for
# `sampling.common_characters`: in English they'd be Q and Z.
CHARACTER_COVERAGE = 0.9995


def _make_normalizer(lowercase: bool) -> sentencepiece.SentencePieceNormalizer:
  """Returns the normalisation that a trained model carries in its file.

  Every whitespace character is a space, runs of it are one, the ends are
  stripped; nothing else changes (`data.cleaning.unicode` chooses the Unicode
  form), but for `lowercase`, character by character.
  """
  changes: dict[str, str] = {}
  for point in range(sys.maxunicode + 1):
    char = chr(point)
    lower = char.lower() if lowercase else char
    if char.isspace():
      lower = " "
    if lower != char:
      changes[char] = lower
  return sentencepiece.SentencePieceNormalizer(
    norm_map=list(changes.items()),
    add_dummy_prefix=True,
    escape_whitespaces=True,
    remove_extra_whitespaces=True,
  )


def train(
  lines: Iterable[str], *, kind: str, vocab_size: int, lowercase: bool
) -> bytes:
  """Trains a model; the same lines give the same bytes on any machine.

  [PAD] [UNK] [CLS] [SEP] [MASK] are its pieces 0 to 4.

  Args:
    lines: Text in lines of at most 4,192 bytes (SentencePiece drops longer).
    kind: "unigram" or "bpe".
    vocab_size: Number of pieces.
    lowercase: The model lower-cases what it reads.

  Returns:
    The model file.

  Raises:
    InputError: The vocabulary is too large or too small for the text.
  """
  sentencepiece.set_min_log_level(_QUIET)
  model = io.BytesIO()
  # U+2585 is SentencePiece's own mark: it drops a sentence that has one.
  sentences = [line.replace("\u2585", " ") for line in lines]
  counts: Counter[str] = Counter()
  for line in sentences:
    counts.update(line.lower() if lowercase else line)
  names = {role: names[0] for role, names in SPECIAL_NAMES.items()}
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(sentences),
      model_writer=model,
      model_type=kind,
      vocab_size=vocab_size,
      normalizer=_make_normalizer(lowercase),
      character_coverage=CHARACTER_COVERAGE,
      required_chars="".join(common_characters(counts, vocab_size // 4)),
      num_threads=_TRAINING_THREADS,
      pad_id=0,
      pad_piece=names["pad"],
      unk_id=1,
      unk_piece=names["unk"],
      bos_id=-1,
      eos_id=-1,
      control_symbols=[names["cls"], names["sep"], names["mask"]],
      minloglevel=_QUIET,
    )
  except RuntimeError as error:
    raise _explain(error, vocab_size) from error
  return _round_scores(model.getvalue())


def _round_scores(model: bytes) -> bytes:
  """Returns a model whose scores are multiples of 1/1024.

  The model adds scores up in float32. "0" "00" and "00" "0" tie, and what
  rounding is left decides, by what stands before them. Sums of such multiples
  are exact up to 16,384: a word has the same pieces wherever it stands, and in
  programs that add up in float64.
  """
  proto = ModelProto.FromString(model)
  for piece in proto.pieces:
    piece.score = round(piece.score * 1024) / 1024
  return proto.SerializeToString(deterministic=True)


def _explain(error: RuntimeError, vocab_size: int) -> InputError:
  message = str(error)
  if match := re.search(r"value <= (\d+)", message):
    return InputError(
      f"tokenizer.vocab_size={vocab_size} is too large for the training text;"
      f" at most {match[1]} works, or give it more text"
    )
  if match := re.search(r"required_chars\. \d+ vs (\d+)", message):
    return InputError(
      f"tokenizer.vocab_size={vocab_size} is too small for the characters of"
      f" the training text; at least {match[1]} works"
    )
  return InputError(
    f"SentencePiece can't train a tokenizer on this text: {message.strip()}"
  )
