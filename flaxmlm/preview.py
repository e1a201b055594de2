"""Shows what the model is shown: rows with what is hidden in them.

  python -m flaxmlm.preview --workdir=runs/quickstart --steps=0:3

These are the very rows and masks of a run's steps, whether the run is there
already or is still to come (then with --config, as for train). --html=FILE
writes the same as a page.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from flaxmlm import InputError, config
from flaxmlm.pages.page import join
from flaxmlm.pages.rows import hidden, measure, pair_words, write_rows

if TYPE_CHECKING:
  import numpy as np
  from rich.console import Console
  from rich.text import Text

  from flaxmlm.objectives import Batch, Example

_WORD_START = 1  # in `flags`
# What becomes of a hidden token: its colours, its sign, the sign's meaning.
_KINDS = {
  "masked": ("black on yellow", "{shown}‹{original}›", "masked"),
  "replaced": (
    "black on bright_red",
    "‹{original}→{shown}›",
    "replaced by a random token",
  ),
  "kept": ("black on bright_cyan", "‹{original}=›", "asked for, but kept"),
}


def main(argv: list[str] | None = None) -> None:
  """Prints the rows of some steps, and writes them as JSON."""
  parser = config.parser(__doc__)
  parser.add_argument(
    "--steps", default="0:1", metavar="A:B", help="steps A to B - 1 (0:1)"
  )
  parser.add_argument(
    "--rows", type=int, default=4, metavar="N", help="rows a step to print (4)"
  )
  parser.add_argument(
    "--rollbacks",
    type=int,
    metavar="N",
    help="rows as they were after the run had gone back N times (all)",
  )
  parser.add_argument(
    "--json", metavar="FILE", help="write all rows here, one object a line"
  )
  parser.add_argument(
    "--html", metavar="FILE", help="write the printed rows here, as a page"
  )
  args, c = config.parse(parser, argv)
  match = re.fullmatch(r"(\d+):(\d+)", args.steps)
  if match is None or int(match[1]) >= int(match[2]):
    raise InputError(f"--steps={args.steps}: wants A:B with A < B, like 0:3")

  if args.rows < 0:
    raise InputError(f"--rows={args.rows}: wants 0 or more")
  if args.rollbacks is not None and args.rollbacks < 0:
    raise InputError(f"--rollbacks={args.rollbacks}: wants 0 or more")

  from flaxmlm.train import open_data

  store, plans, _ = open_data(c, args.workdir)

  import jax
  from rich.console import Console

  from flaxmlm import objectives, tokenizers
  from flaxmlm.data import batches
  from flaxmlm.objectives import as_batch
  from flaxmlm.training import chain
  from flaxmlm.training.step import row_keys, run_keys

  tokenizer = tokenizers.load(os.path.join(store.folder, "tokenizer"))
  objective = objectives.build(
    c.objective,
    row_length=c.data.row_length,
    vocab=store.vocab,
    steps=c.train.steps,
  )
  _, step_key = run_keys(c.seed)
  *before, phase = chain.find_chain(args.workdir, c.to_dict(), store.hash)
  if int(match[1]) < phase.first_step:
    raise InputError(
      f"--steps={args.steps}: {args.workdir} begins at step"
      f" {phase.first_step}; the steps before are those of {before[-1].workdir}"
    )

  if args.rollbacks is not None:
    if args.rollbacks > len(phase.skips):
      raise InputError(
        f"--rollbacks={args.rollbacks}: {args.workdir} went back"
        f" {len(phase.skips)} times"
      )
    phase = phase._replace(skips=phase.skips[: args.rollbacks])

  @jax.jit
  def corrupt(step: int, batch: Batch) -> Example:
    keys, _ = row_keys(step_key, step, batch.example)
    return objective.corrupt(keys, batch, step)

  console, pairs = Console(), pair_words(c.objective.name, c.objective.labels)
  console.print(legend(tokenizer.tokens([store.vocab["mask"]])[0]))
  shown = []
  with open(args.json or os.devnull, "w", encoding="utf-8") as file:
    for step in range(int(match[1]), int(match[2])):
      batch = batches.at(
        store,
        plans,
        seed=c.seed,
        step=step,
        batch_size=c.train.batch_size,
        weights=c.data.weights,
        offset=phase.row_offset(step),
        others=config.wants_others(c),
      )
      example = jax.device_get(corrupt(step, as_batch(batch)))
      for row in objects(example, batch.example, step=step):
        if row["row"] < args.rows:
          show(row, tokenizer.tokens, store.vocab, console, pairs=pairs)
          if args.html:
            shown.append(row)
        file.write(json.dumps(row) + "\n")
  if args.json:
    print(f"rows: {args.json}")
  if args.html:
    name = os.path.basename(os.path.abspath(args.workdir))
    arguments = sys.argv[1:] if argv is None else argv
    write_rows(
      args.html,
      shown,
      title=f"{name}, steps {args.steps}: what the model is shown",
      command=shlex.join(["python", "-m", "flaxmlm.preview", *arguments]),
      tokens=tokenizer.tokens,
      vocab=store.vocab,
      specials=objectives.special_ids(store.vocab),
      pairs=pairs,
    )
    print(f"page: {args.html}")


def objects(
  example: Example, numbers: np.ndarray, *, step: int
) -> Iterator[dict[str, Any]]:
  """Yields one JSON object a row of what the objective made of a batch.

  Args:
    example: The rows as the model is shown them, on the host.
    numbers: The rows' numbers in the run [B].
    step: The batch's step.

  Yields:
    `step`; `row`, the index in the batch; `example`, the row's number in the
    run; lists of L: `original_ids`, `input_ids`, `segments`, `positions`,
    `token_types`, `flags`; lists of M: `slots`, `targets`, `weights`, where
    weight 0 says that a slot is not used. Of pairs `pair_label` too: the
    class, -1 where a row has none.
  """
  from flaxmlm.objectives import restore_ids

  inputs = example.inputs
  arrays = {
    "original_ids": restore_ids(example),
    "input_ids": inputs.ids,
    "slots": example.slots,
    "targets": example.targets,
    "weights": example.weights,
    "segments": inputs.segments,
    "positions": inputs.positions,
    "token_types": inputs.token_types,
    "flags": example.flags,
  }
  if example.pairs is not None:
    arrays["pair_label"] = example.pairs.labels
  for row, number in enumerate(numbers.tolist()):
    values = {name: array[row].tolist() for name, array in arrays.items()}
    yield {"step": step, "row": row, "example": number, **values}


def show(
  row: Mapping[str, Any],
  tokens: Callable[[list[int]], list[str]],
  vocab: Mapping[str, Any],
  console: Console,
  *,
  pairs: Mapping[int, str],
) -> None:
  """Prints a row: a paragraph a document, hidden tokens marked, the counts.

  Of a pair, A and B are a paragraph each.

  Spaces stand where the flags say that a word starts; marked tokens are written
  as in the vocabulary.

  Args:
    row: One of `objects`.
    tokens: Ids → token strings, as `Tokenizer.tokens`.
    vocab: Ids of the special tokens by name, as in `Vocab`.
    console: Where to print.
    pairs: Of `pages.rows.pair_words`.
  """
  from rich.table import Table
  from rich.text import Text

  from flaxmlm.objectives import special_ids

  specials = special_ids(vocab)
  kinds = hidden(row, mask=vocab["mask"])
  originals, shown = tokens(row["original_ids"]), tokens(row["input_ids"])
  texts = [text for _, text in join(originals)]
  label = row.get("pair_label", -1)
  documents: dict[str, Text] = {}
  for place, segment in enumerate(row["segments"]):
    if segment == 0:
      continue
    name = str(segment) if label < 0 else "AB"[row["token_types"][place]]
    text = documents.setdefault(name, Text())
    if text and row["flags"][place] & _WORD_START:
      text.append(" ")
    if place in kinds:
      text.append(_mark(kinds[place], originals[place], shown[place]))
    else:
      special = row["original_ids"][place] in specials
      text.append(_printable(texts[place]), style="dim" if special else "")
  padding = row["segments"].count(0)
  if padding:
    pad = tokens([vocab["pad"]])[0]
    documents[""] = Text(f"+{padding} {pad}", style="dim")

  counts = measure(row, kinds, specials)
  maskable = counts["maskable"]
  share = f" = {len(kinds) / maskable:.1%}" if maskable else ""
  console.print(
    f"step {row['step']}, row {row['row']}, example {row['example']}:"
    f" hidden {len(kinds)} of {maskable}{share};"
    f" {', '.join(f'{counts[kind]} {kind}' for kind in _KINDS)}"
    + (f"; {pairs[label]}" if "pair_label" in row else ""),
    style="bold",
    highlight=False,
    markup=False,
  )
  table = Table.grid(padding=(0, 1))
  table.add_column(justify="right")
  table.add_column(overflow="fold")  # a long word is not cut off
  for name, text in documents.items():
    table.add_row(Text(f"{name} │" if name else "│", style="dim"), text)
  console.print(table)


def legend(mask: str = "[MASK]") -> Text:
  """Returns the line that explains the marks of `show`; `mask` is a token."""
  from rich.text import Text

  return Text("   ").join(
    Text.assemble(
      _mark(kind, "cat", mask if kind == "masked" else "dog"), " ", meaning
    )
    for kind, (_, _, meaning) in _KINDS.items()
  )


def _mark(kind: str, original: str, shown: str) -> Text:
  from rich.text import Text

  style, form, _ = _KINDS[kind]
  text = form.format(original=_printable(original), shown=_printable(shown))
  return Text(text, style=style)


def _printable(text: str) -> str:
  """Returns a text that can do nothing to a terminal."""
  return "".join(
    c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text
  )


if __name__ == "__main__":
  config.run(main)
