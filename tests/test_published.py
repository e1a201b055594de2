"""Hugging Face folders without tokenizer.json, against transformers."""

from __future__ import annotations

import functools
import io
import json
import os
import pickle

import pytest
import sentencepiece
import tokenizers as library

from flaxmlm import InputError
from flaxmlm import tokenizers as flax_tokenizers
from flaxmlm.tokenizers.model_proto import ModelProto

DATA = os.environ.get("FLAXMLM_DATA", "../shared/data")
SPM = "sentencepiece.bpe.model"
HARD = [
  "The Data (see also the class) is \"one\". Café x-ray ``quoted'' é",
  "ÜBER naïve Straße e\u0301 \ufb01ne 日本語 中国 １２ \u00a0",
  "a\u3000b\u200bc \u00ad",
  "COVID19 covid19 covid19x in 1998, 2,000",
  "  two  spaces\tand a tab ▁ mark\x00 ",
]


@functools.cache
def corpus() -> tuple[str, ...]:
  """English that every Python has, with accents enough to be learnt."""
  from pydoc_data.topics import topics

  lines = [x for name in sorted(topics)[:20] for x in topics[name].split("\n")]
  return (*filter(str.strip, lines), *["Café naïve ÉTÉ Über straße é"] * 30)


@functools.cache
def lines() -> tuple[str, ...]:
  """What is encoded: every tenth line, hard ones, and real ones if any."""
  real = []
  path = os.path.join(DATA, "c4_mini", "train.jsonl")
  if os.path.exists(path):
    with open(path, encoding="utf-8") as file:
      real = [json.loads(next(file))["text"] for _ in range(30)]
  return (*corpus()[::5], *HARD, *real)


@functools.cache
def unigram(**options) -> bytes:
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(corpus()),
    model_writer=model,
    minloglevel=3,
    **{"vocab_size": 400, **options},
  )
  return model.getvalue()


def albert(**options) -> bytes:
  return unigram(
    pad_id=0,
    unk_id=1,
    bos_id=-1,
    eos_id=-1,
    pad_piece="<pad>",
    control_symbols="[CLS],[SEP],[MASK]",
    **options,
  )


@functools.cache
def wordpieces() -> tuple[str, ...]:
  tokenizer = flax_tokenizers.train(
    [*corpus(), *(line.lower() for line in corpus())],
    kind="wordpiece",
    vocab_size=700,
  )
  return tuple(tokenizer.tokens(range(tokenizer.vocab.size)))


@functools.cache
def byte_bpe() -> library.Tokenizer:
  tokenizer = library.ByteLevelBPETokenizer()
  tokenizer.train_from_iterator(
    corpus(),
    vocab_size=500,
    special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
    show_progress=False,
  )
  return tokenizer


def write(folder, **files) -> str:
  """Writes files; "config" becomes config.json, with the value as JSON."""
  for name, value in files.items():
    (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
  return str(folder)


def write_vocab_txt(folder, tokens=None, **files) -> str:
  text = "".join(f"{token}\n" for token in tokens or wordpieces())
  (folder / "vocab.txt").write_text(text, encoding="utf-8")
  return write(folder, config={"model_type": "bert"}, **files)


def theirs(folder: str):
  transformers = pytest.importorskip("transformers")
  return transformers.AutoTokenizer.from_pretrained(folder)


def check_against_transformers(folder: str):
  """Compares ids of real lines, and V and the ids of the special tokens."""
  other = theirs(folder)
  found = flax_tokenizers.load(folder)
  for line, ours in zip(lines(), found.encode_batch(lines()), strict=True):
    want = other(line, add_special_tokens=False).input_ids
    assert ours.ids.tolist() == want, line
  assert found.vocab.size == len(other)
  for role in ("pad", "unk", "cls", "sep", "mask"):
    want = getattr(other, f"{role}_token_id")
    assert getattr(found.vocab, role) == want, role
  return found


XLMR = {"model_type": "xlm-roberta"}
CAMEMBERT = {"model_type": "camembert"}


@pytest.mark.parametrize("config", [XLMR, CAMEMBERT])
@pytest.mark.parametrize("rule", ["nmt_nfkc", "identity"])
def test_fairseqs_ids(config, rule, tmp_path):
  (tmp_path / SPM).write_bytes(unigram(normalization_rule_name=rule))
  check_against_transformers(write(tmp_path, config=config))


def test_fairseqs_ids_survive_saving(tmp_path):
  (tmp_path / SPM).write_bytes(unigram())
  found = flax_tokenizers.load(write(tmp_path, config=XLMR))
  found.save(str(tmp_path / "saved"))
  saved = flax_tokenizers.load(str(tmp_path / "saved"))
  assert saved.vocab == found.vocab
  assert saved.fingerprint == found.fingerprint
  for a, b in zip(*(t.encode_batch(HARD) for t in (found, saved)), strict=True):
    assert a.ids.tolist() == b.ids.tolist()
    assert a.flags.tolist() == b.flags.tolist()


def test_words_and_masks_of_fairseqs_ids(tmp_path):
  (tmp_path / SPM).write_bytes(unigram())
  found = flax_tokenizers.load(write(tmp_path, config=XLMR))
  encoded = found.encode_batch(["The value of x. Is it one?"])[0]
  marks = [token.startswith("▁") for token in found.tokens(encoded.ids)]
  assert (encoded.flags & flax_tokenizers.WORD_START != 0).tolist() == marks
  masked = found.tokens(found.encode("The [MASK] of x[MASK]s"))
  assert masked == ["▁The", "<mask>", "▁of", "▁", "x", "<mask>", "s"]


@pytest.mark.slow
def test_fill_mask_of_a_folder_without_tokenizer_json(tmp_path):
  transformers = pytest.importorskip("transformers")
  from flaxmlm import load

  config = transformers.XLMRobertaConfig(
    vocab_size=402,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=66,
    pad_token_id=1,
  )
  model = transformers.XLMRobertaForMaskedLM(config).eval()
  model.save_pretrained(tmp_path)
  (tmp_path / SPM).write_bytes(unigram())
  pipe = transformers.pipeline("fill-mask", model=str(tmp_path))
  want = pipe("The value of the <mask> is one")
  got = load(str(tmp_path)).fill_mask("The value of the [MASK] is one")
  assert [g["token"] for g in got] == [w["token"] for w in want]
  assert [g["sequence"] for g in got] == [w["sequence"] for w in want]
  for g, w in zip(got, want, strict=True):
    assert abs(g["score"] - w["score"]) < 1e-8

  config.pad_token_id = 0
  config.save_pretrained(tmp_path)
  with pytest.raises(InputError, match="1 to the tokenizer, 0 to the model"):
    load(str(tmp_path))


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"do_lower_case": True},
    {"do_lower_case": False, "keep_accents": True},
    {"do_lower_case": True, "keep_accents": True, "remove_space": True},
    {"do_lower_case": False, "mask_token": {
      "content": "[MASK]", "lstrip": True, "normalized": False,
      "rstrip": False, "single_word": False, "__type": "AddedToken"}},
  ],
)  # fmt: skip
def test_albert(options, tmp_path):
  (tmp_path / "spiece.model").write_bytes(albert())
  folder = write(
    tmp_path,
    config={"model_type": "albert"},
    tokenizer_config={"tokenizer_class": "AlbertTokenizer", **options},
  )
  check_against_transformers(folder)


def test_albert_with_user_defined_pieces(tmp_path):
  model = albert(user_defined_symbols='(,),",-,.')
  (tmp_path / "spiece.model").write_bytes(model)
  check_against_transformers(write(tmp_path, config={"model_type": "albert"}))


@pytest.mark.parametrize(
  "options",
  [
    {"do_lower_case": True},
    {"do_lower_case": False},
    {"do_lower_case": True, "strip_accents": False},
    {"do_lower_case": True, "strip_accents": None, "never_split": None},
    {"do_lower_case": False, "strip_accents": True},
    {"do_lower_case": True, "tokenize_chinese_chars": False},
    {"do_lower_case": True, "tokenizer_class": "BertTokenizerFast"},
    {"do_lower_case": False, "tokenizer_class": "DistilBertTokenizer"},
    {"do_lower_case": True, "tokenizer_class": "ElectraTokenizer"},
  ],
)
def test_wordpiece(options, tmp_path):
  check_against_transformers(
    write_vocab_txt(tmp_path, tokenizer_config=options)
  )


def test_distilbert_by_its_model_type(tmp_path):
  write_vocab_txt(tmp_path, tokenizer_config={"do_lower_case": False})
  write(tmp_path, config={"model_type": "distilbert"})
  check_against_transformers(str(tmp_path))


@pytest.mark.parametrize("options", [{}, {"add_prefix_space": True}])
def test_roberta(options, tmp_path):
  byte_bpe().save_model(str(tmp_path))
  folder = write(
    tmp_path, config={"model_type": "roberta"}, tokenizer_config=options
  )
  check_against_transformers(folder)


def test_tokenizer_json_as_modernbert_has_it(tmp_path):
  names = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
  }
  model = library.Tokenizer.from_str(byte_bpe().to_str())
  model.add_tokens(["  ", "covid19"])
  model.add_special_tokens(["<|endoftext|>", *names.values()])
  model.save(str(tmp_path / "tokenizer.json"))
  folder = write(
    tmp_path,
    config={"model_type": "modernbert"},
    tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", **names},
  )
  found = check_against_transformers(folder)
  assert found.added == ()


@pytest.mark.parametrize(
  "options",
  [
    {"do_lower_case": False},
    {"do_lower_case": True, "strip_accents": False},
    {"do_lower_case": True, "tokenize_chinese_chars": False},
  ],
)
def test_tokenizer_config_goes_before_berts_tokenizer_json(options, tmp_path):
  plain = tmp_path / "plain"
  plain.mkdir()
  write_vocab_txt(plain)
  flax_tokenizers.load(str(plain), lowercase=True).save(str(tmp_path))
  (tmp_path / flax_tokenizers.vocab.SETTINGS_FILE).unlink()
  folder = write(
    tmp_path, config={"model_type": "bert"}, tokenizer_config=options
  )
  check_against_transformers(folder)


# Special and added tokens.


def test_added_tokens_keep_their_ids(tmp_path):
  size = len(wordpieces())
  folder = write_vocab_txt(
    tmp_path,
    tokenizer_config={"do_lower_case": True},
    added_tokens={"[ENT]": size + 1, "covid19": size},
    special_tokens_map={"additional_special_tokens": ["[ENT]"]},
  )
  found = check_against_transformers(folder)
  assert found.encode("covid19").tolist() == [size]
  assert size + 1 in found.vocab.others


@pytest.mark.parametrize("normalized", [True, False])
def test_tokens_that_tokenizer_config_lists(normalized, tmp_path):
  size = len(wordpieces())
  token = {
    "content": "COVID19",
    "lstrip": False,
    "rstrip": False,
    "single_word": True,
    "normalized": normalized,
    "special": False,
  }
  folder = write_vocab_txt(
    tmp_path,
    tokenizer_config={
      "do_lower_case": True,
      "added_tokens_decoder": {str(size): token},
    },
  )
  found = check_against_transformers(folder)
  assert found.encode("COVID19").tolist() == [size]


def test_added_tokens_of_a_sentencepiece_model(tmp_path):
  (tmp_path / SPM).write_bytes(unigram())
  folder = write(tmp_path, config=XLMR, added_tokens={"covid19": 402})
  found = check_against_transformers(folder)
  assert 402 in found.encode("no covid19")


def rename(tokens: tuple[str, ...], names: dict[str, str]) -> list[str]:
  return [names.get(token, token) for token in tokens]


@pytest.mark.parametrize("file", ["special_tokens_map", "tokenizer_config"])
def test_other_names_of_special_tokens(file, tmp_path):
  names = {"[MASK]": "<blank>", "[CLS]": "<begin>", "[PAD]": "<fill>"}
  said = {
    "mask_token": "<blank>",
    "cls_token": {"content": "<begin>", "lstrip": False},
    "pad_token": "<fill>",
  }
  options = {"do_lower_case": True} | (said if file[0] == "t" else {})
  folder = write_vocab_txt(
    tmp_path, rename(wordpieces(), names), tokenizer_config=options
  )
  if file[0] == "t":
    options["cls_token"]["__type"] = "AddedToken"
    write(tmp_path, tokenizer_config=options)
  else:
    write(tmp_path, special_tokens_map=said)
  found = check_against_transformers(folder)
  assert found.added == ()
  assert found.encode("<blank>").tolist() == [found.vocab.mask]


def test_other_names_survive_saving_and_pickling(tmp_path):
  names = {"[MASK]": "<blank>"}
  folder = write_vocab_txt(
    tmp_path,
    rename(wordpieces(), names),
    special_tokens_map={"mask_token": "<blank>"},
  )
  found = flax_tokenizers.load(folder)
  found.save(str(tmp_path / "saved"))
  saved = flax_tokenizers.load(str(tmp_path / "saved"))
  sent = pickle.loads(pickle.dumps(found))
  assert saved.fingerprint == sent.fingerprint == found.fingerprint
  assert saved.vocab == sent.vocab == found.vocab
  assert found.vocab.mask == wordpieces().index("[MASK]")


def test_other_names_in_tokenizer_json(tmp_path):
  model = library.Tokenizer.from_str(byte_bpe().to_str())
  model.add_special_tokens(["<|mask|>", "<|pad|>"])
  model.save(str(tmp_path / "tokenizer.json"))
  folder = write(
    tmp_path,
    tokenizer_config={
      "tokenizer_class": "PreTrainedTokenizerFast",
      "mask_token": "<|mask|>",
      "pad_token": "<|pad|>",
      "unk_token": "<unk>",
      "cls_token": "<s>",
      "sep_token": "</s>",
    },
  )
  write(tmp_path, config={"model_type": "modernbert"})
  found = check_against_transformers(folder)
  assert found.added == ()


def test_a_special_token_that_the_vocabulary_lacks(tmp_path):
  tokens = [t for t in wordpieces() if t != "[MASK]"]
  folder = write_vocab_txt(tmp_path, tokens, added_tokens={"covid19": 699})
  write(tmp_path, tokenizer_config={"do_lower_case": True})
  found = check_against_transformers(folder)
  assert found.added == ("[MASK]",)
  assert found.vocab.mask == 700


# What isn't understood is refused.


def refuse(folder, match: str) -> None:
  with pytest.raises(InputError, match=match) as caught:
    flax_tokenizers.load(str(folder))
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("never_split", ["covid"]),
    ("do_basic_tokenize", False),
    ("clean_text", False),
    ("wordpieces_prefix", "@@"),
    ("do_lower_case", "yes"),
    ("strip_accents", 1),
  ],
)
def test_settings_of_wordpiece_are_refused_by_name(key, value, tmp_path):
  write_vocab_txt(tmp_path, tokenizer_config={key: value})
  refuse(tmp_path, f"tokenizer_config.json: {key}=")


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("remove_space", False),
    ("sp_model_kwargs", {"enable_sampling": True}),
    ("add_prefix_space", False),
    ("keep_accents", "no"),
  ],
)
def test_settings_of_sentencepiece_are_refused_by_name(key, value, tmp_path):
  (tmp_path / "spiece.model").write_bytes(albert())
  write(
    tmp_path,
    config={"model_type": "albert"},
    tokenizer_config={key: value},
  )
  refuse(tmp_path, f"tokenizer_config.json: {key}=")


def test_classes_that_we_do_not_know_are_refused(tmp_path):
  write_vocab_txt(
    tmp_path, tokenizer_config={"tokenizer_class": "BertJapaneseTokenizer"}
  )
  refuse(tmp_path, "tokenizer_config.json says BertJapaneseTokenizer, and voc")
  (tmp_path / "vocab.txt").unlink()
  (tmp_path / "tokenizer_config.json").unlink()
  (tmp_path / SPM).write_bytes(unigram())
  refuse(tmp_path, "config.json says BertTokenizer, and sentencepiece.bpe")
  write(tmp_path, config={"model_type": "mbart"})
  refuse(tmp_path, "config.json says mbart, and sentencepiece.bpe.model")
  write(tmp_path, config={}, added_tokens={"x": 400})
  refuse(tmp_path, "names no class")


def test_a_model_file_on_its_own_keeps_its_ids(tmp_path):
  (tmp_path / SPM).write_bytes(unigram())
  write(tmp_path, config={"width": 64})
  model = sentencepiece.SentencePieceProcessor(model_proto=unigram())
  found = flax_tokenizers.load(str(tmp_path / SPM))
  ids = [encoded.ids.tolist() for encoded in found.encode_batch(lines())]
  assert ids == model.encode(list(lines()))


@pytest.mark.parametrize(
  ("part", "key", "value", "match"),
  [
    ("trainer_spec", "model_type", 2, "not a unigram model"),
    ("normalizer_spec", "add_dummy_prefix", False, "white space unusually"),
    (9, "type", 5, "has unused pieces"),
    (1, "type", 1, "special pieces are not where XLMRobertaTokenizer"),
    (9, "piece", "<mask>", "special pieces are not where XLMRobertaTokenizer"),
  ],
)
def test_models_of_another_kind_are_refused(part, key, value, match, tmp_path):
  model = ModelProto.FromString(unigram())
  setattr(
    model.pieces[part] if isinstance(part, int) else getattr(model, part),
    key,
    value,
  )
  (tmp_path / SPM).write_bytes(model.SerializeToString())
  write(tmp_path, config=XLMR)
  refuse(tmp_path, match)


def test_bytes_in_place_of_unknown_characters_are_refused(tmp_path):
  model = unigram(byte_fallback=True, vocab_size=600)
  (tmp_path / SPM).write_bytes(model)
  write(tmp_path, config=XLMR)
  refuse(tmp_path, "falls back to bytes")


def test_ids_that_do_not_follow_are_refused(tmp_path):
  size = len(wordpieces())
  write_vocab_txt(tmp_path, added_tokens={"covid19": size + 5})
  refuse(tmp_path, f"'covid19' is to have the id {size + 5}, but is {size}")


@pytest.mark.parametrize(
  ("file", "value", "match"),
  [
    ("tokenizer_config", [1], "tokenizer_config.json: not a JSON object"),
    ("special_tokens_map", {"mask_token": 3}, "can't be read"),
    ("added_tokens", {"x": "a"}, "can't be read"),
    ("tokenizer_config", {"added_tokens_decoder": {"9": 1}}, "can't be read"),
  ],
)
def test_broken_files_are_refused(file, value, match, tmp_path):
  write_vocab_txt(tmp_path, **{file: value})
  refuse(tmp_path, match)
