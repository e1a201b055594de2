"""What a tokenizer is to the rest: its vocabulary's special ids, its output."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol, SupportsIndex, runtime_checkable

import numpy as np

from flaxmlm import InputError
from flaxmlm.storage import bounded, files

# The names that published vocabularies give the special tokens: BERT's,
# RoBERTa's and T5's. The first name is given to one that a file lacks.
SPECIAL_NAMES: dict[str, tuple[str, ...]] = {
  "pad": ("[PAD]", "<pad>"),
  "unk": ("[UNK]", "<unk>"),
  "cls": ("[CLS]", "<s>", "<cls>"),
  "sep": ("[SEP]", "</s>", "<sep>"),
  "mask": ("[MASK]", "<mask>"),
}
SETTINGS_FILE = "flaxmlm_tokenizer.json"


class Vocab(NamedTuple):
  """Size of a vocabulary and the ids of its special tokens.

  The five are found by name, wherever they stand. `others` are further ids
  that never stand for text: control pieces of a loaded file.
  """

  size: int
  pad: int
  unk: int
  cls: int
  sep: int
  mask: int
  others: tuple[int, ...] = ()

  @property
  def specials(self) -> tuple[int, ...]:
    """Ids that are never picked or drawn, ascending: the five and `others`."""
    return tuple(sorted({*self[1:6], *self.others}))


class Encoded(NamedTuple):
  """A text's tokens, without [CLS] and [SEP].

  `ids` is uint32 [T]; `flags` is uint8 [T], of `WORD_START` and
  `SENTENCE_START` (see `flags`).
  """

  ids: np.ndarray
  flags: np.ndarray


@runtime_checkable
class Tokenizer(Protocol):
  """Text to ids and back. Can be pickled; runs on the calling thread only.

  Attributes:
    vocab: Size and special ids.
    added: Names of special tokens that the loaded file lacked and that were
      given ids after the file's own.
    fingerprint: sha256 (hex) over the model file and the settings: equal
      fingerprints, equal ids and flags.
    style: How its tokens show where words are: tokens of two tokenizers of one
      style that have one name are the same.
  """

  vocab: Vocab
  added: tuple[str, ...]
  fingerprint: str
  style: str

  def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
    """Encodes documents; the name of a special token in them is plain text.

    Raises:
      InputError: A text can't be written as UTF-8 (a lone surrogate).
    """

  def encode(self, text: str) -> np.ndarray:
    """Encodes one text in which "[MASK]" stands for the mask id.

    The vocabulary's own name of it ("<mask>") does too. Where the tokenizer
    marks spaces, what follows a mask without one continues its word.

    Returns:
      uint32 [T], without [CLS] and [SEP].

    Raises:
      InputError: As `encode_batch`.
    """

  def decode(self, ids: Iterable[SupportsIndex]) -> str:
    """Returns the text of ids; of the specials only masks and unknowns show.

    Raises:
      InputError: An id is outside the vocabulary.
    """

  def tokens(self, ids: Iterable[SupportsIndex]) -> list[str]:
    """Returns the tokens as the vocabulary writes them: "▁the", "##ing".

    Raises:
      InputError: An id is outside the vocabulary.
    """

  def save(self, folder: str) -> None:
    """Writes a folder that `load` reads; a half-written one is refused."""


class Settings(NamedTuple):
  """What a tokenizer does that its model file doesn't say.

  Attributes:
    lowercase: Text is lower-cased before the model sees it. (False where the
      model does it itself.)
    words: What starts a word in the flags, "whitespace" or "jieba".
    specials: Names of the five special tokens, in the order of
      `SPECIAL_NAMES`; "" (and (), for all) where one of those names is it.
  """

  lowercase: bool = False
  words: str = "whitespace"
  specials: tuple[str, ...] = ()

  def to_record(self) -> dict[str, object]:
    """Returns the settings for JSON; `specials` only where there are some."""
    record = self._asdict()
    if not self.specials:
      del record["specials"]
    return record


def find_specials(
  ids: Mapping[str, int],
  size: int,
  others: Iterable[int] = (),
  specials: Sequence[str] = (),
) -> tuple[Vocab, tuple[str, ...]]:
  """Finds the five special tokens by name, and numbers those that are missing.

  Args:
    ids: Id of each token that may be special.
    size: Ids in use.
    others: See `Vocab.others`.
    specials: See `Settings.specials`.

  Returns:
    The vocabulary, and the names that were appended, in the order of their
    ids, which start at `size`.
  """
  found: dict[str, int] = {}
  added: list[str] = []
  given = specials or [""] * len(SPECIAL_NAMES)
  for (role, usual), own in zip(SPECIAL_NAMES.items(), given, strict=True):
    names = (own,) if own else usual
    name = next((name for name in names if name in ids), None)
    found[role] = size + len(added) if name is None else ids[name]
    if name is None:
      added.append(names[0])
  others = tuple(sorted(set(others) - set(found.values())))
  return Vocab(size + len(added), **found, others=others), tuple(added)


def split_at_masks(text: str, name: str) -> list[str]:
  """Splits text at each "[MASK]", or at `name`, the vocabulary's own."""
  return re.split(f"{re.escape('[MASK]')}|{re.escape(name)}", text)


def check_text(text: str) -> None:
  """Raises InputError for a text that can't be written as UTF-8."""
  try:
    text.encode("utf-16-le")  # the cheapest that sees a lone surrogate
  except UnicodeEncodeError as error:
    raise InputError(
      f"text has a lone surrogate at character {error.start}: not valid"
      " Unicode; repair or drop the document"
    ) from error


def check_ids(ids: Iterable[SupportsIndex], size: int) -> list[int]:
  """Returns ids as a list of ints; raises InputError for one out of range."""
  values = np.asarray(
    ids if isinstance(ids, (np.ndarray, list, tuple)) else list(ids)
  )
  result: list[int] = values.astype(np.int64).reshape(-1).tolist()
  for token in result:
    if not 0 <= token < size:
      raise InputError(f"id {token} is not in the vocabulary of {size} tokens")
  return result


def get_fingerprint(model: bytes, settings: Settings) -> str:
  """Returns the sha256 over a model file and the settings, in hex."""
  text = json.dumps(settings.to_record(), sort_keys=True)
  return hashlib.sha256(_sha256(model).encode() + text.encode()).hexdigest()


def _sha256(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()


def save_files(
  folder: str, name: str, model: bytes, settings: Settings
) -> None:
  """Writes the settings, then the model file, each in one rename.

  The settings hold the model's sha256, so that a folder of which only one
  file was written is not taken for a whole one.
  """
  os.makedirs(folder, exist_ok=True)
  record = {"model": name, "sha256": _sha256(model), **settings.to_record()}
  files = {
    SETTINGS_FILE: (json.dumps(record, indent=2) + "\n").encode(),
    name: model,
  }
  for file_name, data in files.items():
    path = os.path.join(folder, file_name)
    with open(f"{path}.{os.getpid()}.tmp", "wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    os.replace(file.name, path)


def read_settings(folder: str) -> tuple[str, Settings] | None:
  """Reads what `save_files` wrote: the model's path and the settings.

  Returns:
    None where the folder has no settings.

  Raises:
    InputError: The settings are damaged, or the model is not the one that
      was saved with them.
  """
  path = os.path.join(folder, SETTINGS_FILE)
  if not os.path.exists(path):
    return None
  try:
    record = bounded.read_json(path)
    settings = Settings(
      bool(record["lowercase"]),
      str(record["words"]),
      tuple(map(str, record.get("specials", ()))),
    )
    if not files.is_inside(record["model"]):
      raise ValueError(f"names {record['model']!r}")
    model = os.path.join(folder, record["model"])
    digest = record["sha256"]
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise InputError(
      f"{path}: not the settings of a saved tokenizer ({error!r}); save it anew"
    ) from error
  if not os.path.exists(model) or _sha256(bounded.read(model)) != digest:
    raise InputError(
      f"{model}: missing, or not the file that {SETTINGS_FILE} beside it was"
      " saved with; save the tokenizer anew"
    )
  return model, settings
