"""`preview --json` of every objective with every tokenizer, by definition."""

import json

import pytest
from conftest import ROOT, lines, program
from definitions import check

from flaxmlm import preview

OBJECTIVES = (
  "masked",
  "whole_word",
  "ngram",
  "span",
  "replaced_token",
  "next_sentence",
  ("whole_word", "sentence_order"),
  "sentence_pair",
)
PAIRS = ("next_sentence", "sentence_order", "sentence_pair")
LABELS = "('half', 'whole')"
TOKENIZERS = {
  "wordpiece": ("novels", "bert-base-cased-vocab.txt", "whitespace"),
  "unigram": ("novels", "t5-style-unigram-32k.model", "whitespace"),
  "byte_bpe": ("novels", "huggingface_gpt2_vocab.txt", "whitespace"),
  "chinese": ("zh", "bert-base-chinese-vocab.txt", "jieba"),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def store(request, real_data, tmp_path_factory):
  """Stores of some real text: (folder, ids of special tokens).

  `store` is one of texts, `labelled` one of pairs of its pieces.
  """
  text, vocab, words = TOKENIZERS[request.param]
  if words == "jieba":
    pytest.importorskip("jieba")
  folder = tmp_path_factory.mktemp(request.param)
  found = sorted((real_data / text).glob("*.txt"))
  for number in range(4):
    whole = found[number % len(found)].read_text(encoding="utf-8")
    part = whole[20_000 + 90_000 * number :][:90_000]
    (folder / f"{number}.txt").write_text(part, encoding="utf-8")
    with open(folder / "pairs.jsonl", "a") as file:
      for start in range(0, len(part) - 100, 100):
        text, second = part[start : start + 50], part[start + 50 : start + 100]
        label = "half" if start % 200 else "whole"
        record = {"text": text, "second": second, "label": label}
        file.write(json.dumps(record) + "\n")
  labels = f"--config.objective.labels={LABELS}"
  for name, keys in {
    "store": [f"--config.data.source={folder}/*.txt"],
    "labelled": [
      f"--config.data.source={folder}/pairs.jsonl",
      "--config.data.pair_field=second",
      labels,
    ],
  }.items():
    program(
      "prepare",
      *keys,
      "--config.data.validation_fraction=0.0",
      f"--config.tokenizer.path={real_data / 'vocab' / vocab}",
      f"--config.tokenizer.words={words}",
      f"--out={folder / name}",
    )
  manifest = json.loads((folder / "store" / "manifest.json").read_text())
  return folder, manifest["vocab"]


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES, ids=str)
def test_what_preview_writes_is_by_definition(store, name):
  folder, specials = store
  kind = "labelled" if name == "sentence_pair" else "store"
  names = (name,) if isinstance(name, str) else name
  pairs = [n for n in names if n in PAIRS]
  tokens = [n for n in names if n not in pairs] or ["masked"]
  preview.main(
    [
      f"--config={ROOT}/configs/bert_mini.py",
      f"--workdir={folder}",
      f"--config.data.store={folder / kind}",
      "--config.data.row_length=128",
      f"--config.objective.name={name}",
      f"--config.objective.labels={LABELS}",
      "--config.model.family=electra",
      "--config.train.batch_size=128",
      "--steps=0:3",
      "--rows=0",
      f"--json={folder / 'rows.jsonl'}",
    ]
  )
  check(
    lines(folder / "rows.jsonl"),
    tokens=tokens[0],
    pairs=pairs[0] if pairs else None,
    rate=0.15,
    specials=specials,
  )
