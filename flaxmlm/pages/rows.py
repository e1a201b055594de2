"""The page of a preview: rows as text, and what became of their tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from flaxmlm.pages.page import escape, join, write_page

_WORD_START = 1  # in `flags`
_MEANINGS = {
  "masked": "masked: the model reads {mask} and is asked for cat",
  "replaced": "replaced: it reads dog, a random token, and is asked for cat",
  "kept": "kept: it reads cat, and is asked for it all the same",
}
_PAIRS = {
  "next_sentence": {0: "B goes on from A", 1: "B is from another document"},
  "sentence_order": {0: "A and B in order", 1: "A and B swapped"},
}


def pair_words(
  objective: str | Sequence[str], labels: Sequence[str] | None = None
) -> dict[int, str]:
  """Returns what the values of `pair_label` mean.

  Args:
    objective: `objective.name`.
    labels: `objective.labels`.

  >>> pair_words(("span", "sentence_order"))[1]
  'A and B swapped'
  """
  names = (objective,) if isinstance(objective, str) else objective
  words = {-1: "No pair could be made"}
  for name in names:
    if name == "sentence_pair":
      words |= dict(enumerate(labels))
    words |= _PAIRS.get(name, {})
  return words


def hidden(row: Mapping[str, Any], *, mask: int) -> dict[int, str]:
  """Returns what became of each token that is asked for, by its place.

  A random token that happens to be the original one counts as kept.

  >>> row = {"slots": [1, 2, 4, 0], "weights": [1.0, 1.0, 1.0, 0.0]}
  >>> row |= {"original_ids": [7, 8, 9, 7, 6], "input_ids": [7, 0, 9, 7, 5]}
  >>> hidden(row, mask=0)
  {1: 'masked', 2: 'kept', 4: 'replaced'}
  """
  kinds = {}
  for slot, weight in zip(row["slots"], row["weights"], strict=True):
    if weight > 0:
      shown, original = row["input_ids"][slot], row["original_ids"][slot]
      if shown == mask:
        kinds[slot] = "masked"
      else:
        kinds[slot] = "kept" if shown == original else "replaced"
  return kinds


def measure(
  row: Mapping[str, Any], kinds: Mapping[int, str], specials: Collection[int]
) -> Counter[str]:
  """Counts a row's tokens; the counts of several rows add up.

  Args:
    row: A line of `preview --json`.
    kinds: Of `hidden`.
    specials: Ids that are never hidden, padding's among them.

  Returns:
    `tokens` and `padding`; `maskable` tokens, `hidden` ones, and each kind of
    these; `runs` of hidden tokens that are neighbours, and the `words` in
    them: a word counts wherever one of its tokens is.
  """
  counts = Counter(kinds.values())
  counts["hidden"] = len(kinds)
  counts["padding"] = row["segments"].count(0)
  counts["tokens"] = len(row["segments"]) - counts["padding"]
  counts["maskable"] = sum(
    token not in specials for token in row["original_ids"]
  )
  for _, _, places in _parts(row):
    for asked, run in groupby(places, key=kinds.__contains__):
      if asked:
        _, *rest = run
        starts = sum(row["flags"][place] & _WORD_START for place in rest)
        counts += Counter(runs=1, words=1 + starts)
  return counts


def write_rows(
  path: str,
  rows: Sequence[Mapping[str, Any]],
  *,
  title: str,
  command: str,
  tokens: Callable[[list[int]], list[str]],
  vocab: Mapping[str, Any],
  specials: Collection[int],
  pairs: Mapping[int, str],
) -> None:
  """Writes the page of some rows, whole or not at all.

  Args:
    path: The file; it is replaced.
    rows: Lines of `preview --json`, ascending by step.
    title: Title of the page.
    command: What made the page.
    tokens: Ids → token strings, as `Tokenizer.tokens`.
    vocab: Ids of the special tokens by name, as in `Vocab`.
    specials: Ids that are never hidden.
    pairs: Of `pair_words`.
  """
  mask, pad = tokens([vocab["mask"], vocab["pad"]])
  total: Counter[str] = Counter()
  labels: Counter[str] = Counter()
  articles = []
  for step, group in groupby(rows, key=lambda row: row["step"]):
    articles.append(f"<h2>Step {step:,}</h2>")
    for row in group:
      kinds = hidden(row, mask=vocab["mask"])
      counts = measure(row, kinds, specials)
      total += counts
      label = row.get("pair_label")
      said = None if label is None else pairs.get(label, f"label {label}")
      articles += [
        f"<article>{_head(row, counts, said)}",
        *_paragraphs(row, kinds, tokens, specials),
        f'<p class="special">+ {counts["padding"]:,} {escape(pad)}</p>'
        if counts["padding"]
        else "",
        "</article>",
      ]
      if said:
        labels[said] += 1
  two = any(any(row.get("token_types", ())) for row in rows)
  body = [
    f"<h1>{escape(title)}</h1>",
    f'<pre class="command"><code>{escape(command)}</code></pre>',
    *_legend(mask, two),
    "<h2>All rows shown</h2>",
    _table(total, labels),
    *articles,
  ]
  write_page(path, title=title, body="\n".join(body), style=_STYLE)


def _parts(row: Mapping[str, Any]) -> Iterator[tuple[int, int, Iterator[int]]]:
  """Yields the document, the token type and the places of each part of a row.

  Padding is left out.
  """
  segments = row["segments"]
  types = row.get("token_types") or [0] * len(segments)
  for (segment, part), places in groupby(
    range(len(segments)), key=lambda place: (segments[place], types[place])
  ):
    if segment:
      yield segment, part, places


def _head(
  row: Mapping[str, Any], counts: Mapping[str, int], said: str | None
) -> str:
  label = f' <span class="label">{escape(said)}</span>' if said else ""
  kinds = ", ".join(f"{counts[kind]:,} {kind}" for kind in _MEANINGS)
  return (
    f"<h3>Row {row['row']:,} <small>example {row['example']:,}; hidden"
    f" {counts['hidden']:,}, {_share(counts['hidden'], counts['maskable'])}:"
    f" {kinds}</small>{label}</h3>"
  )


def _share(part: int, whole: int) -> str:
  percent = f"{100 * part / whole:.1f} %" if whole else "–"
  return f"{percent} of {whole:,}"


def _table(total: Mapping[str, int], labels: Mapping[str, int]) -> str:
  """Returns the counts of all rows, and what they are shares of."""

  def line(name: str, count: int, whole: int, of: str) -> tuple[str, int, str]:
    return name, count, f"{_share(count, whole)} {of}"

  places, asked = total["tokens"] + total["padding"], total["hidden"]
  length = f"{total['words'] / total['runs']:.2f}" if total["runs"] else "–"
  lines = [
    ("Tokens", total["tokens"], ""),
    line("Padding", total["padding"], places, "places"),
    line("Hidden", asked, total["maskable"], "that may be hidden"),
    *(
      line(kind.capitalize(), total[kind], asked, "hidden")
      for kind in _MEANINGS
    ),
    (
      "Runs of hidden tokens",
      total["runs"],
      f"{length} words each, on average",
    ),
    *(
      line(name, n, sum(labels.values()), "rows")
      for name, n in sorted(labels.items())
    ),
  ]
  rows = "".join(
    f'<tr><th scope="row">{escape(name)}</th><td>{count:,}</td>'
    f"<td>{escape(share)}</td></tr>"
    for name, count, share in lines
  )
  return f'<table class="sums"><tbody>{rows}</tbody></table>'


def _legend(mask: str, two: bool) -> Iterator[str]:
  yield '<ul class="legend">'
  for kind, meaning in _MEANINGS.items():
    mark = _run([_mark(kind, "cat", "dog")])
    yield f"<li>{mark} {escape(meaning.format(mask=mask))}</li>"
  joined = [
    _mark("masked", text, "", space=space)
    for text, space in (("un", ""), ("do", ""), ("it", " "))
  ]
  yield (
    f"<li>{_run(joined)} neighbours; a space parts words, a line the tokens of"
    " one</li>"
  )
  if two:
    yield (
      '<li><span class="b">B</span> the second segment of a pair; A is the'
      " first</li>"
    )
  yield "</ul>"


def _paragraphs(
  row: Mapping[str, Any],
  kinds: Mapping[int, str],
  tokens: Callable[[list[int]], list[str]],
  specials: Collection[int],
) -> Iterator[str]:
  """Yields a paragraph a document, or two where it is a pair of segments."""
  ids, shown = row["original_ids"], row["input_ids"]
  names, read = tokens(ids), tokens(shown)
  texts, read_texts = join(names), join(read)
  spaces = _spaces(texts, row["flags"])
  # Of hidden tokens, what can't be seen is written as in the vocabulary.
  blank = {place for place in kinds if not texts[place][1].strip()}
  for place in blank:
    spaces[place] = ""
  two = any(row.get("token_types", ()))

  def draw(place: int, space: str) -> str:
    title = f"place {place}, position {row['positions'][place]}:"
    title += f" {names[place]} = {ids[place]}"
    if shown[place] != ids[place]:
      title += f", read as {read[place]} = {shown[place]}"
    _, text = texts[place]
    if place not in kinds:
      kind = ' class="special"' if ids[place] in specials else ""
      text = escape(text)
      return f'{space}<span{kind} title="{escape(title)}">{text}</span>'
    _, random = read_texts[place]
    mark = _mark(
      kinds[place],
      names[place] if place in blank else text,
      random if random.strip() else read[place],
      space=space,
      title=title,
    )
    return mark + text if place in blank and "\n" in text else mark

  for segment, part, places in _parts(row):
    name = "AB"[part] if two else segment
    text = ""
    for asked, group in groupby(places, key=kinds.__contains__):
      first, *rest = group
      space = spaces[first] if text else ""
      drawn = [draw(place, spaces[place]) for place in rest]
      if asked:
        text += space + _run([draw(first, ""), *drawn])
      else:
        text += "".join([draw(first, space), *drawn])
    yield (
      f'<div class="part{" b" * (part > 0)}"><small>{name}</small>'
      f'<p dir="auto">{text}</p></div>'
    )


def _spaces(
  texts: Sequence[tuple[bool, str]], flags: Sequence[int]
) -> list[str]:
  """Returns the space before each token, "" where none is needed.

  It stands where a word starts, unless white space in the text is there.
  """
  spaces = []
  before = ""
  for (own, text), flag in zip(texts, flags, strict=True):
    blank = before[-1:].isspace() or text[:1].isspace()
    starts = flag & _WORD_START and (own or not blank)
    spaces.append(" " if starts else "")
    before = text or spaces[-1]
  return spaces


def _run(marks: Sequence[str]) -> str:
  return f'<span class="run">{"".join(marks)}</span>'


def _mark(
  kind: str, original: str, shown: str, *, space: str = "", title: str = ""
) -> str:
  text = escape(original)
  if kind == "replaced":
    text = f"<del>{text}</del>→<b>{escape(shown)}</b>"
  kind += " inside" * (not space)  # a word, if there is a mark before
  hover = f' title="{escape(title)}"' if title else ""
  return f'<mark class="{kind}"{hover}>{space}{text}</mark>'


_STYLE = """
.command { color: var(--muted); margin: .5rem 0 1rem; white-space: pre-wrap; }
.legend { list-style: none; margin: 0; padding: 0; }
.legend li { margin: .2rem 0; }
.sums td:nth-child(2) {
  font-variant-numeric: tabular-nums; text-align: right; white-space: nowrap;
}
.label {
  border: 1px solid var(--line); border-radius: 1rem; display: inline-block;
  font-size: .85rem; font-weight: normal; padding: .05rem .6rem;
}
.part {
  align-items: baseline; display: grid;
  grid-template-columns: 2rem minmax(0, 1fr); margin: 0 -.5rem;
  padding: 0 .5rem;
}
.part small, .part p { line-height: 1.9; margin: 0; }
.part p { white-space: pre-wrap; }
.part + .special { margin: .3rem 0 0; }
.b {
  background: color-mix(in srgb, var(--first) 9%, var(--paper));
  border-radius: .2rem;
}
.legend .b { padding: .1rem .5rem; }
mark {
  background: color-mix(in srgb, var(--tone) 26%, var(--paper));
  border-bottom-color: var(--tone); border-radius: 0; padding: 0;
  -webkit-box-decoration-break: clone; box-decoration-break: clone;
}
mark + .inside { border-inline-start: 1px solid var(--paper); }
mark:first-child {
  border-end-start-radius: .3rem; border-start-start-radius: .3rem;
  padding-inline-start: .15em;
}
mark:last-child {
  border-end-end-radius: .3rem; border-start-end-radius: .3rem;
  padding-inline-end: .15em;
}
.masked { --tone: #c99400; }
.replaced { --tone: var(--wrong); border-bottom-style: dashed; }
.kept { --tone: var(--first); border-bottom-style: dotted; }
.replaced del { color: var(--muted); }
"""
