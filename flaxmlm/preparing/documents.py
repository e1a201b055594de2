"""What the sources of a config hold, and how it is cut into parts."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from flaxmlm import config as config_lib
from flaxmlm.data import sources, store
from flaxmlm.preparing import tokens
from flaxmlm.storage.files import size_of

if TYPE_CHECKING:
  from collections.abc import Mapping

  from ml_collections import ConfigDict

# Small files are read together until they have so many bytes, which keep a core
# busy for seconds: what is done once a part takes no time beside that.
PART_BYTES = 16 << 20
# A tokenizer's sample is drawn from so many times its size, not from more.
OVERSAMPLE = 8
SAMPLE_FILES = 16
BLOCK_CHARS = 1 << 20


class Part(NamedTuple):
  """What is read in one go: files of a source, or a source that has none."""

  source: int
  """Index into the sources, validation's own behind the others."""
  specs: tuple[str, ...]
  """Files, or a spec such as `embedded`."""


def all_sources(config: ConfigDict) -> tuple[str, ...]:
  """Returns the specs of training, then validation's own."""
  specs = config_lib.as_tuple(config.data.source)
  return specs + config_lib.as_tuple(config.data.validation_source or ())


def first_validation_source(config: ConfigDict) -> int | None:
  """Returns from where on sources are validation's own; None if none is."""
  if config.data.validation_source is None:
    return None
  return len(config_lib.as_tuple(config.data.source))


def reading(config: ConfigDict) -> dict[str, Any]:
  """Returns the arguments that `sources.read` takes from a config."""
  return {
    "text_field": config.data.text_field,
    "pair_field": config.data.pair_field,
    "label_field": config.data.label_field,
    "labels": tuple(config.objective.labels or ()),
    "document": config.data.document,
    "encoding": config.data.encoding,
    "on_bad_record": config.data.on_bad_record,
    "max_bad_records": config.data.max_bad_records,
    "tfds_dir": config.data.tfds_dir,
  }


def cut(config: ConfigDict) -> list[Part]:
  """Cuts the sources into parts, in reading order.

  A part is a file, neighbours of some `PART_BYTES` together, or a slice of a
  data set of that size. The cut depends on the sources alone.

  Raises:
    InputError: See `sources.files`.
  """
  parts = []
  for source, spec in enumerate(all_sources(config)):
    files = sources.files([spec])
    if spec.startswith("tfds:"):
      slices = sources.cut_tfds(spec, config.data.tfds_dir, PART_BYTES)
      parts += [Part(source, (slice_,)) for slice_ in slices]
    elif not files:
      parts.append(Part(source, (spec,)))
    part: list[str] = []
    size = 0
    for path in files:
      part.append(path)
      size += size_of(path)
      if size >= PART_BYTES or path == files[-1]:
        parts.append(Part(source, tuple(part)))
        part, size = [], 0
  return parts


def read_part(
  part: Part,
  options: Mapping[str, Any],
  bad: sources.BadRecords | None = None,
) -> Iterator[sources.Document]:
  """Yields the documents of a part.

  Args:
    part: Of `cut`.
    options: Of `reading`.
    bad: Is filled with what was skipped.

  Raises:
    InputError: See `sources.read`.
  """
  for document in sources.read(part.specs, **options, bad=bad):
    yield document._replace(source=part.source)


def total_bytes(config: ConfigDict) -> int | None:
  """Returns the size of the text, or None where it can't be known."""
  files = [sources.files([spec]) for spec in all_sources(config)]
  plain = all(
    path.endswith((".txt", ".jsonl", ".json", ".csv", ".tsv"))
    for named in files
    for path in named
  )
  if not plain or not all(files):
    return None
  return sum(size_of(path) for named in files for path in named)


def tokenizer_texts(config: ConfigDict) -> Iterator[str]:
  """Yields cleaned training text for a tokenizer to draw its sample from.

  Reading and cleaning all of a large corpus twice would take long for a small
  sample. Of more than eight times the sample, a random part is taken (of
  documents over a million characters, some blocks of lines: only there,
  validation text may be among it); of more than thirty-two times, that part
  comes from a random part of the files, sixteen at least.
  """
  total = total_bytes(config) or 0
  wanted = OVERSAMPLE * config.tokenizer.sample_chars
  specs = config_lib.as_tuple(config.data.source)
  if total > wanted:
    specs, total = _some_files(config, 4 * wanted)
  documents = sources.read(specs, **reading(config))
  if total > wanted:
    blocks = (d._replace(text=t) for d in documents for t in _blocks(d.text))
    draw = random.Random(0)
    documents = (d for d in blocks if draw.random() < wanted / total)
  bound = 0
  if config.data.validation_source is None:
    bound = store.validation_bound(config.data.validation_fraction)
  counts: Counter[str] = Counter()
  for document in documents:
    cleaned = tokens.clean_document(document, config.data.cleaning, counts)
    if cleaned is not None and tokens.fingerprint_of(cleaned) >= bound:
      yield from cleaned.texts


def _some_files(config: ConfigDict, wanted: int) -> tuple[tuple[str, ...], int]:
  """Returns random training files of `wanted` bytes together, and their size.

  They stay in their order. There are sixteen at least, or all that there are.
  """
  files = sources.files(config_lib.as_tuple(config.data.source))
  order = list(range(len(files)))
  random.Random(0).shuffle(order)
  chosen, size = [], 0
  for number in order:
    if size >= wanted and len(chosen) >= SAMPLE_FILES:
      break
    chosen.append(number)
    size += size_of(files[number])
  return tuple(files[number] for number in sorted(chosen)), size


def _blocks(text: str) -> Iterator[str]:
  """Cuts a text at line ends into blocks of at most `BLOCK_CHARS`."""
  start = 0
  while len(text) - start > BLOCK_CHARS:
    end = text.rfind("\n", start, start + BLOCK_CHARS) + 1
    end = end if end > start else start + BLOCK_CHARS
    yield text[start:end]
    start = end
  yield text[start:]
