r"""Writes a trained model as a Hugging Face folder.

  python -m flaxmlm.export --workdir=runs/quickstart --format=huggingface \
    --out=exported

The folder has config.json, model.safetensors, tokenizer.json and README.md, a
model card with how the model was trained. transformers and
sentence-transformers load it; neither is needed here. Before it is called done,
its tokenizer gives the same ids on 10,000 lines and its weights the same
logits. Of ELECTRA it is the discriminator's; the generator's is in generator/.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sysconfig
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from flaxmlm import InputError, config, load
from flaxmlm.storage.remote import localize

if TYPE_CHECKING:
  import numpy as np

  from flaxmlm.inference.loading import LoadedModel
  from flaxmlm.interop import model_card
  from flaxmlm.tokenizers import Tokenizer

FORMATS = ("huggingface",)
_LINES = 10_000  # compared between the two tokenizers
_ODD_LINES = 1_000
_READ = 20_000  # lines of each source that those are drawn from
_ROWS = 8  # whose logits are compared


def main(argv: list[str] | None = None) -> None:
  """Exports a workdir or a Hugging Face folder."""
  parser = config.Parser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    "--workdir", metavar="DIR", required=True, help="folder of a run"
  )
  parser.add_argument(
    "--format", required=True, metavar="NAME", help=", ".join(FORMATS)
  )
  parser.add_argument(
    "--out", metavar="DIR", required=True, help="folder to be made"
  )
  args = parser.parse_args(argv)
  out = args.out.rstrip(os.sep) or args.out
  if args.format not in FORMATS:
    raise InputError(
      f"--format={args.format}: wants one of {', '.join(FORMATS)}"
    )
  if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
    raise InputError(f"--out={out}: is there already; name a new folder")

  from flaxmlm.inference import exporting
  from flaxmlm.interop import model_card
  from flaxmlm.models.model import count_parameters
  from flaxmlm.tokenizers.exporting import to_json

  args.workdir = localize(args.workdir)
  m = load(args.workdir)
  if m.tokenizer is None or not {"mlm", "discriminator"} & set(m.params):
    missing = "MLM head" if m.tokenizer else "tokenizer"
    raise InputError(f"{args.workdir}: has no {missing}; export wants one")
  phases = read_phases(args.workdir)
  family, vocab = m.config["model"]["family"], m.tokenizer.vocab
  facts = {
    "family": family,
    "parameters": f"{count_parameters(m.params):,}",
    "vocabulary": f"{m.vocab_size:,}",
    "longest text": f"{m.max_length:,} tokens",
  } | ({"steps": f"{m.step:,}"} if m.step else {})
  print(f"{args.workdir} -> {out}, a Hugging Face folder")
  for name, value in facts.items():
    print(f"{name:>14}  {value}")
  left = set(m.params) - set(exporting.kept(m)) - {"generator"}
  if left:
    print(f"{'left out':>14}  {', '.join(sorted(left))}: has no place there")

  tokenizer_json = to_json(m.tokenizer)
  lines, notes = check_tokenizer(
    m.tokenizer,
    tokenizer_json,
    read_texts(phases[-1].config if phases else None),
  )

  # The folder is made beside its place, and moved there when it is right.
  card = model_card.write(
    name=os.path.basename(os.path.abspath(out)),
    facts=facts | {"tokenizer": describe(m.tokenizer, tokenizer_json)},
    mask=m.tokenizer.tokens([vocab.mask])[0],
    notes=notes,
    phases=phases,
  )
  parent = os.path.dirname(os.path.abspath(out))
  try:
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as made:
      partial = os.path.join(made, "folder")
      print(f"comparing logits: {_ROWS} of these lines", flush=True)
      rows = [make_row(m, line) for line in lines[:_ROWS]]
      wanted = {partial: m}
      if "generator" in m.params:
        wanted[os.path.join(partial, "generator")] = m.generator()
      worst = 0.0
      for folder, model in wanted.items():
        os.mkdir(folder)
        exporting.write_folder(
          model, folder, tokenizer_json=tokenizer_json, card=card
        )
        worst = max(worst, exporting.check_logits(model, folder, rows))
      os.rename(partial, out)
  except OSError as error:
    raise InputError(f"--out={out}: {error.strerror}") from error
  print(f"the same ids, and logits that differ by {worst:.1g} at most\n")
  print(f"exported: {out}")
  print("its README.md has a place for the licence; try it:")
  text = f"The {m.tokenizer.tokens([vocab.mask])[0]} of the house."
  filler = out if "mlm" in m.params else os.path.join(out, "generator")
  print(
    '  python -c "from transformers import pipeline;'
    f" print(pipeline('fill-mask', '{filler}')('{text}'))\""
  )


def read_phases(folder: str) -> list[model_card.Phase]:
  """Returns what a workdir knows of its run, and of those that it went on from.

  Of a Hugging Face folder that is nothing. The store and the metrics of a phase
  may have gone; a store that isn't the one it was trained on says nothing.
  """
  from flaxmlm.data.store import MANIFEST, read_manifest
  from flaxmlm.interop import huggingface, model_card
  from flaxmlm.training import chain, metrics

  if huggingface.is_folder(folder):
    return []
  phases = []
  for phase in chain.read_chain(folder):
    c = config.check_keys(config.to_flat(phase.config), where=phase.workdir)
    store = c.data.store or os.path.join(phase.workdir, "store")
    manifest = None
    if os.path.exists(os.path.join(store, MANIFEST)):
      found, digest = read_manifest(store)
      # Another one may have been made there since.
      manifest = found if phase.store in (None, digest) else None
    lines = metrics.read(os.path.join(phase.workdir, "metrics.jsonl"))
    phases.append(
      model_card.Phase(
        config=c.to_dict(),
        first_step=phase.first_step,
        last_step=phase.last_step,
        manifest=manifest,
        metrics=[x for x in lines if x["step"] <= phase.last_step],
      )
    )
  return phases


def check_tokenizer(
  tokenizer: Tokenizer, tokenizer_json: bytes, texts: dict[str, list[str]]
) -> tuple[list[str], list[str]]:
  """Compares a tokenizer with what is to be exported of it.

  Args:
    tokenizer: The model's.
    tokenizer_json: See `tokenizers.exporting.to_json`.
    texts: Lines by where they come from.

  Returns:
    The lines, and what is to be said of lines with odd things in them: these
    may differ, for there are SentencePiece models that tokenizer.json can't
    follow everywhere.

  Raises:
    InputError: The ids of a line differ.
  """
  from flaxmlm.tokenizers import trials
  from flaxmlm.tokenizers.exporting import compare

  vocab = tokenizer.vocab
  names = tokenizer.tokens(i for i in vocab.specials if i != vocab.mask)
  lines, counts = trials.make_lines(texts, count=_LINES, seed=0, without=names)
  shown = ", ".join(f"{n:,} {name}" for name, n in counts.items())
  print(f"comparing tokenizers: {_LINES:,} lines ({shown})", flush=True)
  for difference in compare(tokenizer, tokenizer_json, lines):
    raise InputError(
      f"the exported tokenizer isn't the same: {difference}; nothing was"
      " exported"
    )
  odd = trials.disturb(lines, count=_ODD_LINES, seed=0)
  different = list(compare(tokenizer, tokenizer_json, odd))
  if not different:
    return lines, []
  note = (
    f"Of {_ODD_LINES:,} lines with odd characters, runs and masks put in,"
    f" tokenizer.json cuts {len(different):,} in another way than the training"
    f" did. The first is {different[0]}."
  )
  print(f"  {note}")
  return lines, [note]


def read_texts(c: dict[str, Any] | None) -> dict[str, list[str]]:
  """Returns lines of the run's own text, of English prose and of code.

  The last two come with Python. The run's text is left out where it can't be
  read any more.
  """
  from flaxmlm.data import sources
  from flaxmlm.tokenizers import sampling

  def cut(texts: Iterator[str]) -> list[str]:
    lines = (line for text in texts for line in sampling.cut_lines(text))
    return list(itertools.islice(lines, _READ))

  result = {}
  if c is not None and c["data"]["source"] != "embedded":
    data = c["data"]
    try:
      documents = sources.read(
        config.as_tuple(data["source"]),
        text_field=data["text_field"],
        document=data["document"],
        encoding=data["encoding"],
        on_bad_record="skip",
        tfds_dir=data["tfds_dir"],
      )
      result["of the run's text"] = cut(d.text for d in documents)
    except InputError as error:
      print(f"the run's own text isn't compared: {error}")
  documents = list(sources.read(["embedded"]))
  random.Random(0).shuffle(documents)
  result["of Python's manuals"] = cut(d.text for d in documents)
  result["of Python's code"] = cut(_code())
  return result


def _code() -> Iterator[str]:
  folder = sysconfig.get_path("stdlib")
  names = sorted(n for n in os.listdir(folder) if n.endswith(".py"))
  random.Random(0).shuffle(names)
  for name in names:
    path = os.path.join(folder, name)
    with open(path, encoding="utf-8", errors="ignore") as file:
      yield file.read()


def describe(tokenizer: Tokenizer, tokenizer_json: bytes) -> str:
  """Returns a tokenizer in words, for the model card."""
  kind = json.loads(tokenizer_json)["model"]["type"]
  specials = tokenizer.tokens(tokenizer.vocab[1:6])
  return f"{kind}, {tokenizer.vocab.size:,} tokens; {' '.join(specials)}"


def make_row(m: LoadedModel, line: str) -> np.ndarray:
  """Returns the ids of a line between [CLS] and [SEP], cut to the model."""
  import numpy as np

  vocab = m.tokenizer.vocab
  ids = m.tokenizer.encode(line)[: m.max_length - 2]
  return np.concatenate([[vocab.cls], ids, [vocab.sep]]).astype(np.int32)


if __name__ == "__main__":
  config.run(main)
