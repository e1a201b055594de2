"""The page of a run: true in words, whole whatever is missing, safe."""

import html.parser
import math
import os
import re

import numpy as np
import pytest

from flaxmlm.models import Inputs
from flaxmlm.objectives import Example
from flaxmlm.training import report

BASELINES = {"eval/unigram_entropy": 6.03, "eval/uniform_entropy": 7.62}
HOSTILE = "<script>alert('x')</script>&\""


def lines(steps=range(10, 101, 10), **extra):
  return [
    {
      "step": step,
      "train/loss": 7.0 - step / 50,
      "train/accuracy": step / 400,
      "train/learning_rate": 1e-3,
      "train/grad_norm": 1.0,
      "train/tokens_per_second": 1000.0,
      "train/mfu": 0.25,
      "train/host_share": 0.01,
      **extra,
    }
    for step in steps
  ]


def evaluation(step, loss):
  return {
    "step": step,
    "eval/loss": loss,
    "eval/accuracy": 0.274,
    "eval/perplexity": math.exp(loss),
    **BASELINES,
  }


FULL = [*lines(), evaluation(100, 4.0)]


def page(tmp_path, **arguments):
  path = str(tmp_path / "report.html")
  given = {"facts": {}, "metrics": [], "config": {}, "examples": []}
  report.write(path, **{"title": "a run", **given, **arguments})
  with open(path, encoding="utf-8") as file:
    return file.read()


@pytest.fixture(scope="module")
def full(tmp_path_factory):
  """The page of a run that lacks nothing; drawing costs a second."""
  return page(tmp_path_factory.mktemp("full"), metrics=FULL)


class Outline(html.parser.HTMLParser):
  """What a browser would find: tags, attributes; open tags must be closed."""

  VOID = {"meta", "br", "path", "use", "rect"}

  def __init__(self, text):
    super().__init__()
    self.found, self.open = [], []
    self.feed(text)
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    self.found.append((tag, dict(attrs)))
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    if tag not in self.VOID:
      assert self.open.pop() == tag

  def handle_startendtag(self, tag, attrs):
    self.found.append((tag, dict(attrs)))

  def count(self, tag):
    return sum(found == tag for found, _ in self.found)


def test_headline_of_a_run_that_learned():
  metrics = [*lines(), evaluation(50, 5.0), evaluation(2000, 4.31)]
  assert report.headline(metrics) == (
    "After 2,000 steps the validation loss is 4.31 nats: 1.72 below the unigram"
    " entropy (6.03) and 3.31 below ln V (7.62). It predicts 27.4 % of hidden"
    " tokens."
  )


@pytest.mark.parametrize(
  ("loss", "learned"), [(5.92, True), (5.94, False), (6.2, False), (8, False)]
)
def test_headline_says_when_only_frequencies_are_learnt(loss, learned):
  text = report.headline([evaluation(500, loss)])
  assert text.startswith("Nothing beyond word frequencies") == (not learned)
  side = "above" if loss > 6.03 else "below"
  assert f"{abs(loss - 6.03):.2f} {side} the unigram entropy (6.03)" in text


@pytest.mark.parametrize(
  ("metrics", "text"),
  [
    ([], "No loss has been logged yet."),
    ([{"step": 3}], "No loss has been logged yet."),
    (lines([1]), "After 1 step the training loss is 6.98 nats. It has not"),
    ([{"step": 7, "eval/loss": 4.0}], "After 7 steps the validation loss is"),
    ([evaluation(10, math.nan)], "not a finite number at step 10: the run has"),
    ([evaluation(10, math.inf)], "the run has diverged"),
    (lines([9], **{"train/loss": None}), "the run has diverged"),
  ],
)
def test_headline_without_an_evaluation_or_a_number(metrics, text):
  assert text in report.headline(metrics)


def test_a_step_that_was_run_again_counts_once_by_its_later_line():
  metrics = [evaluation(20, 5.0), evaluation(10, 5.5), evaluation(20, 4.0)]
  assert "After 20 steps the validation loss is 4.00" in report.headline(
    metrics
  )


@pytest.mark.parametrize(
  ("metrics", "plots", "said"),
  [
    ([], 0, "metrics.jsonl is empty"),
    (lines(), 6, "No evaluation has been logged"),
    (lines([10]), 6, "No evaluation has been logged"),
    ([evaluation(100, 4.0)], 2, "train/grad_norm"),
    (
      lines(**{"train/grad_norm": math.inf}),
      5,
      "train/grad_norm is not a finite number in 10 of 10 lines, first at step"
      " 10.",
    ),
    (
      [{"step": 1, "train/grad_norm": 0.0}, {"train/loss": 1.0}],
      1,
      "1 lines of the metrics have no step",
    ),
    (
      [{"step": 1, "train/mfu": 0.5, "train/tokens_per_second": math.nan}],
      1,
      "train/tokens_per_second is not a finite number in 1 of 1 lines",
    ),
  ],
)
def test_page_is_whole_and_says_what_is_missing(tmp_path, metrics, plots, said):
  text = page(tmp_path, metrics=metrics)
  outline = Outline(text)
  assert outline.count("figure") == 6
  assert outline.count("svg") == plots
  assert text.count("No values in the metrics.") == 6 - plots
  assert said in text


def test_page_of_a_run_that_lacks_nothing(full):
  assert Outline(full).count("svg") == 6
  assert "Missing or not finite" not in full


def test_baselines_are_labelled_on_the_plot(full):
  loss = full[full.index("<svg") : full.index("</svg>")]
  assert ">word frequencies alone: 6.03</text>" in loss
  assert ">ln V, a uniform guess: 7.62</text>" in loss


def test_what_else_is_asked_has_plots_beside_chance(tmp_path):
  shares = {"eval/discriminator_replaced": 0.15}
  found = {f"{kind}/{task}_{name}": 0.8
           for kind in ("train", "eval")
           for task in ("discriminator", "sentence_order", "sentence_pair")
           for name in ("loss", "accuracy")}  # fmt: skip
  text = page(
    tmp_path,
    metrics=[*lines(**found), evaluation(100, 4.0) | found | shares],
    tasks=["discriminator", "sentence_order", "sentence_pair"],
  )
  assert Outline(text).count("svg") == 6 + 2 * 3
  assert "Missing or not finite" not in text
  # -0.15 ln 0.15 - 0.85 ln 0.85, all called true; ln 2, a coin.
  levels = re.findall(r">chance: ([\d.]+)</text>", text)
  assert levels == ["0.42", "85.00", "0.69", "50.00"]
  assert '<th scope="col">sentence_pair accuracy</th>' in text
  names = re.findall(r'\bid="([^"]*)"', text)
  assert len(names) == len(set(names))


def test_gradient_norm_is_logarithmic_where_it_spans(tmp_path):
  wide = [{"step": n, "train/grad_norm": 10.0**n} for n in range(4)]
  narrow = [{"step": n, "train/grad_norm": 1.0 + n} for n in range(4)]
  labels = [
    re.findall(r">([\d,.]+)</text>", page(tmp_path, metrics=metrics))
    for metrics in (wide, narrow)
  ]
  assert {"1", "10", "100", "1000"} <= set(labels[0])
  assert "10" not in labels[1]


def test_plots_are_told_in_words(full):
  plots = [attrs for tag, attrs in Outline(full).found if tag == "svg"]
  assert all(plot["role"] == "img" for plot in plots)
  assert "eval/loss: 4 at step 100" in plots[0]["aria-label"]
  assert "between 5 and 6.8" in plots[0]["aria-label"]


def test_plots_follow_the_page_from_light_to_dark(full):
  for svg in re.findall("<svg.*?</svg>", full, re.DOTALL):
    assert "var(--muted)" in svg
    assert re.findall("#[0-9a-f]{6};", svg) == []


def test_names_of_shapes_are_unique_in_the_page(full):
  names = re.findall(r' id="([^"]*)"', full)
  used = re.findall(r'(?:url\(|href=")#([^")]*)', full)
  assert len(names) == len(set(names))
  assert set(used) <= set(names)


def test_page_needs_nothing_else(full):
  for tag, attrs in Outline(full).found:
    assert tag not in ("script", "link", "img", "iframe")
    assert "src" not in attrs
    for name in ("href", "xlink:href"):
      assert attrs.get(name, "#").startswith("#")
  assert "@import" not in full
  assert re.findall(r"url\((?!#)", full) == []


def test_what_comes_from_outside_is_escaped(tmp_path):
  text = page(
    tmp_path,
    title=HOSTILE,
    facts={HOSTILE: HOSTILE},
    config={HOSTILE: HOSTILE},
    examples=[
      {
        "tokens": [HOSTILE, "▁b", HOSTILE],
        "slots": [0],
        "before": [[[HOSTILE, 0.5]]],
        "after": [],
      }
    ],
  )
  assert Outline(text).count("script") == 0
  assert "<script" not in text
  # Title and heading; name and value, twice; text, truth and guess.
  assert text.count("&lt;script&gt;") == 2 + 4 + 4


def test_same_input_same_bytes_whatever_one_s_matplotlibrc(full, tmp_path):
  import matplotlib

  with matplotlib.rc_context({"font.size": 30, "axes.grid": False}):
    assert page(tmp_path, metrics=FULL) == full
    assert matplotlib.rcParams["font.size"] == 30


def test_a_page_is_replaced_whole_or_stays(tmp_path, monkeypatch):
  before = page(tmp_path, title="first")

  def fail(*_):
    raise OSError("disk full")

  monkeypatch.setattr(os, "replace", fail)
  with pytest.raises(OSError, match="disk full"):
    page(tmp_path, title="second")
  assert os.listdir(tmp_path) == ["report.html"]
  assert (tmp_path / "report.html").read_text(encoding="utf-8") == before


def test_examples_mark_right_and_wrong_by_sign(tmp_path):
  tokens = ["[CLS]", "▁a", "▁cat", "▁sat", "[SEP]", "[PAD]", "[PAD]", "[PAD]"]
  example = {
    "tokens": tokens,
    "slots": [1, 3],
    "before": [[["▁x", 0.1], ["▁a", 0.05]], [["▁sat", 0.2], ["▁y", 0.1]]],
    "after": [[["▁a", 0.9], ["▁x", 0.05]], [["▁y", 0.6], ["▁z", 0.1]]],
  }
  text = page(tmp_path, examples=[example])
  assert "1 of 2 right before training, 1 of 2 right after training" in text
  assert '<mark class="right">a<sup>1✓</sup></mark>' in text
  assert '<mark class="wrong">sat<sup>2✗</sup></mark>' in text
  assert "[PAD] × 3" in text
  rows = re.findall(r'<tr><th scope="row">\d</th>.*?</tr>', text)
  plain = [re.sub(r"\s+", " ", re.sub("<.*?>", " ", row)) for row in rows]
  assert plain == [
    " 1 ▁a ▁x 10.0 % ✓ ▁a 5.0 % ✓ ▁a 90.0 % ▁x 5.0 % ",
    " 2 ▁sat ✓ ▁sat 20.0 % ▁y 10.0 % ▁y 60.0 % ▁z 10.0 % ",
  ]
  Outline(text)


def test_guesses_leave_out_unused_slots_and_rows_of_padding():
  ids = np.array([[0, 5, 6, 1], [9, 9, 9, 9]], np.int32)
  segments = np.array([[1, 1, 1, 1], [0, 0, 0, 0]], np.int32)
  flat = np.zeros_like(ids)
  example = Example(
    Inputs(ids, segments, flat, flat),
    np.array([[2, 0], [0, 0]]),
    np.array([[6, 0], [0, 0]]),
    np.array([[1.0, 0.0], [0.0, 0.0]], np.float32),
    counts={},
    flags=flat.astype(np.uint8),
  )
  found = report.guesses(
    example,
    np.full((2, 2, 2), 0.25, np.float32),
    np.array([[[6, 5], [7, 7]], [[8, 8], [8, 8]]]),
    tokens=lambda ids: [f"t{n}" for n in ids],
  )
  assert found == [
    {
      "tokens": ["t0", "t5", "t6", "t1"],
      "slots": [2],
      "guesses": [[["t6", 0.25], ["t5", 0.25]]],
    }
  ]
