"""A tokenizer as a tokenizer.json, as `tokenizers` and transformers read it."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import normalizers

from flaxmlm import InputError
from flaxmlm.tokenizers.hugging_face import HuggingFace
from flaxmlm.tokenizers.model_proto import ModelProto, TrainerSpec
from flaxmlm.tokenizers.sentence_piece import SentencePiece
from flaxmlm.tokenizers.vocab import Tokenizer

_UNIGRAM, _BPE = TrainerSpec.UNIGRAM, TrainerSpec.BPE
_NORMAL = ModelProto.SentencePiece.NORMAL
_USER_DEFINED = ModelProto.SentencePiece.USER_DEFINED
_UNUSED = ModelProto.SentencePiece.UNUSED

Json = dict[str, Any]


def to_json(tokenizer: Tokenizer) -> bytes:
  """Returns the contents of a tokenizer.json that does what a tokenizer does.

  It puts [CLS] and [SEP] around a text, and [SEP] after the second text of a
  pair. Names of special tokens in a text are read as these, as is usual there:
  [MASK], which `encode` reads so too, and the others.

  Raises:
    InputError: It is a SentencePiece model with something that tokenizer.json
      has no words for.
  """
  if isinstance(tokenizer, SentencePiece):
    spec = _from_sentence_piece(tokenizer)
  else:
    spec = _from_hugging_face(tokenizer)
  return json.dumps(spec, ensure_ascii=False, indent=2).encode() + b"\n"


def compare(
  tokenizer: Tokenizer, data: bytes, lines: Iterable[str]
) -> Iterator[str]:
  """Yields what differs, for each line whose ids do.

  Args:
    tokenizer: One of ours.
    data: What `to_json` made of it.
    lines: Texts in which only [MASK] is the name of a special token.
  """
  other = tokenizers.Tokenizer.from_buffer(data)
  vocab = tokenizer.vocab
  mask = tokenizer.tokens([vocab.mask])[0]
  for number, line in enumerate(lines, 1):
    line = line.replace("[MASK]", mask)
    ours = [vocab.cls, *tokenizer.encode(line).tolist(), vocab.sep]
    theirs = other.encode(line).ids
    if ours == theirs:
      continue
    same = len(os.path.commonprefix([ours, theirs]))
    a, b = ours[same : same + 4], theirs[same : same + 4]
    shown = line if len(line) <= 80 else f"{line[:80]}…"
    yield (
      f"line {number}, {shown!r}: from token {same} on {a}"
      f" ({' '.join(tokenizer.tokens(a))}) here, {b}"
      f" ({' '.join(tokenizer.tokens(b))}) in tokenizer.json"
    )


def _from_hugging_face(tokenizer: HuggingFace) -> Json:
  spec = json.loads(tokenizer.data)
  vocab = tokenizer.vocab
  spec |= {"truncation": None, "padding": None}
  own = tokenizers.Tokenizer.from_buffer(tokenizer.data)
  own.no_truncation()
  if own.encode("").ids != [vocab.cls, vocab.sep]:
    spec["post_processor"] = _template(tokenizer)
  if tokenizer.settings.lowercase:
    own = [spec["normalizer"]] if spec["normalizer"] else []
    spec["normalizer"] = _normalizers([*_lowercase(), *own])
  old = {t["id"]: t for t in spec["added_tokens"]}
  new = {t["id"]: t for t in _added_tokens(tokenizer, lstrip=True)}
  spec["added_tokens"] = [t for _, t in sorted((old | new).items())]
  return spec


def _from_sentence_piece(tokenizer: SentencePiece) -> Json:
  data = tokenizer.model.serialized_model_proto()
  proto = ModelProto.FromString(data)
  pieces, trainer = proto.pieces, proto.trainer_spec
  normalizer, kind = proto.normalizer_spec, trainer.model_type
  for wrong, what in (
    (kind not in (_UNIGRAM, _BPE), "is neither unigram nor BPE"),
    (trainer.treat_whitespace_as_suffix, "has its spaces behind the words"),
    (not normalizer.escape_whitespaces, "doesn't escape white space"),
    (any(p.type == _UNUSED for p in pieces), "has unused pieces"),
  ):
    if wrong:
      raise InputError(
        f"the SentencePiece model {what}, for which tokenizer.json has no words"
      )
  dummy_prefix = normalizer.add_dummy_prefix
  remove_extra = normalizer.remove_extra_whitespaces
  fallback = trainer.byte_fallback
  special = set(tokenizer.vocab.specials)
  defined = [
    piece.piece
    for i, piece in enumerate(pieces)
    if piece.type == _USER_DEFINED and i not in special and kind == _BPE
  ]

  normal = _lowercase() if tokenizer.settings.lowercase else []
  if normalizer.precompiled_charsmap:
    normal += _charsmap(normalizer.precompiled_charsmap)
  if remove_extra:
    # What stands before a mask is normalised by itself, so the space between
    # goes too. The space behind a mask stays: a new word begins there.
    normal += [_replace(" {2,}", " "), _replace(r"[ ▁]+\z", "")]
    normal += [] if dummy_prefix else [_replace(r"\A +", "")]
  else:
    normal.append(_replace(" ", "▁"))
  # The first puts a space before a text that has none, and only a Metaspace
  # knows where a text begins; one for "▁" alone would take a "▁" of the text
  # for its own.
  steps = [_metaspace(" ", "first", split=False)] if dummy_prefix else []
  steps.append(_metaspace("▁", "never", split=tokenizer.whole != ("",)))
  if defined:
    defined.sort(key=len, reverse=True)
    pattern = "|".join(map(re.escape, defined))
    steps.append(
      {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
      }
    )
  unk = tokenizer.model.unk_id()
  model = _unigram(pieces, unk) if kind == _UNIGRAM else _bpe(pieces, unk)
  bytes_first = [{"type": "ByteFallback"}, {"type": "Fuse"}] if fallback else []
  strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
  return {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": _added_tokens(tokenizer, lstrip=False),
    "normalizer": _normalizers(normal),
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
    "post_processor": _template(tokenizer),
    "decoder": {
      "type": "Sequence",
      "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        *(bytes_first or [{"type": "Fuse"}]),
        strip,
      ],
    },
    "model": model | {"byte_fallback": fallback},
  }


def _unigram(pieces: Sequence[ModelProto.SentencePiece], unk: int) -> Json:
  """Returns the model; a user-defined piece costs less than its bytes would.

  The formula is SentencePiece's (unigram_model.cc, EncodeOptimized).
  """
  most = max(p.score for p in pieces if p.type == _NORMAL)
  return {
    "type": "Unigram",
    "unk_id": unk,
    "vocab": [
      [
        p.piece,
        len(p.piece.encode()) * most - 0.1
        if p.type == _USER_DEFINED
        else p.score,
      ]
      for p in pieces
    ],
  }


def _bpe(pieces: Sequence[ModelProto.SentencePiece], unk: int) -> Json:
  """Returns the model with its merges.

  SentencePiece has none: it merges the neighbours that make the piece with the
  highest score. So every two pieces that make a third may merge.
  """
  scores = {p.piece: p.score for p in pieces if p.type == _NORMAL}
  merges = [
    (name[:cut], name[cut:])
    for name in sorted(scores, key=lambda name: -scores[name])
    for cut in range(1, len(name))
    if name[:cut] in scores and name[cut:] in scores
  ]
  return {
    "type": "BPE",
    "dropout": None,
    "unk_token": pieces[unk].piece,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": True,
    # A user-defined piece is one token, though nothing merges into it.
    "ignore_merges": any(p.type == _USER_DEFINED for p in pieces),
    "vocab": {p.piece: i for i, p in enumerate(pieces)},
    "merges": merges,
  }


def _charsmap(blob: bytes) -> list[Json]:
  """Returns normalizers that do what a model's map of characters does.

  "Precompiled" reads the map itself, but drops what follows a mapped character
  in its grapheme (the accent of a capital letter, say): where the map has
  single characters only, it is written in other words.
  """
  if not blob:
    return []
  changes = read_charsmap(blob)
  encoded = base64.b64encode(blob).decode()
  precompiled = [{"type": "Precompiled", "precompiled_charsmap": encoded}]
  lower = normalizers.Lowercase()
  rest = {old: new for old, new in changes.items() if new not in (" ", "")}
  if any(len(old) > 1 for old in changes) or any(
    lower.normalize_str(old) != new for old, new in rest.items()
  ):
    return precompiled
  result = []
  for new in (" ", ""):
    some = [old for old in changes if changes[old] == new]
    if some:
      result.append(_replace(f"[{re.escape(''.join(some))}]", new))
  return [*result, {"type": "Lowercase"}] if rest else result


def read_charsmap(blob: bytes) -> Mapping[str, str]:
  """Returns what a SentencePiece model turns into what, by normalisation.

  The map is a double array (Aoe 1989), as darts-clone writes it, of the
  UTF-8 of the keys, with its size before it; behind it are the values, each
  with a zero byte at its end.
  """
  size = int.from_bytes(blob[:4], "little")
  units = np.frombuffer(blob[4 : 4 + size], "<u4").astype(np.int64)
  texts = blob[4 + size :]
  labels = np.arange(1, 256)

  def children(place: int) -> int:
    unit = int(units[place])
    return place ^ ((unit >> 10) << ((unit & 0x200) >> 6))

  result = {}
  todo = [(b"", children(0))]
  while todo:
    key, base = todo.pop()
    places = np.minimum(base ^ labels, len(units) - 1)
    found = labels[(units[places] & 0x800000FF) == labels]
    for label in found.tolist():
      place, longer = base ^ label, key + bytes([label])
      if units[place] & 0x100:
        begin = int(units[children(place)]) & 0x7FFFFFFF
        text = texts[begin : texts.index(b"\0", begin)]
        result[longer.decode()] = text.decode()
      todo.append((longer, children(place)))
  return result


def _added_tokens(tokenizer: Tokenizer, *, lstrip: bool) -> list[Json]:
  """Returns the special tokens; the mask takes the space before it."""
  specials = tokenizer.vocab.specials
  return [
    {
      "id": i,
      "content": name,
      "single_word": False,
      "lstrip": lstrip and i == tokenizer.vocab.mask,
      "rstrip": False,
      "normalized": False,
      "special": True,
    }
    for i, name in zip(specials, tokenizer.tokens(specials), strict=True)
  ]


def _template(tokenizer: Tokenizer) -> Json:
  """Returns what puts [CLS] and [SEP] around texts."""
  ids = tokenizer.vocab.cls, tokenizer.vocab.sep
  cls, sep = tokenizer.tokens(ids)

  def special(name: str, kind: int = 0) -> Json:
    return {"SpecialToken": {"id": name, "type_id": kind}}

  single = [
    special(cls),
    {"Sequence": {"id": "A", "type_id": 0}},
    special(sep),
  ]
  second = [{"Sequence": {"id": "B", "type_id": 1}}, special(sep, 1)]
  return {
    "type": "TemplateProcessing",
    "single": single,
    "pair": [*single, *second],
    "special_tokens": {
      name: {"id": name, "ids": [i], "tokens": [name]}
      for name, i in zip((cls, sep), ids, strict=True)
    },
  }


def _lowercase() -> list[Json]:
  """Returns Python's `str.lower`, which has a sigma of its own at word ends."""
  cased = r"\p{Lu}\p{Ll}\p{Lt}"
  between = r"['.:’·\p{M}]"
  final = rf"(?<=[{cased}]|[{cased}]{between})Σ(?!{between}*[{cased}])"
  return [_replace(final, "ς"), {"type": "Lowercase"}]


def _normalizers(steps: list[Json]) -> Json | None:
  return {"type": "Sequence", "normalizers": steps} if steps else None


def _replace(pattern: str, content: str) -> Json:
  return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def _metaspace(replacement: str, scheme: str, *, split: bool) -> Json:
  return {
    "type": "Metaspace",
    "replacement": replacement,
    "prepend_scheme": scheme,
    "split": split,
  }
