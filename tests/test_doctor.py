"""The doctor finds what is wrong, and nothing where nothing is."""

import json
import random

import pytest
from conftest import ROOT, program
from test_prepare import make_config

from flaxmlm import config, doctor, prepare
from flaxmlm.training import versions

WORDS = ["".join(random.Random(i).choices("abcdefgh", k=5)) for i in range(400)]


def make_run(folder, texts, lines=(), incidents=(), **values):
  """A workdir with a real store, and metrics as a run would have them."""
  source = folder / "texts.txt"
  source.write_text("\n".join(texts) + "\n")
  keys = {"train__steps": 1000, "train__batch_size": 8}
  keys |= {"optimizer__warmup_steps": 100} | values
  c = make_config(source, **keys)
  prepare.prepare_store(c, str(folder / "run" / "store"), progress=False)
  (folder / "run" / "config.json").write_text(config.to_json(c))
  for name, some in (("metrics", lines), ("incidents", incidents)):
    text = "".join(json.dumps(line) + "\n" for line in some)
    (folder / "run" / f"{name}.jsonl").write_text(text)
  return str(folder / "run")


def write_texts(count=200, length=60, seed=0, head=""):
  draw = random.Random(seed)
  return [head + " ".join(draw.choices(WORDS, k=length)) for _ in range(count)]


def metrics(steps=40, *, loss=3.0, norm=1.0, host=0.01, end=None):
  """Metrics of a run: constant, or growing towards `end` by the last step."""
  lines = []
  for step in range(25, 25 * (steps + 1), 25):
    share = step / (25 * steps)
    line = {
      "step": step,
      "train/loss": loss,
      "train/grad_norm": norm if end is None else norm * end**share,
      "train/host_share": host,
    }
    lines.append(line)
    if step % 250 == 0:
      scores = {"eval/loss": loss, "eval/unigram_entropy": 5.0}
      lines.append({"step": step, **scores})
  return lines


def names(run, *overrides):
  return [(f.name, f.level) for f in doctor.examine(run, overrides)]


@pytest.mark.parametrize(
  "path", sorted((ROOT / "configs").rglob("*.py")), ids=lambda path: path.stem
)
def test_our_configs_are_well(path):
  assert names(str(path)) == []


def test_a_healthy_run_is_well(tmp_path):
  assert names(make_run(tmp_path, write_texts(), metrics())) == []


@pytest.mark.parametrize(
  ("name", "lines"),
  [
    ("unigram line", metrics(loss=4.95)),
    ("growing gradients", metrics(end=30.0)),
    ("host-bound steps", metrics(host=0.4)),
    (
      "rising validation loss",
      metrics()
      + [{"step": 1000 + i, "eval/loss": 3 + i / 10} for i in range(1, 5)],
    ),
  ],
)
def test_what_metrics_tell(tmp_path, name, lines):
  assert names(make_run(tmp_path, write_texts(), lines)) == [(name, "warning")]


def test_what_the_text_tells(tmp_path):
  # The same beginning in a tenth of the documents.
  head = " ".join(WORDS[:60]) + " "
  texts = write_texts(180) + write_texts(20, seed=1, head=head)
  assert names(make_run(tmp_path, texts)) == [("copies", "warning")]
  one = tmp_path / "one"
  one.mkdir()
  short = write_texts(400, length=5)  # of 20 tokens or so, in rows of 256
  run = make_run(
    one, short, data__row_length=256, objective__name="next_sentence"
  )
  assert ("empty rows", "note") in names(run)


def test_what_the_tokenizer_does_not_know(tmp_path):
  first = tmp_path / "first"
  first.mkdir()
  run = make_run(first, write_texts())
  other = [text + " ñandú çağ 東京" for text in write_texts(seed=2)]
  found = names(
    make_run(tmp_path, other, tokenizer__path=f"{run}/store/tokenizer")
  )
  assert found == [("unknown tokens", "warning")]


def test_fewer_masks_than_asked_for(tmp_path):
  run = make_run(tmp_path, write_texts(), data__validation_fraction=0.3)
  lines = metrics()
  lines[-1]["eval/targets"] = 5
  (tmp_path / "run" / "metrics.jsonl").write_text(
    "".join(json.dumps(line) + "\n" for line in lines)
  )
  assert names(run) == [("few masks", "warning")]


def test_incidents_are_told(tmp_path):
  skip = {"step": 3, "kind": "non_finite"}
  run = make_run(tmp_path, write_texts(), incidents=[skip, skip])
  assert names(run) == [("incidents", "note")]
  back = {"step": 9, "kind": "rollback"}
  run = make_run(tmp_path, write_texts(), incidents=[skip, back])
  assert names(run) == [("incidents", "warning")]


@pytest.mark.parametrize(
  ("override", "name"),
  [
    ("optimizer.peak_lr=0.1", "learning rate"),
    ("optimizer.peak_lr=1e-7", "learning rate"),
    ("objective.rate=0.001", "masks"),
  ],
)
def test_what_a_config_tells(override, name):
  path = str(ROOT / "configs" / "bert_base.py")
  assert names(path, f"--config.{override}") == [(name, "warning")]


def test_sums_are_checked(monkeypatch):
  assert versions.adds_up()  # by what is installed for the tests
  monkeypatch.setattr(versions, "adds_up", lambda: False)
  found = names(str(ROOT / "configs" / "bert_base.py"))
  assert found == [("wrong sums", "warning")]


def test_the_program(tmp_path):
  run = make_run(tmp_path, write_texts(), metrics(host=0.4))
  file = tmp_path / "findings.json"
  said = program("doctor", run, f"--json={file}", code=1)
  [finding] = json.loads(file.read_text())
  assert finding["name"] == "host-bound steps"
  assert finding["advice"] in said or said == ""
  assert "no run there" in program("doctor", str(tmp_path), code=2)
  path = str(ROOT / "configs" / "quickstart.py")
  assert "nothing is wrong" in program("doctor", path)
