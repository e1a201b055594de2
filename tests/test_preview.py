"""Preview: each hidden token is recognised and marked for what it is."""

import html.parser
import io
import json
import re
from collections import Counter
from xml.etree import ElementTree

import jax
import numpy as np
import pytest
from rich.console import Console

from flaxmlm import config, objectives, preview
from flaxmlm.models.model import Inputs
from flaxmlm.objectives import Batch, Example
from flaxmlm.pages import rows as pages

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCAB += ["▁the", "▁cat", "s", "▁sat", "▁dog", "\x1b[31m"]
SPECIALS = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
PAD, CLS, SEP, MASK, THE, CAT, S, SAT, DOG, ESCAPE = 0, 2, 3, 4, *range(5, 11)

# Two documents and two slots of padding; of the four slots one is not used.
ORIGINAL = [CLS, THE, CAT, S, SEP, CLS, SAT, DOG, SEP, PAD, PAD]
SHOWN = [CLS, MASK, CAT, S, SEP, CLS, THE, DOG, SEP, PAD, PAD]
ROW = {
  "step": 3,
  "row": 1,
  "example": 77,
  "original_ids": ORIGINAL,
  "input_ids": SHOWN,
  "slots": [1, 6, 7, 0],
  "targets": [THE, SAT, DOG, CLS],
  "weights": [1.0, 1.0, 1.0, 0.0],
  "segments": [1] * 5 + [2] * 4 + [0] * 2,
  "positions": [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0],
  "token_types": [0] * 11,
  "flags": [1, 3, 1, 0, 1, 1, 1, 1, 1, 0, 0],
}


def tokens(ids):
  return [VOCAB[n] for n in ids]


def printed(row, **options):
  console = Console(file=io.StringIO(), width=100, **options)
  preview.show(row, tokens, SPECIALS, console, pairs={})
  return console.file.getvalue()


def test_masked_replaced_and_kept_are_told_apart():
  assert preview.hidden(ROW, mask=MASK) == {
    1: "masked",
    6: "replaced",
    7: "kept",
  }


def test_a_random_token_equal_to_the_original_counts_as_kept():
  row = ROW | {"input_ids": [*SHOWN[:6], SAT, *SHOWN[7:]]}
  assert preview.hidden(row, mask=MASK)[6] == "kept"


def test_a_row_is_printed_with_signs_borders_padding_and_counts():
  lines = [line.rstrip() for line in printed(ROW).splitlines()]
  assert lines == [
    "step 3, row 1, example 77: hidden 3 of 5 = 60.0%; 1 masked, 1 replaced,"
    " 1 kept",
    "1 │ [CLS] [MASK]‹▁the› cats [SEP]",
    "2 │ [CLS] ‹▁sat→▁the› ‹▁dog=› [SEP]",
    "  │ +2 [PAD]",
  ]


def test_each_kind_has_a_colour_of_its_own():
  text = printed(ROW, force_terminal=True, color_system="standard")
  colours = [
    text[: text.index(sign)].rpartition("\x1b[")[2]
    for sign in ("[MASK]‹", "‹▁sat", "‹▁dog")
  ]
  assert len(set(colours)) == 3
  assert "" not in colours


def test_a_row_of_padding_has_nothing_hidden():
  row = ROW | {
    "original_ids": [PAD] * 11,
    "input_ids": [PAD] * 11,
    "segments": [0] * 11,
    "weights": [0.0] * 4,
  }
  text = printed(row)
  assert "hidden 0 of 0; 0 masked" in text
  assert "+11 [PAD]" in text


@pytest.mark.parametrize("place", [2, 7])
def test_a_token_can_do_nothing_to_the_terminal(place):
  original = [*ORIGINAL[:place], ESCAPE, *ORIGINAL[place + 1 :]]
  text = printed(ROW | {"original_ids": original})
  assert "\x1b" not in text
  assert "\N{REPLACEMENT CHARACTER}[31m" in text


def test_legend_has_every_sign():
  assert preview.legend("<mask>").plain == (
    "<mask>‹cat› masked   ‹cat→dog› replaced by a random token   ‹cat=› asked"
    " for, but kept"
  )


def test_objects_are_the_rows_and_json():
  batch = Batch(
    *(
      np.array([ROW[name], ROW[name][::-1]])
      for name in ("original_ids", "segments", "positions", "flags")
    ),
    np.array([77, 78], np.int32),
  )
  shown = np.array([SHOWN, SHOWN[::-1]])
  example = Example(
    Inputs(shown, batch.segments, batch.positions, np.zeros_like(shown)),
    *(np.array([ROW[name]] * 2) for name in ("slots", "targets", "weights")),
    counts={},
    flags=batch.flags,
  )
  found = list(preview.objects(example, batch.example, step=3))
  assert json.loads(json.dumps(found[0])) == ROW | {"row": 0}
  assert found[1]["row"] == 1
  assert found[1]["example"] == 78
  assert found[1]["input_ids"] == SHOWN[::-1]


def test_counts_of_what_the_objective_really_draws():
  V, L = 500, 128
  objective = objectives.build(
    config.defaults().objective,
    row_length=L,
    vocab=SPECIALS | {"size": V},
    steps=1,
  )
  rng = np.random.default_rng(0)
  ids = rng.integers(5, V, (64, L)).astype(np.int32)
  ids[:, 0], ids[:, -1] = CLS, SEP
  ones = np.ones_like(ids)
  flags = ones.astype(np.uint8)
  batch = Batch(ids, ones, ones, flags, np.arange(64, dtype=np.int32))
  keys = jax.random.split(jax.random.key(0), 64)
  example = jax.device_get(jax.jit(objective.corrupt)(keys, batch, 0))
  kinds = []
  for row in preview.objects(example, batch.example, step=0):
    hidden = preview.hidden(row, mask=MASK)
    changed = np.flatnonzero(ids[row["row"]] != row["input_ids"])
    assert {p for p, kind in hidden.items() if kind != "kept"} == set(changed)
    assert len(hidden) == round(0.15 * (L - 2))
    kinds += hidden.values()
  # Binomial, five standard deviations of n = 64 * 19.
  for kind, share in (("masked", 0.8), ("replaced", 0.1), ("kept", 0.1)):
    bound = 5 * (share * (1 - share) / len(kinds)) ** 0.5
    assert abs(kinds.count(kind) / len(kinds) - share) < bound


# The page

HOSTILE = "<script>alert('x')</script>&\""


class Tree(html.parser.HTMLParser):
  """An HTML page as ElementTree has it; each tag must be closed in order."""

  def __init__(self, text):
    super().__init__()
    self.builder, self.open = ElementTree.TreeBuilder(), 0
    self.feed(text)
    self.close()
    assert self.open == 0
    self.root = self.builder.close()

  def handle_starttag(self, tag, attrs):
    self.builder.start(tag, dict(attrs))
    self.open += 1
    if tag == "meta":
      self.handle_endtag(tag)

  def handle_endtag(self, tag):
    assert self.builder.end(tag).tag == tag
    self.open -= 1

  def handle_data(self, data):
    self.builder.data(data)


def text_of(element):
  return "".join(element.itertext())


def page(tmp_path, rows, *, vocab=VOCAB, objective="masked"):
  """The page's tree."""
  path = tmp_path / "page.html"
  pages.write_rows(
    str(path),
    rows,
    title=f"a run of {HOSTILE}",
    command=f"python {HOSTILE}",
    tokens=lambda ids: [vocab[n] for n in ids],
    vocab=SPECIALS,
    specials=list(SPECIALS.values()),
    pairs=preview.pair_words(objective),
  )
  return Tree(path.read_text(encoding="utf-8")).root


def paragraphs(root):
  """The text of each paragraph of rows, by its name."""
  return [
    (text_of(part.find("small")), text_of(part.find("p")))
    for part in root.findall(".//article/div")
  ]


def table(root):
  """The summary: count and share by name."""
  return {
    line.find("th").text: tuple(cell.text or "" for cell in line.findall("td"))
    for line in root.findall(".//table//tr")
  }


def draw_rows(number, *, seed=0, L=64, M=20):
  """Rows of random tokens, hidden at random, of no objective in particular."""
  rng = np.random.default_rng(seed)
  for n in range(number):
    filled = int(rng.integers(L // 2, L + 1))
    ids = rng.integers(5, len(VOCAB), L)
    segments = np.where(np.arange(L) < filled // 3, 1, 2)
    for place in (0, filled // 3 - 1, filled // 3, filled - 1):
      ids[place] = rng.choice([CLS, SEP])
    ids[filled:], segments[filled:] = PAD, 0
    slots = np.sort(rng.choice(np.flatnonzero(ids > MASK), M, replace=False))
    weights = (rng.random(M) < 0.8).astype(float)
    shown = ids.copy()
    for slot in slots[weights > 0]:
      shown[slot] = rng.choice([MASK, ids[slot], rng.integers(5, len(VOCAB))])
    yield {
      "step": n // 3,
      "row": n % 3,
      "example": n,
      "original_ids": ids.tolist(),
      "input_ids": shown.tolist(),
      "slots": slots.tolist(),
      "targets": ids[slots].tolist(),
      "weights": weights.tolist(),
      "segments": segments.tolist(),
      "positions": np.arange(L).tolist(),
      "flags": (rng.integers(0, 4, L) * (segments > 0)).tolist(),
    }


def kinds_of(row):
  """(place, kind) of what is asked for, from the row's arrays."""
  ids, shown = np.array(row["original_ids"]), np.array(row["input_ids"])
  kinds = np.select(
    [shown == MASK, shown != ids], ["masked", "replaced"], "kept"
  )
  asked = np.array(row["slots"])[np.array(row["weights"]) > 0]
  return [(int(place), str(kinds[place])) for place in asked]


def test_page_has_each_hidden_token_once_with_its_kind(tmp_path):
  rows = list(draw_rows(9))
  root = page(tmp_path, rows)
  assert [h.text for h in root.iter("h2")][1:] == ["Step 0", "Step 1", "Step 2"]
  articles = list(root.iter("article"))
  for row, article in zip(rows, articles, strict=True):
    places = [
      int(re.match(r"place (\d+),", mark.get("title"))[1])
      for mark in article.iter("mark")
    ]
    kinds = [mark.get("class").split()[0] for mark in article.iter("mark")]
    assert list(zip(places, kinds, strict=True)) == kinds_of(row)


def test_hovering_over_a_token_tells_place_position_and_ids(tmp_path):
  (article,) = page(tmp_path, [ROW]).iter("article")
  titles = [e.get("title") for e in article.iter() if e.get("title")]
  assert titles == [
    "place 0, position 0: [CLS] = 2",
    "place 1, position 1: ▁the = 5, read as [MASK] = 4",
    "place 2, position 2: ▁cat = 6",
    "place 3, position 3: s = 7",
    "place 4, position 4: [SEP] = 3",
    "place 5, position 0: [CLS] = 2",
    "place 6, position 1: ▁sat = 8, read as ▁the = 5",
    "place 7, position 2: ▁dog = 9",
    "place 8, position 3: [SEP] = 3",
  ]


def test_a_paragraph_a_document_and_padding_as_a_count(tmp_path):
  root = page(tmp_path, [ROW])
  assert paragraphs(root) == [
    ("1", "[CLS] the cats [SEP]"),
    ("2", "[CLS] sat→the dog [SEP]"),
  ]
  (padding,) = root.findall(".//article/p")
  assert padding.text == "+ 2 [PAD]"
  assert text_of(root.find(".//article/h3")) == (
    "Row 1 example 77; hidden 3, 60.0 % of 5: 1 masked, 1 replaced, 1 kept"
  )


def test_hidden_neighbours_are_one_unit_with_spaces_between_words(tmp_path):
  row = ROW | {
    "slots": [2, 3, 6, 7],
    "weights": [1.0] * 4,
    "input_ids": [CLS, THE, MASK, MASK, SEP, CLS, MASK, MASK, SEP, PAD, PAD],
    "flags": [1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0],
  }
  runs = page(tmp_path, [row]).findall('.//article//span[@class="run"]')
  assert [[text_of(mark) for mark in run] for run in runs] == [
    ["cat", "s"],
    ["sat", " dog"],
  ]


def test_hidden_neighbours_of_two_documents_are_two_units(tmp_path):
  row = ROW | {"original_ids": [CLS, THE, CAT, S, SAT, SAT, *ORIGINAL[6:]]}
  row |= {"slots": [4, 5, 6, 0], "input_ids": [CLS, THE, CAT, S] + [MASK] * 7}
  root = page(tmp_path, [row])
  runs = root.findall('.//article//span[@class="run"]')
  assert [text_of(run) for run in runs] == ["sat", "sat sat"]
  assert table(root)["Runs of hidden tokens"] == (
    "2",
    "1.50 words each, on average",
  )


def test_what_comes_from_outside_is_escaped(tmp_path):
  vocab = [*VOCAB[:5], *[HOSTILE] * 6]
  root = page(tmp_path, [ROW], vocab=vocab)
  assert list(root.iter("script")) == []
  # Six tokens, one of them twice, and their names.
  (article,) = root.iter("article")
  titles = [e.get("title") or "" for e in article.iter()]
  assert text_of(article).count(HOSTILE) == 6
  assert sum(title.count(HOSTILE) for title in titles) == 6
  for tag in ("title", "h1", "code"):
    assert HOSTILE in text_of(root.find(f".//{tag}"))


def test_page_needs_nothing_else(tmp_path):
  root = page(tmp_path, [ROW])
  tags = {element.tag for element in root.iter()}
  assert not tags & {"script", "link", "img", "iframe"}
  assert not {"src", "href"} & {name for e in root.iter() for name in e.attrib}
  assert "url(" not in root.find(".//style").text
  policy = [meta.get("content") for meta in root.iter("meta")]
  assert "default-src 'none'; style-src 'unsafe-inline'" in policy


def test_summary_equals_a_recount(tmp_path):
  rows = list(draw_rows(8, seed=1))
  found = table(page(tmp_path, rows))
  kinds, runs, words, maskable, padding = Counter(), 0, 0, 0, 0
  for row in rows:
    asked = dict(kinds_of(row))
    kinds.update(asked.values())
    padding += sum(segment == 0 for segment in row["segments"])
    maskable += sum(token > MASK for token in row["original_ids"])
    for place in asked:
      # Special tokens keep the hidden ones of two documents apart.
      first = place - 1 not in asked
      runs += first
      words += first or row["flags"][place] % 2
  places, hidden = 8 * 64, sum(kinds.values())
  assert min(kinds.values()) > 10 and runs < hidden

  def line(count, whole, of):
    return f"{count:,}", f"{100 * count / whole:.1f} % of {whole:,} {of}"

  assert found == {
    "Tokens": (f"{places - padding:,}", ""),
    "Padding": line(padding, places, "places"),
    "Hidden": line(hidden, maskable, "that may be hidden"),
    "Masked": line(kinds["masked"], hidden, "hidden"),
    "Replaced": line(kinds["replaced"], hidden, "hidden"),
    "Kept": line(kinds["kept"], hidden, "hidden"),
    "Runs of hidden tokens": (
      f"{runs}",
      f"{words / runs:.2f} words each, on average",
    ),
  }


def test_a_row_of_padding_and_no_row_have_no_shares(tmp_path):
  row = ROW | {"segments": [0] * 11, "weights": [0.0] * 4}
  row["original_ids"] = row["input_ids"] = [PAD] * 11
  assert table(page(tmp_path, [row]))["Hidden"] == (
    "0",
    "– of 0 that may be hidden",
  )
  assert table(page(tmp_path, []))["Padding"] == ("0", "– of 0 places")


def test_segments_of_a_pair_are_told_apart_and_its_label_is_in_words(tmp_path):
  pair = ROW | {"segments": [1] * 9 + [0] * 2, "pair_label": 1}
  pair["token_types"] = [0] * 5 + [1] * 4 + [0] * 2
  none = ROW | {"pair_label": -1, "token_types": [0] * 11}
  rows = [pair, pair | {"pair_label": 0}, pair, none]
  root = page(tmp_path, rows, objective=("span", "next_sentence"))
  assert paragraphs(root)[:2] + paragraphs(root)[-2:] == [
    ("A", "[CLS] the cats [SEP]"),
    ("B", "[CLS] sat→the dog [SEP]"),
    ("1", "[CLS] the cats [SEP]"),
    ("2", "[CLS] sat→the dog [SEP]"),
  ]
  tinted = root.findall('.//article/div[@class="part b"]')
  assert [text_of(part.find("small")) for part in tinted] == ["B"] * 3
  heads = [text_of(head) for head in root.findall(".//article/h3")]
  said = ["another document", "goes on from A", "another document", "be made"]
  for head, words in zip(heads, said, strict=True):
    assert head.endswith(words)
  found = table(root)
  assert found["B is from another document"] == ("2", "50.0 % of 4 rows")
  assert found["B goes on from A"] == ("1", "25.0 % of 4 rows")
  assert found["No pair could be made"] == ("1", "25.0 % of 4 rows")


def test_code_keeps_its_lines_and_what_is_blank_is_seen(tmp_path):
  vocab = [*VOCAB[:5], "def", "Ġf", "():", "Ċ", "ĠĠĠ", "Ġreturn"]
  ids = [CLS, 5, 6, 7, 8, 9, 10, 8, 9, 10, SEP]
  row = ROW | {"original_ids": ids, "segments": [1] * 11, "positions": [0] * 11}
  row |= {"flags": [1, 1, 1, 0, *[1] * 7], "weights": [1.0, 1.0, 0.0, 0.0]}
  row |= {"slots": [7, 8, 0, 0], "input_ids": [*ids[:7], MASK, MASK, 10, SEP]}
  ((_, text),) = paragraphs(page(tmp_path, [row], vocab=vocab))
  assert text == "[CLS] def f():\n    returnĊ\nĠĠĠ return [SEP]"
