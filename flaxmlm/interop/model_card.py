"""README.md of an exported folder: what was trained, on what, how well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_EVAL = {
  "eval/loss": "loss (nats a hidden token)",
  "eval/perplexity": "perplexity",
  "eval/accuracy": "accuracy",
  "eval/unigram_entropy": "loss of the token frequencies alone",
  "eval/uniform_entropy": "loss of a uniform guess, ln V",
}


def write(
  *,
  name: str,
  facts: Mapping[str, str],
  config: Mapping[str, Any] | None,
  chain: Sequence[Any],
  manifest: Mapping[str, Any] | None,
  metrics: Sequence[Mapping[str, float]],
  mask: str,
  notes: Sequence[str],
) -> str:
  """Returns a model card: YAML front matter and Markdown.

  Args:
    name: Title of the card.
    facts: The model in words: label -> value.
    config: The run's resolved config, nested; None for a folder that no run
      of ours has made.
    chain: The phases of the run (`training.chain.read_chain`), itself last.
    manifest: Of the run's token store, if that is there.
    metrics: Lines of metrics.jsonl.
    mask: The mask token.
    notes: What a user should know besides.
  """
  family = facts["family"]
  lines = [
    "---",
    "license: other",
    "license_name: not-chosen-yet",
    "library_name: transformers",
    "pipeline_tag: fill-mask",
    f"mask_token: {_quoted(mask)}",
    f"tags: [fill-mask, masked-lm, {family}, flaxmlm]",
    "---",
    "",
    f"# {name}",
    "",
    "An encoder pretrained as a masked language model with flaxmlm.",
    "",
    "```python",
    "from transformers import pipeline",
    "",
    'fill = pipeline("fill-mask", model=FOLDER)',
    f'fill("The {mask} of the house.")',
    "```",
    "",
    "**Licence:** not chosen yet. Name one here and in the first lines of this",
    "file, with what the licences of the data allow.",
    "",
    "## Model",
    "",
    *_table(facts),
  ]
  if config is None:
    lines += ["", "How it was trained isn't known here."]
  else:
    lines += ["", "## Data", "", *_table(_data(config, manifest))]
    lines += ["", "## Training", "", *_table(_training(config, chain))]
  evals = [line for line in metrics if "eval/loss" in line]
  if evals:
    last = evals[-1]
    shown = {
      label: f"{last[key]:.4g}" for key, label in _EVAL.items() if key in last
    }
    lines += ["", "## Evaluation", ""]
    lines += [f"On held-out documents, after step {last['step']:,}.", ""]
    lines += _table(shown)
  if notes:
    lines += ["", "## Notes", "", *(f"- {note}" for note in notes)]
  return "\n".join(lines) + "\n"


def _table(facts: Mapping[str, str]) -> list[str]:
  return [
    "| | |",
    "|---|---|",
    *(f"| {k} | {_cell(v)} |" for k, v in facts.items()),
  ]


def _cell(value: str) -> str:
  return " ".join(value.replace("|", "\\|").split())


def _quoted(text: str) -> str:
  return "'" + text.replace("'", "''") + "'"


def _listed(value: Any) -> str:
  values = [value] if isinstance(value, str) else value
  return ", ".join(f"`{v}`" for v in values)


def _data(
  config: Mapping[str, Any], manifest: Mapping[str, Any] | None
) -> dict[str, str]:
  """Returns the facts of the text; the store knows best what it was made of."""
  spec = {} if manifest is None else manifest["spec"]
  data, cleaning = config["data"], config["data"]["cleaning"]
  cleaning = {
    name: spec.get(f"data.cleaning.{name}", value)
    for name, value in cleaning.items()
  }
  facts = {"source": _listed(data["source"])}
  if data["store"] is not None:
    facts["source"] = f"the store `{data['store']}`"
  if data["weights"]:
    facts["weights of the sources"] = _listed(map(str, data["weights"]))
  if manifest is not None:
    documents, splits = manifest["documents"], manifest["splits"]
    train, held_out = splits["train"], splits["validation"]
    dropped = sum(documents["dropped"].values())
    facts |= {
      "documents": f"{train['documents']:,} for training,"
      f" {held_out['documents']:,} held out, {dropped:,} dropped",
      "tokens": f"{train['tokens']:,} for training, {held_out['tokens']:,}"
      " held out",
    }
  facts["cleaning"] = ", ".join(f"{k}={v}" for k, v in cleaning.items())
  return facts


def _training(
  config: Mapping[str, Any], chain: Sequence[Any]
) -> dict[str, str]:
  """Returns the facts of the training; of a chain a line a phase."""
  train, objective = config["train"], dict(config["objective"])
  optimizer, model = config["optimizer"], chain[0].config["model"]
  name = objective.pop("name")
  facts = {
    "objective": ", ".join([name, *(f"{k}={v}" for k, v in objective.items())])
  }
  for number, phase in enumerate(chain, 1):
    data, batch = phase.config["data"], phase.config["train"]["batch_size"]
    label = "steps" if len(chain) == 1 else f"steps, phase {number}"
    facts[label] = (
      f"{phase.steps:,} of {batch:,} rows of {data['row_length']:,} tokens,"
      f" {phase.tokens:,} tokens in all"
    )
    if len(chain) > 1:
      facts[label] += f"; {_listed(data['store'] or data['source'])}"
  facts |= {
    "optimizer": f"{optimizer['name']}, "
    + ", ".join(
      f"{key}={optimizer[key]}"
      for key in ("peak_lr", "schedule", "warmup_steps", "weight_decay")
    ),
    "compute dtype": train["dtype"],
    "seed": str(config["seed"]),
  }
  if model["init_from"] is not None:
    facts["started from"] = f"`{model['init_from']}`"
  return facts
