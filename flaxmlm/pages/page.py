"""What pages have in common: the frame, its style, and tokens as text."""

from __future__ import annotations

import codecs
import contextlib
import html
import os
import re
from collections.abc import Sequence

SPECIAL = re.compile(r"\[(PAD|UNK|CLS|SEP|MASK)\]|</?s>|<(pad|unk|mask)>")
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def write_page(path: str, *, title: str, body: str, style: str) -> None:
  """Writes a page, whole or not at all.

  Args:
    path: The file; it is replaced.
    title: Text.
    body: HTML.
    style: CSS that comes after what all pages have.
  """
  page = _PAGE.format(title=escape(title), style=_STYLE + style, body=body)
  temporary = f"{path}.tmp"
  try:
    with open(temporary, "w", encoding="utf-8") as file:
      file.write(page)
    os.replace(temporary, path)
  except OSError:
    with contextlib.suppress(OSError):
      os.unlink(temporary)
    raise


def escape(text: object) -> str:
  r"""Returns a text that means nothing to HTML, without control characters.

  >>> escape('<b class="x">\x1b')
  '&lt;b class=&quot;x&quot;&gt;�'
  """
  return html.escape(_CONTROLS.sub("\N{REPLACEMENT CHARACTER}", str(text)))


def join(tokens: Sequence[str]) -> list[tuple[bool, str]]:
  """Returns for each token whether a space stands before it, and its text.

  Takes the marks of SentencePiece (▁x starts a word), byte-level BPE (Ġx) or
  WordPiece (##x goes on with one), whichever the tokens have. A character that
  is cut into several byte-level tokens is the text of the last of them.

  >>> join(["▁play", "ing"]), join(["play", "##ing"])
  ([(True, 'play'), (False, 'ing')], [(True, 'play'), (False, 'ing')])
  """
  plain = [token for token in tokens if not SPECIAL.fullmatch(token)]
  if any(token.startswith("▁") for token in plain):
    return [
      (
        token.startswith("▁") or bool(SPECIAL.fullmatch(token)),
        token.removeprefix("▁").replace("▁", " "),
      )
      for token in tokens
    ]
  if any(token.startswith("Ġ") for token in plain):
    return _join_bytes(tokens)
  return [
    (not token.startswith("##"), token.removeprefix("##")) for token in tokens
  ]


def _join_bytes(tokens: Sequence[str]) -> list[tuple[bool, str]]:
  from flaxmlm.tokenizers.hugging_face import byte_chars

  table = byte_chars()
  decoder = codecs.getincrementaldecoder("utf-8")("replace")
  joined = []
  for token in tokens:
    special = bool(SPECIAL.fullmatch(token))
    if special or not table.keys() >= set(token):  # or added, written plainly
      decoder.reset()
      joined.append((special, token))
    else:
      text = decoder.decode(bytes(table[c] for c in token))
      joined.append((text.startswith(" "), text.removeprefix(" ")))
  return joined


_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fff; --ink: #1b1f24; --muted: #59636e; --line: #d8dee4;
  --soft: #f6f8fa; --first: #0a58ca; --second: #c2571a;
  --right: #116329; --right-soft: #dcf5e3; --wrong: #a40e26;
  --wrong-soft: #ffebe9; --note: #fff8c5;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #12161c; --ink: #e6edf3; --muted: #9aa5b1; --line: #333c47;
    --soft: #1b2129; --first: #6cb0ff; --second: #f0a058;
    --right: #7ee2a0; --right-soft: #12361f; --wrong: #ff9f97;
    --wrong-soft: #41191b; --note: #332a0a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 68rem;
  background: var(--paper); color: var(--ink); overflow-wrap: anywhere;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .75rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .75rem; }
h3 { font-size: 1rem; margin: 0 0 .4rem; }
small { color: var(--muted); font-size: .85em; font-weight: normal; }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.lead { font-size: 1.15rem; margin: 0; max-width: 48rem; }
details { margin-top: 1rem; }
summary { cursor: pointer; }
.wide { overflow-wrap: normal; overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; }
th, td {
  border-bottom: 1px solid var(--line); padding: .25rem .7rem .25rem 0;
  text-align: left; vertical-align: baseline;
}
thead th { color: var(--muted); font-weight: normal; white-space: nowrap; }
tbody th { font-weight: normal; }
.numbers th, .numbers td {
  font-variant-numeric: tabular-nums; text-align: right; white-space: nowrap;
}
article {
  border: 1px solid var(--line); border-radius: .4rem; margin-top: 1rem;
  padding: .8rem 1rem;
}
.row { margin: 0 0 .6rem; line-height: 1.9; white-space: pre-line; }
.special { color: var(--muted); font-size: .8em; margin-right: .3em; }
mark {
  background: var(--soft); border-bottom: 2px solid var(--muted);
  border-radius: .2rem; color: inherit; padding: 0 .15em;
}
@media print {
  body { font-size: .8rem; max-width: none; padding: 0; }
  details::details-content { content-visibility: visible; block-size: auto; }
  * { print-color-adjust: exact; }
}
"""
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
