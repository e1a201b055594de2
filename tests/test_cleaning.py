"""Cleaning: each step against a truth of its own, and real messes."""

from __future__ import annotations

import hashlib
import os
import pathlib
import random
import sys
import textwrap
import unicodedata
from collections import Counter

import ftfy
import pytest
from ftfy.chardata import CHARMAP_ENCODINGS

from flaxmlm.data import cleaning

DATA = pathlib.Path(os.environ.get("FLAXMLM_DATA", "../shared/data"))

OFF = {
  "html": False,
  "mojibake": False,
  "unicode": "none",
  "control": False,
  "unwrap": False,
  "whitespace": False,
  "min_chars": 1,
}
DEFAULT = {
  **OFF,
  "mojibake": True,
  "unicode": "NFC",
  "control": True,
  "whitespace": True,
}


def clean(text: str, **options: object) -> str | None:
  return cleaning.clean(text, {**OFF, **options}, Counter())


def test_a_real_novel_comes_out_without_its_mess():
  path = DATA / "novels" / "Ford_Soldier_1915.txt"
  if not path.exists():
    pytest.skip("no real novels: set FLAXMLM_DATA")
  raw = path.read_bytes().decode("utf-8")
  assert "\r\n" in raw and raw.startswith("\ufeff")  # what the test is for
  text = cleaning.clean(raw, DEFAULT, Counter())
  assert text.split() == raw.removeprefix("\ufeff").split()
  assert text == text.strip()
  for bad in ("\r", "\t", "  ", " \n", "\n\n\n", "\ufeff"):
    assert bad not in text


def test_cleaning_twice_is_cleaning_once():
  messes = [
    "schÃ¶n\u200b \t a\u0308\r\n\r\n\r\nx\u3000y\x00\u2028z \n",
    "  â€œquotedâ€\x9d  — ok\x85next ",
    "e\u200b\u0301 \ufeff\u202aabc\u202c",
  ]
  for mess in messes:
    once = cleaning.clean(mess, DEFAULT, Counter())
    assert cleaning.clean(once, DEFAULT, Counter()) == once


def test_counts_say_what_each_step_changed():
  counts = Counter()
  for text in ("plain", "a  b", "a  b\u200b", "schÃ¶n", "a\u0308"):
    cleaning.clean(text, DEFAULT, counts)
  expected = {"whitespace": 2, "control": 1, "mojibake": 1, "unicode": 1}
  assert counts == expected


def test_steps_that_are_off_leave_the_text_alone():
  mess = "<b>schÃ¶n</b>  a\u0308\u200b\r\n\r\n\r\n &amp; "
  assert clean(mess) == mess


def test_short_documents_are_dropped_by_what_is_left_of_them():
  counts = Counter()
  options = {**DEFAULT, "min_chars": 4}
  assert cleaning.clean("  abc  \n", options, counts) is None
  assert cleaning.clean("  abcd \n", options, counts) == "abcd"
  assert cleaning.clean(" \u200b\n", {**DEFAULT}, counts) is None
  assert counts["too_short"] == 2
  # With white space left as it is, blanks still aren't text.
  assert clean("   \n  ", min_chars=2) is None


# --- mojibake ---------------------------------------------------------------


def test_mojibake_is_repaired_line_by_line():
  broken = "Zu schön.\nEs ist schÃ¶n.\nâ€œSo it isâ€\x9d\nПривет"
  fixed = "Zu schön.\nEs ist schön.\n“So it is”\nПривет"
  assert clean(broken, mojibake=True) == fixed


def test_the_quick_look_misses_nothing_that_ftfy_repairs():
  lines = [
    "Über größere Maßnahmen – „schön“ … Äpfel, Öl",
    "L’été, « à Noël » : où est l'œuvre ? Ça coûte 5 €… déjà\xa0!",
    "Война и мир — «Анна Каренина», ёлка, В 1812 году… №5",
    "Ελληνικά: «Όμηρος», ΒΓΞΟ είναι ώρα",
    "žluťoučký kůň úpěl ďábelské ódy – „Příliš“; Łódź, żółć",
    "中文：“你好”……《红楼梦》——第１回 日本語「こんにちは」",
    "naïve café — “quoted” ‘single’ … £5 ½ °C × ² ™ © 😀👨‍👩‍👧",
    "Tiếng Việt: đường, nghĩa; Ağaç, İstanbul; עברית العربية",
  ]
  draw = random.Random(0)
  repaired = 0
  for _ in range(3000):
    line = draw.choice(lines)
    for _ in range(draw.choice([1, 1, 2])):
      start = draw.randrange(len(line))
      end = start + draw.randint(1, 60)
      wrong = line[start:end].encode()
      wrong = wrong.decode(draw.choice(CHARMAP_ENCODINGS), "replace")
      if draw.random() < 0.3:  # The damage of a later hand.
        wrong = wrong.replace("\xa0", " ").replace("\ufffd", "?")
      line = line[:start] + wrong + line[end:]
    if "\n" in line:
      continue
    expected = ftfy.fix_encoding(line)
    repaired += expected != line
    assert cleaning.repair_mojibake(line) == expected
  assert repaired > 500


# --- control, unicode -------------------------------------------------------


def test_what_shapes_words_and_emoji_stays():
  for kept in (
    "👨\u200d👩\u200d👧",  # a family
    "می\u200cخواهم",  # Persian, "I want"
    "क\u094d\u200dष",  # Devanagari with a half form
    "❤\ufe0f",  # a red heart
    "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",  # England
    "a\tb\nc",
  ):
    assert clean(kept, control=True) == kept


def test_every_control_and_invisible_character_is_removed():
  kept = {0x09, 0x0A, 0x180E, 0x200C, 0x200D}
  line_ends = {0x0B, 0x0C, 0x0D, 0x85, 0x2028, 0x2029}
  for code in range(0x3000):
    char = chr(code)
    hidden = unicodedata.category(char) in ("Cc", "Cf", "Zl", "Zp")
    # Letters of Arabic, Syriac and Kaithi script are shown though they are Cf.
    shown = 0x600 <= code <= 0x605 or code in (
      0x6DD,
      0x70F,
      0x890,
      0x891,
      0x8E2,
    )
    result = clean(f"a{char}b", control=True)
    if code in line_ends:
      assert result == "a\nb", hex(code)
    elif hidden and not shown and code not in kept:
      assert result == "ab", hex(code)
    else:
      assert result == f"a{char}b", hex(code)


def test_line_ends_of_all_systems_become_one():
  assert clean("a\r\nb\rc\nd\r\n\r\ne", control=True) == "a\nb\nc\nd\n\ne"


def test_halves_of_characters_never_get_through():
  for control in (False, True):
    text = clean("cut \ud83d off", control=control)
    assert text.encode("utf-8") == b"cut  off"
  # A whole character is none of them.
  assert clean("\U0001f600") == "\U0001f600"


def test_unicode_forms():
  decomposed = unicodedata.normalize("NFD", "Größe 각 ﬁ")
  assert clean(decomposed, unicode="NFC") == "Größe 각 ﬁ"
  assert clean(decomposed, unicode="NFKC") == "Größe 각 fi"
  # What an invisible character kept apart is composed once that is gone.
  assert clean("e\u200b\u0301", control=True, unicode="NFC") == "é"


# --- whitespace -------------------------------------------------------------


def test_white_space_against_a_slow_version():
  draw = random.Random(1)
  pieces = [
    "a",
    "bc",
    " ",
    "  ",
    "\t",
    "\n",
    "\n\n",
    "\xa0",
    "\u3000",
    "\u2009",
  ]
  for _ in range(500):
    text = "".join(draw.choices(pieces, k=draw.randint(1, 30)))
    lines = text.split("\n")
    slow = "\n".join(
      (" " if line[:1].isspace() and line.strip() else "")
      + " ".join(line.split())
      for line in lines
    )
    while "\n\n\n" in slow:
      slow = slow.replace("\n\n\n", "\n\n")
    assert cleaning.collapse_whitespace(text) == slow.strip()


# --- html -------------------------------------------------------------------

PAGE = """<!DOCTYPE html>
<html><head><title>Title</title><style>p { color: red }</style></head>
<body><!-- hidden -->
<h1>Soup</h1>
<p>Salt &amp; <b>pep</b>per,
  5&nbsp;&lt; 6 &eacute;&#233;&#x1F600;<br>second line
<p>unclosed <script>document.write("<p>no</p>")</script>paragraph
<ul><li>one<li><a href="?a=1&b=2">two</a></ul>
<table><tr><td>1</td><td>2</td></tr><tr><td>3<td>4</table>
<pre>for x in y:
    print(x)</pre>
<div><div>deep</div></div> tail
</body></html>"""

SHOWN = """Soup

Salt & pepper, 5\xa0< 6 éé😀
second line

unclosed paragraph

one
two

1 2
3 4

for x in y:
    print(x)

deep
tail"""


def test_a_page_becomes_the_text_it_shows():
  assert clean(PAGE, html=True) == SHOWN


def test_text_without_tags_keeps_its_lines():
  plain = "if x < y:\n\n  AT&T &amp; co > 1"
  assert clean(plain, html=True) == "if x < y:\n\n  AT&T & co > 1"


def test_pages_may_nest_more_deeply_than_the_stack():
  depth = sys.getrecursionlimit() * 2
  page = "<div>" * depth + "deep" + "</div>" * depth
  assert clean(page, html=True) == "deep"


@pytest.mark.parametrize(
  "clutter",
  [
    "<svg>" + '<path d="M0 0h9"/>' * 5000 + "</svg>",
    "<script>" + "if(a<b)c<d;" * 2500 + "</script>",
    "<img><br>" * 20_000,
  ],
)
def test_a_flat_page_keeps_its_paragraphs(clutter):
  page = f"<p>One.</p>{clutter}<p>Two.</p>" * 2
  assert clean(page, html=True).split("\n\n") == ["One.", "Two."] * 2


@pytest.mark.parametrize(
  "knot",
  [
    "<div>" * 20_000,
    "<q><div></q>" * 20_000,
    "".join(f"<font size={i}>" for i in range(2000)) + "<p>" * 2000,
    "<x>" * 20_000 + "</y>" * 20_000,
  ],
)
def test_what_would_take_the_square_is_read_without_structure(knot):
  found = clean(f"<p>One.</p><i>t</i>wo{knot}", html=True)
  assert found.split() == ["One.", "t", "wo"]


# --- unwrap -----------------------------------------------------------------

PROSE = (
  "My father's family name being Pirrip, and my Christian name Philip, my "
  "infant tongue could make of both names nothing longer or more explicit "
  "than Pip. So, I called myself Pip, and came to be called Pip."
)


def _wrap(text: str, width: int) -> str:
  return textwrap.fill(text, width, break_on_hyphens=True)


@pytest.mark.parametrize("width", [60, 72, 100])
def test_wrapped_paragraphs_come_back(width):
  text = "\n\n".join(["CHAPTER I", PROSE, "“Oh!” I said.", PROSE[::-1]])
  wrapped = "\n\n".join(_wrap(part, width) for part in text.split("\n\n"))
  assert wrapped.count("\n") > text.count("\n")
  assert clean(wrapped, unwrap=True) == text


def test_verse_lists_and_indented_lines_stay_apart():
  verse = "Tyger Tyger, burning bright,\nIn the forests of the night;"
  items = "1. one\n2. two\n- three\n  indented by hand"
  prose = " ".join([PROSE] * 4)
  text = f"{_wrap(prose, 72)}\n\n{verse}\n\n{items}"
  assert clean(text, unwrap=True) == f"{prose}\n\n{verse}\n\n{items}"


def test_text_that_was_not_wrapped_stays():
  assert clean(f"{PROSE}\n{PROSE}\n{PROSE}", unwrap=True).count("\n") == 2
  short = "\n".join(
    ["a sentence a line", "of any length at all, as it comes"] * 9
  )
  assert clean(short, unwrap=True) == short


def test_hyphens_at_line_ends():
  words = "so many words that this line is as long as a line can be"
  text = (
    f"{words} hyphen-\nation {words} well-\nknown {words} for it\n\n"
    f"A word on hyphenation.\n\n{_wrap(PROSE, 66)}"
  )
  result = clean(text, unwrap=True)
  assert result.startswith(
    f"{words} hyphenation {words} well-known {words} for it\n\n"
  )


def test_chinese_lines_are_joined_without_a_space():
  line = (
    "他从来没有见过这样的大雪一连下了三天三夜把整个村子都盖住了谁也出不了门"
  )
  assert clean("\n".join([line] * 4), unwrap=True) == line * 4


# --- fingerprint ------------------------------------------------------------


def test_fingerprint_is_the_same_everywhere():
  digest = hashlib.blake2b("Grüße".encode(), digest_size=8).digest()
  assert cleaning.fingerprint("Grüße") == int.from_bytes(digest, "little")
  assert 0 <= cleaning.fingerprint("") < 2**64
  assert cleaning.fingerprint("\ud800") != cleaning.fingerprint("\ud801")
