"""What a published folder says of its tokenizer beside the vocabulary.

Hugging Face's older ("slow") tokenizers are a vocabulary and the name of a
class of transformers that knows the rest: how text is normalised, which ids
the special tokens have. The classes that we know are in `CLASSES`; their ids
are those of transformers 5.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from flaxmlm import InputError
from flaxmlm.storage import bounded
from flaxmlm.tokenizers import hugging_face, sentence_piece
from flaxmlm.tokenizers.hugging_face import HuggingFace, Token
from flaxmlm.tokenizers.model_proto import ModelProto
from flaxmlm.tokenizers.vocab import SPECIAL_NAMES, Settings

_BRACKETS = {role: names[0] for role, names in SPECIAL_NAMES.items()}
_ANGLES = {
  "bos": "<s>",
  "eos": "</s>",
  "unk": "<unk>",
  "sep": "</s>",
  "pad": "<pad>",
  "cls": "<s>",
  "mask": "<mask>",
}
_ALBERT = _BRACKETS | {
  "bos": "[CLS]",
  "eos": "[SEP]",
  "unk": "<unk>",
  "pad": "<pad>",
}

# transformers' classes, and the names that their special tokens have where the
# folder gives no other.
_WORDPIECE = {
  "BertTokenizer": _BRACKETS,
  "DistilBertTokenizer": _BRACKETS,
  "ElectraTokenizer": _BRACKETS,
}
_BYTE_BPE: dict[str, dict[str, str]] = {
  "RobertaTokenizer": _ANGLES,
  "GPT2Tokenizer": {},
}
_UNIGRAM = {
  "XLMRobertaTokenizer": _ANGLES,
  "CamembertTokenizer": _ANGLES,
  "AlbertTokenizer": _ALBERT,
}
CLASSES = _WORDPIECE | _BYTE_BPE | _UNIGRAM
_OF_MODEL = {
  "bert": "BertTokenizer",
  "distilbert": "BertTokenizer",
  "electra": "BertTokenizer",
  "roberta": "RobertaTokenizer",
  "gpt2": "GPT2Tokenizer",
  "xlm-roberta": "XLMRobertaTokenizer",
  "camembert": "CamembertTokenizer",
  "albert": "AlbertTokenizer",
}

# In the order in which transformers appends those that a vocabulary lacks.
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# Settings that some versions of transformers take and others drop, and what
# they may be.
_ONLY = {
  "never_split": (None, []),
  "do_basic_tokenize": (None, True),
  "clean_text": (None, True),
  "wordpieces_prefix": (None, "##"),
  "remove_space": (None, True),
  "sp_model_kwargs": (None, {}),
}
_ADVICE = (
  "save the folder's tokenizer as a tokenizer.json:"
  " transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
)
_UNIGRAM_TYPE = 1  # of sentencepiece_model.proto's ModelType
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5  # of its Piece.Type


class Published(NamedTuple):
  """What is said of a tokenizer.

  Attributes:
    kind: The class of transformers, without "Fast"; "" if none is named.
    where: The file that names it.
    config: The path of tokenizer_config.json.
    options: Its keys.
    tokens: Tokens that transformers adds to the vocabulary.
    specials: See `Settings.specials`.
  """

  kind: str
  where: str
  config: str
  options: Mapping[str, Any]
  tokens: tuple[Token, ...]
  specials: tuple[str, ...]

  def get_flag(self, key: str, default: bool | None) -> bool | None:
    """Returns a setting of tokenizer_config.json; null is `default`."""
    value = self.options.get(key)
    if not isinstance(value, (bool, type(None))):
      raise InputError(
        f"{self.config}: {key}={value!r}; wants true, false or null"
      )
    return default if value is None else value


def read(where: str) -> Published | None:
  """Reads what config.json and tokenizer_config.json beside a file say.

  And special_tokens_map.json and added_tokens.json.
  As transformers does: special_tokens_map.json has the last word on names,
  unless tokenizer_config.json lists all tokens in `added_tokens_decoder`.

  Returns:
    None where the folder has none of them, or a config.json alone that is no
    model's.

  Raises:
    InputError: A file can't be read.
  """
  folder = os.path.dirname(where)
  config = _read_object(folder, "config.json") or {}
  options = _read_object(folder, "tokenizer_config.json")
  names = _read_object(folder, "special_tokens_map.json")
  added = _read_object(folder, "added_tokens.json")
  model_type, source = str(config.get("model_type") or ""), "config.json"
  kind = config.get("tokenizer_class") or _OF_MODEL.get(model_type, model_type)
  if options and options.get("tokenizer_class"):
    kind, source = options["tokenizer_class"], "tokenizer_config.json"
  if options is None and names is None and added is None and not kind:
    return None
  kind = str(kind or "").removesuffix("Fast")
  options = options or {}
  # A tokenizer.json may call them otherwise than its class does.
  usual = {} if where.endswith("tokenizer.json") else CLASSES.get(kind, {})
  try:
    tokens, specials = _combine(usual, options, names or {}, added or {})
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise InputError(
      f"{folder}: special or added tokens can't be read: {error!r}"
    ) from error
  return Published(
    kind=kind,
    where=os.path.join(folder, source),
    config=os.path.join(folder, "tokenizer_config.json"),
    options=options,
    tokens=tokens,
    specials=specials,
  )


def _combine(
  usual: Mapping[str, str],
  options: Mapping[str, Any],
  names: Mapping[str, Any],
  added: Mapping[str, Any],
) -> tuple[tuple[Token, ...], tuple[str, ...]]:
  """Returns the tokens that are to be added, and `Settings.specials`."""
  listed = options.get("added_tokens_decoder")
  said = dict(options) if listed else {**options, **names}
  found = {
    role: said.get(f"{role}_token") or usual.get(role) for role in _ROLES
  }
  special = {role: _read_token(t) for role, t in found.items() if t}
  extra = said.get("extra_special_tokens")
  extra = extra or said.get("additional_special_tokens") or ()
  if isinstance(extra, dict):
    extra = extra.values()
  rest = [*special.values(), *map(_read_token, extra)]
  marked = {token.content for token in rest}
  by_id = {
    int(i): _read_token(t, t["content"] in marked)
    for i, t in (listed or {}).items()
  } or {
    int(i): _read_token(
      {"content": name, "normalized": name not in marked}, name in marked
    )
    for name, i in added.items()
  }
  tokens = {t.content: Token(i, t) for i, t in sorted(by_id.items())}
  for token in rest:
    tokens.setdefault(token.content, Token(None, token))
  specials = (
    special[role].content if role in special else "" for role in SPECIAL_NAMES
  )
  return tuple(tokens.values()), tuple(specials)


def _read_object(folder: str, name: str) -> dict[str, Any] | None:
  path = os.path.join(folder, name)
  return bounded.read_object(path) if os.path.exists(path) else None


def _read_token(
  value: str | Mapping[str, Any], special: bool = True
) -> tokenizers.AddedToken:
  """Returns a token that is a name or an object of its properties."""
  if isinstance(value, str):
    value = {"content": value}
  special = bool(special or value.get("special"))
  return tokenizers.AddedToken(
    value["content"],
    single_word=bool(value.get("single_word", False)),
    lstrip=bool(value.get("lstrip", False)),
    rstrip=bool(value.get("rstrip", False)),
    normalized=bool(value.get("normalized", not special)),
    special=special,
  )


def check(published: Published, where: str) -> None:
  """Raises InputError unless we know what a vocabulary file means here.

  Args:
    published: What is said beside it.
    where: The file: a vocab.txt, a vocab.json or a `.model`.
  """
  if where.endswith(".model"):
    known, only = _UNIGRAM, _ONLY | {"add_prefix_space": (None, True)}
  elif hugging_face.is_byte_bpe(where):
    known, only = _BYTE_BPE, _ONLY
  else:
    known, only = _WORDPIECE, _ONLY
  named = published.kind or known is _UNIGRAM
  if named and published.kind not in known:
    what = f"says {published.kind}" if published.kind else "names no class"
    raise InputError(
      f"{published.where} {what}, and {os.path.basename(where)} is understood"
      f" for {', '.join(known)}; {_ADVICE}; or copy the file into a folder of"
      " its own, to use it with its own ids"
    )
  for key, allowed in only.items():
    value = published.options.get(key)
    if value not in allowed:
      raise InputError(
        f"{published.config}: {key}={value!r} is not supported; {_ADVICE}"
      )


def adapt(data: bytes, published: Published) -> bytes:
  """Returns a tokenizer.json with the settings of tokenizer_config.json.

  BERT's classes of transformers let it go before the file, where it has one of
  these settings; for others the file says it all.
  """
  keys = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
  if published.kind not in _WORDPIECE or not published.options.keys() & {*keys}:
    return data
  try:
    spec = bounded.parse_json(data)
    normalizer = spec["normalizer"]
    if normalizer["type"] != "BertNormalizer":
      return data
  except (ValueError, TypeError, KeyError):
    return data  # not BERT's; from_json says what is wrong
  lowercase, strip_accents, split_chinese = keys
  normalizer |= {
    "lowercase": published.get_flag(lowercase, True),
    "strip_accents": published.get_flag(strip_accents, None),
    "handle_chinese_chars": published.get_flag(split_chinese, True),
  }
  return json.dumps(spec).encode()


def from_unigram(
  data: bytes, published: Published, settings: Settings, where: str
) -> HuggingFace:
  """Returns the tokenizer of a SentencePiece model, with its class's ids.

  XLM-R and CamemBERT have fairseq's (Ott et al. 2019): its own special tokens
  stand before the pieces, and the mask behind them.

  Args:
    data: Contents of the model file.
    published: What is said beside it; its class is one of a `.model`.
    settings: See `Settings`.
    where: The file's name, for errors.

  Raises:
    InputError: It is not a SentencePiece model, or not one of its class.
  """
  proto = _read_model(data, where)
  kind = published.kind
  pieces = [(piece.piece, piece.score) for piece in proto.pieces]
  types = [piece.type for piece in proto.pieces]
  pad, unk, cls, sep, mask = published.specials
  if kind == "AlbertTokenizer":
    unknown, fits = 1, types[1:2] == [_UNKNOWN]
  elif kind == "CamembertTokenizer":
    unknown, fits = 3, types[:1] == [_UNKNOWN]
    first = [("<s>NOTUSED", 0.0), (pad, 0.0), ("</s>NOTUSED", 0.0), (unk, 0.0)]
    first.append(("<unk>NOTUSED", -100.0))
    pieces = [*first, *pieces[1:], (mask, 0.0)]
  else:
    unknown, fits = 3, types[:3] == [_UNKNOWN, _CONTROL, _CONTROL]
    first = [(cls, 0.0), (pad, 0.0), (sep, 0.0), (unk, 0.0)]
    pieces = [*first, *pieces[3:], (mask, 0.0)]
  if not fits or len({name for name, _ in pieces}) < len(pieces):
    raise InputError(
      f"{where}: its special pieces are not where {kind} has them"
      f" ({published.where}); {_ADVICE}"
    )

  steps = list(_get_steps(published))
  if proto.normalizer_spec.precompiled_charsmap:
    charsmap = proto.normalizer_spec.precompiled_charsmap
    steps.append(normalizers.Precompiled(charsmap))
  model = tokenizers.Tokenizer(models.Unigram(pieces, unknown, False))
  if steps:
    model.normalizer = normalizers.Sequence(steps)
  model.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
  )
  model.decoder = decoders.Metaspace()
  own = tuple(
    Token(
      None,
      tokenizers.AddedToken(
        piece.piece, normalized=False, special=piece.type == _CONTROL
      ),
    )
    for piece in proto.pieces
    if piece.type in (_CONTROL, _USER_DEFINED)
  )
  tokens = published.tokens + own
  return hugging_face.wrap(model, settings, where, tokens)


def _get_steps(published: Published) -> Iterator[normalizers.Normalizer]:
  if published.kind != "AlbertTokenizer":
    return
  yield normalizers.Replace("``", '"')
  yield normalizers.Replace("''", '"')
  if not published.get_flag("keep_accents", False):
    yield normalizers.NFKD()
    yield normalizers.StripAccents()
  if published.get_flag("do_lower_case", True):
    yield normalizers.Lowercase()


def _read_model(data: bytes, where: str):
  """Returns a SentencePiece model's ModelProto, if it works as usual."""
  processor = sentence_piece.read(data, where)
  proto = ModelProto.FromString(data)
  for wrong, what in (
    (proto.trainer_spec.model_type != _UNIGRAM_TYPE, "is not a unigram model"),
    (proto.trainer_spec.byte_fallback, "falls back to bytes"),
    (any(p.type == _UNUSED for p in proto.pieces), "has unused pieces"),
    (processor.normalize("  a  b ") != "▁a▁b", "treats white space unusually"),
  ):
    if wrong:
      raise InputError(
        f"{where}: {what}, which transformers doesn't read as SentencePiece"
        f" does; {_ADVICE}"
      )
  return proto
