"""Scores: brute force over each token, in any batch, and minimal pairs."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from conftest import program, random_params
from test_published import byte_bpe, corpus

from flaxmlm import InputError, config, evaluate, load, models, tokenizers
from flaxmlm.inference import scoring
from flaxmlm.inference.loading import LoadedModel
from flaxmlm.interop import families, huggingface
from flaxmlm.tokenizers import Encoded

VOCAB = [
  *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "s", "##s"),
  *("un", "##believ", "##able", "dog", "##gy", ".", ",", "'", "are", "a"),
]
L = 20
OPTIONS = config.defaults().model.to_dict() | {
  "family": "bert",
  "layers": 2,
  "width": 16,
  "heads": 2,
  "ffn": 20,
  "max_positions": L,
  "segment_types": 2,
  "dropout": 0.0,
  "attention_dropout": 0.0,
  "local_attention": 8,
}
TEXTS = [
  "the cat",
  "The unbelievable cats are doggy, the dog's a cat.",
  "a",
  "xyzzy the dogs unbelievables . . .",
  "cats",
  "the unbelievable unbelievable dogs are the dogs",
]
BIAS = np.linspace(-1, 2, len(VOCAB)) ** 3


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> LoadedModel:
  """A small BERT of random weights with its vocabulary."""
  folder = tmp_path_factory.mktemp("bert")
  write_folder(folder, random_params(OPTIONS, vocab_size=len(VOCAB)))
  return load(str(folder))


@pytest.fixture(scope="module")
def level(tmp_path_factory) -> str:
  """A folder whose logits are BIAS, whatever the text."""
  params = random_params(OPTIONS, vocab_size=len(VOCAB))
  params["mlm"] = jax.tree.map(np.zeros_like, params["mlm"])
  params["mlm"]["bias"] = BIAS.astype(np.float32)
  folder = tmp_path_factory.mktemp("level")
  write_folder(folder, params)
  return str(folder)


def write_folder(folder, params) -> None:
  (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
  ids = {"pad": 0, "cls": 2, "sep": 3}
  written = families.write_config(
    OPTIONS, vocab_size=len(VOCAB), ids=ids, heads=["mlm"]
  )
  huggingface.save(str(folder), params, written, OPTIONS)


def log_softmax(logits: np.ndarray) -> np.ndarray:
  logits = logits.astype(np.float64)
  top = logits.max()
  return logits - top - np.log(np.exp(logits - top).sum())


def by_hand(m: LoadedModel, text: str) -> float:
  """The score from `logits`, a row and a token at a time."""
  vocab = m.tokenizer.vocab
  ((ids, flags),) = m.tokenizer.encode_batch([text])
  total = 0.0
  for i, token in enumerate(ids):
    row = [vocab.cls, *ids.tolist(), vocab.sep]
    for j in range(i, len(ids)):
      if j > i and flags[j] & tokenizers.WORD_START:
        break
      row[1 + j] = vocab.mask
    logits = m.logits(np.array([row]))[0, 1 + i]
    total += log_softmax(logits)[token]
  return total


@pytest.mark.slow
def test_scores_are_those_of_torch(tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  torch.manual_seed(0)
  model = transformers.BertForMaskedLM(
    transformers.BertConfig(
      vocab_size=len(VOCAB),
      hidden_size=16,
      num_hidden_layers=2,
      num_attention_heads=2,
      intermediate_size=20,
      max_position_embeddings=L,
      initializer_range=0.5,
    )
  ).eval()
  model.save_pretrained(tmp_path)
  (tmp_path / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
  model = model.double()

  want = []
  for text in TEXTS:
    encoded = tokenizer(text, return_tensors="pt")
    ids, words = encoded["input_ids"], encoded.word_ids()
    total = 0.0
    for i in range(1, len(words) - 1):
      hidden = ids.clone()
      for j in range(i, len(words) - 1):
        if words[j] == words[i]:
          hidden[0, j] = tokenizer.mask_token_id
      with torch.no_grad():
        logits = model(hidden).logits[0, i]
      total += torch.log_softmax(logits, -1)[ids[0, i]].item()
    want.append(total)
  got = load(str(tmp_path)).score(TEXTS)
  np.testing.assert_allclose(got, want, rtol=2e-6)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_scores_are_those_of_the_logits(loaded, family):
  options = OPTIONS | {"family": family}
  model = models.build(options, vocab_size=len(VOCAB), dtype="float32")
  m = dataclasses.replace(
    loaded,
    config={"model": options},
    model=model,
    params=random_params(options, vocab_size=len(VOCAB)),
  )
  want = [by_hand(m, text) for text in TEXTS[:4]]
  np.testing.assert_allclose(m.score(TEXTS[:4]), want, rtol=1e-5)


def test_a_score_is_the_same_in_any_batch(loaded, monkeypatch):
  want = [loaded.score([text])[0] for text in TEXTS]
  # Two rows of the longest texts, a few of the shorter ones, the last not full.
  monkeypatch.setattr(scoring, "_TOKENS", 2 * L)
  got = loaded.score(TEXTS)
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_equal_texts_have_equal_scores_to_the_bit(loaded, monkeypatch):
  monkeypatch.setattr(scoring, "_TOKENS", 2 * L)
  scores = loaded.score([*TEXTS, *TEXTS, "THE   CAT"])
  np.testing.assert_array_equal(scores[6:12], scores[:6])
  assert scores[12] == scores[0]


def test_a_model_that_reads_nothing_scores_by_frequencies(level):
  share = log_softmax(BIAS)
  names = ["the", "un", "##believ", "##able", "dog", "##s", "."]
  want = sum(share[VOCAB.index(name)] for name in names)
  assert load(level).score(["the unbelievable dogs."])[0] == pytest.approx(
    want, rel=1e-6
  )


def test_the_rest_of_the_word_is_hidden():
  flags = np.array([1, 0, 0, 1, 3, 0], np.uint8)
  short = np.array([0, 1], np.uint8)  # a text starts a word in any case
  copies = scoring.make_copies(
    [Encoded(np.zeros(len(f), np.uint32), f) for f in (flags, short)]
  )
  assert copies.texts.tolist() == [0] * 6 + [1] * 2
  assert copies.slots.tolist() == [1, 2, 3, 4, 5, 6, 1, 2]
  assert copies.ends.tolist() == [4, 4, 4, 5, 7, 7, 2, 3]


@pytest.mark.parametrize("kind", ["unigram", "bpe", "wordpiece", "bytes"])
def test_words_are_those_of_the_text_with_any_tokenizer(kind, tmp_path):
  if kind == "bytes":
    byte_bpe().save(str(tmp_path / "tokenizer.json"))
    tokenizer = tokenizers.load(str(tmp_path))
  else:
    tokenizer = tokenizers.train(corpus(), kind=kind, vocab_size=500)
  text = "Unbelievable manuscripts disappear in a labyrinthine library"
  (encoded,) = tokenizer.encode_batch([text])
  _, slots, ends = scoring.make_copies([encoded])
  words = [
    tokenizer.decode(encoded.ids[a - 1 : b - 1]) for a, b in _first(slots, ends)
  ]
  assert len(encoded.ids) > 10
  # A space that is a token by itself is a word to byte-level BPE.
  assert [word.strip() for word in words if word.strip()] == text.split()


def _first(slots, ends):
  """The first token of each word, and the word's end."""
  return [
    (a, b)
    for a, b, before in zip(slots, ends, [0, *ends[:-1]], strict=True)
    if b != before
  ]


def test_long_texts_can_be_skipped(loaded):
  long = "a " * (L - 1)
  got = loaded.score([long, *TEXTS, long], skip_long=True)
  want = [np.nan, *loaded.score(TEXTS), np.nan]
  np.testing.assert_array_equal(got, want)
  assert np.isnan(loaded.score([long], skip_long=True)).tolist() == [True]


def test_progress_ends_at_all_tokens_of_all_copies(loaded, monkeypatch):
  monkeypatch.setattr(scoring, "_TOKENS", 2 * L)
  calls = []
  loaded.score(TEXTS, update=lambda *call: calls.append(call))
  lengths = [len(e.ids) for e in loaded.tokenizer.encode_batch(TEXTS)]
  total = sum(n * (n + 2) for n in lengths)
  assert [t for _, t in calls] == [total] * len(calls)
  assert calls[-1][0] == total and len(calls) > 5
  assert calls == sorted(calls)


def test_no_text_has_no_score(loaded):
  assert loaded.score([]).shape == (0,)


@pytest.mark.parametrize(
  ("texts", "message"),
  [
    (["a", ""], "text 2: '' has no token; leave it out"),
    (["a", " \n"], "text 2: ' .n' has no token"),
    (["a " * 19], "text 1: 'a a .*… has 19 tokens; at most 18 fit the model"),
    (["a", "\ud800"], "text 2: text has a lone surrogate at character 0"),
  ],
)
def test_what_cant_be_scored_is_refused(loaded, texts, message):
  with pytest.raises(InputError, match=message):
    loaded.score(texts)


def test_one_text_isnt_taken_for_many(loaded):
  with pytest.raises(InputError, match="wants a list of texts, not one"):
    loaded.score("a cat")


@pytest.mark.parametrize("part", ["head", "tokenizer"])
def test_a_model_without_a_part_is_refused(loaded, part):
  headless = {"encoder": loaded.params["encoder"]}
  change = {"params": headless} if part == "head" else {"tokenizer": None}
  with pytest.raises(InputError, match=f"score: the folder has .*no .*{part}"):
    dataclasses.replace(loaded, **change).score(["a"])


# --- evaluate --task=blimp ---------------------------------------------------


def write_pairs(path, *pairs: tuple[str, str]) -> None:
  path.write_text(
    "".join(
      json.dumps({"sentence_good": good, "sentence_bad": bad}) + "\n"
      for good, bad in pairs
    )
  )


def test_blimp_counts_the_pairs_whose_right_sentence_is_likelier(
  level, tmp_path, capsys
):
  # BIAS rises with the id.
  write_pairs(tmp_path / "nouns.jsonl", ("a dog", "a cat"), ("cat", "dog"))
  write_pairs(
    tmp_path / "more.jsonl",
    *[("a", "the"), ("are", "the"), ("a dog", "dog a"), ("the", "a")],
    *[("a", "A"), ("cat", "a")],
  )
  (tmp_path / "README.md").write_text("not pairs")
  figures = tmp_path / "out"
  evaluate.main(
    [
      *(f"--workdir={level}", "--task=blimp", f"--source={tmp_path}"),
      *("--rows=5", f"--json={figures}"),
    ]
  )
  # "a dog" and "dog a" tie, and so do "a" and "A".
  got = json.loads(figures.read_text())
  assert got.pop("paradigms") == {
    "more": {"accuracy": 0.4, "pairs": 5},
    "nouns": {"accuracy": 0.5, "pairs": 2},
  }
  assert got.pop("accuracy") == pytest.approx(0.45)
  assert got == {"task": "blimp"}
  out = capsys.readouterr().out
  assert "left out: 1 pairs beyond --rows=5" in out
  assert f"left out: {tmp_path}/README.md, which isn't .jsonl" in out
  assert "have equal scores, and count as not right" in out


def test_blimp_agrees_with_score(loaded, tmp_path):
  folder = tmp_path / "model"
  folder.mkdir()
  write_folder(folder, loaded.params)
  pairs = [(a, b) for a in TEXTS for b in TEXTS if a != b]
  write_pairs(tmp_path / "all.jsonl", *pairs)
  program(
    "evaluate",
    *(f"--workdir={folder}", "--task=blimp", f"--json={tmp_path}/out"),
    f"--source={tmp_path}/*.jsonl",
  )
  scores = loaded.score(TEXTS)
  right = sum(
    scores[TEXTS.index(good)] > scores[TEXTS.index(bad)] for good, bad in pairs
  )
  found = json.loads((tmp_path / "out").read_text())["paradigms"]["all"]
  assert found == {"accuracy": right / len(pairs), "pairs": 30}
  assert math.isclose(found["accuracy"], 0.5)  # of two orders, one is right


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (["--task=blip"], "--task=blip: wants one of masked, blimp"),
    ([], "--task=blimp needs --source"),
    (["--source=x", "--rows=0"], "--rows=0: wants at least 1"),
    (
      ["--source=x", "--config.data.row_length=9"],
      "reads no config, but --config.data.row_length=9 is given",
    ),
    (["--source=x", "--config=c.py"], "but --config=c.py is given"),
    (["--source=x", "--print_config"], "but --print_config is given"),
    (["--source=x", "--json=/none/x"], "--json=/none/x: can't be written"),
    (["--source=x", "--workdir=/none"], "/none: no checkpoint there yet"),
    (["--source=none.jsonl"], "none.jsonl: no such file or folder"),
    (["--source={}/long.jsonl"], r"long.jsonl:2: 'a a.* has 19 tokens"),
  ],
)
def test_bad_calls_of_blimp_are_refused(level, tmp_path, args, message):
  write_pairs(tmp_path / "long.jsonl", ("a", "cat"), ("a", "a " * 19))
  args = [arg.format(tmp_path) for arg in args]
  with pytest.raises(InputError, match=message):
    evaluate.main([f"--workdir={level}", "--task=blimp", *args])


def test_long_pairs_are_left_out_if_asked(level, tmp_path, capsys):
  long = "a " * (L - 1)
  write_pairs(
    *(tmp_path / "x.jsonl", ("a", "the"), ("a", long), (long, long)),
    *[("the", "cat"), ("cat", "the")],
  )
  evaluate.main(
    [
      *(f"--workdir={level}", "--task=blimp", "--skip_long"),
      *(f"--source={tmp_path}", f"--json={tmp_path}/out"),
    ]
  )
  found = json.loads((tmp_path / "out").read_text())["paradigms"]["x"]
  assert found == {"accuracy": 2 / 3, "pairs": 3}
  out = capsys.readouterr().out
  assert f"left out: 2 pairs longer than {L} tokens" in out
  assert f"the first is {tmp_path}/x.jsonl:2" in out


def test_a_paradigm_of_long_pairs_alone_is_refused(level, tmp_path):
  write_pairs(tmp_path / "x.jsonl", ("a", "a " * (L - 1)))
  with pytest.raises(InputError, match="x: all of its pairs are too long"):
    evaluate.main(
      [
        *(f"--workdir={level}", "--task=blimp", "--skip_long"),
        f"--source={tmp_path}",
      ]
    )


def test_skip_long_is_for_pairs_alone(level):
  with pytest.raises(InputError, match="--skip_long is for --task=blimp"):
    evaluate.main([f"--workdir={level}", "--skip_long"])


def test_scores_that_arent_numbers_are_no_result(level, tmp_path):
  params = jax.tree.map(np.array, load(level).params)
  params["mlm"]["bias"][7] = np.nan
  folder = tmp_path / "broken"
  folder.mkdir()
  write_folder(folder, params)
  write_pairs(tmp_path / "a.jsonl", ("a", "the"))
  with pytest.raises(InputError, match="a.jsonl:1: its score is nan"):
    evaluate.main(
      [
        *(f"--workdir={folder}", "--task=blimp"),
        f"--source={tmp_path}/a.jsonl",
      ]
    )
