"""Makes shards, and finds copies, by Apache Beam: on one machine or many.

Text never goes through Beam. Its elements are the numbers of parts, and the
fingerprints of documents; a worker reads a part from the sources itself, and
writes to a folder that all workers and the one that starts them see, on a disk
that they share or in a bucket:

```
parts.json            which files are part N
results/N.json        what part N became: its shards, or what is wrong with it
results/N.at          where in it a worker is, or was when it died
results/N.failed      why it failed the last time
fates/N.npy           which of its documents are copies
```
Every file is written whole or not at all, and to make it again makes the same:
Beam may do any of it twice, one after the other or at once. Each job has a
folder of its own, so that an older one that lives on writes nothing there. It
ends when it finds its own gone.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from flaxmlm import InputError
from flaxmlm.data import sources, store
from flaxmlm.preparing import shards
from flaxmlm.preparing.documents import Part
from flaxmlm.storage import files

# Beam warns of what it has no use for here, as soon as it is imported.
_level = logging.root.manager.disable
logging.disable(logging.WARNING)
import apache_beam as beam  # noqa: E402
from apache_beam.options import pipeline_options  # noqa: E402
from apache_beam.runners.runner import PipelineState  # noqa: E402

logging.disable(_level)

# How long another machine's file may take to show up, by the habits of NFS.
_PATIENCE = 60.0
_LOOK_EVERY = 5.0  # seconds
_LISTED_IN = 0.1  # of that time, the most that looking may take

# What goes through Beam of a document, by its place in its part.
_HEAD = np.dtype(
  [("fingerprint", "<u8"), ("document", "<u4"), ("validation", "?")]
)
_FATE = np.dtype([("document", "<u4"), ("fate", "u1")])


class Job(NamedTuple):
  """What every worker has to know."""

  folder: str
  """Of this job alone."""
  options: dict[str, Any]
  """Of `documents.reading`."""
  recipe: shards.Recipe

  def file(self, *names: str) -> str:
    """Returns the path of a file in the folder."""
    return os.path.join(self.folder, *names)


class Result(NamedTuple):
  """What became of a part."""

  shards: list[shards.Done]
  bad_records: int
  messages: list[str]
  """The first ten bad records."""


def start(arguments: Sequence[str]) -> beam.Pipeline:
  """Returns an empty pipeline.

  Args:
    arguments: Beam's own, `--runner=NAME` among them.

  Raises:
    InputError: Beam doesn't take them.
  """
  said = io.StringIO()
  try:
    with contextlib.redirect_stderr(said):  # argparse's usage: 200 lines
      options = pipeline_options.PipelineOptions(list(arguments))
      given = options.get_all_options(retain_unknown_options=True)
    known = pipeline_options.PipelineOptions([]).get_all_options()
    # Others ask their job server what else there is.
    local = pipeline_options.StandardOptions.LOCAL_RUNNERS
    if given["runner"] in local and (unknown := given.keys() - known):
      raise ValueError(f"no option --{min(unknown)}")
    return beam.Pipeline(options=options)
  except (ValueError, ImportError) as error:
    raise InputError(f"Apache Beam: {_last_line(error)}") from error
  except SystemExit:
    line = said.getvalue().strip().splitlines()[-1]
    raise InputError(f"Apache Beam: {line.rpartition('error: ')[2]}") from None


def tokenize(
  job: Job,
  parts: Sequence[Part],
  arguments: Sequence[str],
  bad: sources.BadRecords,
  update: Callable[[int, int, int], None],
) -> list[Result]:
  """Makes the shards of all parts.

  A part whose text is bad ends the job soon, without being tried again; one
  that fails otherwise is tried again as often as the runner does.

  Args:
    job: Its folder is there.
    parts: Of `documents.cut`.
    arguments: Of `start`.
    bad: Is filled with what was skipped.
    update: Called now and then with the bytes, documents and tokens so far.

  Returns:
    One result a part.

  Raises:
    InputError: A source can't be read; or the runner gave up, and where.
  """
  files.make_folder(job.file("results"))
  _write_json(job.file("parts.json"), [_absolute(part) for part in parts])
  pipeline = start(arguments)
  _ = (
    pipeline
    | "parts" >> beam.Create([job.file("parts.json")])
    | "list" >> beam.FlatMap(_list_parts)
    | "spread" >> beam.Reshuffle()
    | "shards" >> beam.Map(_make_part, job)
  )
  with _watched(job, update):
    error = _run(pipeline)
  results = _gather(job, len(parts), 0.0 if error else _PATIENCE)
  for number in [n for n in range(len(parts)) if n not in results]:
    place = _read_place(job, number)
    # A part that was never begun isn't to blame for another one's failure.
    if place or not error:
      line = _explain(error, number, parts[number], place)
      raise InputError(line) from error
  if error:
    raise InputError(f"Apache Beam: {_last_line(error)}; {_AGAIN}") from error
  for _, result in sorted(results.items()):
    bad.count += result.bad_records
    bad.messages += result.messages[: 10 - len(bad.messages)]
  bad.check(job.options["max_bad_records"])
  return [results[number] for number in range(len(parts))]


def choose(
  job: Job,
  results: Sequence[Result],
  arguments: Sequence[str],
  paths: Sequence[str],
  held_out: store.HeldOut,
  deduplicate: bool,
) -> Iterator[np.ndarray]:
  """Finds the copies; with the first three arguments given, a `store.Choose`.

  Fingerprints are grouped by ranges, so that a worker sees all documents of a
  fingerprint, half a million to a million of them at a time.

  Raises:
    InputError: The runner gave up.
  """
  documents = sum(done.kept for result in results for done in result.shards)
  if not documents or not (deduplicate or held_out.first_source is not None):
    # There is nothing to be found.
    for result in results:
      for done in result.shards:
        yield np.full(done.kept, store.KEPT, np.uint8)
    return
  files.make_folder(job.file("fates"))
  pipeline = start(arguments)
  _ = (
    pipeline
    | "parts" >> beam.Create([job.file("parts.json")])
    | "list" >> beam.FlatMap(_list_parts)
    | "spread" >> beam.Reshuffle()
    | "heads"
    >> beam.FlatMap(
      _read_part_heads, job, held_out, store.count_ranges(documents)
    )
    | "ranges" >> beam.GroupByKey()
    | "choose"
    >> beam.FlatMap(_decide, held_out.first_source is not None, deduplicate)
    | "back" >> beam.GroupByKey()
    | "fates" >> beam.Map(_write_fates, job)
  )
  if error := _run(pipeline):
    raise InputError(
      f"Apache Beam, looking for copies: {_last_line(error)}; {_AGAIN}"
    ) from error
  wanted = [
    job.file("fates", f"{number}.npy")
    for number, result in enumerate(results)
    if any(done.kept for done in result.shards)
  ]
  found = iter(_read_all(wanted))
  for result in results:
    fates = np.zeros(0, np.uint8)
    if any(done.kept for done in result.shards):
      fates = np.load(io.BytesIO(next(found)), allow_pickle=False)
    first = 0
    for done in result.shards:
      yield fates[first : first + done.kept]
      first += done.kept


def _read_all(paths: Sequence[str]) -> Iterator[bytes]:
  """Yields what is in files, as soon as it can be read.

  Raises:
    InputError: One doesn't show up.
  """
  for first in range(0, len(paths), files.AT_ONCE):
    some = paths[first : first + files.AT_ONCE]
    for path in some:
      if not files.is_remote(path) and not _await(path, _PATIENCE):
        break  # said below
    data = dict(files.read_many(some))
    for path in some:
      if path not in data:
        raise InputError(f"{path}: no worker has left it; {_AGAIN}")
      yield data[path]


# What is done on the workers. Beam reads the types.


def _list_parts(path: str) -> Iterable[tuple[int, int, list[str]]]:
  _await(path, _patience(path))
  for number, (source, specs) in enumerate(json.loads(files.read(path))):
    yield number, source, specs


def _make_part(numbered: tuple[int, int, list[str]], job: Job) -> None:
  """Writes the shards of a part and its result."""
  number, source, specs = numbered
  for ended in (f"{number}.json", "stop"):
    if files.exists(job.file("results", ended)):
      return
  parts = job.file("parts.json")
  if not _await(parts, _patience(parts)):
    return  # a newer job does it, or it is done
  part = Part(source, tuple(specs))
  bad = sources.BadRecords()
  place = specs[0]
  made = []
  try:
    _write(job.file("results", f"{number}.at"), place)
    for task in shards.tasks([(number, part)], job.options, job.recipe, bad):
      place = task.where
      _write(job.file("results", f"{number}.at"), place)
      made.append(shards.make_shard(task))
  except InputError as error:
    # To try again would find the same. Neither need the other parts be made.
    _write_json(job.file("results", f"{number}.json"), {"error": str(error)})
    _write(job.file("results", "stop"), "")
    return
  except Exception as error:
    what = f"{type(error).__name__}: {_last_line(error)}"
    _write(job.file("results", f"{number}.failed"), f"{what} (at {place})")
    raise
  result = Result(made, bad.count, bad.messages)
  _write_json(job.file("results", f"{number}.json"), result._asdict())


def _read_part_heads(
  numbered: tuple[int, int, list[str]],
  job: Job,
  held_out: store.HeldOut,
  ranges: int,
) -> Iterable[tuple[int, tuple[int, bytes]]]:
  """Yields number of a range, number of the part, its documents there."""
  number = numbered[0]
  result = _read_result(job, number, _PATIENCE)
  paths = [done.path for done in result.shards]
  fingerprints, of_sources, _ = store.read_heads(paths)
  heads = np.empty(len(fingerprints), _HEAD)
  heads["document"] = np.arange(len(heads))
  heads["fingerprint"] = fingerprints
  heads["validation"] = held_out.among(fingerprints, of_sources)
  numbers = store.find_range(fingerprints, ranges)
  order = np.argsort(numbers, kind="stable")
  found, first = np.unique(numbers[order], return_index=True)
  for which, here in zip(found, np.split(order, first[1:]), strict=False):
    yield int(which), (number, heads[here].tobytes())


def _decide(
  of_range: tuple[int, Iterable[tuple[int, bytes]]],
  disjoint: bool,
  deduplicate: bool,
) -> Iterable[tuple[int, bytes]]:
  """Yields number of a part, and which documents of it go."""
  # Reading order, whatever order Beam brings the parts in.
  parts = sorted(of_range[1], key=lambda part: part[0])
  heads = [np.frombuffer(data, _HEAD) for _, data in parts]
  every = np.concatenate(heads)
  fates = store.decide(
    every["fingerprint"],
    every["validation"],
    disjoint=disjoint,
    deduplicate=deduplicate,
  )
  pieces = np.split(fates, np.cumsum([*map(len, heads)])[:-1])
  for (number, _), head, fate in zip(parts, heads, pieces, strict=True):
    goes = np.flatnonzero(fate != store.KEPT)
    answer = np.empty(len(goes), _FATE)
    answer["document"] = head["document"][goes]
    answer["fate"] = fate[goes]
    yield number, answer.tobytes()


def _write_fates(answers: tuple[int, Iterable[bytes]], job: Job) -> None:
  """Writes what becomes of each document of a part."""
  number = answers[0]
  result = _read_result(job, number, _PATIENCE)
  fates = np.full(sum(done.kept for done in result.shards), store.KEPT, "u1")
  for data in answers[1]:
    answer = np.frombuffer(data, _FATE)
    fates[answer["document"]] = answer["fate"]
  with files.atomic_file(job.file("fates", f"{number}.npy")) as file:
    np.save(file, fates)


_waited: set[str] = set()  # files that were looked for, here


def _patience(path: str) -> float:
  """Returns how long to wait for a file that may be gone for good.

  On a disk that is shared, a new one may not show up at once; who has waited
  for it once, waits no more.
  """
  if files.is_remote(path) or path in _waited:
    return 0.0
  _waited.add(path)
  return _PATIENCE


# What is done where the job was started.


def _absolute(part: Part) -> Part:
  """Returns a part whose files are found from any folder."""
  specs = (
    spec
    if files.is_remote(spec) or not sources.files([spec])
    else os.path.abspath(spec)
    for spec in part.specs
  )
  return part._replace(specs=tuple(specs))


def _run(pipeline: beam.Pipeline) -> Exception | None:
  """Runs a pipeline to its end; returns why it failed."""
  # Its warnings are about Beam; what went wrong are errors.
  logging.getLogger("apache_beam").setLevel(logging.ERROR)
  try:
    running = pipeline.run()
    try:
      state = running.wait_until_finish()
    except KeyboardInterrupt:
      # Else it would go on elsewhere, with nobody waiting for it.
      with contextlib.suppress(NotImplementedError):
        running.cancel()
      raise
  except Exception as error:  # each runner has its own
    return error
  if state in (PipelineState.DONE, None):
    return None
  return RuntimeError(f"the job ended as {state}")


@contextlib.contextmanager
def _watched(
  job: Job, update: Callable[[int, int, int], None]
) -> Iterator[None]:
  """Tells how far the parts are, by their results, while something runs."""
  ended = threading.Event()
  results: dict[int, Result | InputError] = {}

  def look() -> None:
    _read_new(job, results)
    made = [r for r in results.values() if isinstance(r, Result)]
    totals = np.zeros(3, np.int64)
    for done in (done for result in made for done in result.shards):
      totals += (done.bytes, done.documents, done.tokens)
    update(*totals.tolist())

  def watch() -> None:
    pause = _LOOK_EVERY
    while not ended.wait(pause):
      begin = time.monotonic()
      with contextlib.suppress(OSError):  # the folder is someone else's disk
        look()
      pause = max(_LOOK_EVERY, (time.monotonic() - begin) / _LISTED_IN)

  thread = threading.Thread(target=watch, daemon=True)
  thread.start()
  try:
    yield
    look()
  finally:
    ended.set()
    thread.join()


def _gather(job: Job, parts: int, patience: float) -> dict[int, Result]:
  """Returns the results by number, those that show up in so many seconds.

  Raises:
    InputError: The text of a part is bad; of several, the first one's.
  """
  until = time.monotonic() + patience
  results: dict[int, Result | InputError] = {}
  while True:
    _read_new(job, results)
    for _, result in sorted(results.items()):
      if isinstance(result, InputError):
        raise result
    if len(results) == parts or time.monotonic() >= until:
      return results
    time.sleep(1.0)


def _read_new(job: Job, results: dict[int, Result | InputError]) -> None:
  """Adds the results that are there and aren't among some yet."""
  numbers = {}
  for name in files.list_names(job.file("results")):
    stem, ending = os.path.splitext(name)
    if ending == ".json" and int(stem) not in results:
      numbers[job.file("results", name)] = int(stem)
  for path, data in files.read_many(list(numbers)):
    results[numbers[path]] = _as_result(data)


def _read_result(
  job: Job, number: int, patience: float
) -> Result | InputError | None:
  """Returns a part's result, what was wrong with its text, or nothing."""
  path = job.file("results", f"{number}.json")
  return _as_result(files.read(path)) if _await(path, patience) else None


def _as_result(data: bytes) -> Result | InputError:
  values = json.loads(data)
  if "error" in values:
    return InputError(values["error"])
  made = [shards.Done(*done) for done in values.pop("shards")]
  return Result(made, **values)


def _await(path: str, patience: float) -> bool:
  """Whether a file is there, or shows up in so many seconds."""
  until = time.monotonic() + patience
  while not files.exists(path):
    if time.monotonic() >= until:
      return False
    time.sleep(min(1.0, patience))
  return True


def _read_place(job: Job, number: int) -> tuple[str, str] | None:
  """Returns "failed" or "at", and what is known of a part without a result."""
  for kind in ("failed", "at"):
    with contextlib.suppress(FileNotFoundError):
      path = job.file("results", f"{number}.{kind}")
      return kind, files.read(path).decode()
  return None


_AGAIN = "started again, it goes on where it was"


def _explain(
  error: Exception | None,
  number: int,
  part: Part,
  place: tuple[str, str] | None,
) -> str:
  """Returns a line on a part that has no result."""
  if place is None:
    return (
      f"no worker has left a result for part {number} ({part.specs[0]}); all"
      " of them must see --out and the sources, under the same paths"
    )
  kind, text = place
  what = text if kind == "failed" else f"a worker ended at {text}"
  reason = "" if error is None or kind == "failed" else f": {_last_line(error)}"
  return f"Apache Beam, part {number}: {what}{reason}; {_AGAIN}"


def _last_line(error: BaseException) -> str:
  """Returns what an exception says; of a traceback in it, the last line."""
  lines = [line for line in str(error).splitlines() if line.strip()]
  last = lines[-1].strip() if lines else type(error).__name__
  return last.partition(" [while running ")[0]


def _write(path: str, text: str) -> None:
  files.write(path, text.encode())


def _write_json(path: str, value: Any) -> None:
  _write(path, json.dumps(value))
