"""Pairs with labels: from a file, through the store, to what is asked of them.

What comes out is decoded, and compared with what stood in the file.
"""

import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import program

import flaxmlm
from flaxmlm import InputError, config, objectives, prepare, tokenizers
from flaxmlm.data import batches, rows
from flaxmlm.data.sources import BadRecords, read
from flaxmlm.objectives import as_batch

FIELDS = {"text_field": "a", "pair_field": "b", "label_field": "said"}
LABELS = ("yes", "no", "3")
L = 40


def make_records(count: int) -> list[dict]:
  """Pairs of texts of some words; each tenth is too long for a row."""
  draw = random.Random(0)
  words = ["ab", "ba", "abba", "baba", "aba", "bab.", "Abab"]
  found = []
  for number in range(count):
    size = 60 if number % 10 == 9 else 9
    a, b = (
      " ".join(draw.choices(words, k=draw.randint(1, size))) for _ in "ab"
    )
    label = draw.choice(["yes", "no", 3])
    found.append({"a": f"{a} {number}", "b": b, "said": label})
  return found


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
  folder = tmp_path_factory.mktemp("labelled")
  records = make_records(400)
  path = folder / "pairs.jsonl"
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  values = {f"data.{name}": field for name, field in FIELDS.items()} | {
    "data.source": str(path),
    "data.row_length": L,
    "data.validation_fraction": 0.2,
    "tokenizer.kind": "bpe",
    "tokenizer.vocab_size": 60,
    "objective.name": "sentence_pair",
    "objective.labels": LABELS,
  }
  c = config.check_keys(values, where="test")
  config.validate(c)
  store = prepare.prepare_store(c, str(folder / "store"), progress=False)
  return records, c, store


def test_each_pair_that_fits_is_asked_for_its_own_label_once(stored):
  records, c, store = stored
  tokenizer = tokenizers.load(f"{store.folder}/tokenizer")
  encode = tokenizer.encode_batch
  known, long = {}, 0
  for r in records:
    a, b = (tuple(e.ids.tolist()) for e in encode([r["a"], r["b"]]))
    if len(a) + len(b) <= L - 3:
      known[a, b] = LABELS.index(str(r["said"]))
    else:
      long += 1
  assert long > 20
  objective = objectives.build(
    c.objective, row_length=L, vocab=store.vocab, steps=10
  )
  corrupt = jax.jit(objective.corrupt)
  found = {}
  for split in ("train", "validation"):
    plan = rows.load(store, split, L, kind="pairs")
    for batch in batches.in_order(store, plan, batch_size=16):
      keys = jax.random.split(jax.random.key(0), 16)
      made = corrupt(keys, as_batch(batch), jnp.int32(0))
      example = jax.device_get(made)
      ids = objectives.restore_ids(example)
      labels = example.pairs.labels
      real = batch.segments[:, 0] > 0
      assert (labels[~real] == -1).all()
      for row in np.flatnonzero(real):
        a, b, _ = "".join(
          "," if i == store.vocab["sep"] else f"{i} " for i in ids[row]
        ).split(",")
        a, b = (tuple(map(int, part.split())) for part in (a, b))
        assert a[0] == store.vocab["cls"]
        types = example.inputs.token_types[row]
        assert types.sum() == len(b) + 1 and types[len(a) + 1] == 1
        assert (a[1:], b) not in found
        found[a[1:], b] = int(labels[row])
  assert found == known


@pytest.mark.slow
def test_a_run_is_evaluated_on_other_pairs_and_exported(stored, tmp_path):
  records, c, store = stored
  keys = {
    "data.store": store.folder,
    "data.row_length": L,
    "objective.name": "sentence_pair",
    "objective.labels": LABELS,
    "model.layers": 1,
    "model.width": 16,
    "model.heads": 2,
    "model.ffn": 16,
    "model.max_positions": L,
    "optimizer.warmup_steps": 0,
    "train.steps": 2,
    "train.batch_size": 8,
  }
  given = [f"--config.{name}={value}" for name, value in keys.items()]
  code = "from flaxmlm.config import defaults as get_config\n"
  (tmp_path / "empty.py").write_text(code)
  run = f"--workdir={tmp_path / 'run'}"
  out = program("train", f"--config={tmp_path / 'empty.py'}", run, *given)
  whole = len(store.train.sources)
  assert f" of {whole} train pairs in {store.folder} have more than 37" in out
  # Pairs with other texts, of which a few are too long.
  other = tmp_path / "other.jsonl"
  other.write_text("".join(json.dumps(r | {"b": "ab"}) + "\n" for r in records))
  source = [run, f"--source={other}", "--config.data.text_field=a"]
  source += ["--config.data.pair_field=b", "--config.data.label_field=said"]
  out = program("evaluate", *source, f"--json={tmp_path / 'found.json'}")
  assert "are left out; data.row_length decides" in out
  found = json.loads((tmp_path / "found.json").read_text())
  assert 0 < found["eval/sentence_pair_loss"] < 3
  swapped = "--config.objective.labels=('no', 'yes', '3')"
  error = program("evaluate", *source, swapped, code=2)
  assert "made with objective.labels=['yes', 'no', '3'], not ('no'" in error
  order = "--config.objective.name=sentence_order"
  error = program("evaluate", run, order, "--config.data.row_length=16", code=2)
  assert "was asked sentence_pair, yes, no, 3 of pairs, not sente" in error
  long = json.dumps({"a": "ab", "b": "ab ba " * 40, "said": "no"}) + "\n"
  other.write_text(long)
  error = program("evaluate", *source, code=2)
  assert (
    "1 of 1 train pairs in" in error and "raise data.row_length=40" in error
  )
  folder = tmp_path / "exported"
  out = program("export", run, "--format=huggingface", f"--out={folder}")
  assert "pair: has no place there" in out
  assert "labels=('yes', 'no', '3')" in (folder / "README.md").read_text()
  assert flaxmlm.load(str(folder)).params.keys() == {"encoder", "mlm", "pooler"}


def write(path, kind):
  """Two good records, and three bad ones in the middle."""
  records = [
    {"a": "one", "b": "two", "said": "yes"},
    {"a": "one", "b": "two", "said": "perhaps"},
    {"a": "one", "b": None, "said": "no"},
    {"a": "one", "b": "two", "said": None},
    {"a": "three", "b": "four", "said": "3"},
  ]
  if kind == "parquet":
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
  elif kind == "jsonl":
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
  else:  # A table has no null: rows that lack a field.
    lines = ["\t".join(v for v in r.values() if v) for r in records]
    path.write_text("\n".join(["a\tb\tsaid", *lines]))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "tsv"])
def test_records_without_a_label_that_is_known_are_bad_ones(tmp_path, kind):
  path = tmp_path / f"pairs.{kind}"
  write(path, kind)
  bad = BadRecords()
  given = {**FIELDS, "labels": LABELS}
  found = read([str(path)], **given, on_bad_record="skip", bad=bad)
  assert [(d.text, d.pair, d.label) for d in found] == [
    ("one", "two", 0),
    ("three", "four", 2),
  ]
  assert bad.count == 3
  message = r"label 'perhaps' is none of yes, no, 3; set objective\.labels"
  with pytest.raises(InputError, match=message):
    list(read([str(path)], **given))
  with pytest.raises(InputError, match=r"no field 'c' .*set data\.pair_field"):
    list(read([str(path)], **given | {"pair_field": "c"}))
  with pytest.raises(InputError, match=r"no field 'c' .*set data\.label_field"):
    list(read([str(path)], **given | {"label_field": "c"}))


def test_a_text_without_fields_has_no_pairs(tmp_path):
  (tmp_path / "a.txt").write_text("some text")
  for source in (str(tmp_path / "a.txt"), "embedded"):
    with pytest.raises(InputError, match=r"has no fields, .*pair_field=b"):
      read([source], **FIELDS, labels=LABELS)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({}, r"wants objective\.labels, the labels"),
    ({"objective.labels": ("yes",)}, "wants 2 to 32 different labels"),
    ({"objective.labels": ("a", "b", "a")}, "names one twice"),
    ({"objective.labels": LABELS}, r"wants data\.pair_field"),
  ],
)
def test_what_sentence_pair_lacks_is_said(values, message):
  c = config.check_keys(
    {"objective.name": "sentence_pair"} | values, where="test"
  )
  with pytest.raises(InputError, match=message):
    config.validate(c)
