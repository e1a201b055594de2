"""Cleans one document: text in, clean text (or None) out.

Each step is a function of the text alone and has a key of its own under
`data.cleaning`. They run in the order of `STEPS`: markup goes before the text
under it is looked at; mojibake is repaired while the control characters that
betray it are still there; what is left apart by invisible characters is
composed after they are gone; lines are joined while indentation still shows.
"""

from __future__ import annotations

import functools
import hashlib
import html
import itertools
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any


def clean(
  text: str, options: Mapping[str, Any], counts: Counter[str]
) -> str | None:
  """Returns the cleaned text, or None if too little of it is left.

  Args:
    text: One document.
    options: The keys of `data.cleaning`: a bool for each of `STEPS`, `unicode`
      (a normal form or "none") and `min_chars`; others are not looked at.
    counts: Is added to: a step's name for a document that it changed,
      "surrogates" where halves of characters were removed although `control` is
      off (no tokenizer can encode them), and "too_short" for one that is
      shorter than `min_chars`, the blanks around it not counted.
  """
  for name, step in STEPS.items():
    option = options[name]
    if option is False or option == "none":
      continue
    changed = step(text, option) if name == "unicode" else step(text)
    if changed != text:
      counts[name] += 1
      text = changed
  if not options["control"] and not text.isascii():
    changed = _SURROGATES.sub("", text)
    if changed != text:
      counts["surrogates"] += 1
      text = changed
  if len(text.strip()) < options["min_chars"]:
    counts["too_short"] += 1
    return None
  return text


def fingerprint(text: str) -> int:
  """Returns 64 bits that stand for the text, the same on every machine.

  It is the first 8 bytes of BLAKE2b, little-endian, over the UTF-8: in
  [0, 2**64). Two different documents of 10**8 share one with a probability of
  3e-4.
  """
  data = text.encode("utf-8", "surrogatepass")
  return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


# --- html -------------------------------------------------------------------

_TAG = re.compile(r"<(?:[a-zA-Z][^<>]*|/[a-zA-Z][^<>]*|![^<>]*)>")
# fmt: off
_NO_TEXT = frozenset({
  "audio", "canvas", "datalist", "head", "iframe", "math", "noscript", "object",
  "script", "select", "style", "svg", "template", "textarea", "video",
})
_SPACED = frozenset({
  "blockquote", "dl", "h1", "h2", "h3", "h4", "h5", "h6", "ol", "p", "pre",
  "table", "ul",
})
_BLOCKS = _SPACED | {
  "address", "article", "aside", "body", "caption", "center", "dd", "details",
  "dialog", "dir", "div", "dt", "fieldset", "figcaption", "figure", "footer",
  "form", "header", "hr", "legend", "li", "main", "menu", "nav", "optgroup",
  "option", "search", "section", "summary", "tbody", "tfoot", "thead", "tr",
}
# fmt: on
_CELLS = frozenset({"td", "th"})
# What HTML closes by itself, or has no inside.
_UNNESTED = frozenset({
  "a", "area", "base", "body", "br", "col", "dd", "dt", "embed", "head", "hr",
  "html", "img", "input", "li", "link", "meta", "option", "p", "param",
  "source", "tbody", "td", "tfoot", "th", "thead", "tr", "track", "wbr",
})  # fmt: skip
_ELEMENT = re.compile(r"<(/?)([a-zA-Z][^\s/<>]*)([^<>]*)")
_GAP = re.compile(r"[\s/]+")
# What HTML opens again in each paragraph, until it is closed.
_FORMATTING = frozenset({
  "b", "big", "code", "em", "font", "i", "nobr", "s", "small", "strike",
  "strong", "tt", "u",
})  # fmt: skip
# By HTML's rules a tag may walk over all elements that it stands in (20,000 in
# one another: 0.4 s), or open all of _FORMATTING again, each in 100 bytes. A
# page has some 10,000 tags, 20 deep.
_MAX_WALK, _OPENED_AGAIN = 10**8, 100
_MAX_ATTRIBUTES = 20_000  # of one element; two are compared with one another
_HIDDEN = re.compile(
  r"<(script|style)\b.*?(?:</\1[^<>]*>?|\Z)", re.DOTALL | re.I
)
# HTML's own white space: a no-break space isn't among it.
_HTML_SPACE = re.compile(r"[ \t\n\f\r]+")


def html_to_text(text: str) -> str:
  r"""Returns the text that a page shows.

  Scripts, styles, the head and form fields are dropped. A block element begins
  and ends a line; around a paragraph, heading, list or table there is a blank
  line. Cells of a table are a space apart, `pre` keeps its lines. A text
  without a single tag keeps its line breaks; only its entities are resolved.
  Of one whose tags stand in thousands of others, tags and scripts are taken out
  as they come.

  >>> html_to_text("<h1>Soup</h1><p>Salt &amp; <b>pep</b>per<br>to taste.</p>")
  'Soup\n\nSalt & pepper\nto taste.'
  """
  if not _TAG.search(text):
    return html.unescape(text) if "&" in text else text
  if _is_tangled(text):
    text = _HIDDEN.sub(" ", text)
    return html.unescape(_TAG.sub(" ", text)).strip(" \n")
  from selectolax.lexbor import LexborHTMLParser

  parts: list[str] = []
  breaks = pre = 0
  # A walk without recursion: pages nest more deeply than Python's stack.
  node = LexborHTMLParser(text).root
  while node is not None:
    tag = node.tag
    if tag == "-text":
      inner = node.text_content or ""
      if not pre:
        inner = _HTML_SPACE.sub(" ", inner)
        if breaks or not parts or parts[-1].endswith(" "):
          inner = inner.lstrip(" ")
      if inner:
        if breaks and parts:
          parts[-1] = parts[-1].rstrip(" ")
          parts.append("\n" * min(breaks, 2))
        parts.append(inner)
        breaks = 0
    elif tag == "br":
      breaks += 1
    elif tag in _CELLS:
      parts.append(" ")
    elif tag in _BLOCKS:
      breaks = max(breaks, 1 + (tag in _SPACED))
      pre += tag == "pre"
    if tag not in _NO_TEXT and node.first_child is not None:
      node = node.first_child
      continue
    while node is not None:
      tag = node.tag
      if tag in _BLOCKS:
        breaks = max(breaks, 1 + (tag in _SPACED))
        pre -= tag == "pre"
      after = node.next
      if after is not None:
        node = after
        break
      node = node.parent
  return "".join(parts).strip(" \n")


def _is_tangled(text: str) -> bool:
  """Says whether a page nests too deeply, or a tag has too many attributes.

  What isn't closed counts as open: tags of SVG that end in a slash too, and
  what looks like a tag in a script.
  """
  tags = text.count("<")
  if len(text) < _MAX_ATTRIBUTES and tags**2 * _OPENED_AGAIN < _MAX_WALK:
    return False
  inside: Counter[str] = Counter()
  depth = formatting = walk = 0
  for close, name, rest in _ELEMENT.findall(text):
    if len(rest) > _MAX_ATTRIBUTES:
      gaps = itertools.islice(_GAP.finditer(rest), _MAX_ATTRIBUTES)
      if sum(1 for _ in gaps) == _MAX_ATTRIBUTES:
        return True
    walk += depth + formatting * _OPENED_AGAIN
    if walk > _MAX_WALK:
      return True
    name = name.lower()
    if name in _UNNESTED or (close and not inside[name]):
      continue
    change = -1 if close else 1
    inside[name] += change
    depth += change
    formatting += change * (name in _FORMATTING)
  return False


# --- mojibake ---------------------------------------------------------------


def repair_mojibake(text: str) -> str:
  """Undoes decoding with the wrong encoding, line by line, with ftfy.

  >>> repair_mojibake("schÃ¶n")
  'schön'
  """
  if text.isascii():
    return text
  suspect = _suspect()
  if not suspect.search(text):
    return text
  import ftfy

  return "\n".join(
    ftfy.fix_encoding(line)
    if not line.isascii() and suspect.search(line)
    else line
    for line in text.split("\n")
  )


@functools.cache
def _suspect() -> re.Pattern[str]:
  """Returns a pattern that every line has which `ftfy.fix_encoding` changes.

  ftfy's own test takes 100 times as long on text that isn't ASCII. What it
  repairs is UTF-8 that was read as one of its single-byte encodings, so some
  character stands for a first byte of a sequence and the next for a following
  one, perhaps after a space or question mark that took the place of a lost
  byte; or C1 controls, or what a replaced byte left.
  """
  import ftfy.bad_codecs.sloppy  # noqa: F401  (registers the encodings)
  from ftfy.chardata import CHARMAP_ENCODINGS

  firsts = ""
  cases = ["(?<=[\x80-\x9f\x1a\ufffd])", "(?<=[ÂÃ]) "]
  for encoding in CHARMAP_ENCODINGS:
    first = bytes(range(0xC2, 0xF5)).decode(encoding, "ignore")
    following = bytes(range(0x80, 0xC0)).decode(encoding, "ignore")
    firsts += first
    cases.append(f"(?<=[{first}])[ ?]?[{following}]")
  unique = "".join(sorted(set(firsts)))
  return re.compile(f"[\x80-\x9f\x1a\ufffd{unique}](?:{'|'.join(cases)})")


# --- control, unicode -------------------------------------------------------

_LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_INVISIBLE = re.compile(
  "["
  "\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 and C1 controls but tab and line feed
  "\xad"  # soft hyphen
  "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # direction marks
  "\u200b\u2060-\u2064\ufeff"  # zero-width space and joiners of no letter
  "\u206a-\u206f\ufff9-\ufffb"  # deprecated, annotation
  "\u2028\u2029"  # line and paragraph separator
  "\ud800-\udfff\ufffe\uffff"  # halves of characters, no characters
  "]+"
)
_SURROGATES = re.compile("[\ud800-\udfff]+")
_PRINTABLE_ASCII = bytes([ord("\n"), *range(0x20, 0x7F)])


def remove_control(text: str) -> str:
  r"""Removes characters that can't be seen and makes every line end `\n`.

  Removed are C0 and C1 controls, zero-width spaces, byte order marks, soft
  hyphens, direction marks, and halves of surrogate pairs. Kept are tab and line
  feed, variation selectors, and U+200C and U+200D, which shape Persian and
  Indic words and join emoji.
  """
  # None of them is printable, and this looks several times as fast.
  if text.isascii():
    if not text.encode().translate(None, _PRINTABLE_ASCII):
      return text
  elif text.replace("\n", "").isprintable():
    return text
  return _INVISIBLE.sub("", _LINE_ENDS.sub("\n", text))


def normalize(text: str, form: str) -> str:
  """Returns the text in a Unicode normal form.

  A run of marks (accents without a letter) is ordered a thousand at a time:
  Python takes the square of its length.
  """
  if len(text) > _MANY_MARKS and not text.isascii():
    run = _run_of_marks()
    # Every run of twice as many is long where one of these places is in it.
    if any(run.match(text, i) for i in range(0, len(text), _MANY_MARKS)):
      ends = [found.end() for found in run.finditer(text)]
      borders = itertools.pairwise([0, *ends, len(text)])
      parts = (text[a:b] for a, b in borders)
      return "".join(unicodedata.normalize(form, part) for part in parts)
  if unicodedata.is_normalized(form, text):
    return text
  return unicodedata.normalize(form, text)


_MANY_MARKS = 1000


@functools.cache
def _run_of_marks() -> re.Pattern[str]:
  """Returns a pattern of `_MANY_MARKS` marks, one after another."""
  marks = [
    c
    for c in map(chr, range(sys.maxunicode + 1))
    if unicodedata.combining(c)
    or (
      unicodedata.decomposition(c)
      and all(map(unicodedata.combining, unicodedata.normalize("NFKD", c)))
    )
  ]
  return re.compile(f"[{''.join(marks)}]{{{_MANY_MARKS}}}")


# --- unwrap -----------------------------------------------------------------

_WIDE = re.compile("[\u2e80-\ua4cf\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff60]")
_ITEM = re.compile(r"[-*•+–—] |\(?[0-9]{1,3}[.)] |\(?[a-zA-Z][.)] |[|>#]")


def unwrap(text: str) -> str:
  """Joins the lines of paragraphs that were broken to a fixed width.

  Only lines that another one follows within a block are looked at. The width
  is what nine in ten of them don't exceed, in columns (Chinese and Japanese
  characters take two). Unless it is 50 to 120, and six in ten of them come
  within a fifth of it, the text wasn't broken to a width and stays.

  A line is joined to the next where that one's first word would have made it
  longer than 0.9 widths: so headings, verse, dialogue and the ends of
  paragraphs keep their line ends. Indented lines and list items begin anew. A
  hyphen at the end of a line is dropped where the text has the joined word
  elsewhere; otherwise it stays, as in `to-` + `morrow`. Chinese and Japanese
  lines are joined without a space.
  """
  lines = [line.rstrip() for line in text.split("\n")]
  columns = [
    len(line) + (0 if line.isascii() else len(_WIDE.findall(line)))
    for line in lines
  ]
  inner = sorted(
    c for c, after in zip(columns, lines[1:], strict=False) if c and after
  )
  width = inner[len(inner) * 9 // 10] if inner else 0
  near = sum(0.8 * width < c <= 1.2 * width for c in inner)
  if not 50 <= width <= 120 or near < 0.6 * len(inner):
    return text
  words: set[str] = set()
  result = [lines[0]]
  for line, length, after in zip(lines, columns, lines[1:], strict=False):
    wide = bool(_WIDE.match(after))
    word = after[:1] if wide else after.partition(" ")[0]
    if (
      not line
      or not word
      or after[0].isspace()
      or length + (2 if wide else 1 + len(word)) <= 0.9 * width
      or _ITEM.match(after)
    ):
      result += ["\n", after]
      continue
    hyphen = re.search(r"(\w+)-$", line)
    if hyphen and word[0].islower():
      words = words or set(re.findall(r"\w+", text.lower()))
      tail = re.match(r"\w+", word)
      if (hyphen[1] + tail[0]).lower() in words:
        result[-1] = result[-1][:-1]
    elif not line.endswith(("-", "—")) and not (wide and _WIDE.match(line[-1])):
      result.append(" ")
    result.append(after)
  return "".join(result)


# --- whitespace -------------------------------------------------------------

# Every white space but the plain one and line ends.
_SPACES = (
  "\t\x0b\x0c\r\x1c\x1d\x1e\x1f\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005"
  "\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
)
_ASCII_SPACES = "".join(space for space in _SPACES if space.isascii())
# A literal beginning lets `re` search at the speed of `str.find`.
_MANY_SPACES = re.compile("   *")
_BLANK_LINES = re.compile("\n\n\n+")


def collapse_whitespace(text: str) -> str:
  """Makes white space plain.

  Runs of tabs and spaces (no-break, thin and ideographic ones too) become one
  space, none at a line's end; more than one blank line becomes one; nothing
  stays around the text.
  """
  for space in _ASCII_SPACES if text.isascii() else _SPACES:
    if space in text:
      text = text.replace(space, " ")
  if "  " in text:
    text = _MANY_SPACES.sub(" ", text)
  text = text.replace(" \n", "\n")
  return _BLANK_LINES.sub("\n\n", text).strip()


STEPS: dict[str, Callable[..., str]] = {
  "html": html_to_text,
  "mojibake": repair_mojibake,
  "control": remove_control,
  "unicode": normalize,
  "unwrap": unwrap,
  "whitespace": collapse_whitespace,
}
"""The steps in their order, by their keys under `data.cleaning`."""
