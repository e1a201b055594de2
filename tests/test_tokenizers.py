from __future__ import annotations

import functools
import itertools
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import sentencepiece
import tokenizers as library

from flaxmlm import InputError
from flaxmlm import tokenizers as flax_tokenizers
from flaxmlm.tokenizers import SENTENCE_START, WORD_START, flags, sampling

DATA = os.environ.get("FLAXMLM_DATA", "../shared/data")
SPACES = " \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u2003\u2028\u3000"


def data_path(*parts: str) -> str:
  path = os.path.join(DATA, *parts)
  if not os.path.exists(path):
    pytest.skip(f"no {path}: set FLAXMLM_DATA to the folder of real data")
  return path


@functools.cache
def load(name: str, **settings):
  return flax_tokenizers.load(data_path("vocab", name), **settings)


@functools.cache
def novel() -> str:
  path = data_path("novels", "Doyle_Hound_1902.txt")
  with open(path, encoding="utf-8-sig", newline="") as file:
    return file.read()


@functools.cache
def web_pages() -> tuple[str, ...]:
  with open(data_path("c4_mini", "train.jsonl"), encoding="utf-8") as file:
    return tuple(json.loads(line)["text"] for line in file)


@functools.cache
def chinese() -> str:
  with open(data_path("zh", "modern.txt"), encoding="utf-8") as file:
    return file.read(6000)


def corpus() -> list[str]:
  """English that every Python has."""
  from pydoc_data.topics import topics

  return [topics[name] for name in sorted(topics)][:40]


@functools.cache
def trained(kind: str, **settings):
  return flax_tokenizers.train(corpus(), kind=kind, vocab_size=600, **settings)


ENGLISH = (
  "bert-base-uncased-vocab.txt",
  "bert-base-cased-vocab.txt",
  "huggingface_gpt2_vocab.txt",
  "t5-style-unigram-32k.model",
  "unigram-1k.model",
)
TRAINED = ("unigram", "bpe", "wordpiece")


def normal(text: str) -> str:
  return " ".join(text.split())


# What the files say, by the libraries themselves.


def test_sentencepiece_ids_are_the_librarys():
  texts = [
    novel()[:200_000],
    *web_pages()[:100],
    "",
    " \n",
    "😀 é\u0301 \ufb01ne",
  ]
  for name in ("t5-style-unigram-32k.model", "unigram-1k.model"):
    model = sentencepiece.SentencePieceProcessor(
      model_file=data_path("vocab", name)
    )
    want = model.encode(texts)
    got = load(name).encode_batch(texts)
    assert [e.ids.tolist() for e in got] == want, name
    assert all(e.ids.dtype == np.uint32 for e in got)
    assert all(e.flags.dtype == np.uint8 for e in got)


def greedy_wordpiece(text: str, ids: dict[str, int], lowercase: bool):
  """WordPiece as google-research/bert's tokenization.py describes it."""
  text = "".join(
    f" {c} " if 0x4E00 <= ord(c) <= 0x9FFF else c
    for c in text
    if c in "\t\n\r" or unicodedata.category(c) not in ("Cc", "Cf")
  )
  for word in text.split():
    if lowercase:
      word = unicodedata.normalize("NFD", word.lower())
      word = "".join(c for c in word if unicodedata.category(c) != "Mn")
    is_punctuation = [
      unicodedata.category(c).startswith("P")
      or (c.isascii() and not c.isalnum())
      for c in word
    ]
    runs = itertools.groupby(
      range(len(word)), lambda i, p=is_punctuation: -1 - i if p[i] else 0
    )
    for _, run in runs:
      part = "".join(word[i] for i in run)
      found, begin = [], 0
      while begin < len(part) <= 100:
        prefix = "##" if begin else ""
        ends = range(len(part), begin, -1)
        end = next((e for e in ends if prefix + part[begin:e] in ids), None)
        if end is None:
          break
        found.append(prefix + part[begin:end])
        begin = end
      yield from found if begin == len(part) else ["[UNK]"]


@pytest.mark.parametrize(
  "name", ["bert-base-uncased-vocab.txt", "bert-base-cased-vocab.txt"]
)
def test_wordpiece_is_the_greedy_longest_match(name):
  with open(data_path("vocab", name), encoding="utf-8") as file:
    ids = {line.rstrip("\n"): i for i, line in enumerate(file)}
  texts = [*web_pages()[:30], novel()[:20_000], "naïve Ünï 中国 x" * 3]
  tokenizer = load(name)
  for text, found in zip(texts, tokenizer.encode_batch(texts), strict=True):
    want = list(greedy_wordpiece(text, ids, "uncased" in name))
    assert tokenizer.tokens(found.ids) == want


def test_byte_bpe_is_the_librarys_from_vocab_json(tmp_path):
  with open(
    data_path("vocab", "huggingface_gpt2_vocab.txt"), encoding="utf-8"
  ) as file:
    ids = {line.rstrip("\n"): i for i, line in enumerate(file)}
  (tmp_path / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
  shutil.copy(
    data_path("vocab", "huggingface_gpt2_merges.txt"), tmp_path / "merges.txt"
  )
  want = library.ByteLevelBPETokenizer(
    str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")
  )
  tokenizer = flax_tokenizers.load(str(tmp_path))
  assert tokenizer.fingerprint == load("huggingface_gpt2_vocab.txt").fingerprint
  for text in web_pages()[:60]:
    assert (
      tokenizer.encode_batch([text])[0].ids.tolist() == want.encode(text).ids
    )


# Round trips.


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("lowercase", [False, True])
def test_sentencepiece_decodes_to_the_normalised_text(kind, lowercase):
  tokenizer = trained(kind, lowercase=lowercase)
  for text in corpus():
    ids = tokenizer.encode_batch([text])[0].ids
    if tokenizer.vocab.unk in ids:  # a character too rare for the alphabet
      continue
    want = normal(text.lower() if lowercase else text)
    assert tokenizer.decode(ids) == want


def test_trained_normalisation_changes_whitespace_only():
  alphabet = "ﬁ²…ＡİẞǅéΣ"
  text = f"{alphabet}{SPACES}{alphabet}  x  "
  tokenizer = flax_tokenizers.train(
    [alphabet + " x\n"] * 50, kind="bpe", vocab_size=17
  )
  ids = tokenizer.encode_batch([text])[0].ids
  assert tokenizer.decode(ids) == normal(text)


def test_sentencepiece_decode_is_the_librarys():
  model = sentencepiece.SentencePieceProcessor(
    model_file=data_path("vocab", "t5-style-unigram-32k.model")
  )
  tokenizer = load("t5-style-unigram-32k.model")
  for text in web_pages()[:50]:
    ids = model.encode(text)
    if tokenizer.vocab.unk not in ids:
      assert tokenizer.decode(ids) == model.decode(ids)


def test_byte_bpe_decodes_to_exactly_the_text():
  tokenizer = load("huggingface_gpt2_vocab.txt")
  texts = [novel()[:50_000], chinese(), "  a \r\n\n\t b\u3000😀é\u0301\x00 "]
  for text in texts:
    ids = tokenizer.encode_batch([text])[0].ids
    assert tokenizer.decode(ids) == text


def test_decode_shows_masks_and_unknowns_only():
  for tokenizer in (trained("unigram"), trained("wordpiece")):
    vocab = tokenizer.vocab
    the = tokenizer.encode("the")
    ids = [vocab.cls, *the, vocab.mask, vocab.unk, vocab.sep, vocab.pad]
    assert normal(tokenizer.decode(ids)).replace(" ", "") == "the[MASK][UNK]"


# Special tokens.


def test_specials_are_found_by_name_wherever_they_stand(tmp_path):
  path = tmp_path / "my-vocab.txt"
  path.write_text("a\n[MASK]\n[SEP]\n##b\n[UNK]\n[CLS]\nb\n[PAD]\n")
  vocab = flax_tokenizers.load(str(path)).vocab
  assert vocab == flax_tokenizers.Vocab(
    size=8, pad=7, unk=4, cls=5, sep=2, mask=1
  )
  assert vocab.specials == (1, 2, 4, 5, 7)


def test_missing_specials_get_ids_after_the_files():
  tokenizer = load("t5-style-unigram-32k.model")
  vocab = tokenizer.vocab
  assert tokenizer.added == ("[PAD]", "[MASK]")
  assert (vocab.pad, vocab.mask, vocab.size) == (32768, 32769, 32770)
  assert (vocab.unk, vocab.cls, vocab.sep) == (0, 1, 2)
  assert tokenizer.tokens(tokenizer.encode("a [MASK].")) == [
    "▁a",
    "[MASK]",
    ".",
  ]


def test_missing_specials_are_appended_to_a_vocab_txt(tmp_path):
  path = tmp_path / "vocab.txt"
  path.write_text("a\nb\n##b\n")
  tokenizer = flax_tokenizers.load(str(path))
  assert tokenizer.added == ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
  assert tokenizer.vocab.size == 8
  assert tokenizer.vocab.specials == (3, 4, 5, 6, 7)
  assert tokenizer.encode("ab c [MASK]").tolist() == [0, 2, 4, 7]
  tokenizer.save(str(tmp_path / "saved"))
  assert flax_tokenizers.load(str(tmp_path / "saved")).vocab == tokenizer.vocab


NAMES_AS_TEXT = "x [MASK]. [SEP][CLS] <s> </s><pad> <mask> [PAD] <unk> y"


@pytest.mark.parametrize("name", ENGLISH)
def test_names_of_specials_in_raw_text_are_text(name):
  tokenizer = load(name)
  ids = tokenizer.encode_batch([NAMES_AS_TEXT])[0].ids
  special = set(tokenizer.vocab.specials) - {tokenizer.vocab.unk}
  assert not special & set(ids.tolist())
  if name.startswith(("hugging", "t5")):
    assert tokenizer.decode(ids) == NAMES_AS_TEXT


@pytest.mark.parametrize("kind", TRAINED)
def test_names_of_specials_are_text_to_a_trained_tokenizer(kind, tmp_path):
  trained(kind).save(str(tmp_path))
  for tokenizer in (
    trained(kind),
    flax_tokenizers.load(str(tmp_path)),
    pickle.loads(pickle.dumps(trained(kind))),
  ):
    ids = tokenizer.encode_batch(["[MASK] [SEP]"])[0].ids
    assert not set(ids.tolist()) & {0, 2, 3, 4}
    assert tokenizer.encode("[MASK]").tolist() == [tokenizer.vocab.mask]


def test_a_model_that_knows_the_name_whole_gives_unk(tmp_path):
  ids = {"[UNK]": 0, "[MASK]": 1, "a": 2}
  model = library.Tokenizer(library.models.WordLevel(ids, unk_token="[UNK]"))
  model.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
  model.save(str(tmp_path / "tokenizer.json"))
  tokenizer = flax_tokenizers.load(str(tmp_path))
  assert tokenizer.encode_batch(["a [MASK] a"])[0].ids.tolist() == [2, 0, 2]
  assert tokenizer.encode("a [MASK] a").tolist() == [2, 1, 2]


def test_user_defined_specials_of_sentencepiece_give_unk(tmp_path):
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["a b c d e f"] * 9),
    model_prefix=str(tmp_path / "m"),
    vocab_size=12,
    user_defined_symbols=["[MASK]"],
    hard_vocab_limit=False,
    minloglevel=3,
  )
  tokenizer = flax_tokenizers.load(str(tmp_path / "m.model"))
  assert tokenizer.vocab.mask == 3
  ids = tokenizer.encode_batch(["a[MASK]b"])[0].ids
  assert tokenizer.vocab.mask not in ids
  assert tokenizer.vocab.unk in ids
  assert tokenizer.vocab.mask in tokenizer.encode("a[MASK]b")


def test_control_pieces_count_as_special(tmp_path):
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["a b c d e f"] * 9),
    model_prefix=str(tmp_path / "m"),
    vocab_size=12,
    control_symbols=["<extra>"],
    hard_vocab_limit=False,
    minloglevel=3,
  )
  vocab = flax_tokenizers.load(str(tmp_path / "m.model")).vocab
  assert vocab.others == (3,)
  assert 3 in vocab.specials


@pytest.mark.parametrize("name", ENGLISH)
def test_encode_puts_a_mask_in_the_place_of_a_word(name):
  tokenizer = load(name)
  text = "said the man to his son. He"
  got = tokenizer.encode("said the [MASK] to his [MASK]. He")
  man, son = (tokenizer.encode(w) for w in ("x man", "x son"))
  ids = tokenizer.encode(text).tolist()
  for word in (man, son):
    tail = word[len(tokenizer.encode("x")) :].tolist()
    at = next(i for i in range(len(ids)) if ids[i : i + len(tail)] == tail)
    ids[at : at + len(tail)] = [tokenizer.vocab.mask]
  assert got.tolist() == ids
  assert got.dtype == np.uint32


def test_what_follows_a_mask_without_space_continues_the_word():
  for name in ("t5-style-unigram-32k.model", "huggingface_gpt2_vocab.txt"):
    tokenizer = load(name)
    assert tokenizer.tokens(tokenizer.encode("[MASK]ing"))[1:] == ["ing"]
    assert tokenizer.decode(tokenizer.encode("a [MASK]ing")).endswith("ing")
    two = tokenizer.encode("[MASK][MASK]")
    assert two.tolist() == [tokenizer.vocab.mask] * 2


# Flags.


def brute_sentences(text: str) -> list[int]:
  """Positions at which a sentence (and the space before it) begins."""
  closers = re.escape("\"'”’»›)]}」』）】》〉］｝＂＇")
  stop = r"[.!?…。！？｡．]"
  begins = [0]
  for i in range(1, len(text)):
    before, after = text[:i], text[i:]
    at_space = after[0].isspace() and not before[-1].isspace()
    ended = re.search(rf"{stop}[{closers}]*\Z", before[-20:]) is not None
    gap = re.match(r"\s*", after)[0]
    blank = at_space and gap.count("\n") >= 2
    wide = re.search(rf"[。！？｡]{stop}*[{closers}]*\Z", before[-20:])
    goes_on = re.match(rf"{stop}|[{closers}]", after)
    if (
      (at_space and (ended or blank))
      or (wide and not after[0].isspace() and not goes_on)
      or (
        re.search(rf"…[{closers}]*\Z", before[-20:])
        and re.match("[\u3040-\u30ff\u3400-\u9fff]", after)
      )
    ):
      begins.append(i)
  return begins


def test_sentences_against_brute_force():
  texts = [
    'He said: "Stop!" (Why?) I… did.\n\nChapter I\n \nMr. X "went." Home',
    "no stop\nhere\r\n\r\nbut here. . . ok! '' .) x",
    "“好。”他说。然后……走了！！？」再见 … end。\n下一句。\n\n　第二段",
    '.\n\n\n"" )) \n a',
    "😀 one. 😀😀! two 😀.\n\n😀",
    novel()[2000:8000],
    chinese()[:3000],
  ]
  rng = np.random.default_rng(0)
  letters = list('ab .!?…"”)\n\n  。」中😀\r\t')
  texts += ["".join(rng.choice(letters, 60)) for _ in range(300)]
  for text in texts:
    got = sorted(set(flags.find_sentences(text).tolist()))
    want = [
      begin for begin in brute_sentences(text) if text[begin:].strip() != ""
    ]
    assert [g for g in got if text[g:].strip()] == want, text


def align(pieces: list[str], text: str) -> list[int]:
  """Position of each piece's first character, for one-to-one pieces."""
  starts, at = [], 0
  for piece in pieces:
    starts.append(at)
    for char in piece.replace("▁", ""):
      while text[at].isspace():
        at += 1
      assert text[at] == char, (piece, text[at - 9 : at + 9])
      at += 1
  return starts


@pytest.mark.parametrize(
  "text",
  [
    "One two. Three, four! “Five six?” Seven\n\nEight nine",
    "a. b. c.   d\u3000e.\tf\u2028g\n\n\nh",
    "“好。”他说。 然后……走了！再见\n\n　第二段。Then this. And 😀.",
  ],
)
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_sentencepiece_flags_against_brute_force(kind, text):
  model = sentencepiece.SentencePieceProcessor(
    model_proto=character_model(kind)
  )
  tokenizer = tokenizer_of(character_model(kind))
  found = tokenizer.encode_batch(["x", text, "", "y. z"])[1]
  pieces = model.encode(text, out_type=str)
  word = [i == 0 or p.startswith("▁") for i, p in enumerate(pieces)]
  assert (found.flags & WORD_START != 0).tolist() == word
  starts = np.array(align(pieces, text))
  first = np.searchsorted(starts, brute_sentences(text))
  sentence = np.isin(np.arange(len(pieces)), first)
  assert (found.flags & SENTENCE_START != 0).tolist() == sentence.tolist()


@functools.cache
def character_model(kind: str) -> bytes:
  from flaxmlm.tokenizers import sentence_piece

  lines = ["One two. Three, four! “Five six?” Seven Eight nine a b c d e f g h"]
  lines += ["“好。”他说。 然后……走了！再见 第二段。Then this. And 😀.", "x y z"]
  return sentence_piece.train(
    lines * 40, kind=kind, vocab_size=58, lowercase=False
  )


def tokenizer_of(model: bytes):
  from flaxmlm.tokenizers import sentence_piece
  from flaxmlm.tokenizers.vocab import Settings

  return sentence_piece.build(model, Settings(), "test")


@pytest.mark.parametrize("name", [n for n in ENGLISH if n.endswith("model")])
def test_fast_sentence_flags_are_those_of_offsets(name):
  tokenizer = load(name)
  texts = [novel()[:100_000], *web_pages()[:100]]
  for text, found in zip(texts, tokenizer.encode_batch(texts), strict=True):
    slow = tokenizer._encode_with_offsets(text)
    assert np.array_equal(found.ids, slow.ids)
    assert np.array_equal(found.flags, slow.flags)


@pytest.mark.parametrize(
  "name", ["t5-style-unigram-32k.model", "unigram-1k.model", "unigram", "bpe"]
)
def test_words_on_their_own_are_the_whole_text(name, monkeypatch):
  from flaxmlm.tokenizers import sentence_piece

  # So that words are forgotten all the time.
  monkeypatch.setattr(sentence_piece, "_KNOWN_WORDS", 20)
  monkeypatch.setattr(sentence_piece, "_GROUP_CHARS", 500)
  tokenizer = load(name) if name.endswith("model") else trained(name)
  rng = np.random.default_rng(0)
  letters = list("aab ee .!?…\n\t\r,'\"▁中。😀\u0301\u200b\u3000\x1c\x07ﬁ¨")
  texts = ["".join(rng.choice(letters, 30)) for _ in range(1000)]
  plain = [letter for letter in letters if letter not in "▁。…\x1c\n\t\r"]
  texts += ["".join(rng.choice(plain, 30)) for _ in range(1000)]
  texts += ["", " ", "\u200b", "x" * 100 + " y", "\x07 a. \x07 b"]
  for text, found in zip(texts, tokenizer.encode_batch(texts), strict=True):
    whole = tokenizer._encode_with_offsets(text)
    # Sorted: of "a aa" and "aa a", which score the same, rounding decides.
    assert np.array_equal(np.sort(found.ids), np.sort(whole.ids)), text
    assert np.array_equal(found.flags, whole.flags), text


def test_a_model_with_pieces_over_spaces_is_given_whole_texts(tmp_path):
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["a b c d e f g", "a b a b"] * 9),
    model_prefix=str(tmp_path / "m"),
    vocab_size=14,
    split_by_whitespace=False,
    hard_vocab_limit=False,
    minloglevel=3,
  )
  tokenizer = flax_tokenizers.load(str(tmp_path / "m.model"))
  assert any("▁" in name[1:] for name in tokenizer.names)
  text = "a b a b a b c a b"
  ids = tokenizer.encode_batch([text])[0].ids.tolist()
  assert ids == tokenizer.model.encode(text)


def test_flags_do_not_depend_on_the_batch():
  texts = ["", *web_pages()[:20], " ", "a. b", "\n\n", novel()[:9000], "c\n"]
  for name in ENGLISH:
    tokenizer = load(name)
    for text, found in zip(texts, tokenizer.encode_batch(texts), strict=True):
      alone = tokenizer.encode_batch([text])[0]
      assert np.array_equal(alone.ids, found.ids)
      assert np.array_equal(alone.flags, found.flags)
      assert not len(found.ids) or found.flags[0] == 3


def test_byte_bpe_words_start_at_whitespace():
  tokenizer = load("huggingface_gpt2_vocab.txt")
  pages = [page for page in web_pages() if page.isascii()][:40]
  for text in ["Hi, you  there\n\nnew\tline. ok  \r\nx", *pages]:
    found = tokenizer.encode_batch([text])[0]
    at, want = 0, []
    for i in found.ids.tolist():
      after_space = at == 0 or text[at - 1].isspace()
      want.append(after_space or text[at].isspace())
      at += len(tokenizer.decode([i]))
    assert at == len(text)
    assert (found.flags & WORD_START != 0).tolist() == want


def test_wordpiece_words_start_but_at_continuations():
  tokenizer = load("bert-base-cased-vocab.txt")
  found = tokenizer.encode_batch([novel()[:20_000]])[0]
  want = [not t.startswith("##") for t in tokenizer.tokens(found.ids)]
  assert (found.flags & WORD_START != 0).tolist() == want


@functools.cache
def jieba_cut():
  jieba = pytest.importorskip("jieba", reason="extra zh")
  jieba.setLogLevel(60)
  return jieba.Tokenizer().cut


def jieba_words(text: str) -> list[int]:
  """Number of the jieba word that holds each character."""
  words = jieba_cut()(text)
  return [i for i, word in enumerate(words) for _ in word]


def test_jieba_flags_against_brute_force():
  text = chinese()[:1000] + " 中国abc人民 Hello，世界😀！\n\n新的一段"
  owner = jieba_words(text)
  wordpiece = load("bert-base-chinese-vocab.txt", words="jieba")
  encoding = wordpiece.model.encode(text, add_special_tokens=False)
  offsets = encoding.offsets
  want = [True] + [
    owner[end - 1] != owner[begin]
    for (_, end), (begin, _) in itertools.pairwise(offsets)
  ]
  found = wordpiece.encode_batch([text])[0]
  assert (found.flags & WORD_START != 0).tolist() == want
  assert 0.3 < np.mean(want) < 0.9


def test_jieba_flags_of_sentencepiece():
  tokenizer = flax_tokenizers.train(
    [chinese()], kind="bpe", vocab_size=1700, words="jieba"
  )
  texts = [normal(line) for line in chinese().splitlines() if line.strip()]
  checked = 0
  for text, found in zip(texts, tokenizer.encode_batch(texts), strict=True):
    if tokenizer.vocab.unk in found.ids:
      continue  # its token may be any number of characters
    owner = jieba_words(text)
    spans, at = [], 0
    for i, piece in enumerate(tokenizer.tokens(found.ids)):
      size = len(piece.removeprefix("▁") if i == 0 else piece)
      spans.append((at, at + size))
      at += size
    assert at == len(text)
    want = [True] + [
      a == b or owner[b - 1] != owner[c]
      for (a, b), (c, _) in itertools.pairwise(spans)
    ]
    assert (found.flags & WORD_START != 0).tolist() == want
    checked += 1
  assert checked > 20


def test_jieba_is_quiet_and_leaves_no_cache(tmp_path):
  pytest.importorskip("jieba", reason="extra zh")
  code = (
    "from flaxmlm.tokenizers import flags; import numpy as np;"
    "f = flags.get_jieba_flags('中国人民', np.arange(4), np.arange(1, 5));"
    "print(f.tolist())"
  )
  run = subprocess.run(
    [sys.executable, "-W", "default", "-c", code],
    env={**os.environ, "TMPDIR": str(tmp_path)},
    capture_output=True,
    text=True,
    check=True,
  )
  assert run.stdout == "[1, 0, 1, 0]\n"
  assert run.stderr == ""
  assert not list(tmp_path.iterdir())


# Training.


@pytest.mark.parametrize("kind", TRAINED)
def test_the_same_text_gives_the_same_file_in_any_process(kind, tmp_path):
  code = (
    "import sys; from pydoc_data.topics import topics;"
    "from flaxmlm import tokenizers;"
    "texts = (topics[n] for n in sorted(topics)[:40]);"
    f"k = tokenizers.train(texts, kind={kind!r}, vocab_size=600);"
    "k.save(sys.argv[1])"
  )
  files = []
  for i, threads in enumerate(("1", "4")):
    folder = tmp_path / str(i)
    subprocess.run(
      [sys.executable, "-c", code, str(folder)],
      env={**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": "0"},
      check=True,
    )
    files.append({p.name: p.read_bytes() for p in folder.iterdir()})
  trained(kind).save(str(tmp_path / "here"))
  here = {p.name: p.read_bytes() for p in (tmp_path / "here").iterdir()}
  assert files[0] == files[1] == here


@pytest.mark.parametrize("kind", TRAINED)
def test_trained_vocabularies_have_their_size_and_specials_first(kind):
  tokenizer = trained(kind)
  assert tokenizer.vocab == flax_tokenizers.Vocab(600, 0, 1, 2, 3, 4)
  names = tokenizer.tokens(range(600))
  assert names[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
  assert len(set(names)) == 600
  found = tokenizer.encode_batch(corpus())
  ids = np.concatenate([e.ids for e in found])
  assert np.mean(ids == tokenizer.vocab.unk) < 0.01
  assert len(ids) < 0.6 * sum(map(len, corpus()))


@pytest.mark.parametrize("kind", TRAINED)
def test_a_vocabulary_too_large_names_the_largest_that_works(kind):
  with pytest.raises(InputError, match="tokenizer.vocab_size=50000") as caught:
    flax_tokenizers.train(corpus()[:3], kind=kind, vocab_size=50_000)
  assert "\n" not in str(caught.value)
  size = int(re.search(r"at most (\d+)", str(caught.value))[1])
  tokenizer = flax_tokenizers.train(corpus()[:3], kind=kind, vocab_size=size)
  assert tokenizer.vocab.size == size


@pytest.mark.parametrize("kind", TRAINED)
def test_a_vocabulary_too_small_names_the_smallest_that_works(kind):
  with pytest.raises(InputError, match="at least") as caught:
    flax_tokenizers.train(corpus()[:3], kind=kind, vocab_size=20)
  size = int(re.search(r"at least (\d+)", str(caught.value))[1])
  tokenizer = flax_tokenizers.train(corpus()[:3], kind=kind, vocab_size=size)
  assert tokenizer.vocab.size == size


def test_long_lines_and_reserved_characters_are_trained_on():
  # SentencePiece drops sentences over 4,192 bytes, and those with U+2585.
  text = "天地玄黄宇宙洪荒" * 2000 + " \u2585 zebra" * 30
  tokenizer = flax_tokenizers.train([text], kind="bpe", vocab_size=30)
  ids = tokenizer.encode_batch(["天地 zebra"])[0].ids
  assert tokenizer.vocab.unk not in ids


def test_training_says_nothing(capfd):
  for kind in TRAINED:
    flax_tokenizers.train(corpus()[:3], kind=kind, vocab_size=200)
  assert capfd.readouterr() == ("", "")


def test_no_text_and_unknown_choices_are_refused():
  with pytest.raises(InputError, match="no text"):
    flax_tokenizers.train(["", " \n"], kind="bpe", vocab_size=99)
  with pytest.raises(InputError, match="tokenizer.kind"):
    flax_tokenizers.train(["a"], kind="bpr", vocab_size=99)
  with pytest.raises(InputError, match="tokenizer.words"):
    flax_tokenizers.train(["a"], kind="bpe", vocab_size=99, words="jeiba")


# Sampling.


def test_a_sample_is_all_text_where_it_fits():
  texts = ["a\n" * 5000, "", "b" * 9000, "c c " * 3000]
  chunks = sampling.sample(iter(texts), chars=10**6, seed=0)
  assert "".join(chunks) == "".join(texts)


def test_a_sample_is_even_and_bounded():
  def texts():
    for i in range(20_000):
      yield f"{i:05d} " + "x" * 94

  counts = np.zeros(10)
  for seed in range(5):
    chunks = sampling.sample(texts(), chars=100_000, seed=seed)
    assert sum(map(len, chunks)) <= 100_000
    assert len(chunks) == 1000
    places = [int(chunk[:5]) for chunk in chunks]
    assert places == sorted(places)
    counts += np.histogram(places, 10, (0, 20_000))[0]
  # 500 expected in each tenth, standard deviation under 22.
  assert np.all(np.abs(counts - 500) < 100)
  assert chunks == sampling.sample(texts(), chars=100_000, seed=4)
  assert chunks != sampling.sample(texts(), chars=100_000, seed=3)


def test_a_sample_holds_no_more_than_itself():
  alive = 0
  most = 0

  class Text(str):
    def __del__(self):
      nonlocal alive
      alive -= 1

  def texts():
    nonlocal alive, most
    for _ in range(3000):
      alive += 1
      most = max(most, alive)
      yield Text("y" * 100)

  sampling.sample(texts(), chars=5000, seed=0)
  assert most < 60


def test_lines_are_cut_without_loss():
  texts = [*corpus(), "天" * 5000, "w " * 3000, "a" * 999 + " " + "b" * 1500]
  for text in texts:
    lines = list(sampling.cut_lines(text))
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(len(line.encode()) <= 4192 for line in lines)
    words = {w for w in text.split() if len(w) <= 1000}
    assert words <= {w for line in lines for w in line.split()}


# Saving, loading, bad input.


@pytest.mark.parametrize("kind", TRAINED)
def test_a_saved_folder_comes_back_as_it_was(kind, tmp_path):
  tokenizer = trained(kind, lowercase=True)
  folder = str(tmp_path / "deep" / "tokenizer")
  tokenizer.save(folder)
  again = flax_tokenizers.load(folder)
  assert again.fingerprint == tokenizer.fingerprint
  assert again.vocab == tokenizer.vocab
  text = "The QUICK Brown fox. It jumps"
  a, b = (t.encode_batch([text])[0] for t in (tokenizer, again))
  assert a.ids.tolist() == b.ids.tolist()
  assert a.flags.tolist() == b.flags.tolist()
  assert "quick" in again.decode(b.ids)


def test_settings_are_saved_and_change_the_fingerprint(tmp_path):
  plain = load("unigram-1k.model")
  tokenizer = load("unigram-1k.model", words="jieba", lowercase=True)
  assert tokenizer.fingerprint != plain.fingerprint
  tokenizer.save(str(tmp_path))
  again = flax_tokenizers.load(str(tmp_path))
  assert again.settings == tokenizer.settings
  assert again.fingerprint == tokenizer.fingerprint


def test_a_half_written_folder_is_refused(tmp_path):
  trained("bpe").save(str(tmp_path))
  model = tmp_path / "tokenizer.model"
  whole = model.read_bytes()
  trained("unigram").save(str(tmp_path))
  model.write_bytes(whole)
  with pytest.raises(InputError, match="save the tokenizer anew"):
    flax_tokenizers.load(str(tmp_path))
  model.unlink()
  with pytest.raises(InputError, match="save the tokenizer anew"):
    flax_tokenizers.load(str(tmp_path))


def test_saving_leaves_no_temporary_files(tmp_path):
  trained("bpe").save(str(tmp_path))
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    "flaxmlm_tokenizer.json",
    "tokenizer.model",
  ]


@pytest.mark.parametrize("kind", TRAINED)
def test_one_that_lower_cases_is_the_same_when_asked_to(kind, tmp_path):
  made = trained(kind, lowercase=True)
  made.save(str(tmp_path))
  asked = flax_tokenizers.load(str(tmp_path), lowercase=True)
  assert asked.fingerprint == made.fingerprint


def test_vocab_txt_is_lowercased_as_it_looks_or_as_told(tmp_path):
  name = "bert-base-cased-vocab.txt"
  cased, lower = load(name), load(name, lowercase=True)
  assert cased.tokens(cased.encode("The é")) == ["The", "é"]
  assert lower.tokens(lower.encode("The é")) == ["the", "e"]
  uncased = load("bert-base-uncased-vocab.txt")
  assert uncased.tokens(uncased.encode("The É")) == ["the", "e"]
  (tmp_path / "vocab.txt").write_text("the\nThe\n[UNK]\n")
  (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true}')
  told = flax_tokenizers.load(str(tmp_path))
  assert told.tokens(told.encode("The")) == ["the"]


def test_the_files_own_padding_and_truncation_are_left_out(tmp_path):
  source = trained("wordpiece").model
  model = library.Tokenizer.from_str(source.to_str())
  model.enable_padding(length=50)
  model.enable_truncation(8)
  model.save(str(tmp_path / "tokenizer.json"))
  tokenizer = flax_tokenizers.load(str(tmp_path))
  text = "the value of the expression"
  for words in (text, text * 9):
    want = trained("wordpiece").encode_batch([words])[0].ids
    got = tokenizer.encode_batch([words])[0].ids
    assert got.tolist() == want.tolist()


def test_a_trained_tokenizer_json_adds_cls_and_sep_elsewhere(tmp_path):
  trained("wordpiece").save(str(tmp_path))
  model = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  assert model.encode("the [MASK]", "of").tokens == [
    "[CLS]", "the", "[MASK]", "[SEP]", "of", "[SEP]",
  ]  # fmt: skip


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("vocab.txt", b"a\nb\na\n", r"vocab.txt:3: 'a' is at line 1 too"),
    ("vocab.txt", b"a\n\nb\n", r"vocab.txt:2: empty"),
    ("vocab.txt", b"a\n\xff\n", r"vocab.txt:2: not UTF-8"),
    ("vocab.txt", b"", r"vocab.txt: empty"),
    ("tokenizer.json", b"{}", r"not a tokenizer.json"),
    ("tokenizer.json", b"[", r"not a tokenizer.json"),
    ("vocab.json", b'{"a": 1}', r"not a vocab.json"),
    ("vocab.json", b'{"a": 0}', r"merges.txt: No such file"),
    ("m.model", b"not a model", r"not a SentencePiece model"),
    ("m.bin", b"x", r"tokenizer.path=.*wants"),
  ],
)
def test_a_broken_file_is_one_line_that_says_where(
  name, content, message, tmp_path
):
  path = tmp_path / name
  path.write_bytes(content)
  with pytest.raises(InputError, match=message) as caught:
    flax_tokenizers.load(str(path))
  assert "\n" not in str(caught.value)


def test_broken_merges_and_folders_are_refused(tmp_path):
  with pytest.raises(InputError, match="no tokenizer"):
    flax_tokenizers.load(str(tmp_path))
  with pytest.raises(InputError, match="No such file"):
    flax_tokenizers.load(str(tmp_path / "none.model"))
  (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
  (tmp_path / "merges.txt").write_text("#version: 0.2\na b\na a\n")
  with pytest.raises(InputError, match=r"merges.txt:3: 'a a'"):
    flax_tokenizers.load(str(tmp_path))
  (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
  tokenizer = flax_tokenizers.load(str(tmp_path))
  assert tokenizer.tokens(tokenizer.encode("abb")) == ["ab", "b"]


@pytest.mark.parametrize("kind", TRAINED)
def test_bad_text_and_ids_are_refused(kind):
  tokenizer = trained(kind)
  for encode in (tokenizer.encode, lambda t: tokenizer.encode_batch([t])):
    with pytest.raises(InputError, match="lone surrogate"):
      encode("a \ud800 b")
  for ids in ([600], [-1]):
    with pytest.raises(InputError, match="not in the vocabulary"):
      tokenizer.decode(ids)
    with pytest.raises(InputError, match="not in the vocabulary"):
      tokenizer.tokens(ids)
  assert tokenizer.decode([]) == ""
  assert tokenizer.encode("").tolist() == []
  assert tokenizer.encode_batch([]) == []


def test_the_heavy_libraries_are_imported_late():
  code = (
    "import sys, flaxmlm.tokenizers;"
    "print(sorted({'sentencepiece', 'tokenizers', 'jieba', 'jax'}"
    " & set(sys.modules)))"
  )
  out = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert out.stdout == "[]\n"


@pytest.mark.parametrize("kind", ["unigram", "bpe", "wordpiece"])
def test_a_rare_letter_is_no_unknown(kind):
  # 12 of 50,000 characters: under the 0.05 % that may become unknown.
  draw = random.Random(0)
  words = ["".join(draw.choices("aeimnoprstuw", k=5)) for _ in range(8000)]
  texts = [" ".join(words), "Queen " * 12]
  tokenizer = flax_tokenizers.train(texts, kind=kind, vocab_size=160)
  ids = tokenizer.encode("Queen")
  assert tokenizer.vocab.unk not in ids
  assert tokenizer.decode(ids) == "Queen"
