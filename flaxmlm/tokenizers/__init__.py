"""Text to token ids and back, and training what does it.

`load` reads SentencePiece models, vocab.txt (WordPiece), tokenizer.json and
byte-level BPE; `train` makes SentencePiece models and WordPiece. Both return a
`Tokenizer`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from flaxmlm import InputError
from flaxmlm.storage import bounded
from flaxmlm.tokenizers.flags import SENTENCE_START, WORD_START
from flaxmlm.tokenizers.vocab import (
  Encoded,
  Settings,
  Tokenizer,
  Vocab,
  read_settings,
)

if TYPE_CHECKING:
  from flaxmlm.tokenizers.published import Published

__all__ = [
  "SENTENCE_START",
  "WORD_START",
  "Encoded",
  "Tokenizer",
  "Vocab",
  "has_tokenizer",
  "load",
  "train",
]

WORDS = ("whitespace", "jieba")
_ENDINGS = ("tokenizer.json", ".model", "vocab.json", "vocab.txt")
_FORMS = "*.model, *vocab.txt, tokenizer.json, or vocab.json with merges.txt"


def load(
  path: str, *, lowercase: bool | None = None, words: str | None = None
) -> Tokenizer:
  """Loads a tokenizer.

  What Hugging Face's config.json, tokenizer_config.json,
  special_tokens_map.json and added_tokens.json beside the file say is done, or
  refused by name (see `published`). Special tokens have the names given there,
  else the usual ones ("[MASK]", "<mask>", …). Those that the file lacks get
  ids after its own, so that the vocabulary grows; `Tokenizer.added` names
  them.

  Args:
    path: A SentencePiece `.model`; a `vocab.txt` (any name that ends so) of
      WordPieces, or of byte-level BPE if `merges.txt` is beside it under the
      same prefix; `tokenizer.json`; `vocab.json` with `merges.txt`; or a
      folder with one of these. A folder written by `Tokenizer.save` comes back
      as it was.
    lowercase: True: lower-case all text. None: as saved; for a vocab.txt, as
      the `do_lower_case` of a tokenizer_config.json beside it says, else if
      it has no capital letter; other files do it themselves where they
      should, and False doesn't keep them from it.
    words: What starts a word in the flags, "whitespace" (the tokenizer's own
      marks) or "jieba". None: as saved, else "whitespace".

  Raises:
    InputError: There is no tokenizer there, it can't be read, or the files
      beside it ask for something that we don't have.
  """
  saved = None
  where = path
  if os.path.isdir(path):
    saved = read_settings(path)
    where = saved[0] if saved else _find_in_folder(path)
  settings = saved[1] if saved else Settings()
  if words is not None:
    settings = settings._replace(words=words)
  if settings.words not in WORDS:
    place = f"{path}: " if words is None else ""
    raise InputError(
      f"{place}tokenizer.words={settings.words!r}: wants one of"
      f" {', '.join(WORDS)}"
    )
  if not where.endswith((".json", ".model", "vocab.txt")):
    raise InputError(
      f"tokenizer.path={path}: wants {_FORMS}, or a folder of it"
    )
  data = bounded.read(where)
  if saved is not None:
    as_saved = _build(where, data, None, settings, None)
    if lowercase is None or (lowercase and _lower_cases(as_saved)):
      return as_saved
    return _build(where, data, lowercase, settings, None)
  from flaxmlm.tokenizers import published

  said = published.read(where)
  if said is not None:
    if not where.endswith("tokenizer.json"):
      published.check(said, where)
    settings = settings._replace(specials=said.specials)
  return _build(where, data, lowercase, settings, said)


def _lower_cases(tokenizer: Tokenizer) -> bool:
  """Says whether a tokenizer lower-cases text by itself."""
  text = "ABCDEFGHIJKLMNOPQRSTUVWXYZ ÄÉΣЖ"
  upper, lower = tokenizer.encode_batch([text, text.lower()])
  return upper.ids.tolist() == lower.ids.tolist()


def has_tokenizer(folder: str) -> bool:
  """Says whether there is a file of a tokenizer in a folder."""
  names = os.listdir(folder)
  return any(name.endswith(_ENDINGS) for name in names)


def _find_in_folder(folder: str) -> str:
  """Returns the file of a folder to load.

  tokenizer.json first: where a published folder has it and a SentencePiece
  model, the ids of the two may differ, and its are those of the weights.
  """
  names = sorted(os.listdir(folder))
  for end in _ENDINGS:
    found = [name for name in names if name.endswith(end)]
    if len(found) > 1:
      raise InputError(
        f"tokenizer.path={folder}: has {' and '.join(found)}; name one of them"
      )
    if found:
      return os.path.join(folder, found[0])
  raise InputError(f"tokenizer.path={folder}: no tokenizer; wants {_FORMS}")


def _build(
  where: str,
  data: bytes,
  lowercase: bool | None,
  settings: Settings,
  said: Published | None,
) -> Tokenizer:
  """Returns the tokenizer of a file, with what is said beside it."""
  from flaxmlm.tokenizers import hugging_face, published, sentence_piece

  is_byte_bpe = hugging_face.is_byte_bpe(where)
  tokens = said.tokens if said else ()
  if where.endswith("vocab.txt") and not is_byte_bpe:
    ids = hugging_face.read_vocab_txt(data, where)
    if lowercase is None and said:
      lowercase = said.get_flag("do_lower_case", None)
    if lowercase is None:
      lowercase = hugging_face.looks_lowercase(ids)
    return hugging_face.from_wordpiece(
      ids,
      lowercase=lowercase,
      strip_accents=said.get_flag("strip_accents", None) if said else None,
      split_chinese=not said or said.get_flag("tokenize_chinese_chars", True),
      settings=settings,
      where=where,
      tokens=tokens,
    )
  if lowercase is not None:
    settings = settings._replace(lowercase=lowercase)
  if where.endswith(".model") and said is None:
    return sentence_piece.build(data, settings, where)
  if where.endswith(".model"):
    return published.from_unigram(data, said, settings, where)
  if not is_byte_bpe:
    data = published.adapt(data, said) if said else data
    return hugging_face.from_json(data, settings, where, tokens)
  is_json = where.endswith(".json")
  read = (
    hugging_face.read_vocab_json if is_json else hugging_face.read_vocab_txt
  )
  merges = hugging_face.get_merges_path(where)
  return hugging_face.from_byte_bpe(
    read(data, where),
    bounded.read(merges),
    settings=settings,
    where=where,
    merges_where=merges,
    prefix_space=bool(said and said.get_flag("add_prefix_space", False)),
    tokens=tokens,
  )


def train(
  texts: Iterable[str],
  *,
  kind: str,
  vocab_size: int,
  lowercase: bool = False,
  words: str = "whitespace",
  sample_chars: int = 10_000_000,
  seed: int = 0,
) -> Tokenizer:
  """Trains a tokenizer on a bounded sample of texts.

  The same texts, in the same order, give the same model file, bit for bit.

  Args:
    texts: Documents; read once, as a stream.
    kind: "unigram" or "bpe" (SentencePiece), or "wordpiece".
    vocab_size: Tokens, special ones included.
    lowercase: The tokenizer lower-cases all text (WordPiece: and strips
      accents, as BERT does).
    words: See `load`.
    sample_chars: Characters to train on, at most, drawn evenly.
    seed: Of that draw.

  Raises:
    InputError: A choice is unknown, there is no text, or the vocabulary is
      too large or too small for it.
  """
  from flaxmlm.tokenizers import sampling

  if kind not in ("unigram", "bpe", "wordpiece"):
    raise InputError(
      f"tokenizer.kind={kind!r}: wants one of unigram, bpe, wordpiece"
    )
  if words not in WORDS:
    raise InputError(
      f"tokenizer.words={words!r}: wants one of {', '.join(WORDS)}"
    )
  chunks = sampling.sample(texts, chars=sample_chars, seed=seed)
  lines = [line for chunk in chunks for line in sampling.cut_lines(chunk)]
  if not lines:
    raise InputError("data.source: no text to train a tokenizer on")
  settings = Settings(words=words)
  from flaxmlm.tokenizers import sentence_piece

  if kind == "wordpiece":
    from flaxmlm.tokenizers import hugging_face

    return hugging_face.train_wordpiece(
      lines,
      vocab_size=vocab_size,
      lowercase=lowercase,
      coverage=sentence_piece.CHARACTER_COVERAGE,
      settings=settings,
    )
  model = sentence_piece.train(
    lines, kind=kind, vocab_size=vocab_size, lowercase=lowercase
  )
  return sentence_piece.build(model, settings, "the trained model")
