"""Metrics: their names, their sums, where they are written, FLOP peaks."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxmlm.storage import files

# Dense matrix FLOP/s of one device in bfloat16, from the makers' data sheets:
# cloud.google.com/tpu/docs (v4, v5e, v5p, v6e); NVIDIA's for A100, H100, H200,
# L4 and V100 (float16), without sparsity. Looked up in `device_kind`, in order.
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
  ("TPU v6", 918e12),
  ("TPU v5p", 459e12),
  ("TPU v5 lite", 197e12),
  ("TPU v5e", 197e12),
  ("TPU v5", 459e12),
  ("TPU v4", 275e12),
  ("H200", 989e12),
  ("H100 PCIe", 756e12),
  ("H100", 989e12),
  ("A100", 312e12),
  ("L40S", 362e12),
  ("L40", 181e12),
  ("L4", 121e12),
  ("V100", 125e12),
)


class Peak(NamedTuple):
  """FLOP/s that all devices reach together at most, and how it is known."""

  flops: float
  source: str


def peak_flops(dtype: str) -> Peak | None:
  """Returns the peak of the devices in use; None if they are unknown.

  On a CPU it is measured, with a float32 product of 1024 x 1024 matrices, best
  of several: what XLA reaches here, shared by all (emulated) devices.

  Args:
    dtype: Compute dtype. In float32, GPUs and TPUs still have the peak of
      bfloat16, so that figures of both can be compared.
  """
  device = jax.devices()[0]
  if device.platform == "cpu":
    return Peak(_measured_peak(), "measured float32 product, 1024 x 1024")
  for name, flops in PEAK_FLOPS:
    if name.lower() in device.device_kind.lower():
      source = f"bfloat16 peak of {device.device_kind}"
      return Peak(flops * jax.device_count(), source)
  return None


def _measured_peak(size: int = 1024, seconds: float = 0.3) -> float:
  product = jax.jit(jnp.matmul)
  a = jnp.ones((size, size), jnp.float32)
  product(a, a).block_until_ready()
  best, end = math.inf, time.perf_counter() + seconds
  while time.perf_counter() < end:
    start = time.perf_counter()
    product(a, a).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best


def log_unigram(counts: np.ndarray, specials: Sequence[int]) -> np.ndarray:
  """Returns log-probabilities float32 [V] of tokens from their counts.

  Each count is raised by one (Laplace), so that a token never seen in training
  has a finite one. Special tokens, which are never asked for, are not counted.
  """
  raised = np.asarray(counts, np.float64) + 1
  raised[list(specials)] = 1
  return np.log(raised / raised.sum()).astype(np.float32)


def add_up(sums: Sequence[Any]) -> Any:
  """Adds up the sums of several steps or batches, in float64 on the host."""
  return jax.tree.map(
    lambda *parts: float(np.sum(parts, dtype=np.float64)),
    *jax.device_get(list(sums)),
  )


def means(
  sums: Mapping[str, Mapping[str, float | tuple[float, float]]],
  shares: Mapping[str, float],
) -> dict[str, float]:
  """Returns loss and accuracy of added-up sums.

  They are those of the first task, which asks for hidden tokens. Of several
  tasks each one's stand beside them by name, and `total_loss`, their weighted
  sum, which is minimised. Where a task asked nothing, its means are NaN; a mean
  with a weight of its own is left out where that is 0.

  Args:
    sums: See `objectives.Sums`.
    shares: Weight of each task in the loss, as `Objective.shares`.

  >>> tokens = {"nll": 6.0, "weight": 4.0, "correct": 1.0}
  >>> means({"masked": tokens}, {"masked": 1.0})
  {'loss': 1.5, 'accuracy': 0.25}
  """
  each = {}
  for task in shares:
    names = {"nll": "loss", "correct": "accuracy"}
    for name, value in sums[task].items():
      if name != "weight":
        own = isinstance(value, tuple)
        part, whole = value if own else (value, sums[task]["weight"])
        if whole or not own:
          each[f"{task}_{names.get(name, name)}"] = part / (whole or math.nan)
  first = next(iter(shares))
  values = {"loss": each[f"{first}_loss"]}
  values["accuracy"] = each[f"{first}_accuracy"]
  if len(shares) == 1:
    return values
  total = sum(share * each[f"{task}_loss"] for task, share in shares.items())
  return values | {"total_loss": total} | each


def chance(task: str, values: Mapping[str, float]) -> dict[str, float]:
  """Returns loss and accuracy of a task for one who reads no text.

  Of sentences that is a coin; of ELECTRA's discriminator, the share of replaced
  tokens alone; of a span's tokens their frequencies, a loss. Empty for labelled
  pairs, whose shares aren't known here.

  Args:
    task: Name of a task, one of `Objective.shares`.
    values: Means of an evaluation, as of `means`.

  >>> chance("sentence_order", {})
  {'loss': 0.6931471805599453, 'accuracy': 0.5}
  """
  if task in ("next_sentence", "sentence_order"):
    return {"loss": math.log(2), "accuracy": 0.5}
  if task == "span_boundary" and "unigram_entropy" in values:
    return {"loss": values["unigram_entropy"]}
  share = values.get("discriminator_replaced", math.nan)
  if task != "discriminator" or not 0 < share < 1:
    return {}
  entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
  return {"loss": entropy, "accuracy": max(share, 1 - share)}


class Writer(NamedTuple):
  """Where metrics go; `write(step, {name: value})` on one host only."""

  path: str
  file: Any
  board: Any

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Adds one line to metrics.jsonl and the same to TensorBoard.

    Raises:
      OSError: The disk is full, or can't be written.
    """
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.summary import scalar

    with files.named(self.path):
      self.file.write(_line({"step": step, **values}))
      self.file.flush()
      for name, value in values.items():
        summary = scalar(name, value)
        event = Event(wall_time=time.time(), step=step, summary=summary)
        self.board.write_event(event)
      if any(name.startswith("eval/") for name in values):
        self.board.flush()  # as far as to the disk, so not each time


def discard(step: int, values: Mapping[str, float]) -> None:
  """Writes nothing: for the processes that aren't the first one."""


@contextmanager
def open_writer(workdir: str, *, step: int, first: int = 0) -> Iterator[Writer]:
  """Opens WORKDIR/metrics.jsonl and WORKDIR/tensorboard for a run.

  Lines later than `step`, of a run that was killed after its last checkpoint,
  are taken out, at its `first` step all of them: those steps are about to be
  run again. tensorboardX' own writer has a thread that a full disk ends, and
  then waits for it for ever.
  """
  from tensorboardX.event_file_writer import EventsWriter
  from tensorboardX.proto.event_pb2 import Event, SessionLog

  path = os.path.join(workdir, "metrics.jsonl")
  kept = [line for line in read(path) if first < step >= line["step"]]
  folder = os.path.join(workdir, "tensorboard")
  with files.named(path):
    with open(path + ".tmp", "w", encoding="utf-8") as file:
      file.writelines(_line(line) for line in kept)
    os.replace(path + ".tmp", path)
    os.makedirs(folder, exist_ok=True)
    board = EventsWriter(os.path.join(folder, "events"))
    # TensorBoard forgets what it had of later steps.
    start = SessionLog(status=SessionLog.START)
    purge = step + 1 if step > first else 0
    board.write_event(
      Event(wall_time=time.time(), step=purge, session_log=start)
    )
  file = open(path, "a", encoding="utf-8")  # noqa: SIM115
  try:
    yield Writer(path, file, board)
  finally:
    with files.named(path):
      try:
        file.close()
      finally:
        board.close()


def _line(values: Mapping[str, float | int]) -> str:
  """Returns a line of metrics.jsonl; what isn't finite is null there."""
  finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
  return json.dumps(finite) + "\n"


def read(path: str) -> list[dict[str, int | float]]:
  """Reads metrics.jsonl; a last line cut off by a kill is left out."""
  if not os.path.exists(path):
    return []
  lines = []
  with open(path, encoding="utf-8") as file:
    for text in file:
      if text.endswith("\n"):
        values = json.loads(text).items()
        lines.append({k: math.nan if v is None else v for k, v in values})
  return lines
