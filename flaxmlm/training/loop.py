"""The one loop: step, log, evaluate, save, stop."""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

import jax
from jaxtyping import Array, Key
from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeElapsedColumn,
  TimeRemainingColumn,
)

from flaxmlm.models.model import Params
from flaxmlm.objectives.objective import Batch
from flaxmlm.training import metrics
from flaxmlm.training.checkpoints import Saver
from flaxmlm.training.incidents import Guard
from flaxmlm.training.step import EvalStep, State, TrainStep
from flaxmlm.training.watchdog import Watch


class Schedule(NamedTuple):
  """When the loop does what, in steps; 0 means at the end only.

  A run that goes on from another one begins at step `first`.
  """

  steps: int
  log_every: int
  eval_every: int
  save_every: int
  first: int = 0


class Cost(NamedTuple):
  """What a step is worth, for throughput and MFU."""

  tokens: int  # of the global batch, padding included
  flops: float
  peak: metrics.Peak | None
  tokens_before: int = 0  # that were seen before the run's first step


def run(
  state: State,
  key: Key[Array, ""],
  *,
  train_step: TrainStep,
  batch_at: Callable[[int], Batch],
  evaluate: Callable[[Params], dict[str, float]],
  saver: Saver,
  guard: Guard,
  write: Callable[[int, dict[str, float]], None],
  stop: Callable[[], bool],
  vote: Callable[[Sequence[int]], tuple[int, ...]],
  schedule: Schedule,
  cost: Cost,
  shares: Mapping[str, float],
  watch: Watch,
) -> State:
  """Trains until the last step, or until it is asked to stop.

  At most two steps are in flight: while the device computes one, the host has
  read and sent the next. Only to log, evaluate or save is the newest step
  waited for. The metrics of a line are means over the steps since the line
  before it, without those whose update was skipped; a resumed run's first line
  begins at its checkpoint. While updates are skipped nothing is saved, unless
  it is asked to stop.

  Args:
    state: Where to begin; donated.
    key: Key of the run.
    train_step: Of `step.make_train_step`.
    batch_at: Returns a step's batch, on the devices.
    evaluate: Returns metrics of the validation split.
    saver: Saves states in the background.
    guard: Looks for updates that were skipped, and for jumps of the loss.
    write: Writes metrics of a step.
    stop: Returns whether this process is asked to stop.
    vote: Returns what any process says: `hosts.make_vote`'s.
    schedule: When to log, evaluate, save and stop.
    cost: For throughput.
    shares: Weight of each task in the loss.
    watch: Is told what goes on.

  Returns:
    The last state; its step is less than `schedule.steps` if it was asked to
    stop. It is on the disk.

  Raises:
    SaveError: It can't be saved any more.
    DivergedError: Of `guard`.
  """
  first = int(state.step)
  window: list[Any] = []  # sums of the steps since the last report
  mark, timed, host, paused = time.perf_counter(), 0, 0.0, 0.0

  def due(step: int, every: int) -> bool:
    return step == schedule.steps or (every > 0 and step % every == 0)

  def report(step: int) -> dict[str, float]:
    """Writes the means over the window, all of whose steps have ended."""
    nonlocal mark, timed, host, paused
    guard.settle()
    every = jax.device_get(window)
    good = [sums for sums in every if not sums["step"]["skipped"]]
    values = {}
    if good:
      sums = metrics.add_up(good)
      means = metrics.means(sums, shares)
      means |= {name: v / len(good) for name, v in sums["step"].items()}
      values = {f"train/{k}": v for k, v in (means | sums["counts"]).items()}
    values["train/skipped"] = float(len(every) - len(good))
    values["train/loss_spikes"] = float(guard.count_jumps())
    values["train/largest_parameter"] = guard.measure(step, state.params)
    own = (step - schedule.first) * cost.tokens
    values["train/tokens"] = float(cost.tokens_before + own)
    now = time.perf_counter()
    seconds = now - mark - paused
    if timed:
      values["train/tokens_per_second"] = timed * cost.tokens / seconds
      values["train/host_share"] = host / seconds
      if cost.peak is not None:
        speed = timed * cost.flops / seconds
        values["train/mfu"] = speed / cost.peak.flops
    write(step, values)
    window.clear()
    mark, timed, host, paused = now, 0, 0.0, 0.0
    return values

  tasks, values, late = list(shares), {}, False
  with _progress(first, schedule.steps, tasks) as show:
    if first == schedule.first:  # what it begins with: as a rule, nothing
      values = evaluate(state.params)
      write(first, values)
      show.step(first, values)
    for step in range(first + 1, schedule.steps + 1):
      begin = time.perf_counter()
      watch.enter("data", step)
      batch = batch_at(step - 1)
      watch.enter("step")
      host += time.perf_counter() - begin
      state, sums = train_step(state, batch, key)
      window.append(sums)
      timed += 1
      if len(window) > 2:
        jax.block_until_ready(window[-3])
      guard.note(step, sums)
      if step == first + 1:
        jax.block_until_ready(sums)  # compilation is no part of the speed
        mark, timed, host = time.perf_counter(), 0, 0.0
        began, idle = mark, 0.0
      if step == first + 11:
        jax.block_until_ready(sums)
        pace = (time.perf_counter() - began - idle) / 10
        left = clock(pace * (schedule.steps - step))
        show.say(f"{pace:.3g} s a step: {left} to go")
      values = {}
      if due(step, schedule.log_every):
        jax.block_until_ready(sums)
        begin = time.perf_counter()
        values = report(step)
        host += time.perf_counter() - begin
      show.step(step, values)
      stopping, failed, again = vote(
        (stop(), saver.failed(), saver.is_due_again())
      )
      if failed:
        saver.count_failure(failed)
      saving = due(step, schedule.save_every) or stopping or again or late
      if due(step, schedule.eval_every) or saving:
        jax.block_until_ready(sums)
        guard.settle()
        begin = time.perf_counter()
        if due(step, schedule.eval_every):
          values = evaluate(state.params)
          write(step, values)
          show.step(step, values)
        late = saving and guard.skipped > 0 and not stopping
        if saving and not late:
          saver.note({"guard": guard.memory})
          saver.save(state, values.get("eval/loss"))
        paused += time.perf_counter() - begin
        idle += time.perf_counter() - begin
      if stopping:
        break
    saver.note({"guard": guard.memory})
    saver.close(state, values.get("eval/loss"))
  return state


def evaluate(
  eval_step: EvalStep,
  params: Params,
  batches: Iterable[Batch],
  *,
  shares: Mapping[str, float],
) -> dict[str, float]:
  """Returns `eval/…` metrics over batches, each row once.

  Loss, perplexity and accuracy are those of the hidden tokens, of which there
  are `targets`; what else is asked has its own by name. `eval/unigram_entropy`
  is the cross-entropy of the same targets under the token frequencies of the
  training data: what is reached by knowing those alone.
  """
  every: list[Any] = []
  for batch in batches:
    every.append(eval_step(params, batch))
    if len(every) > 2:  # no more in flight than in training
      jax.block_until_ready(every[-3])
  sums = metrics.add_up(every)
  values = metrics.means(sums, shares)
  unigram = sums["unigram"]
  values |= sums["counts"] | {
    "perplexity": perplexity(values["loss"]),
    "unigram_entropy": unigram["nll"] / max(unigram["weight"], 1.0),
    "targets": unigram["weight"],
  }
  for task in list(shares)[1:]:
    values[f"{task}_targets"] = sums[task]["weight"]
  return {f"eval/{name}": value for name, value in values.items()}


def perplexity(loss: float) -> float:
  """Returns e^loss, at most 1e30 so that it stays a number in JSON."""
  return math.exp(min(loss, 69.0))


def clock(seconds: float) -> str:
  """Returns a duration for people.

  >>> clock(59.0), clock(61.0), clock(3661.0), clock(90061.0)
  ('59 s', '1 min 1 s', '1 h 1 min', '25 h 1 min')
  """
  seconds = max(int(seconds), 0)
  if seconds < 60:
    return f"{seconds} s"
  if seconds < 3600:
    return f"{seconds // 60} min {seconds % 60} s"
  return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def catch_signals() -> Callable[[], bool]:
  """Returns what says whether a signal came since, or the reader is gone.

  Those are SIGINT and SIGTERM. A second one ends the process at once. What is
  being saved then is no checkpoint yet, and the last one stays as it is.

  The reader is who sees standard output and error: `| tee log` dies of the same
  Ctrl-C as the run, a moment before or after, and terminals close. From now on
  what nobody reads is thrown away, and is no error.
  """
  caught: list[int] = []

  def handle(number: int, frame: Any) -> None:
    if caught:
      os._exit(128 + number)
    caught.append(number)
    # No print: that isn't safe in here.
    with contextlib.suppress(OSError):
      os.write(
        sys.stdout.fileno(),
        b"stopping after this step; once more to stop at once\n",
      )

  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, handle)
  outputs: list[_Output] = []
  for name in ("stdout", "stderr"):
    stream = getattr(sys, name)
    if stream is getattr(sys, f"__{name}__"):  # a notebook has its own
      outputs.append(_Output(stream.fileno()))
      setattr(sys, name, _replace(stream, outputs[-1]))
  return lambda: bool(caught) or any(output.is_lost for output in outputs)


class _Output(io.RawIOBase):
  """A standard stream whose reader may go."""

  def __init__(self, number: int):
    self._number = number
    self.is_lost = False

  def writable(self) -> bool:
    return True

  def fileno(self) -> int:
    return self._number

  def isatty(self) -> bool:
    return os.isatty(self._number)

  def write(self, data: Any) -> int:
    try:
      return os.write(self._number, data)
    except OSError as error:
      # A pipe without a reader; a terminal that was closed.
      if error.errno not in (errno.EPIPE, errno.EIO):
        raise
      self.is_lost = True
      null = os.open(os.devnull, os.O_WRONLY)
      os.dup2(null, self._number)
      os.close(null)
      return len(data)


def _replace(stream: TextIO, output: _Output) -> TextIO:
  """Returns a stream like another one, that writes to an output."""
  stream.flush()
  direct = stream.write_through  # PYTHONUNBUFFERED
  return io.TextIOWrapper(
    output if direct else io.BufferedWriter(output),
    stream.encoding,
    stream.errors,
    line_buffering=stream.line_buffering,
    write_through=direct,
  )


class _Show(NamedTuple):
  step: Callable[[int, dict[str, float]], None]
  say: Callable[[str], None]


@contextlib.contextmanager
def _progress(first: int, steps: int, tasks: Sequence[str]) -> Iterator[_Show]:
  """Shows a bar on a terminal, and plain lines elsewhere."""
  if jax.process_index() != 0:
    yield _Show(lambda step, values: None, lambda text: None)
    return
  console = Console()
  if not console.is_terminal:

    def line(step: int, values: dict[str, float]) -> None:
      if values:
        text = brief(values, tasks)
        print(f"step {step:,}/{steps:,}  {text}", flush=True)

    yield _Show(line, lambda text: print(text, flush=True))
    return
  with Progress(
    TextColumn("step"),
    MofNCompleteColumn(),
    BarColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
    TextColumn("{task.fields[values]}"),
    console=console,
    refresh_per_second=4,
  ) as bar:
    task = bar.add_task("train", total=steps, completed=first, values="")

    def advance(step: int, values: dict[str, float]) -> None:
      bar.update(task, completed=step)
      if "eval/loss" in values:
        bar.console.print(f"step {step:,}  {brief(values, tasks)}")
      elif values:
        bar.update(task, values=brief(values, tasks))

    yield _Show(advance, bar.console.print)


def brief(values: Mapping[str, float], tasks: Sequence[str]) -> str:
  """Returns the metrics that one watches, in a line.

  The loss and accuracy without a name are those of the first task.

  >>> values = {"eval/loss": 7.0, "eval/sentence_order_accuracy": 0.625}
  >>> brief(values, ["masked", "sentence_order"])
  'validation loss 7.000  sentence_order accuracy 62.5%'
  """
  forms = {
    "train/loss": "loss {:.3f}",
    "train/accuracy": "accuracy {:.1%}",
    "train/learning_rate": "lr {:.2e}",
    "train/tokens_per_second": "{:,.0f} tokens/s",
    "train/mfu": "MFU {:.1%}",
    "eval/loss": "validation loss {:.3f}",
    "eval/accuracy": "accuracy {:.1%}",
    "eval/unigram_entropy": "(unigram entropy {:.3f})",
  }
  for task in tasks[1:]:
    for kind in ("train", "eval"):
      forms[f"{kind}/{task}_loss"] = task + " loss {:.3f}"
      forms[f"{kind}/{task}_accuracy"] = task + " accuracy {:.1%}"
  shown = [form.format(values[k]) for k, form in forms.items() if k in values]
  return "  ".join(shown)
