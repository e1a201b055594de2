"""WordPiece, byte-level BPE and tokenizer.json, on the `tokenizers` library."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, SupportsIndex

# One process, one thread: parallelism is by processes. It is read at each
# call, and also silences the library's warning about forks.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import tokenizers
from tokenizers import (
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)

from flaxmlm import InputError
from flaxmlm.storage import bounded
from flaxmlm.tokenizers import flags as token_flags
from flaxmlm.tokenizers.flags import WORD_START
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

_MOST_IDS = 1 << 24
_ANCHOR = "\ue000"  # see sentence_piece


@dataclasses.dataclass(frozen=True, eq=False)
class HuggingFace:
  """A `tokenizers.Tokenizer` as a `Tokenizer`.

  `style` says what the tokens show of words: "##" (WordPiece: a word starts
  at every token but these), "bytes" (a word starts at whitespace), "▁", or
  "" (nothing: a word starts after whitespace in the text).
  """

  vocab: Vocab
  added: tuple[str, ...]
  fingerprint: str
  settings: Settings
  model: tokenizers.Tokenizer
  style: str
  data: bytes = dataclasses.field(repr=False)

  def __reduce__(self):
    # Pickling the library's object loses `encode_special_tokens`.
    return _restore, (self.data, self.settings, self.added)

  @functools.cached_property
  def _names(self) -> list[str]:
    names = [""] * self.vocab.size
    for name, i in self.model.get_vocab(with_added_tokens=True).items():
      names[i] = name
    return names

  @functools.cached_property
  def _edges(self) -> tuple[np.ndarray, np.ndarray]:
    """Whether each token starts with whitespace, and ends with it [V]."""
    texts = [_read_bytes(name) for name in self._names]
    return (
      np.array([text[:1].isspace() for text in texts], bool),
      np.array([text[-1:].isspace() for text in texts], bool),
    )

  @functools.cached_property
  def _starts(self) -> np.ndarray:
    """Whether each token starts a word by its own look [V]."""
    if self.style == "##":
      prefix = self.model.model.continuing_subword_prefix
      return np.array([not n.startswith(prefix) for n in self._names], bool)
    return np.array([name.startswith("▁") for name in self._names], bool)

  @functools.cached_property
  def _is_special(self) -> np.ndarray:
    table = np.zeros(self.vocab.size, bool)
    table[list(self.vocab.specials)] = True
    return table

  def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
    """See `Tokenizer.encode_batch`."""
    # One by one: a batch would hold all of the library's encodings, some
    # hundred bytes a token.
    return [self._encode_document(text) for text in texts]

  def _encode_document(self, text: str) -> Encoded:
    check_text(text)
    if self.settings.lowercase:
      text = text.lower()
    ids, starts, ends = self._encode_offsets(text)
    flags = self._get_word_flags(text, ids, starts, ends)
    flags[:1] |= WORD_START
    flags |= token_flags.get_sentence_flags(text, starts)
    return Encoded(ids, flags)

  def _get_word_flags(
    self, text: str, ids: np.ndarray, starts: np.ndarray, ends: np.ndarray
  ) -> np.ndarray:
    if self.settings.words == "jieba":
      return token_flags.get_jieba_flags(text, starts, ends)
    if self.style == "bytes":
      leading, trailing = self._edges
      marks = leading[ids]
      marks[1:] |= trailing[ids[:-1]]
    elif self.style:
      marks = self._starts[ids]
    else:
      words = token_flags.find_words(text)
      before = np.searchsorted(words.starts, starts, side="right")
      marks = np.diff(before, prepend=-1) != 0
    return marks.astype(np.uint8) * np.uint8(WORD_START)

  def _encode_offsets(
    self, text: str
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    found = self.model.encode(text, add_special_tokens=False)
    ids = np.array(found.ids, np.uint32)
    flat = itertools.chain.from_iterable(found.offsets)
    offsets = np.fromiter(flat, np.int64, 2 * len(ids)).reshape(-1, 2)
    ids[self._is_special[ids]] = self.vocab.unk
    return ids, offsets[:, 0], offsets[:, 1]

  def encode(self, text: str) -> np.ndarray:
    """See `Tokenizer.encode`.

    Whitespace before a mask is dropped: the mask stands for the word with it.
    """
    check_text(text)
    parts = split_at_masks(text, self._names[self.vocab.mask])
    if self.settings.lowercase:
      parts = [part.lower() for part in parts]
    result: list[np.ndarray] = []
    for i, part in enumerate(parts):
      if i:
        result.append(np.array([self.vocab.mask], np.uint32))
      part = part.rstrip() if i + 1 < len(parts) else part
      if i and part and self.style == "▁" and not part[0].isspace():
        ids, _, ends = self._encode_offsets(_ANCHOR + part)
        ids = ids[ends > 1]
      else:
        ids = self._encode_offsets(part)[0]
      result.append(ids)
    return np.concatenate(result)

  def decode(self, ids: Iterable[SupportsIndex]) -> str:
    """See `Tokenizer.decode`."""
    vocab = self.vocab
    hidden = {*vocab.specials} - {vocab.mask, vocab.unk}
    kept = [i for i in check_ids(ids, vocab.size) if i not in hidden]
    if self.style != "bytes":
      return self._decode(kept)
    text = ""
    for is_mask, run in itertools.groupby(kept, lambda i: i == vocab.mask):
      if is_mask:
        gap = " " if text and not text[-1].isspace() else ""
        text += gap + " ".join(self._names[i] for i in run)
      else:
        text += self._decode(list(run))
    return text

  def _decode(self, ids: list[int]) -> str:
    return self.model.decode(ids, skip_special_tokens=False)

  def tokens(self, ids: Iterable[SupportsIndex]) -> list[str]:
    """See `Tokenizer.tokens`."""
    return [self._names[i] for i in check_ids(ids, self.vocab.size)]

  def save(self, folder: str) -> None:
    """See `Tokenizer.save`."""
    save_files(folder, "tokenizer.json", self.data, self.settings)


@functools.cache
def byte_chars() -> dict[str, int]:
  """Returns the byte that each character of a byte-level token stands for.

  GPT-2's table (Radford et al. 2019, encoder.py): printable characters of
  Latin-1 are themselves, the other bytes follow from U+0100 in order.
  """
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  rest = [byte for byte in range(256) if byte not in plain]
  table = {chr(byte): byte for byte in plain}
  return table | {chr(256 + i): byte for i, byte in enumerate(rest)}


def _read_bytes(token: str) -> str:
  """Returns a byte-level token as text; added tokens are written plainly."""
  table = byte_chars()
  if any(char not in table for char in token):
    return token
  return bytes(table[char] for char in token).decode("utf-8", "replace")


def _find_types(node: Any) -> set[str]:
  """Returns every "type" in a part of tokenizer.json."""
  if isinstance(node, list):
    return set().union(*map(_find_types, node))
  if isinstance(node, dict):
    own = {node["type"]} if isinstance(node.get("type"), str) else set()
    return own.union(*map(_find_types, node.values()))
  return set()


def _restore(
  data: bytes, settings: Settings, added: tuple[str, ...]
) -> HuggingFace:
  result = from_json(data, settings, "a pickled tokenizer")
  return dataclasses.replace(result, added=added)


def _find_style(spec: Mapping[str, Any]) -> str:
  if spec["model"].get("type") == "WordPiece":
    return "##"
  types = _find_types(spec.get("pre_tokenizer"))
  types |= _find_types(spec.get("decoder"))
  if "ByteLevel" in types:
    return "bytes"
  return "▁" if "Metaspace" in types else ""


class Token(NamedTuple):
  """A token that is to be added to a model, and the id it must get, if any."""

  id: int | None
  token: tokenizers.AddedToken


def from_json(
  data: bytes, settings: Settings, where: str, tokens: Sequence[Token] = ()
) -> HuggingFace:
  """Returns the tokenizer of a tokenizer.json.

  Padding and truncation that it asks for are left out; special tokens it
  lacks are appended. The name of a special token in raw text is encoded as
  plain text, or as [UNK] where the model knows it as one token.

  Args:
    data: Contents of the file.
    settings: See `Settings`.
    where: The file's name, for errors.
    tokens: Those that the model is to have besides, in the order of their
      ids; where it has one, it stays as it is.

  Raises:
    InputError: It is not a tokenizer.json, or a token gets another id.
  """
  try:
    spec = bounded.parse_json(data)
    marked = {name for names in SPECIAL_NAMES.values() for name in names}
    marked |= {*settings.specials}
    for token in spec.get("added_tokens") or ():
      token["special"] = token["special"] or token["content"] in marked
    model = tokenizers.Tokenizer.from_str(json.dumps(spec))
    style = _find_style(spec)
    highest = max(model.get_vocab(with_added_tokens=True).values(), default=-1)
    if not 0 <= highest < _MOST_IDS:
      raise ValueError(f"its ids go up to {highest}")
  except BaseException as error:
    # The library raises bare Exception, and where it panics not even that.
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
      raise
    raise InputError(f"{where}: not a tokenizer.json: {error}") from error
  model.no_padding()
  model.no_truncation()
  model.encode_special_tokens = True
  vocab, added = _add_tokens(model, tokens, settings, where)
  if tokens or added:
    data = model.to_str().encode()
  if find_specials(model.get_vocab(), vocab.size, vocab.others)[0] == vocab:
    settings = settings._replace(specials=())
  return HuggingFace(
    vocab,
    added,
    get_fingerprint(data, settings),
    settings,
    model,
    style,
    data,
  )


def _add_tokens(
  model: tokenizers.Tokenizer,
  tokens: Sequence[Token],
  settings: Settings,
  where: str,
) -> tuple[Vocab, tuple[str, ...]]:
  """Adds tokens, and then what special tokens are still missing.

  Returns:
    The vocabulary, and the names of the special tokens that the model lacked
    and for which no id was given.
  """
  held = {t.content for t in model.get_added_tokens_decoder().values()}
  known = {t.token.content for t in tokens if t.id is not None}
  known |= model.get_vocab().keys()
  model.add_tokens([t.token for t in tokens if t.token.content not in held])
  for i, token in tokens:
    got = model.token_to_id(token.content)
    if i is not None and got != i:
      raise InputError(
        f"{where}: {token.content!r} is to have the id {i}, but is {got} here;"
        " save the folder's tokenizer as a tokenizer.json"
      )
  ids = model.get_vocab(with_added_tokens=True)
  others = [
    i for i, token in model.get_added_tokens_decoder().items() if token.special
  ]
  vocab, added = find_specials(
    ids, max(ids.values()) + 1, others, settings.specials
  )
  model.add_special_tokens(list(added))
  first = vocab.size - len(added)
  if any(model.token_to_id(t) != first + i for i, t in enumerate(added)):
    raise InputError(
      f"{where}: lacks {' '.join(added)}, and its ids have gaps, so that none"
      " can be appended; add them to the file"
    )
  names = [model.id_to_token(i) for i in vocab[1:6]]
  return vocab, tuple(name for name in names if name not in known)


def _complete(
  ids: Mapping[str, int], settings: Settings
) -> tuple[dict[str, int], tuple[str, ...]]:
  """Appends the special tokens that a vocabulary lacks."""
  _, added = find_specials(ids, len(ids), specials=settings.specials)
  ids = dict(ids)
  for name in added:
    ids[name] = len(ids)
  return ids, added


def wrap(
  model: tokenizers.Tokenizer,
  settings: Settings,
  where: str,
  tokens: Sequence[Token] = (),
  added: tuple[str, ...] = (),
) -> HuggingFace:
  """Wraps a model that was built here; its file adds [CLS] and [SEP].

  Args:
    model: Changed in place.
    settings: See `Settings`.
    where: The file's name, for errors.
    tokens: See `from_json`.
    added: Names of special tokens that were appended to the file's before.
  """
  vocab, more = _add_tokens(model, tokens, settings, where)
  cls, sep = (model.id_to_token(i) for i in (vocab.cls, vocab.sep))
  model.post_processor = processors.TemplateProcessing(
    single=f"{cls} $A {sep}",
    pair=f"{cls} $A {sep} $B:1 {sep}:1",
    special_tokens=[(cls, vocab.cls), (sep, vocab.sep)],
  )
  model.add_special_tokens([model.id_to_token(i) for i in vocab[1:6]])
  result = from_json(model.to_str().encode(), settings, where)
  return dataclasses.replace(result, added=added + more)


def _read_lines(data: bytes, where: str) -> list[str]:
  try:
    text = data.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    line = data[: error.start].count(b"\n") + 1
    raise InputError(f"{where}:{line}: not UTF-8") from error
  lines = [line.removesuffix("\r") for line in text.split("\n")]
  return lines[:-1] if lines and not lines[-1] else lines


def read_vocab_txt(data: bytes, where: str) -> dict[str, int]:
  """Reads a vocab.txt: a token a line, its id the number of the line.

  Raises:
    InputError: A line is empty or is there twice.
  """
  ids: dict[str, int] = {}
  for i, token in enumerate(_read_lines(data, where)):
    if not token or token in ids:
      what = f"{token!r} is at line {ids[token] + 1} too" if token else "empty"
      raise InputError(f"{where}:{i + 1}: {what}; wants one token a line")
    ids[token] = i
  if not ids:
    raise InputError(f"{where}: empty; wants one token a line")
  return ids


def get_merges_path(path: str) -> str:
  """Returns where the merges.txt of a vocab.txt or vocab.json would be."""
  folder, name = os.path.split(path)
  stem = name.rpartition("vocab.")[0]
  return os.path.join(folder, f"{stem}merges.txt")


def is_byte_bpe(path: str) -> bool:
  """Whether a file is a vocabulary of byte-level BPE."""
  is_text = path.endswith("vocab.txt")
  return path.endswith("vocab.json") or (
    is_text and os.path.exists(get_merges_path(path))
  )


def read_vocab_json(data: bytes, where: str) -> dict[str, int]:
  """Reads a vocab.json: an object of token to id.

  Raises:
    InputError: It isn't one, or its ids are not 0 to V - 1.
  """
  try:
    ids = dict(bounded.parse_json(data))
    if sorted(ids.values()) != list(range(len(ids))) or not ids:
      raise ValueError("ids are not 0, 1, 2, … each once")
  except (ValueError, TypeError) as error:
    raise InputError(f"{where}: not a vocab.json: {error}") from error
  return ids


def from_wordpiece(
  ids: Mapping[str, int],
  *,
  lowercase: bool,
  settings: Settings,
  where: str,
  strip_accents: bool | None = None,
  split_chinese: bool = True,
  tokens: Sequence[Token] = (),
) -> HuggingFace:
  """Returns BERT's tokenizer over a vocabulary of WordPieces.

  Args:
    ids: Id of each token.
    lowercase: Lower-case all text, as BERT's uncased models do.
    settings: See `Settings`.
    where: The file's name, for errors.
    strip_accents: None: if lowercase, as in BERT.
    split_chinese: Every Chinese character is a word, as in BERT.
    tokens: See `from_json`.

  Raises:
    InputError: The vocabulary has to have its own ids, by `tokens`, but no
      [UNK]; or see `from_json`.
  """
  added: tuple[str, ...] = ()
  if not tokens:
    ids, added = _complete(ids, settings)
  vocab, _ = find_specials(ids, len(ids), specials=settings.specials)
  unk = next((name for name, i in ids.items() if i == vocab.unk), None)
  if unk is None:
    raise InputError(f"{where}: no token for unknown words; add it to the file")
  model = tokenizers.Tokenizer(models.WordPiece(dict(ids), unk_token=unk))
  model.normalizer = _make_bert_normalizer(
    lowercase, strip_accents, split_chinese
  )
  model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  model.decoder = decoders.WordPiece()
  return wrap(model, settings, where, tokens, added)


def _make_bert_normalizer(
  lowercase: bool,
  strip_accents: bool | None = None,
  split_chinese: bool = True,
) -> normalizers.BertNormalizer:
  return normalizers.BertNormalizer(
    clean_text=True,
    handle_chinese_chars=split_chinese,
    strip_accents=lowercase if strip_accents is None else strip_accents,
    lowercase=lowercase,
  )


def from_byte_bpe(
  ids: Mapping[str, int],
  merges: bytes,
  *,
  settings: Settings,
  where: str,
  merges_where: str,
  prefix_space: bool = False,
  tokens: Sequence[Token] = (),
) -> HuggingFace:
  """Returns GPT-2's and RoBERTa's byte-level BPE.

  Args:
    ids: Id of each token.
    merges: Contents of merges.txt, a pair of tokens a line.
    settings: See `Settings`.
    where: The vocabulary file's name, for errors.
    merges_where: The merges file's name, for errors.
    prefix_space: A text that has no space in front gets one.
    tokens: See `from_json`.

  Raises:
    InputError: A merge is not a pair, or its tokens are not in the
      vocabulary; or see `from_json`.
  """
  pairs: list[tuple[str, str]] = []
  for i, line in enumerate(_read_lines(merges, merges_where)):
    if not line or (i == 0 and line.startswith("#version")):
      continue
    pair = tuple(line.split(" "))
    if len(pair) != 2 or any(t not in ids for t in (*pair, "".join(pair))):
      raise InputError(
        f"{merges_where}:{i + 1}: {line!r} is not two tokens of {where} that"
        " merge into a third"
      )
    pairs.append(pair)
  added: tuple[str, ...] = ()
  if not tokens:
    ids, added = _complete(ids, settings)
  model = tokenizers.Tokenizer(models.BPE(dict(ids), pairs))
  model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
  model.decoder = decoders.ByteLevel()
  return wrap(model, settings, where, tokens, added)


def looks_lowercase(ids: Mapping[str, int]) -> bool:
  """Whether a vocabulary has no capital letter but in specials."""
  return not any(
    token != token.lower() and not re.fullmatch(r"[\[<].+[\]>]", token)
    for token in ids
  )


def train_wordpiece(
  lines: Sequence[str],
  *,
  vocab_size: int,
  lowercase: bool,
  coverage: float,
  settings: Settings,
) -> HuggingFace:
  """Trains WordPiece; the same lines give the same file on any machine.

  [PAD] [UNK] [CLS] [SEP] [MASK] get the ids 0 to 4.

  Args:
    lines: Text.
    vocab_size: Number of tokens.
    lowercase: See `from_wordpiece`.
    coverage: Share of the characters that the alphabet is to cover.
    settings: See `Settings`.

  Raises:
    InputError: The vocabulary is too large or too small for the text.
  """
  words = _count_words(lines, lowercase)
  alphabet = _choose_alphabet(words, coverage, vocab_size // 8)
  specials = [names[0] for names in SPECIAL_NAMES.values()]
  # The library numbers the "##x" of its alphabet in the order of a hash map
  # with random keys, and breaks ties by these numbers: given by us, in order.
  inner = sorted(
    {f"##{c}" for word in words for c in word[1:] if c in alphabet}
  )
  least = len(specials) + len(alphabet) + len(inner)
  if vocab_size < least:
    raise InputError(
      f"tokenizer.vocab_size={vocab_size} is too small for the characters of"
      f" the training text; at least {least} works"
    )
  model = tokenizers.Tokenizer(models.WordPiece(unk_token=specials[1]))
  model.normalizer = _make_bert_normalizer(lowercase)
  model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  trainer = trainers.WordPieceTrainer(
    vocab_size=vocab_size,
    show_progress=False,
    special_tokens=specials + inner,
    initial_alphabet=sorted(alphabet),
    limit_alphabet=len(alphabet),
  )
  model.train_from_iterator(lines, trainer)
  ids = model.get_vocab()
  if len(ids) < vocab_size:
    raise InputError(
      f"tokenizer.vocab_size={vocab_size} is too large for the training text;"
      f" at most {len(ids)} works, or give it more text"
    )
  return from_wordpiece(
    ids, lowercase=lowercase, settings=settings, where="the trained WordPieces"
  )


def _count_words(lines: Iterable[str], lowercase: bool) -> Counter[str]:
  """Counts words as WordPiece sees them: normalised, cut at punctuation."""
  spaced = Counter(word for line in lines for word in line.split())
  normalizer = _make_bert_normalizer(lowercase)
  pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  words: Counter[str] = Counter()
  for text, count in spaced.items():
    normal = normalizer.normalize_str(text)
    for word, _ in pre_tokenizer.pre_tokenize_str(normal):
      words[word] += count
  return words


def _choose_alphabet(
  words: Mapping[str, int], coverage: float, most: int
) -> set[str]:
  """Returns the characters that cover so much, and others that are common.

  See `common_characters` for `most`; each takes two places in the vocabulary.
  """
  counts: Counter[str] = Counter()
  for word, count in words.items():
    for char in word:
      counts[char] += count
  need = coverage * sum(counts.values())
  alphabet = set(common_characters(counts, most))
  covered = 0
  for char, count in sorted(counts.items(), key=lambda item: (-item[1], item)):
    if covered >= need:
      break
    alphabet.add(char)
    covered += count
  return alphabet
