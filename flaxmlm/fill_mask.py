"""Fills in the [MASK]s of texts with a trained model.

  python -m flaxmlm.fill_mask --workdir=runs/quickstart "A [MASK] object."

Texts are arguments, or lines on standard input.
"""

from __future__ import annotations

import argparse
import json
import sys

from flaxmlm import InputError, config, load


def main(argv: list[str] | None = None) -> None:
  """Prints the likeliest tokens for each [MASK]."""
  parser = config.Parser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("texts", nargs="*", metavar="TEXT")
  parser.add_argument(
    "--workdir", metavar="DIR", required=True, help="folder of a run"
  )
  parser.add_argument(
    "--top_k", type=int, default=5, metavar="K", help="tokens for each [MASK]"
  )
  parser.add_argument(
    "--json", metavar="FILE", help="write the results as JSON too"
  )
  args = parser.parse_args(argv)
  config.check_file("json", args.json)
  if not args.texts and sys.stdin.isatty():
    print("type lines with a [MASK]; end with Ctrl-D", file=sys.stderr)
  texts = args.texts or [line.rstrip("\n") for line in sys.stdin]
  texts = [text for text in texts if text.strip() or args.texts]

  if not texts:
    raise InputError("no text; give some as arguments or on standard input")

  m = load(args.workdir)
  if "generator" in m.params:  # ELECTRA's discriminator fills in nothing
    m = m.generator()
  results = m.fill_mask(texts, top_k=args.top_k)

  if args.json is not None:
    with open(args.json, "w", encoding="utf-8") as file:
      json.dump(
        [
          {"text": text, "result": result}
          for text, result in zip(texts, results, strict=True)
        ],
        file,
        ensure_ascii=False,
        indent=2,
      )
      file.write("\n")
  for text, result in zip(texts, results, strict=True):
    print(text)
    masks = result if isinstance(result[0], list) else [result]
    for number, guesses in enumerate(masks, 1):
      if len(masks) > 1:
        print(f"  [MASK] {number}")
      for guess in guesses:
        print(
          f"  {guess['score']:7.2%}  {guess['token_str']:<16}"
          f"  {guess['sequence']}"
        )


if __name__ == "__main__":
  config.run(main)
