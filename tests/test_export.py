"""Exported folders: the same ids, the same logits, the same answers."""

import io
import json
import random
import sys

import jax
import numpy as np
import pytest
import sentencepiece
import tokenizers as tokenizers_library
from conftest import ROOT, program
from test_published import write_vocab_txt

from flaxmlm import InputError, config, export, load, models, tokenizers
from flaxmlm.inference import exporting, starting
from flaxmlm.inference.loading import LoadedModel
from flaxmlm.interop import families
from flaxmlm.tokenizers import sentence_piece, trials
from flaxmlm.tokenizers.exporting import compare, read_charsmap, to_json
from flaxmlm.tokenizers.model_proto import ModelProto

ODD = [
  *("", " ", "   ", "\t", "\n", " a", "  a  b  ", "a\tb\n\nc", "a\r\nb\rc"),
  *("a\u00a0b\u3000c\u2003d", "\u200bzero\u200bwidth", "\u2028\u2029x"),
  *("▁a", "▁", "a▁b", "▁ ▁", "a ▁ b", " ▁a", "a▁", "▁ [MASK] ▁"),
  *("[MASK]", " [MASK] ", "The [MASK] is", "The[MASK]is", "The [MASK]ing"),
  *("The [MASK].", "[MASK] [MASK]", "[MASK][MASK]x", "a  [MASK]  b"),
  *("a\t[MASK]\tb", "a\n[MASK]\nb", "[MASK] x", "x [MASK]", "[MASK]s [MASK]."),
  *("\x00a\x01b\x1c c\x1f", "a\x00", "\x7f\x85x", "\ufeffbom", "soft\u00adhy"),
  *("e\u0301 E\u0301 N\u0303", "İstanbul ΣΑΣ ß ẞ ΌΣΟΣ", "q̃", " \u0301a"),
  *("ﬁ ½ ① ２ Ａ ㎏", "\U0010ffff\ue000\uf8ff x", "☃☃ ☃☃☃ a☃b☃☃c"),
  *("\U0001f468\u200d\U0001f469\u200d\U0001f467", "中文。中文！“引号”……"),
  *("x" * 5000, "ab" * 3000, "=" * 777, "0" * 501, "...." * 77, "-" * 99),
  "The " * 3000,
]
SHAPE = config.defaults().model.to_dict() | {
  "layers": 2,
  "width": 16,
  "heads": 2,
  "ffn": 20,
  "max_positions": 64,
  "dropout": 0.0,
  "attention_dropout": 0.0,
  "init_stddev": 0.5,
  "local_attention": 8,
}
PROMPTS = [
  "The [MASK] of the object.",
  "[MASK]s are nice",
  "a [MASK]ing  word",
  " [MASK] x",
  "if x: [MASK] y",
]


@pytest.fixture(scope="module")
def texts() -> list[str]:
  """Some 300 kB in English, with code, and in other scripts."""
  from pydoc_data.topics import topics

  prose = [line for name in sorted(topics) for line in topics[name].split("\n")]
  return prose[:8000] + (trials.CHINESE + trials.OTHERS) * 3


@pytest.fixture(scope="module")
def lines(texts) -> list[str]:
  """2,000 lines as the program compares, and 1,000 disturbed ones."""
  some, _ = trials.make_lines(
    {"prose": texts}, count=2000, seed=1, without=["[CLS]", "[SEP]", "<s>"]
  )
  return some + trials.disturb(some, count=1000, seed=1)


@pytest.fixture(scope="module")
def unigram(texts):
  return tokenizers.train(texts, kind="unigram", vocab_size=3000)


def differences(tokenizer, lines) -> list[str]:
  return list(compare(tokenizer, to_json(tokenizer), lines))


@pytest.mark.parametrize("lowercase", [False, True])
@pytest.mark.parametrize("kind", ["unigram", "bpe", "wordpiece"])
def test_a_trained_tokenizer_gives_the_same_ids(texts, lines, kind, lowercase):
  made = tokenizers.train(
    texts, kind=kind, vocab_size=3000, lowercase=lowercase
  )
  assert differences(made, [*ODD, *lines]) == []


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize(
  "options",
  [
    {"byte_fallback": True},
    {"user_defined_symbols": ["<sep2>", "[MASK]", "foo"]},
    {"remove_extra_whitespaces": False},
    {"add_dummy_prefix": False},
  ],
  ids=lambda options: next(iter(options)),
)
def test_a_sentencepiece_model_of_another_kind(texts, lines, kind, options):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(texts),
    model_writer=model,
    model_type=kind,
    vocab_size=2000,
    normalization_rule_name="identity",
    hard_vocab_limit=False,
    minloglevel=3,
    **options,
  )
  settings = tokenizers.vocab.Settings()
  data = sentence_piece._round_scores(model.getvalue())
  made = sentence_piece.build(data, settings, "a test's")
  assert differences(made, [*ODD, *lines, "a<sep2>b <sep2> ##c foofoo"]) == []


def test_a_tokenizer_that_lower_cases_before_its_model(texts, lines, tmp_path):
  made = tokenizers.train(texts, kind="bpe", vocab_size=2000)
  made.save(str(tmp_path))
  again = tokenizers.load(str(tmp_path / "tokenizer.model"), lowercase=True)
  assert differences(again, ["THE Name", *lines]) == []


@pytest.fixture(scope="module")
def real_lines(real_data) -> list[str]:
  """10,200 lines: of a novel, of Chinese and of code, a third each."""
  novel = next((real_data / "novels").glob("*.txt")).read_text("utf-8-sig")
  chinese = (real_data / "zh" / "modern.txt").read_text("utf-8")
  parts = (
    novel.split("\n"),
    chinese[:1_000_000].split("\n"),
    export.read_texts(None)["of Python's code"],
  )
  draw = random.Random(0)
  return [
    line
    for part in parts
    for line in draw.sample([t for t in part if t.strip()], 3400)
  ]


def without_specials(tokenizer, lines) -> list[str]:
  """At least 10,000 lines without the name of a special token."""
  vocab = tokenizer.vocab
  names = tokenizer.tokens(i for i in vocab.specials if i != vocab.mask)
  kept = [line for line in lines if not any(name in line for name in names)]
  assert len(kept) > 10_000
  return kept


@pytest.mark.slow
@pytest.mark.parametrize(
  "name",
  [
    "bert-base-uncased-vocab.txt",
    "bert-base-cased-vocab.txt",
    "bert-base-chinese-vocab.txt",
    "huggingface_gpt2_vocab.txt",
  ],
)
def test_ten_thousand_real_lines_of_a_published_vocabulary(
  real_data, real_lines, name
):
  made = tokenizers.load(str(real_data / "vocab" / name))
  assert differences(made, without_specials(made, real_lines)) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unigram", "bpe", "wordpiece"])
def test_ten_thousand_real_lines_of_a_trained_tokenizer(real_lines, kind):
  made = tokenizers.train(real_lines, kind=kind, vocab_size=10_000)
  assert differences(made, without_specials(made, real_lines)) == []


@pytest.mark.slow
def test_a_unigram_model_from_elsewhere_differs_in_ties_alone(
  real_data, real_lines
):
  # Its scores are not rounded, so float32 and float64 break ties differently.
  path = real_data / "vocab" / "t5-style-unigram-32k.model"
  made = tokenizers.load(str(path))
  other = tokenizers_library.Tokenizer.from_buffer(to_json(made))
  different = 0
  for line in without_specials(made, real_lines):
    ours = made.encode(line).tolist()
    theirs = other.encode(line, add_special_tokens=False).ids
    if ours != theirs:
      different += 1
      assert sorted(ours) == sorted(theirs), line  # the same pieces, moved
  assert different < 5


def test_what_differs_is_named(unigram):
  spec = json.loads(to_json(unigram))
  spec["normalizer"] = None
  found = list(compare(unigram, json.dumps(spec).encode(), ["a b", "a  b"]))
  assert len(found) == 1
  assert found[0].startswith("line 2, 'a  b': from token 2 on [")


def test_a_model_that_tokenizer_json_cant_say_is_refused(texts):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(texts[:2000]),
    model_writer=model,
    model_type="word",
    vocab_size=300,
    minloglevel=3,
  )
  settings = tokenizers.vocab.Settings()
  made = sentence_piece.build(model.getvalue(), settings, "a test's")
  with pytest.raises(InputError, match="is neither unigram nor BPE"):
    to_json(made)


def test_a_charsmap_is_read_whole():
  spec = sentence_piece._make_normalizer(lowercase=True)
  proto = ModelProto.FromString(spec.serialized_model_proto())
  points = map(chr, [*range(0xD800), *range(0xE000, sys.maxunicode + 1)])
  want = {c: " " if c.isspace() else c.lower() for c in points}
  assert read_charsmap(proto.normalizer_spec.precompiled_charsmap) == {
    old: new for old, new in want.items() if old != new
  }


def test_scores_of_a_trained_model_add_up_exactly(unigram):
  model = unigram.model
  scores = np.array([model.get_score(i) for i in range(len(model))])
  np.testing.assert_array_equal(scores * 1024, np.round(scores * 1024))
  assert len(np.unique(scores)) > 1000


def test_equal_pieces_are_cut_alike_wherever_they_stand(unigram):
  for run in ("0" * 50, "=" * 77, "." * 40, "ab" * 30):
    alone = unigram.encode(run)[1:].tolist()
    behind = unigram.encode("Some words before it " * 9 + "▁" + run).tolist()
    assert behind[-len(alone) :] == alone


def build(family: str, tokenizer, **changes) -> LoadedModel:
  """A model with random parameters, as `load` would return it."""
  options = SHAPE | {"family": family} | changes
  model = models.build(
    options, vocab_size=tokenizer.vocab.size, dtype="float32"
  )
  return LoadedModel(
    tokenizer=tokenizer,
    config={"model": options},
    step=3,
    max_length=60,
    vocab_size=tokenizer.vocab.size,
    pad=tokenizer.vocab.pad,
    model=model,
    params=model.init(jax.random.key(0)),
  )


def written(m, folder) -> str:
  folder.mkdir()
  exporting.write_folder(
    m, str(folder), tokenizer_json=to_json(m.tokenizer), card="# card\n"
  )
  return str(folder)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_comes_back_with_the_same_logits(
  family, unigram, tmp_path
):
  m = build(family, unigram)
  rows = [export.make_row(m, text) for text in ("The name of it.", "中文")]
  assert exporting.check_logits(m, written(m, tmp_path / "x"), rows) == 0


def test_the_exported_folder_answers_as_the_model_did(unigram, tmp_path):
  m = build("bert", unigram)
  again = load(written(m, tmp_path / "x"))
  for prompt in PROMPTS:
    want, got = m.fill_mask(prompt), again.fill_mask(prompt)
    assert [g["token"] for g in got] == [w["token"] for w in want]


def test_other_weights_are_noticed(unigram, tmp_path):
  m = build("bert", unigram)
  folder = written(m, tmp_path / "x")
  rows = [export.make_row(m, "The name of it.")]
  m.params["mlm"]["bias"] = m.params["mlm"]["bias"].at[7].add(0.01)
  with pytest.raises(InputError, match="logits differ by 0.01 in row 1 of 1"):
    exporting.check_logits(m, folder, rows)


def test_bfloat16_runs_are_compared_in_float32(unigram, tmp_path):
  import dataclasses

  m = build("bert", unigram)
  low = models.build(
    m.config["model"], vocab_size=m.vocab_size, dtype="bfloat16"
  )
  m = dataclasses.replace(m, model=low)
  rows = [export.make_row(m, "The name of it.")]
  assert exporting.check_logits(m, written(m, tmp_path / "x"), rows) == 0


def wordpieces(folder, *tokens: str):
  folder.mkdir()
  names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *tokens]
  return tokenizers.load(write_vocab_txt(folder, names))


def test_another_vocabulary_is_counted_as_it_is_mapped(tmp_path):
  old = wordpieces(tmp_path / "old", "the", "sing", "##song", "x")
  new = wordpieces(
    tmp_path / "new", "x", "The", "the", "singsong", "##song", "☃", "Б"
  )
  m = build("bert", old)
  table = np.asarray(m.params["encoder"]["embeddings"]["word"]["embedding"])
  said = []
  mapped = starting.start_from(
    written(m, tmp_path / "x"),
    new,
    m.params,
    said.append,
    options=m.config | {"objective": {"name": "masked"}, "seed": 0},
  )
  got = np.asarray(mapped["encoder"]["embeddings"]["word"]["embedding"])
  the, sing, song, x = table[5:]
  every = table.mean(axis=0)
  want = [*table[:5], x, the, the, (sing + song) / 2, song, every, every]
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
  # Five special tokens, x, the, ##song; The; singsong; what is unknown.
  assert "of 12 tokens; 8 keep their rows, 1 copy that of another" in said[0]
  assert "1 are means of their pieces, 2 are unknown there" in said[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory, texts):
  """A folder with a short run and what was exported of it."""
  return make_run(tmp_path_factory.mktemp("runs"), texts, "unigram")


def make_run(folder, texts, kind):
  source = folder / "text.txt"
  source.write_text("\n".join(texts), encoding="utf-8")
  program(
    "train",
    f"--config={ROOT}/configs/quickstart.py",
    f"--workdir={folder}/run",
    f"--config.data.source={source}",
    "--config.data.document=line",
    f"--config.tokenizer.kind={kind}",
    "--config.model.layers=2",
    "--config.model.width=32",
    "--config.train.steps=4",
    "--config.optimizer.warmup_steps=1",
    "--config.checkpoint.every=4",
    "--config.eval.every=2",
    "--config.eval.rows=32",
  )
  export.main(
    [f"--workdir={folder}/run", "--format=huggingface", f"--out={folder}/out"]
  )
  return folder


@pytest.mark.slow
def test_the_folder_has_what_hugging_face_wants(run):
  names = {path.name for path in (run / "out").iterdir()}
  assert names == {
    *("config.json", "model.safetensors", "tokenizer.json", "README.md"),
    *("tokenizer_config.json", "special_tokens_map.json"),
  }
  assert not list(run.glob("tmp*"))
  config = json.loads((run / "out" / "config.json").read_text())
  assert config["architectures"] == ["BertForMaskedLM"]
  assert config["pad_token_id"] == 0
  settings = json.loads((run / "out" / "tokenizer_config.json").read_text())
  assert settings["model_max_length"] == 64
  assert settings["mask_token"] == "[MASK]"


@pytest.mark.slow
def test_the_card_has_the_figures_of_the_run(run):
  card = (run / "out" / "README.md").read_text(encoding="utf-8")
  metrics = (run / "run" / "metrics.jsonl").read_text().splitlines()
  last = [json.loads(line) for line in metrics if "eval/loss" in line][-1]
  for name in ("loss", "perplexity", "accuracy", "unigram_entropy"):
    assert f" {last[f'eval/{name}']:.4g} |" in card
  manifest = json.loads((run / "run" / "store" / "manifest.json").read_text())
  for split in manifest["splits"].values():
    assert f"{split['tokens']:,} " in card
  assert "text.txt" in card and "muon, peak_lr=0.006" in card
  assert "| steps | 4 of 32 rows of 64 tokens, 8,192 tokens in all |" in card
  assert card.startswith("---\nlicense: other\n")


@pytest.mark.slow
def test_a_workdir_and_its_folder_export_alike(run, tmp_path, capsys):
  export.main(
    [
      f"--workdir={run}/out",
      "--format=huggingface",
      f"--out={tmp_path}/again",
    ]
  )
  assert f"exported: {tmp_path}/again" in capsys.readouterr().out
  again = tmp_path / "again" / "model.safetensors"
  assert again.read_bytes() == (run / "out" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"format": "onnx2"}, "--format=onnx2: wants one of huggingface"),
    ({"out": "out"}, "is there already; name a new folder"),
    ({"out": "text.txt"}, "is there already; name a new folder"),
    ({"workdir": "none"}, "neither a workdir of a run nor a Hugging Face"),
  ],
)
@pytest.mark.slow
def test_refused_with_a_line(run, change, message):
  args = {"workdir": "run", "format": "huggingface", "out": "new"} | change
  folders = {name: f"{run}/{args[name]}" for name in ("workdir", "out")}
  args |= folders
  with pytest.raises(InputError, match=message):
    export.main([f"--{name}={value}" for name, value in args.items()])
  assert not (run / "new").exists() and not list(run.glob("tmp*"))


@pytest.mark.slow
def test_a_folder_without_a_tokenizer_is_refused(run, tmp_path):
  folder = tmp_path / "bare"
  folder.mkdir()
  for name in ("config.json", "model.safetensors"):
    (folder / name).write_bytes((run / "out" / name).read_bytes())
  with pytest.raises(InputError, match="has no tokenizer; export wants one"):
    export.main(
      [f"--workdir={folder}", "--format=huggingface", f"--out={tmp_path}/new"]
    )


@pytest.mark.slow
def test_evaluate_finds_in_the_folder_what_it_finds_in_the_run(run, tmp_path):
  (tmp_path / "other.txt").write_text("\n".join(trials.CHINESE + ODD[40:60]))
  found = {}
  for name, keys in {
    "run": [],
    # What a run knows of how it was trained, and a folder doesn't.
    "out": ["data.document=line", "objective.rate=0.2"],
  }.items():
    path = tmp_path / f"{name}.json"
    program(
      "evaluate",
      *(f"--workdir={run}/{name}", f"--source={tmp_path}/other.txt"),
      *(f"--json={path}", *(f"--config.{key}" for key in keys)),
    )
    found[name] = json.loads(path.read_text())
  ours, theirs = found["run"], found["out"]
  assert ours.pop("step") == 4 and ours["eval/targets"] > 50
  # The folder doesn't know the frequencies of the tokens it was trained on.
  ours.pop("eval/unigram_entropy"), theirs.pop("eval/unigram_entropy")
  assert theirs == pytest.approx(ours, rel=1e-6)


@pytest.mark.slow
def test_fill_mask_answers_from_the_folder_as_from_the_run(run):
  ours, theirs = (
    program("fill_mask", f"--workdir={run}/{name}", *PROMPTS)
    for name in ("run", "out")
  )
  assert theirs == ours


@pytest.mark.parametrize(
  ("name", "args", "message"),
  [
    ("evaluate", [], "name a text by --source"),
    ("evaluate", ["--source=none.txt"], "none.txt: no such file"),
    (
      "evaluate",
      ["--source=x", "--config.data.row_length=128"],
      "data.row_length=128 is longer",
    ),
    (
      "evaluate",
      ["--source=x", "--config=configs/quickstart.py"],
      "has 2, and is taken as it is; leave the key out",
    ),
    (
      "evaluate",
      [
        "--source=x",
        "--config.data.row_length=64",
        "--config.train.dtype=bfloat16",
      ],
      "is measured as it is, with 'float32'; leave the key out",
    ),
    ("preview", [], "is a Hugging Face folder, and no run is there"),
    (
      "train",
      ["--config=configs/quickstart.py"],
      "is a Hugging Face folder, and no run is there",
    ),
  ],
)
@pytest.mark.slow
def test_what_a_folder_isnt_for_is_said_in_a_line(run, name, args, message):
  before = sorted((run / "out").iterdir())
  error = program(name, f"--workdir={run}/out", *args, code=2)
  assert message in error and len(error.splitlines()) == 1
  assert sorted((run / "out").iterdir()) == before


def test_a_line_that_differs_stops_the_export(tmp_path):
  # "Ａ" and an accent are one letter to SentencePiece's own normalisation;
  # "Precompiled" loses the accent.
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=(f"Á A {t}" for t in trials.CHINESE * 20),
    model_writer=model,
    vocab_size=800,
    hard_vocab_limit=False,
    minloglevel=3,
  )
  (tmp_path / "own.model").write_bytes(model.getvalue())
  made = tokenizers.load(str(tmp_path / "own.model"))
  with pytest.raises(InputError, match=r"isn't the same: line \d+, 'Ａ"):
    export.check_tokenizer(made, to_json(made), {"x": ["Ａ\u0301"] * 7000})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unigram", "bpe", "wordpiece"])
def test_the_pipeline_of_transformers_answers_as_fill_mask(
  kind, texts, tmp_path
):
  transformers = pytest.importorskip("transformers")
  folder = make_run(tmp_path, texts, kind)
  m = load(str(folder / "run"))
  fill = transformers.pipeline("fill-mask", str(folder / "out"))
  for prompt in PROMPTS:
    want, got = m.fill_mask(prompt, top_k=8), fill(prompt, top_k=8)
    for name in ("token", "token_str", "sequence"):
      assert [g[name] for g in got] == [w[name] for w in want]
    scores = [[x["score"] for x in answers] for answers in (got, want)]
    np.testing.assert_allclose(*scores, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", families.FAMILIES)
def test_transformers_loads_every_family(family, unigram, lines, tmp_path):
  transformers = pytest.importorskip("transformers")
  m = build(family, unigram)
  folder = written(m, tmp_path / "x")
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  # In float64: of ALBERT, torch's own float32 is 2.1e-5 away from that.
  model = transformers.AutoModelForMaskedLM.from_pretrained(folder).double()
  batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
  want = model.eval()(**batch).logits.detach().numpy()
  got = m.logits(batch["input_ids"].numpy(), batch["attention_mask"].numpy())
  valid = batch["attention_mask"].numpy() == 1
  scale = want[valid].std()
  np.testing.assert_allclose(got[valid] / scale, want[valid] / scale, atol=2e-5)
  for line in [*ODD[:60], *lines[::20]]:
    ids = [2, *unigram.encode(line).tolist(), 3]
    assert tokenizer(line)["input_ids"] == ids


@pytest.mark.slow
def test_transformers_reads_byte_level_bpe_with_its_masks(real_data, tmp_path):
  transformers = pytest.importorskip("transformers")
  made = tokenizers.load(str(real_data / "vocab/huggingface_gpt2_vocab.txt"))
  folder = written(build("roberta", made), tmp_path / "x")
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  for line in ("The <mask> is", "a <mask>.", "<mask><mask> b", "a  <mask>  b"):
    ids = [made.vocab.cls, *made.encode(line).tolist(), made.vocab.sep]
    assert theirs(line)["input_ids"] == ids
  pair = theirs("a", "b")["input_ids"]
  assert pair == [*theirs("a")["input_ids"], *theirs("b")["input_ids"][1:]]


@pytest.mark.slow
def test_sentence_transformers_loads_the_folder(unigram, tmp_path):
  library = pytest.importorskip("sentence_transformers")
  m = build("bert", unigram)
  model = library.SentenceTransformer(written(m, tmp_path / "x"))
  text = "The name of the object."
  row = export.make_row(m, text)
  want = m.encode(row[None])[0].mean(axis=0)
  np.testing.assert_allclose(model.encode(text), want, atol=1e-5)
