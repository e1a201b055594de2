"""The page of a run: what it learned, how fast, and how that came about.

One HTML file that needs nothing else: no network, no scripts, no fonts. The
same input gives the same bytes. Plots are drawn with colours that stand for
the page's own (`_COLORS`), so that they follow it from light to dark.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from flaxmlm.pages.page import SPECIAL, escape, join, write_page
from flaxmlm.training.metrics import chance

if TYPE_CHECKING:
  import numpy as np
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

  from flaxmlm.objectives import Example

# Closer than this to the unigram entropy, nothing has been learnt; in nats.
_PLATEAU = 0.1
# Drawn colours, and what stands in the page for them.
_INK, _MUTED, _GRID, _FIRST, _SECOND = (f"#00000{n}" for n in range(1, 6))
_COLORS = {
  _INK: "var(--ink)",
  _MUTED: "var(--muted)",
  _GRID: "var(--line)",
  _FIRST: "var(--first)",
  _SECOND: "var(--second)",
}
_RC = {
  "axes.axisbelow": True,
  "axes.edgecolor": _GRID,
  "axes.grid": True,
  "axes.grid.axis": "y",
  "axes.labelcolor": _MUTED,
  "axes.spines.left": False,
  "axes.spines.right": False,
  "axes.spines.top": False,
  "axes.xmargin": 0.02,
  "axes.ymargin": 0.1,
  "figure.constrained_layout.use": True,
  "grid.color": _GRID,
  "grid.linewidth": 0.7,
  "legend.borderaxespad": 0.2,
  "legend.borderpad": 0.0,
  "legend.frameon": False,
  "legend.labelcolor": _INK,
  "svg.fonttype": "none",
  "text.color": _INK,
  "xtick.color": _GRID,
  "xtick.labelcolor": _MUTED,
  "ytick.color": _GRID,
  "ytick.labelcolor": _MUTED,
  "ytick.major.size": 0,
  "ytick.minor.size": 0,
}


class Curve(NamedTuple):
  """One metric by step, ascending; a value that isn't finite is NaN."""

  steps: list[int]
  values: list[float]

  @property
  def finite(self) -> list[tuple[int, float]]:
    """The (step, value) pairs with a value."""
    pairs = zip(self.steps, self.values, strict=True)
    return [(step, value) for step, value in pairs if not math.isnan(value)]


class Plot(NamedTuple):
  """One plot: `draw` gets the axes and its `keys`' curves times `scale`."""

  title: str
  unit: str
  keys: tuple[str, ...]
  draw: Callable[[Axes, Mapping[str, Curve]], None]
  scale: float = 1.0


def write(
  path: str,
  *,
  title: str,
  facts: Mapping[str, str],
  metrics: Sequence[Mapping[str, Any]],
  config: Mapping[str, Any],
  examples: Sequence[Mapping[str, Any]],
  tasks: Sequence[str] = (),
) -> None:
  """Writes the page of a run, whole or not at all.

  Whatever is missing among the metrics is named on the page; it never stops it
  from being written. Of two lines with the same step and key, as a resumed run
  leaves them, the later one counts.

  Args:
    path: The file; it is replaced.
    title: Title of the page.
    facts: Name → value, shown in order.
    metrics: The lines of metrics.jsonl. Losses and entropies in nats; accuracy,
      mfu and host_share as shares of 1.
    config: Flat config, `{"group.key": value}`.
    examples: Rows with masks filled. `tokens`: the original row, as in the
      vocabulary. `slots`: places of the hidden tokens. `before`, `after`: for
      each slot the best guesses as (token, probability), best first; or empty.
    tasks: What was asked besides the hidden tokens, by name in the metrics.
  """
  # Of the last evaluation, by names without eval/.
  last = {
    key.removeprefix("eval/"): float(value)
    for line in metrics
    for key, value in line.items()
    if key.startswith("eval/") and value is not None
  }
  plots = [*_PLOTS]
  plots[2:2] = [
    plot for task in tasks for plot in _plots_of(task, chance(task, last))
  ]
  columns = _EVALUATION | {
    f"eval/{task}_{name}": f"{task} {name}"
    for task in tasks
    for name in ("loss", "accuracy")
  }
  keys = {key for plot in plots for key in plot.keys} | set(columns)
  curves = {key: _curve(metrics, key) for key in sorted(keys)}
  missing = _missing(metrics, curves)
  body = [
    f"<h1>{escape(title)}</h1>",
    f'<p class="lead">{escape(headline(metrics))}</p>',
    *_list("Missing or not finite", missing),
    *_facts(facts),
    "<h2>How it learned</h2>",
    '<div class="plots">',
    *(_figure(plot, curves) for plot in plots),
    "</div>",
    *_evaluations(curves, columns),
    *_examples(examples),
    *_config(config),
  ]
  write_page(path, title=title, body="\n".join(body), style=_STYLE)


def headline(metrics: Sequence[Mapping[str, Any]]) -> str:
  """Returns in plain words how far a run has come.

  Args:
    metrics: As for `write`.
  """

  def last(key: str) -> tuple[int, float] | None:
    curve = _curve(metrics, key)
    return (curve.steps[-1], curve.values[-1]) if curve.steps else None

  evaluated, trained = last("eval/loss"), last("train/loss")
  if evaluated is None and trained is None:
    return "No loss has been logged yet."
  step, loss = evaluated or trained or (0, math.nan)
  kind = "training" if evaluated is None else "validation"
  if math.isnan(loss):
    return (
      f"The {kind} loss is not a finite number at step {step:,}: the run has"
      " diverged. Try a lower learning rate or a longer warm-up."
    )
  after = f"{step:,} step{'' if step == 1 else 's'}"
  text = f"fter {after} the {kind} loss is {loss:.2f} nats"
  if evaluated is None:
    return f"A{text}. It has not been evaluated on the validation split yet."
  baselines = [
    (name, value[1])
    for name, value in (
      ("the unigram entropy", last("eval/unigram_entropy")),
      ("ln V", last("eval/uniform_entropy")),
    )
    if value is not None and not math.isnan(value[1])
  ]
  if baselines:
    text += ": " + " and ".join(
      f"{abs(value - loss):.2f} {'below' if loss <= value else 'above'}"
      f" {name} ({value:.2f})"
      for name, value in baselines
    )
  entropy = dict(baselines).get("the unigram entropy", math.inf)
  if loss > entropy - _PLATEAU:
    text = (
      f"Nothing beyond word frequencies has been learnt yet: a{text}. Losses"
      " stay there for a while and then fall; if this one doesn't, train"
      " longer or change the learning rate"
    )
  else:
    text = f"A{text}"
  accuracy = last("eval/accuracy")
  if accuracy is not None and not math.isnan(accuracy[1]):
    text += f". It predicts {100 * accuracy[1]:.1f} % of hidden tokens"
  return text + "."


def guesses(
  example: Example,
  probabilities: np.ndarray,
  ids: np.ndarray,
  *,
  tokens: Callable[[list[int]], list[str]],
) -> list[dict[str, Any]]:
  """Returns what a model fills in, in words: one JSON object a row.

  Args:
    example: Rows, on the host; those of padding alone are left out.
    probabilities: Of the likeliest tokens at each slot [B, M, top].
    ids: Those tokens [B, M, top], likeliest first.
    tokens: Ids → token strings, as `Tokenizer.tokens`.

  Returns:
    `tokens` and `slots` as `write` takes them, and `guesses`, which is its
    `before` or `after`.
  """
  from flaxmlm.objectives import restore_ids

  found = []
  for row, original in enumerate(restore_ids(example)):
    if not example.inputs.segments[row].any():
      continue
    used = example.weights[row] > 0
    found.append(
      {
        "tokens": tokens(original.tolist()),
        "slots": example.slots[row][used].tolist(),
        "guesses": [
          list(map(list, zip(tokens(best.tolist()), p.tolist(), strict=True)))
          for best, p in zip(
            ids[row][used], probabilities[row][used], strict=True
          )
        ],
      }
    )
  return found


def _curve(metrics: Sequence[Mapping[str, Any]], key: str) -> Curve:
  found: dict[int, float] = {}
  for line in metrics:
    if key in line and "step" in line:
      value = line[key]
      finite = value is not None and math.isfinite(value)
      found[int(line["step"])] = float(value) if finite else math.nan
  steps = sorted(found)
  return Curve(steps, [found[step] for step in steps])


def _missing(
  metrics: Sequence[Mapping[str, Any]], curves: Mapping[str, Curve]
) -> list[str]:
  """Returns a line for each thing that the page can't show."""
  if not metrics:
    return ["Nothing has been logged yet: metrics.jsonl is empty."]
  found = []
  absent = [key for key, curve in curves.items() if not curve.steps]
  if all(key in absent for key in _EVALUATION):
    found.append("No evaluation has been logged.")
    absent = [key for key in absent if key not in _EVALUATION]
  if absent:
    found.append(f"Not in the metrics: {', '.join(absent)}.")
  for key, curve in curves.items():
    bad = [s for s, v in zip(*curve, strict=True) if math.isnan(v)]
    if bad:
      found.append(
        f"{key} is not a finite number in {len(bad):,} of"
        f" {len(curve.steps):,} lines, first at step {bad[0]:,}."
      )
  nowhere = sum("step" not in line for line in metrics)
  if nowhere:
    found.append(f"{nowhere:,} lines of the metrics have no step.")
  return found


# Plots


def _line(
  axes: Axes, curve: Curve, color: str, label: str = "", **style: Any
) -> None:
  # A lone point has no line to be seen by.
  few = len(curve.steps) <= 40
  style = {"linewidth": 1.4, "marker": "o" if few else "", **style}
  axes.plot(
    *curve, color=color, label=label, markersize=3, solid_capstyle="round",
    **style,
  )  # fmt: skip


def _pair(
  axes: Axes, curves: Mapping[str, Curve], train: str, evaluation: str
) -> None:
  """Draws a metric of training, thin, and of evaluation, with dots."""
  if curves[train].finite:
    _line(axes, curves[train], _SECOND, "training", linewidth=0.9, marker="")
    if len(curves[train].steps) == 1:
      axes.lines[-1].set_marker("o")
  if curves[evaluation].finite:
    style = {"linewidth": 1.8, "marker": "o", "zorder": 3}
    _line(axes, curves[evaluation], _FIRST, "validation", **style)
  axes.legend(
    loc="lower left", bbox_to_anchor=(0, 1), ncols=2, handlelength=1.6
  )


def _draw_loss(axes: Axes, curves: Mapping[str, Curve]) -> None:
  _pair(axes, curves, "train/loss", "eval/loss")
  uniform, unigram = (
    curves[key].finite[-1][1] if curves[key].finite else None
    for key in ("eval/uniform_entropy", "eval/unigram_entropy")
  )
  if uniform is not None:
    axes.axhline(uniform, color=_MUTED, linewidth=1, dashes=(1, 2), zorder=2)
    _label(axes, uniform, "ln V, a uniform guess")
  if unigram is not None:
    axes.axhline(unigram, color=_MUTED, linewidth=1, dashes=(5, 3), zorder=2)
    low, high = axes.get_ylim()
    # Curves come to lie below, so above is the better side, if there is room.
    gap = math.inf if uniform is None else abs(uniform - unigram)
    room = bool(gap > 0.12 * (high - low))
    _label(axes, unigram, "word frequencies alone", above=room)


def _label(axes: Axes, y: float, text: str, *, above: bool = True) -> None:
  axes.annotate(
    f"{text}: {y:.2f}",
    (1, y),
    (0, 3 if above else -3),
    xycoords=("axes fraction", "data"),
    textcoords="offset points",
    ha="right",
    va="bottom" if above else "top",
    color=_INK,
    zorder=4,
  )


def _draw_accuracy(axes: Axes, curves: Mapping[str, Curve]) -> None:
  _pair(axes, curves, "train/accuracy", "eval/accuracy")
  axes.set_ylim(bottom=0)


def _draw_rate(axes: Axes, curves: Mapping[str, Curve]) -> None:
  _line(axes, curves["train/learning_rate"], _FIRST)
  axes.set_ylim(bottom=0)


def _draw_norm(axes: Axes, curves: Mapping[str, Curve]) -> None:
  curve = curves["train/grad_norm"]
  _line(axes, curve, _FIRST, linewidth=0.9)
  values = [value for _, value in curve.finite]
  if min(values) > 0 and max(values) > 20 * min(values):
    from matplotlib import ticker

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
  else:
    axes.set_ylim(bottom=0)


def _draw_speed(axes: Axes, curves: Mapping[str, Curve]) -> None:
  """MFU is speed times a constant: one line with two scales.

  Where it isn't, as in a run that went on elsewhere, it has a line of its own.
  """
  speed, mfu = curves["train/tokens_per_second"], curves["train/mfu"]
  if speed.finite:
    _line(axes, speed, _FIRST, "tokens/s", linewidth=1.1)
  axes.set_ylim(bottom=0)
  known = dict(speed.finite)
  ratios = sorted(
    100 * value / known[step] for step, value in mfu.finite if known.get(step)
  )
  if not ratios:
    return
  right = axes.twinx()
  right.grid(False)
  right.set_ylabel("MFU in %")
  ratio = ratios[len(ratios) // 2]
  right.set_ylim(0, ratio * axes.get_ylim()[1])
  if ratios[-1] > 1.02 * ratios[0]:
    percent = Curve(mfu.steps, [100 * value for value in mfu.values])
    _line(right, percent, _SECOND, "MFU", linewidth=1.1, dashes=(4, 2))
    right.set_ylim(0, max(right.dataLim.y1 * 1.1, right.get_ylim()[1]))
    axes.legend(
      handles=[*axes.lines, *right.lines], loc="lower left",
      bbox_to_anchor=(0, 1), ncols=2,
    )  # fmt: skip


def _draw_host(axes: Axes, curves: Mapping[str, Curve]) -> None:
  _line(axes, curves["train/host_share"], _FIRST, linewidth=1.1)
  axes.set_ylim(bottom=0)


_PLOTS = (
  Plot(
    "Loss",
    "nats",
    (
      "train/loss",
      "eval/loss",
      "eval/unigram_entropy",
      "eval/uniform_entropy",
    ),
    _draw_loss,
  ),
  Plot(
    "Accuracy",
    "% of the hidden tokens",
    ("train/accuracy", "eval/accuracy"),
    _draw_accuracy,
    100,
  ),
  Plot("Learning rate", "", ("train/learning_rate",), _draw_rate),
  Plot("Gradient norm", "before clipping", ("train/grad_norm",), _draw_norm),
  Plot(
    "Throughput",
    "tokens/s; right: model FLOPs utilization",
    ("train/tokens_per_second", "train/mfu"),
    _draw_speed,
  ),
  Plot(
    "Host work",
    "% of the step's time",
    ("train/host_share",),
    _draw_host,
    100,
  ),
)
_EVALUATION = {
  "eval/loss": "loss",
  "eval/perplexity": "perplexity",
  "eval/accuracy": "accuracy",
  "eval/unigram_entropy": "unigram entropy",
  "eval/uniform_entropy": "ln V",
}


def _plots_of(task: str, known: Mapping[str, float]) -> tuple[Plot, Plot]:
  """Returns the plots of a task beside that of the hidden tokens.

  Args:
    task: Its name in the metrics.
    known: Its loss and accuracy by chance, as far as they are known.
  """

  def draw(name: str, axes: Axes, curves: Mapping[str, Curve]) -> None:
    _pair(axes, curves, *keys(name))
    if name in known:
      level = known[name] * (100 if name == "accuracy" else 1)
      axes.axhline(level, color=_MUTED, linewidth=1, dashes=(5, 3), zorder=2)
      _label(axes, level, "chance")

  def keys(name: str) -> tuple[str, str]:
    return f"train/{task}_{name}", f"eval/{task}_{name}"

  title = task.replace("_", " ").capitalize()
  loss, accuracy = (functools.partial(draw, n) for n in ("loss", "accuracy"))
  return (
    Plot(f"{title}: loss", "nats", keys("loss"), loss),
    Plot(f"{title}: accuracy", "%", keys("accuracy"), accuracy, 100),
  )


def _figure(plot: Plot, curves: Mapping[str, Curve]) -> str:
  """Returns a plot as an HTML figure, or a line that says it has no values."""
  unit = f" <small>{escape(plot.unit)}</small>" if plot.unit else ""
  head = f"<figure><figcaption>{escape(plot.title)}{unit}</figcaption>"
  scaled = {
    key: Curve(curves[key].steps, [plot.scale * v for v in curves[key].values])
    for key in plot.keys
  }
  if any(curve.finite for curve in scaled.values()):
    return f"{head}{_svg(plot, scaled)}</figure>"
  return f'{head}<p class="empty">No values in the metrics.</p></figure>'


def _svg(plot: Plot, curves: Mapping[str, Curve]) -> str:
  """Draws a plot; text stays text, colours follow the page."""
  import matplotlib
  from matplotlib.figure import Figure

  # Defaults first: someone's own matplotlibrc must not change the page.
  with matplotlib.rc_context():
    matplotlib.rcdefaults()
    matplotlib.rcParams.update({**_RC, "svg.hashsalt": plot.title})
    figure = Figure(figsize=(4.9, 2.9))
    axes = figure.subplots()
    plot.draw(axes, curves)
    _ticks(axes)
    text = _save(figure)
  label = escape(_describe(plot, curves))
  box = re.findall(r'viewBox="[^"]*"', text)[0]
  body = text[text.index("</defs>") + len("</defs>") :]
  # Names of groups, unlike those of shapes, come again in every plot.
  body = re.sub(r'<g id="[^"]*"', "<g", body)
  for drawn, color in _COLORS.items():
    body = body.replace(drawn, color)
  return f'<svg role="img" aria-label="{label}" {box}>{body}'


def _ticks(axes: Axes) -> None:
  from matplotlib import ticker

  def number(value: float, _: int | None = None) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"

  axes.set_xlabel("step")
  steps = [1, 2, 2.5, 5, 10]
  axes.xaxis.set_major_locator(ticker.MaxNLocator(5, steps=steps, integer=True))
  axes.xaxis.set_major_formatter(number)
  axes.set_xlim(left=min(0, axes.get_xlim()[0]))
  for side in axes.figure.axes:
    if side.get_yscale() == "linear":
      side.yaxis.set_major_locator(ticker.MaxNLocator(5, steps=steps))
      side.yaxis.set_major_formatter(number)


def _save(figure: Figure) -> str:
  buffer = io.StringIO()
  nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
  figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
  return buffer.getvalue()


def _describe(plot: Plot, curves: Mapping[str, Curve]) -> str:
  """Returns a plot in words, for those who don't see it."""
  parts = []
  for key, curve in curves.items():
    if not curve.finite:
      continue
    (first, start), (last, end) = curve.finite[0], curve.finite[-1]
    low = min(value for _, value in curve.finite)
    high = max(value for _, value in curve.finite)
    parts.append(
      f"{key}: {start:.4g} at step {first:,}, {end:.4g} at step {last:,},"
      f" between {low:.4g} and {high:.4g}."
    )
  unit = f" in {plot.unit}" if plot.unit.startswith(("nats", "%")) else ""
  return f"{plot.title}{unit} by step. {' '.join(parts)}"


# Tables


def _list(title: str, lines: Sequence[str]) -> list[str]:
  if not lines:
    return []
  items = "".join(f"<li>{escape(line)}</li>" for line in lines)
  return [f'<section class="note"><h2>{title}</h2><ul>{items}</ul></section>']


def _facts(facts: Mapping[str, str]) -> list[str]:
  if not facts:
    return []
  cells = "".join(
    f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
    for name, value in facts.items()
  )
  return [f'<h2>The run</h2><dl class="facts">{cells}</dl>']


def _evaluations(
  curves: Mapping[str, Curve], names: Mapping[str, str]
) -> list[str]:
  """Every evaluation as a table, folded: the numbers behind the plots."""
  columns = [dict(zip(*curves[key], strict=True)) for key in names]
  steps = sorted(set().union(*columns))
  if not steps:
    return []
  head = "".join(
    f'<th scope="col">{escape(name)}</th>' for name in ("step", *names.values())
  )
  rows = []
  for step in steps:
    cells = [f'<th scope="row">{step:,}</th>']
    for key, column in zip(names, columns, strict=True):
      value = column.get(step)
      share = key.endswith("accuracy")
      cells.append(f"<td>{_number(value, share)}</td>")
    rows.append(f"<tr>{''.join(cells)}</tr>")
  return [
    "<details><summary>All evaluations</summary>"
    f'<div class="wide"><table class="numbers"><thead><tr>{head}</tr></thead>'
    f"<tbody>{''.join(rows)}</tbody></table></div></details>"
  ]


def _number(value: float | None, share: bool) -> str:
  if value is None:
    return "–"
  if math.isnan(value):
    return "not finite"
  return f"{100 * value:.1f} %" if share else f"{value:,.3f}"


def _config(config: Mapping[str, Any]) -> list[str]:
  rows = "".join(
    f'<tr><th scope="row"><code>{escape(key)}</code></th>'
    f"<td><code>{escape(repr(value))}</code></td></tr>"
    for key, value in config.items()
  )
  return [
    "<h2>Config</h2><details><summary>All keys</summary>"
    f'<div class="wide"><table>{rows}</table></div></details>'
  ]


# Examples


def _examples(examples: Sequence[Mapping[str, Any]]) -> list[str]:
  if not examples:
    return []
  return [
    "<h2>Masks filled</h2>",
    "<p>Rows of the validation split, each with the tokens that were hidden:"
    ' <mark class="right">guessed right ✓</mark> or <mark class="wrong">wrong'
    " ✗</mark> after training. Under it each one's best guesses, with their"
    " probability; tokens are written as in the vocabulary.</p>",
    *(_example(n, example) for n, example in enumerate(examples, 1)),
  ]


def _example(number: int, example: Mapping[str, Any]) -> str:
  tokens, slots = list(example["tokens"]), list(example["slots"])
  guesses = {
    name: example[name] for name in ("before", "after") if example.get(name)
  }
  columns = "".join(f'<th scope="col">{name} training</th>' for name in guesses)
  rows = []
  right = dict.fromkeys(guesses, 0)
  for n, slot in enumerate(slots):
    cells = ""
    for name, found in guesses.items():
      right[name] += _is_right(found[n], tokens[slot])
      cells += f"<td>{_guesses(found[n], tokens[slot])}</td>"
    rows.append(
      f'<tr><th scope="row">{n + 1}</th><td>{_visible(tokens[slot])}</td>'
      f"{cells}</tr>"
    )
  score = ", ".join(
    f"{count} of {len(slots)} right {name} training"
    for name, count in right.items()
  )
  return (
    f"<article><h3>Row {number}{': ' if score else ''}{score}</h3>"
    f'<p class="row">{_row(tokens, slots, example.get("after") or [])}</p>'
    '<div class="wide"><table class="guesses"><thead><tr><th scope="col">#</th>'
    f'<th scope="col">hidden</th>{columns}</tr></thead>'
    f"<tbody>{''.join(rows)}</tbody></table></div></article>"
  )


def _is_right(guesses: Sequence[Sequence[Any]], truth: str) -> bool:
  return bool(guesses) and guesses[0][0] == truth


def _guesses(guesses: Sequence[Sequence[Any]], truth: str) -> str:
  """Returns one slot's guesses; the right one has a sign and a colour."""
  cells = []
  for token, probability in guesses:
    text = f"{_visible(token)} <small>{100 * probability:.1f} %</small>"
    if token == truth:
      text = f'<span class="right">✓ {text}</span>'
    cells.append(f"<span>{text}</span>")
  return " ".join(cells)


def _visible(token: str) -> str:
  """Returns a token escaped, with its blanks and controls to be seen."""
  seen = "".join(
    c if c.isprintable() and c != " " else f"⟨U+{ord(c):04X}⟩" for c in token
  )
  return f"<code>{escape(seen)}</code>"


def _row(
  tokens: Sequence[str], slots: Sequence[int], after: Sequence[Any]
) -> str:
  """Returns a row as text, its hidden tokens marked and numbered."""
  order = {slot: n for n, slot in enumerate(slots)}
  parts: list[str] = []
  repeats = 0
  for place, (space, text) in enumerate(join(tokens)):
    token = tokens[place]
    if place in order:
      n = order[place]
      kind, sign = "asked", ""
      if after:
        good = _is_right(after[n], token)
        kind, sign = ("right", "✓") if good else ("wrong", "✗")
      text = (
        f'<mark class="{kind}">{escape(text)}<sup>{n + 1}{sign}</sup></mark>'
      )
    elif SPECIAL.fullmatch(token):
      repeats += 1
      if token == (tokens[place + 1] if place + 1 < len(tokens) else None):
        continue
      times = f" × {repeats}" if repeats > 1 else ""
      text = f'<span class="special">{escape(token)}{times}</span>'
    else:
      text = escape(text)
    repeats = 0
    parts.append(" " * space + text)
  return "".join(parts)


_STYLE = """
.note {
  background: var(--note); border-radius: .4rem; margin-top: 1rem;
  padding: .6rem 1rem;
}
.note h2 { font-size: 1rem; margin: 0; }
.note ul { margin: .2rem 0 0; padding-left: 1.2rem; }
.facts {
  display: grid; gap: .5rem; margin: 0;
  grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr));
}
.facts div {
  background: var(--soft); border-radius: .4rem; padding: .4rem .8rem;
}
.facts dt { color: var(--muted); font-size: .85rem; }
.facts dd { margin: 0; font-variant-numeric: tabular-nums; }
.plots {
  display: grid; gap: 1.5rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr));
}
figure { margin: 0; break-inside: avoid; }
figcaption { font-weight: 600; }
svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; }
svg text {
  font-family: inherit !important; font-variant-numeric: tabular-nums;
  paint-order: stroke; stroke: var(--paper); stroke-width: 3px;
}
.empty {
  border: 1px dashed var(--line); border-radius: .4rem; color: var(--muted);
  margin: .5rem 0; padding: 2rem 1rem; text-align: center;
}
mark sup { font-size: .65em; line-height: 0; margin-left: .15em; }
mark.right { background: var(--right-soft); border-color: var(--right); }
mark.wrong {
  background: var(--wrong-soft); border-bottom: 2px dashed var(--wrong);
}
.guesses tbody th { color: var(--muted); }
.guesses td > span {
  display: inline-block; margin-right: .4rem; min-width: 6.4rem;
}
span.right { color: var(--right); }
@media print {
  .plots { grid-template-columns: 1fr 1fr; }
}
"""
