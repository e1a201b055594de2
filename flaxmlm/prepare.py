r"""Makes a token store out of text: cleans, tokenizes, splits, de-duplicates.

  python -m flaxmlm.prepare --config=configs/bert_mini.py --out=stores/novels \
    --config.data.source='novels/*.txt'

Text and store may be in a bucket (gs://bucket/folder, extra gcs).

The folder has the tokenizer too: `train --config.data.store=DIR` needs nothing
else. A run that was killed goes on where it was when it is started again; a
store that is finished is left as it is. The store is the same, byte for byte,
for any number of processes, and on many machines by --runner (docs/scale.md).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import shlex
import shutil
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flaxmlm import InputError
from flaxmlm import config as config_lib
from flaxmlm.storage import files, hashes, lease, remote

if TYPE_CHECKING:
  from ml_collections import ConfigDict

  from flaxmlm.data.sources import BadRecords
  from flaxmlm.data.store import Choose, TokenStore
  from flaxmlm.preparing.documents import Part
  from flaxmlm.preparing.shards import Recipe
  from flaxmlm.tokenizers import Tokenizer

# Called with bytes, documents and tokens that have been done so far.
Update = Callable[[int, int, int], None]


def main() -> None:  # noqa: D103
  parser = config_lib.parser(__doc__, workdir=False)
  parser.add_argument("--out", metavar="DIR", help="folder of the store")
  parser.add_argument(
    "--dry_run",
    action="store_true",
    help="show ten documents before and after cleaning; write nothing",
  )
  parser.add_argument(
    "--json", metavar="FILE", help="write the closing table here as JSON"
  )
  parser.add_argument(
    "--runner",
    metavar="NAME",
    help="run under Apache Beam: DirectRunner, FlinkRunner, SparkRunner, ...;"
    " what stands behind `--` are Beam's own options",
  )
  words = sys.argv[1:]
  end = words.index("--") if "--" in words else len(words)
  given, options = words[:end], words[end + 1 :]
  args, config = config_lib.parse(parser, given)
  if args.dry_run:
    print_dry_run(config)
    return
  if args.out is None:
    raise InputError("--out=DIR is missing: the folder of the store")
  if args.json and not os.path.isdir(os.path.dirname(args.json) or "."):
    raise InputError(f"--json={args.json}: no such folder")
  beam = _beam_arguments(args.runner, options)

  from flaxmlm.data import rows, store

  args.out = args.out.rstrip("/") or args.out
  finished = store.is_store(args.out)
  seconds: dict[str, float] = {}
  made = prepare_store(config, args.out, seconds=seconds, beam=beam)
  if finished:
    store.verify(made)
    print(f"{args.out}: nothing to do, the store is finished and undamaged")
  L = config.data.row_length
  fill = rows.predict_fill(made.train.offsets, L)
  if config.data.pair_field is not None:
    fill = rows.plan_pairs(made.train.offsets, L).fill
  facts = summary(made.manifest) | {"row_length": L, "row_fill": fill}
  if not finished:
    facts["seconds"] = seconds
    rate = facts["bytes"] / 1e6 / sum(seconds.values())
    facts["megabytes_per_second"] = rate
  print_summary(facts)
  if args.json:
    with open(args.json, "w", encoding="utf-8") as file:
      json.dump(facts, file, indent=2)
      file.write("\n")
  line = [f"--config={args.config}"] if args.config else []
  line += [a for a in given if a.startswith("--config.")]
  line += [f"--config.data.store={args.out}", "--workdir=runs/NAME"]
  print(f"store: {args.out}")
  print(f"next:  python -m flaxmlm.train {shlex.join(line)}")


def prepare_store(
  config: ConfigDict,
  out: str,
  *,
  progress: bool = True,
  seconds: dict[str, float] | None = None,
  beam: Sequence[str] | None = None,
) -> TokenStore:
  """Makes the store of a config at `out`, or opens the one that is there.

  Work in progress is kept in `OUT.partial`; a later call with the same config
  goes on from there, with another config it starts over. Memory is bounded: by
  some shards a process, whatever the size of the text, and 20 bytes a document
  (by Apache Beam, none).

  A store in a bucket is made in a folder of this machine, then copied there and
  left in the cache (`remote.fetch`). By Apache Beam, shards are made in the
  bucket and copied here.

  Args:
    config: The keys under `data` and `tokenizer` are used.
    out: Folder of the store.
    progress: Whether to show progress, on standard output.
    seconds: Is filled with how long each stage took.
    beam: Arguments of Apache Beam, `--runner=NAME` among them, which does the
      work then. None: the processes of this machine do it.

  Returns:
    The open store.

  Raises:
    InputError: `out` holds something else or the store of another config, or
      another process is making it; a source can't be read; nothing is left to
      train on or to validate with; a worker died.
  """
  from flaxmlm import tokenizers
  from flaxmlm.data import sources, store
  from flaxmlm.preparing import documents, shards

  given = named = load_tokenizer(config)
  spec = store_spec(config, named)
  # Where workers of other machines find and leave what they need.
  shared = partial = out.rstrip(os.sep) + ".partial"
  url = out if files.is_remote(out) else None
  if url is not None:
    out = remote.workplace(url)
    partial = f"{out}.partial"
  if store.is_store(url or out):
    made = store.open_store(url or out)
    check_same(made.manifest["spec"], spec, url or out)
    for folder in (shared, partial):
      files.remove_folder(folder)  # killed while it was deleted
    return made
  if not _may_become_store(url or out):
    raise InputError(
      f"{url or out}: exists and isn't a store; use another folder"
    )

  began = [time.perf_counter()]
  seconds = {} if seconds is None else seconds

  def finished(stage: str) -> None:
    began.append(time.perf_counter())
    seconds[stage] = began[-1] - began[-2]

  say = print if progress else None
  with (
    _explained(out),
    _started(partial, spec, say=say),
    _leased(url, shared, partial) as check_lease,
  ):
    if store.is_store(url or out):
      # Another process finished it a moment ago.
      for folder in (shared, partial):
        files.remove_folder(folder)
      made = store.open_store(url or out)
      check_same(made.manifest["spec"], spec, url or out)
      return made
    _check_outside(partial, shared, config)
    final = os.path.join(partial, "store")
    folder = os.path.join(final, "tokenizer")
    if not os.path.isdir(folder):
      if given is None and progress:
        print("training the tokenizer", flush=True)
      unfinished = os.path.join(partial, "tokenizer")
      shutil.rmtree(unfinished, ignore_errors=True)
      (given or train_tokenizer(config)).save(unfinished)
      os.rename(unfinished, folder)
    tokenizer = tokenizers.load(folder)
    finished("tokenizer")
    bad = sources.BadRecords()
    # What can be known to be wrong without reading is said before any of it.
    specs = documents.all_sources(config)
    sources.read(specs, **documents.reading(config), bad=bad)
    # By name, so that an older job of other text or cleaning writes elsewhere.
    text = json.dumps([spec, tokenizer.fingerprint]).encode()
    kind = hashlib.sha256(text).hexdigest()[:16]
    recipe = shards.Recipe(
      os.path.join(partial, "shards", kind),
      folder,
      tokenizer.fingerprint,
      config.data.cleaning.to_dict(),
    )
    parts = documents.cut(config)
    make = _by_pool
    if beam is not None:
      make = functools.partial(_by_beam, beam, shared)
      if progress:
        print(f"tokenizing by Apache Beam: {len(parts):,} parts", flush=True)
    with _progress(progress, documents.total_bytes(config)) as update:
      paths, size, choose = make(config, parts, recipe, bad, update)
    finished("tokens")
    if progress:
      for message in _bad_lines(bad):
        print(message)
      if beam is not None and (
        config.data.cleaning.deduplicate or config.data.validation_source
      ):
        print("looking for copies by Apache Beam", flush=True)
      print("putting the store together", flush=True)
    manifest = store.assemble(
      final,
      paths,
      vocab=tokenizer.vocab._asdict(),
      validation_fraction=config.data.validation_fraction,
      validation_source=documents.first_validation_source(config),
      deduplicate=config.data.cleaning.deduplicate,
      facts={
        "spec": spec,
        "tokenizer": tokenizer.fingerprint,
        "bytes": size,
        "bad_records": bad.count,
      },
      choose=choose,
    )
    _check_not_empty(manifest, config)
    changed = list(_differences(spec, store_spec(config, named)))
    if changed:
      raise InputError(
        f"the text was changed while it was read: {changed[0]}; start again"
      )
    if progress and manifest["smallest_held_out"]:
      print(
        "no document fell into data.validation_fraction="
        f"{config.data.validation_fraction:g}; the one with the smallest hash"
        " is held out for validation"
      )
    if url is not None:
      if progress:
        print(f"copying the store to {url}", flush=True)
      check_lease()
      remote.push_store(final, url)
      remote.keep_store(final)
      files.remove_folder(shared)
    else:
      os.replace(final, out)
      files.sync_folder(os.path.dirname(os.path.abspath(out)))
    shutil.rmtree(partial, ignore_errors=True)
    finished("store")
  return store.open_store(url or out)


def load_tokenizer(config: ConfigDict) -> Tokenizer | None:
  """Returns the tokenizer of `tokenizer.path`; None if one is to be trained.

  Raises:
    InputError: It can't be read; or is in a bucket, and no folder of one.
  """
  from flaxmlm import tokenizers

  path = config.tokenizer.path
  if path is None:
    return None
  here = remote.localize(path)
  if files.is_remote(path) and not tokenizers.has_tokenizer(here):
    raise InputError(
      f"tokenizer.path={path}: no folder with a tokenizer; of a bucket, name"
      " the folder that has it, not its file"
    )
  return tokenizers.load(
    here,
    lowercase=config.tokenizer.lowercase or None,
    words="jieba" if config.tokenizer.words == "jieba" else None,
  )


def train_tokenizer(config: ConfigDict) -> Tokenizer:
  """Trains the tokenizer of a config on a sample of its training text.

  Raises:
    InputError: A source can't be read, there is no text, or too little of it.
  """
  from flaxmlm import tokenizers
  from flaxmlm.preparing import documents

  texts = documents.tokenizer_texts(config)
  first = next(texts, None)
  if first is None:
    raise InputError(
      f"data.source={config.data.source}: no text to train a tokenizer on; all"
      " of it is for validation (data.validation_fraction; of one .txt file"
      " data.document=paragraph makes many documents) or shorter than"
      f" data.cleaning.min_chars={config.data.cleaning.min_chars}"
    )
  return tokenizers.train(
    itertools.chain([first], texts),
    kind=config.tokenizer.kind,
    vocab_size=config.tokenizer.vocab_size,
    lowercase=config.tokenizer.lowercase,
    words=config.tokenizer.words,
    sample_chars=config.tokenizer.sample_chars,
  )


def store_spec(config: ConfigDict, tokenizer: Tokenizer | None) -> dict:
  """Returns what a store's bytes depend on, by config key.

  Files stand there by base name, size and sha256, so that a corpus may be
  moved, and one that was changed is noticed. Hashes are remembered: see
  `storage.hashes`.
  """
  names = ["text_field", "document", "encoding", "on_bad_record"]
  spec = {
    "data.source": _source_spec(config.data.source),
    "data.validation_source": _source_spec(config.data.validation_source),
    **{f"data.{name}": config.data[name] for name in names},
  }
  if config.data.validation_source is None:
    spec["data.validation_fraction"] = config.data.validation_fraction
  for name, value in config.data.cleaning.items():
    spec[f"data.cleaning.{name}"] = value
  if config.data.pair_field is not None:
    spec["data.pair_field"] = config.data.pair_field
    spec["data.label_field"] = config.data.label_field
    spec["objective.labels"] = list(config.objective.labels)
  if tokenizer is not None:
    spec["tokenizer.path"] = tokenizer.fingerprint
  else:
    for name in ("kind", "vocab_size", "lowercase", "words", "sample_chars"):
      spec[f"tokenizer.{name}"] = config.tokenizer[name]
  return spec


def check_same(old: Mapping, new: Mapping, out: str) -> None:
  """Raises InputError that lists the differences if two specs differ."""
  different = list(_differences(old, new))
  if different:
    raise InputError(
      f"{out}: holds the store of another config ({'; '.join(different)});"
      " use another --out or --workdir, or delete it"
    )


def _differences(old: Mapping, new: Mapping) -> Iterator[str]:
  """Yields `key: old -> new` for each key in which two specs differ."""
  for name in dict.fromkeys([*old, *new]):
    a, b = old.get(name), new.get(name)
    if name in ("data.source", "data.validation_source"):
      b = _as_noted(a, b)
    if a != b:
      yield f"{name}: {_difference(a, b)}"


def _as_noted(old: list | None, new: list | None) -> list | None:
  """Returns files without their sha256 where the old ones have none either.

  Stores of before don't have them.
  """
  if old is None or new is None or len(old) != len(new):
    return new
  return [
    [c[: len(f)] for c, f in zip(b, a, strict=True)]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b)
    else b
    for a, b in zip(old, new, strict=True)
  ]


def summary(manifest: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the figures of the closing table."""
  splits, documents = manifest["splits"], manifest["documents"]
  total = {
    name: sum(split[name] for split in splits.values())
    for name in ("tokens", "characters")
  }
  return {
    "documents_read": documents["read"],
    "documents_kept": documents["kept"],
    "documents_train": splits["train"]["documents"],
    "documents_validation": splits["validation"]["documents"],
    "dropped": documents["dropped"],
    "bad_records": manifest["bad_records"],
    "cleaned": manifest["cleaned"],
    "vocab_size": manifest["vocab"]["size"],
    "tokens": total["tokens"],
    "tokens_train": splits["train"]["tokens"],
    "tokens_validation": splits["validation"]["tokens"],
    "tokens_per_character": total["tokens"] / max(total["characters"], 1),
    "unknown_rate": manifest["unknown_tokens"] / max(total["tokens"], 1),
    "bytes": manifest["bytes"],
  }


def print_summary(facts: Mapping[str, Any]) -> None:
  """Prints the closing table."""

  def listed(counts: Mapping[str, int]) -> str:
    shown = [
      f"{n:,} {name.replace('_', ' ')}" for name, n in counts.items() if n
    ]
    return ", ".join(shown) or "0"

  lines = {
    "documents read": f"{facts['documents_read']:,}",
    "kept": f"{facts['documents_kept']:,}"
    f" ({facts['documents_train']:,} train,"
    f" {facts['documents_validation']:,} validation)",
    "dropped": listed(facts["dropped"]),
    "bad records": f"{facts['bad_records']:,}",
    "changed by cleaning": listed(facts["cleaned"]),
    "vocabulary": f"{facts['vocab_size']:,}",
    "tokens": f"{facts['tokens']:,} ({facts['tokens_train']:,} train,"
    f" {facts['tokens_validation']:,} validation)",
    "tokens a character": f"{facts['tokens_per_character']:.3f}",
    "[UNK] rate": f"{facts['unknown_rate']:.4%}",
    f"row fill at {facts['row_length']}": f"{facts['row_fill']:.2%}",
  }
  if "seconds" in facts:
    stages = [f"{name} {s:.1f}" for name, s in facts["seconds"].items()]
    total = sum(facts["seconds"].values())
    lines["seconds"] = f"{total:.1f} ({', '.join(stages)})"
    lines["MB/s"] = f"{facts['megabytes_per_second']:.1f}"
  width = max(map(len, lines))
  for name, value in lines.items():
    print(f"{name:<{width}}  {value}")


def print_dry_run(config: ConfigDict) -> None:
  """Prints the first ten documents before and after cleaning."""
  from flaxmlm.data import sources
  from flaxmlm.data.cleaning import clean
  from flaxmlm.preparing import documents

  bad = sources.BadRecords()
  specs = config_lib.as_tuple(config.data.source)
  read = sources.read(specs, **documents.reading(config), bad=bad)
  first_ten = itertools.islice(read, 10)
  for where, raw in ((d.where, text) for d in first_ten for text in d.texts):
    counts: Counter[str] = Counter()
    text = clean(raw, config.data.cleaning, counts)
    steps = ", ".join(counts) or "nothing"
    print(f"{where}: {len(raw):,} characters")
    print(f"  changed by: {steps}")
    if text is None:
      print(f"  before: {raw[:70]!r}")
      print("  after:  dropped")
      continue
    pairs = enumerate(zip(raw, text, strict=False))
    first = next((i for i, (a, b) in pairs if a != b), 0)
    begin = max(first - 20, 0)
    print(f"  before: {raw[begin : begin + 70]!r}")
    print(f"  after:  {text[begin : begin + 70]!r}")
  for message in _bad_lines(bad):
    print(message)


# Steps of the program and of prepare_store, in order.


def _beam_arguments(runner: str | None, options: list[str]) -> list[str] | None:
  """Returns the arguments of Apache Beam, if it is to do the work.

  Raises:
    InputError: There is no Beam here, or it doesn't take them.
  """
  if runner is None:
    if options:
      raise InputError(
        f"-- {shlex.join(options)}: options of Apache Beam, and no"
        " --runner=NAME before them"
      )
    return None
  if importlib.util.find_spec("apache_beam") is None:
    raise InputError(
      f"--runner={runner} needs Apache Beam: pip install -e '.[beam]'"
    )
  from flaxmlm.preparing import beam

  arguments = [f"--runner={runner}", *options]
  beam.start(arguments)
  return arguments


def _source_spec(source: str | tuple[str, ...] | None) -> list | None:
  from flaxmlm.data import sources

  if source is None:
    return None
  specs = config_lib.as_tuple(source)
  named = [sources.files([spec]) for spec in specs]
  here = (f for paths in named for f in paths if not files.is_remote(f))
  digests = hashes.hash_files(dict.fromkeys(here), what="the text")

  def entry(path: str) -> list:
    # A bucket's text isn't read an extra time.
    digest = [digests[path]] if path in digests else []
    return [os.path.basename(path), files.size_of(path), *digest]

  return [
    [entry(path) for path in paths] or spec
    for spec, paths in zip(specs, named, strict=True)
  ]


def _difference(old: Any, new: Any) -> str:
  """Returns `old -> new`, of two lists of files the first that differs."""
  if isinstance(old, list) and isinstance(new, list):
    pairs = itertools.zip_longest(_flat(old), _flat(new), fillvalue=None)
    changed = next(((a, b) for a, b in pairs if a != b), None)
    if changed is None:
      return "other grouping"
    a, b = ("nothing" if f is None else f[0] for f in changed)
    return f"the contents of {a} have changed" if a == b else f"{a} -> {b}"
  return f"{old!r} -> {new!r}"


def _flat(entries: list) -> list[tuple[str, str]]:
  """Returns each file or spec as what it is called, and its sha256."""
  lists = [[e] if isinstance(e, str) else e for e in entries]
  return [
    (file, "")
    if isinstance(file, str)
    else (f"{file[0]} of {file[1]} bytes", "".join(file[2:]))
    for files in lists
    for file in files
  ]


@contextlib.contextmanager
def _explained(out: str) -> Iterator[None]:
  """Makes one line of a full disk or of a folder that can't be written."""
  try:
    yield
  except files.BucketError as error:
    raise InputError(
      f"{error.filename}: {error.strerror}; started again, it goes on where it"
      " was"
    ) from error
  except OSError as error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
      where = error.filename or out
      raise OSError(error.errno, error.strerror, where) from error
    raise InputError(
      f"{error.filename or out}: {error.strerror or error}; free some space or"
      " use another folder, and start again: it goes on where it was"
    ) from error


@contextlib.contextmanager
def _started(
  partial: str, spec: Mapping, *, say: Callable[[str], None] | None
) -> Iterator[None]:
  """Locks the folder of unfinished work, empty unless it is of this spec."""
  from flaxmlm.data.store import lock_file

  os.makedirs(partial, exist_ok=True)
  try:
    lock = lock_file(os.path.join(partial, "lock"))
  except BlockingIOError as error:
    raise InputError(
      f"{partial}: another process is making this store; wait for it"
    ) from error
  with lock:
    path = os.path.join(partial, "spec.json")
    text = json.dumps(spec, indent=2).encode()
    old = None
    if os.path.exists(path):
      with open(path, "rb") as file:
        old = file.read()
    if old not in (None, text) and say:
      say(
        f"{partial}: unfinished work of another config, starting over"
        f" ({_why(old, spec)})"
      )
    if old != text:
      for name in ("store", "shards", "tokenizer"):
        shutil.rmtree(os.path.join(partial, name), ignore_errors=True)
    elif say:
      say(f"{partial}: going on with unfinished work")
    for name in ("store", "shards"):
      os.makedirs(os.path.join(partial, name), exist_ok=True)
    files.write(path, text)
    yield


def _why(old: bytes, new: Mapping) -> str:
  """Returns the first thing in which a spec that was written differs."""
  try:
    return next(_differences(json.loads(old), new), "another version")
  except (ValueError, AttributeError, TypeError):
    return "its spec.json is damaged"


def _leased(
  url: str | None, shared: str, partial: str
) -> contextlib.AbstractContextManager[Callable[[], None] | None]:
  """Keeps other machines from making a store in a bucket."""
  if url is None:
    return contextlib.nullcontext()
  return lease.hold(shared, os.path.join(partial, lease.MEMO))


def _may_become_store(out: str) -> bool:
  """Whether a folder is empty, or has what is left of copying a store there."""
  if not files.is_remote(out):
    return not os.path.exists(out) or (
      os.path.isdir(out) and not os.listdir(out)
    )
  known = {"train", "validation", "tokenizer", "counts.bin"}
  try:
    return set(files.list_names(out)) <= known
  except OSError as error:
    raise InputError(f"{out}: {error.strerror}") from error


def _check_outside(partial: str, shared: str, config: ConfigDict) -> None:
  """Raises InputError if a source takes what we write for text."""
  from flaxmlm.data import sources
  from flaxmlm.preparing import documents

  specs = documents.all_sources(config)
  ours = os.path.join(os.path.realpath(partial), "")
  for spec in specs:
    if files.is_remote(spec):
      inside = files.fits(f"{shared}/jobs/0/parts.json", spec)
    else:
      found = map(os.path.realpath, sources.files([spec]))
      inside = any(path.startswith(ours) for path in found)
    if inside:
      shutil.rmtree(partial, ignore_errors=True)
      raise InputError(
        f"{shared}: is inside of the source {spec} and would be read as text;"
        " use an --out or --workdir elsewhere"
      )


def _by_pool(
  config: ConfigDict,
  parts: Sequence[Part],
  recipe: Recipe,
  bad: BadRecords,
  update: Update,
) -> tuple[list[str], int, Choose]:
  """Writes the shards; returns them, bytes of text, how to find copies."""
  from flaxmlm.data import store
  from flaxmlm.preparing import documents, pool, shards

  tasks = shards.tasks(enumerate(parts), documents.reading(config), recipe, bad)
  paths = []
  total = Counter()
  for done in pool.run(tasks, config.data.processes):
    paths.append(done.path)
    total.update(done._asdict() | {"path": 0})
    update(total["bytes"], total["documents"], total["tokens"])
  return paths, total["bytes"], store.choose_in_memory


def _by_beam(
  arguments: Sequence[str],
  shared: str,
  config: ConfigDict,
  parts: Sequence[Part],
  recipe: Recipe,
  bad: BadRecords,
  update: Update,
) -> tuple[list[str], int, Choose]:
  """As `_by_pool`, by Apache Beam, by way of a folder that all workers see."""
  from flaxmlm.preparing import beam, documents

  here, tokenizer = recipe.folder, os.path.abspath(recipe.tokenizer)
  in_bucket = files.is_remote(shared)
  shared = shared if in_bucket else os.path.abspath(shared)
  files.remove_folder(os.path.join(shared, "jobs"))  # their workers end
  folder = os.path.join(shared, "jobs", uuid.uuid4().hex[:12])
  if in_bucket:
    for name in os.listdir(tokenizer):
      path = os.path.join(tokenizer, name)
      files.copy_there(path, f"{folder}/tokenizer/{name}")
    tokenizer = f"{folder}/tokenizer"
  recipe = recipe._replace(
    folder=os.path.join(shared, "shards", os.path.basename(here)),
    tokenizer=tokenizer,
  )
  options = documents.reading(config)
  if options["tfds_dir"] and "://" not in options["tfds_dir"]:
    options["tfds_dir"] = os.path.abspath(options["tfds_dir"])
  job = beam.Job(folder, options, recipe)
  results = beam.tokenize(job, parts, arguments, bad, update)
  done = [done for result in results for done in result.shards]
  paths = [shard.path for shard in done]
  if in_bucket:
    files.remove_folder(here)  # copies of an earlier time
    files.copy_here(paths, recipe.folder, here)
    paths = [path.replace(recipe.folder, here, 1) for path in paths]
  return (
    paths,
    sum(shard.bytes for shard in done),
    functools.partial(beam.choose, job, results, arguments),
  )


def _bad_lines(bad: BadRecords) -> Iterator[str]:
  if bad.count:
    yield f"{bad.count:,} bad records skipped; the first of them:"
    yield from (f"  {message}" for message in bad.messages)
  if bad.ignored_files:
    yield (
      f"{len(bad.ignored_files):,} files of unknown kind left out, such as"
      f" {bad.ignored_files[0]}"
    )


def _check_not_empty(manifest: Mapping[str, Any], config: ConfigDict) -> None:
  documents, splits = manifest["documents"], manifest["splits"]
  if documents["read"] == 0:
    raise InputError(f"data.source={config.data.source}: no document in it")
  dropped = ", ".join(
    f"{count} {reason.replace('_', ' ')}"
    for reason, count in documents["dropped"].items()
    if count
  )
  validation = config.data.validation_source
  split = validation is None and config.data.validation_fraction > 0
  single = documents["kept"] == 1 or not splits["validation"]["documents"]
  if split and documents["kept"] and single:
    raise InputError(
      f"data.source={config.data.source}: a single document"
      f" ({dropped or 'none'} dropped) can't be both for training and for"
      " validation; of a .txt file data.document=paragraph makes many; or name"
      " a data.validation_source, or set data.validation_fraction=0"
    )
  if not splits["train"]["documents"]:
    raise InputError(
      f"no training document is left of {documents['read']}"
      f" ({dropped or 'none'} dropped,"
      f" {splits['validation']['documents']} for validation); see"
      " data.cleaning.min_chars, data.validation_fraction,"
      " data.validation_source"
    )
  if validation is not None and not splits["validation"]["documents"]:
    raise InputError(
      f"data.validation_source={validation}: no document is left"
      f" ({dropped or 'none'} dropped)"
    )


@contextlib.contextmanager
def _progress(enabled: bool, total: int | None) -> Iterator[Update]:
  """Shows a bar on a terminal, elsewhere a line each ten seconds."""
  start = last = time.perf_counter()

  def status(size: int, documents: int, tokens: int) -> str:
    seconds = time.perf_counter() - start
    return (
      f"{documents:,} documents, {tokens:,} tokens,"
      f" {tokens / seconds:,.0f} tokens/s, {size / 1e6 / seconds:.1f} MB/s"
    )

  if not enabled:
    yield lambda size, documents, tokens: None
  elif sys.stdout.isatty():
    from rich import progress

    columns = (
      progress.TextColumn("tokenizing"),
      progress.BarColumn(),
      progress.TimeRemainingColumn(),
      progress.TextColumn("{task.fields[status]}"),
    )
    with progress.Progress(*columns) as bar:
      task = bar.add_task("", total=total, status="")
      yield lambda size, documents, tokens: bar.update(
        task, completed=size, status=status(size, documents, tokens)
      )
  else:

    def update(size: int, documents: int, tokens: int) -> None:
      nonlocal last
      if time.perf_counter() - last >= 10:
        last = time.perf_counter()
        share = f"{size / total:.0%}, " if total else ""
        print(
          f"tokenizing: {share}{status(size, documents, tokens)}", flush=True
        )

    yield update


if __name__ == "__main__":
  config_lib.run(main)
