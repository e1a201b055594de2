"""Config: what is taken, what is refused, and in which words."""

import errno
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from flaxmlm import InputError, config
from flaxmlm.interop import families


def load(*overrides: str, path=None):
  c = config.load(path, [f"--config.{o}" for o in overrides])
  config.validate(c)
  return c


@pytest.mark.parametrize(
  ("override", "key", "value"),
  [
    ("train.steps=1e6", "train.steps", 1_000_000),
    ("optimizer.peak_lr=1e-3", "optimizer.peak_lr", 1e-3),
    ("optimizer.peak_lr=1", "optimizer.peak_lr", 1.0),
    ("optimizer.clip_norm=None", "optimizer.clip_norm", None),
    ("data.cleaning.html=true", "data.cleaning.html", True),
    ("data.source=('embedded', 'tests')", "data.source", ("embedded", "tests")),
    ("data.source=embedded", "data.source", "embedded"),
    ("mesh.data=-1", "mesh.data", -1),
    ("tokenizer.kind=bpe", "tokenizer.kind", "bpe"),
  ],
)
def test_every_type_is_read_from_the_command_line(override, key, value):
  got = config.to_flat(load(override))[key]
  assert got == value and type(got) is type(value)


def test_weights_are_a_tuple_of_floats():
  c = load("data.source=('embedded','tests')", "data.weights=(1, 2)")
  assert c.data.weights == (1.0, 2.0)


@pytest.mark.parametrize(
  ("overrides", "words"),
  [
    (["train.stpes=5"], "train.stpes; did you mean train.steps?"),
    (["widht=5"], "did you mean model.width?"),
    (["train.steps=many"], "train.steps=many: wants an integer"),
    (["train.steps=1.5"], "train.steps=1.5: wants an integer"),
    (["train.steps=True"], "wants an integer"),
    (["train.steps=None"], "wants an integer"),
    (["optimizer.peak_lr=-1"], "must be at least 0"),
    (["optimizer.peak_lr=nan"], "wants a number"),
    (["data.cleaning.html=maybe"], "wants True or False"),
    (["optimizer.name=adam"], "did you mean adamw?"),
    (["data.source=nowhere/*.txt"], "data.source=nowhere/*.txt: no such file"),
    (["data.store=nowhere"], "data.store=nowhere: no store"),
    (["tokenizer.path=nowhere"], "tokenizer.path=nowhere: no such file"),
    (["model.heads=7"], "model.heads=7 doesn't divide model.width=768"),
    (["data.row_length=1024"], "longer than model.max_positions=512"),
    (["model.attention=flash"], "wants one of auto, xla, splash, cudnn"),
    (["model.attention=splash"], "set model.attention_dropout=0"),
    (
      ["model.attention=splash", "model.attention_dropout=0"],
      "data.row_length=128 is less than 512",
    ),
    (
      ["model.attention=cudnn", "model.attention_dropout=0"],
      "set train.dtype=bfloat16",
    ),
    (
      [
        "model.attention=cudnn",
        "model.attention_dropout=0",
        "train.dtype=bfloat16",
        "model.heads=4",
      ],
      "not 192 (model.width / model.heads)",
    ),
    (["train.max_bad_steps=0"], "train.max_bad_steps=0: must be at least 1"),
    (["train.max_rollbacks=-1"], "train.max_rollbacks=-1: must be at least 1"),
    (["train.on_divergence=pray"], "train.on_divergence"),
    (
      ["train.on_divergence=rollback", "checkpoint.every=0"],
      "train.on_divergence=rollback wants checkpoints to go back to",
    ),
    (["tokenizer.vocab_size=4"], "tokenizer.vocab_size=4: must be at least 8"),
    (["train.batch_size=250"], "doesn't divide by the 8 devices"),
    (["train.microbatches=3"], "train.microbatches=3 doesn't divide"),
    (["mesh.data=3"], "doesn't fit 8 devices"),
    (["mesh.data=-1", "mesh.fsdp=-1"], "only one axis"),
    (["mesh.tensor=0"], "0 devices"),
    (["train.steps={[]}"], "wants an integer"),
    ([f"seed=1{'0' * 400}"], "wants an integer"),
    (["optimizer.warmup_steps=10", "train.steps=5"], "more than train.steps"),
    (
      ["objective.mask_share=0.9", "objective.random_share=0.2"],
      "is more than 1",
    ),
    (["data.weights=(1,2)"], "2 numbers for 1 sources"),
    (["train=5"], "unknown key train"),
    (
      ["model.family=albert", "model.layers=2", "model.num_hidden_groups=3"],
      "num_hidden_groups=3 is more than model.layers=2",
    ),
  ],
)
def test_a_bad_key_is_one_line_that_names_it(overrides, words):
  with pytest.raises(InputError) as error:
    load(*overrides)
  assert words in str(error.value) and "\n" not in str(error.value)


def test_batches_are_checked_against_the_devices_there_are():
  c = config.defaults()
  c.train.batch_size = 12
  with pytest.raises(InputError, match="8 devices"):
    config.validate(c, devices=8)
  config.validate(c, devices=4)


@pytest.mark.parametrize(
  ("overrides", "words"),
  [
    (["mesh.tensor=5"], "mesh.tensor=5 doesn't divide model.heads=12"),
    (["mesh.fsdp=3"], "doesn't divide by the 3 devices"),
  ],
)
def test_what_no_number_of_devices_fits_is_refused(
  monkeypatch, overrides, words
):
  monkeypatch.delenv("XLA_FLAGS")  # nobody says how many there are
  with pytest.raises(InputError, match=words):
    load(*overrides)


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("c.train.stpes = 5", ":5: "),
    ("c.train.steps = 'x'", "train.steps='x': wants an integer"),
    ("1 / 0", ":5: division by zero"),
    ("return 3", "returned no ConfigDict"),
    ("c.new = 1", ":5: "),
    ("if", ":5: "),
  ],
)
def test_a_broken_config_file_is_one_line_with_its_place(tmp_path, text, words):
  path = tmp_path / "broken.py"
  path.write_text(
    "from flaxmlm.config import defaults\n\ndef get_config():\n"
    f"  c = defaults()\n  {text}\n  return c\n"
  )
  with pytest.raises(InputError) as error:
    load(path=str(path))
  assert "broken.py" in str(error.value) and words in str(error.value)
  assert "\n" not in str(error.value)


def test_json_brings_the_same_config_back(tmp_path):
  c = load("optimizer.clip_norm=None", "data.source=('embedded', 'tests')")
  path = tmp_path / "config.json"
  path.write_text(config.to_json(c))
  assert config.differences(c, config.from_json(str(path))) == []
  assert config.differences(c, load("seed=3"))[0] == "seed: 0 -> 3"


@pytest.mark.parametrize("name", sorted(os.listdir(ROOT / "configs")))
def test_every_config_in_the_repository_is_valid(name):
  if name.endswith(".py"):
    c = config.load(str(ROOT / "configs" / name))
    # The fewest: data is the rest everywhere.
    config.validate(c, devices=c.mesh.fsdp * c.mesh.tensor)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "kind", "published"),
  [
    (
      "roberta_base",
      "RobertaConfig",
      # What roberta-base's config.json has otherwise than the class.
      {
        "max_position_embeddings": 514,
        "layer_norm_eps": 1e-5,
        "type_vocab_size": 1,
      },
    ),
    ("modernbert_base", "ModernBertConfig", {}),
  ],
)
def test_the_architectures_are_the_published_ones(name, kind, published):
  transformers = pytest.importorskip("transformers")
  theirs = getattr(transformers, kind)(**published)
  c = config.load(str(ROOT / "configs" / f"{name}.py"))
  want = families.read_config(theirs.to_dict(), kind)[1]
  got = {key: c.model[key] for key in want}
  # Both mean the family's own number.
  got["segment_types"] = got["segment_types"] or want["segment_types"]
  dropouts = {"dropout", "attention_dropout"}
  assert {k: v for k, v in got.items() if k not in dropouts} == {
    k: v for k, v in want.items() if k not in dropouts
  }
  assert c.tokenizer.vocab_size == theirs.vocab_size


def test_a_full_disk_is_one_line():
  code = """
from flaxmlm import config
def main():
  with open("/dev/full", "w") as file:
    file.write("a line of metrics")
config.run(main)
"""
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 1
  assert done.stderr.count("\n") == 1
  assert "No space left on device" in done.stderr


def test_the_best_need_a_loss_each():
  c = config.defaults()
  c.checkpoint.keep_best, c.checkpoint.every = 2, 1500
  with pytest.raises(InputError, match=r"multiple of eval\.every=1000"):
    config.validate(c)
  c.checkpoint.every = 2000
  config.validate(c)


def test_docs_are_what_the_code_says():
  docs = (ROOT / "docs" / "config.md").read_text()
  assert docs == "\n".join(config.markdown()) + "\n", (
    "stale: python -m flaxmlm.config > docs/config.md"
  )


def test_a_mistake_ends_with_code_2_before_jax_is_imported(tmp_path):
  done = subprocess.run(
    [
      *(sys.executable, "-X", "importtime", "-m", "flaxmlm.train"),
      *("--config=configs/quickstart.py", f"--workdir={tmp_path}/run"),
      "--config.model.heads=3",
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  errors = [x for x in done.stderr.splitlines() if "import time:" not in x]
  assert done.returncode == 2
  assert errors == ["error: model.heads=3 doesn't divide model.width=128"]
  assert " jax" not in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("number", "remedy"),
  [(errno.ENOSPC, "make room"), (errno.EACCES, "let this user there")]
  + [(errno.EROFS, "mount it to be written"), (errno.EIO, "see to the disk")],
)
def test_what_a_disk_refuses_is_one_line(capsys, number, remedy):
  def main():
    raise OSError(number, os.strerror(number), "runs/a/metrics.jsonl")

  with pytest.raises(SystemExit, match="1"):
    config.run(main)
  error = capsys.readouterr().err
  assert error.count("\n") == 1 and "'runs/a/metrics.jsonl'" in error
  assert error.endswith(f"; {remedy}, and start again\n")
