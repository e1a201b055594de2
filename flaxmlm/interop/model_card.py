"""README.md of an exported folder: what was trained, on what, how well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_EVAL = {
  "eval/loss": "loss (nats a hidden token)",
  "eval/perplexity": "perplexity",
  "eval/accuracy": "accuracy",
  "eval/unigram_entropy": "loss of the token frequencies alone",
  "eval/uniform_entropy": "loss of a uniform guess, ln V",
}
# What is known of each other question, whose name stands before these.
_OTHERS = {
  "loss": "loss",
  "accuracy": "accuracy",
  "replaced": "share of replaced tokens",
}


class Phase(NamedTuple):
  """A run, or one of those that followed one another to make a model.

  Attributes:
    config: Its resolved config, nested, with every key.
    first_step: Steps done before it, of all phases.
    last_step: Steps done at its end.
    manifest: Of its token store; None if that isn't there any more. Then the
      keys of its config say how the text was cleaned, unless a store was named.
    metrics: Lines of its metrics.jsonl; none if that isn't there any more.
  """

  config: Mapping[str, Any]
  first_step: int
  last_step: int
  manifest: Mapping[str, Any] | None
  metrics: Sequence[Mapping[str, float]]


def write(
  *,
  name: str,
  facts: Mapping[str, str],
  phases: Sequence[Phase],
  mask: str,
  notes: Sequence[str],
) -> str:
  """Returns a model card: YAML front matter and Markdown.

  Args:
    name: Title of the card.
    facts: The model in words: label -> value.
    phases: Of the training, the oldest first; none for a folder that no run of
      ours has made.
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
  if not phases:
    lines += ["", "How it was trained isn't known here."]
  for number, phase in enumerate(phases, 1):
    of = f" of phase {number}" if len(phases) > 1 else ""
    lines += ["", f"## Data{of}", "", *_table(_data(phase))]
    lines += ["", f"## Training{of}", "", *_table(_training(phase))]
    lines += _evaluation(phase, of)
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


def _evaluation(phase: Phase, of: str) -> list[str]:
  """Returns the lines of the last evaluation, if there was one."""
  evals = [line for line in phase.metrics if "eval/loss" in line]
  if not evals:
    return []
  last = evals[-1]
  labels = _EVAL | {
    f"{task}_{name}": f"{task.removeprefix('eval/')}: {label}"
    for task in (k.removesuffix("_targets") for k in last if "_targets" in k)
    for name, label in _OTHERS.items()
  }
  shown = {
    label: f"{last[key]:.4g}" for key, label in labels.items() if key in last
  }
  return [
    *("", f"## Evaluation{of}", ""),
    *(f"On held-out documents, after step {last['step']:,}.", ""),
    *_table(shown),
  ]


def _data(phase: Phase) -> dict[str, str]:
  """Returns the facts of the text; the store knows best what it was made of."""
  config, manifest = phase.config, phase.manifest
  spec = {} if manifest is None else manifest["spec"]
  data, cleaning = config["data"], config["data"]["cleaning"]
  cleaning = {
    name: spec.get(f"data.cleaning.{name}", value)
    for name, value in cleaning.items()
  }
  facts = {"source": _listed(data["source"])}
  if data["store"] is not None:
    facts["source"] = f"the store `{data['store']}`{_texts(spec)}"
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
  if data["store"] is None or manifest is not None:
    facts["cleaning"] = ", ".join(f"{k}={v}" for k, v in cleaning.items())
  return facts


def _texts(spec: Mapping[str, Any], shown: int = 5) -> str:
  """Returns the names of the files that a store was made of."""
  names = []
  for source in spec.get("data.source") or []:
    names += [source] if isinstance(source, str) else [f for f, *_ in source]
  if not names:
    return ""
  more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
  return f", made of {_listed(names[:shown])}{more}"


def _training(phase: Phase) -> dict[str, str]:
  """Returns the facts of the training."""
  train, objective = phase.config["train"], dict(phase.config["objective"])
  optimizer, begun = phase.config["optimizer"], phase.config["model"]
  B = train["batch_size"]
  L, steps = phase.config["data"]["row_length"], phase.last_step
  steps -= phase.first_step
  facts = {
    "objective": _objective(objective),
    "steps": f"{steps:,} of {B:,} rows of {L:,} tokens,"
    f" {steps * B * L:,} tokens in all",
  }
  if phase.first_step:
    facts["steps"] += f"; they count on from {phase.first_step:,}"
  facts |= {
    "optimizer": f"{optimizer['name']}, "
    + ", ".join(
      f"{key}={optimizer[key]}"
      for key in ("peak_lr", "schedule", "warmup_steps", "weight_decay")
    ),
    "compute dtype": train["dtype"],
    "seed": str(phase.config["seed"]),
  }
  if begun["init_from"] is not None:
    facts["started from"] = f"`{begun['init_from']}`"
  return facts


def _objective(options: dict[str, Any]) -> str:
  """Returns an objective in a line, without keys that it doesn't look at."""
  name = options.pop("name")
  names = (name,) if isinstance(name, str) else tuple(name)
  idle = {"weights"} if not options["weights"] else set()
  if options["rate_end"] is None:
    idle |= {"rate_end", "rate_schedule"}
  if options["temperature"] == 1:
    idle.add("temperature")
  if not options["span_boundary"]:
    idle.add("span_boundary")
  if "sentence_pair" not in names:
    idle.add("labels")
  if "replaced_token" not in names:
    idle |= {"generator_size", "discriminator_weight"}
  given = [f"{k}={v}" for k, v in options.items() if k not in idle]
  return ", ".join([" + ".join(names), *given])
