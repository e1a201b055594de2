"""Preparing a store: MB/s a core, memory of each process, same bytes.

The text is made from real novels (FLAXMLM_DATA/novels): copy after copy, in
each of which one word in twenty is another, so that no document is a copy of
another. 100 MB are prepared by one process and by as many as there are cores,
which must make the same bytes; then 1 GB, of which the 100 MB are a part.
Cleaning is on. The tokenizer is SentencePiece unigram, trained in each run: its
time doesn't grow with the text, so the rate is given with it and without.
`of_plain` is that rate by SentencePiece's own, of a bare `encode` of the same
text in this process. `cpu_s` is the processor time of all processes, which
neighbours on the machine disturb less than the clock.

Targets: 8 MB/s a core; every process under 500 MB, at 100 MB as at 1 GB.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time

import sentencepiece

from benchmarks import report

SIZES = {"10MB": 10_000_000, "100MB": 100_000_000, "1GB": 1_000_000_000}


def main() -> None:
  parser = report.parser(__doc__)
  parser.add_argument(
    "--size", choices=SIZES, help="of the text; else 100MB and 1GB"
  )
  parser.add_argument(
    "--document",
    default="paragraph",
    choices=("file", "paragraph"),
    help="what a document is",
  )
  args = parser.parse_args()
  novels = report.data_folder("novels")
  if novels is None:
    raise SystemExit("no novels: FLAXMLM_DATA names the folder of real data")
  sizes = [args.size] if args.size else ["100MB", "1GB"]
  sizes = ["10MB"] if args.quick else sizes
  cores = len(os.sched_getaffinity(0))
  results, hashes = [], []
  with tempfile.TemporaryDirectory() as folder:
    out = os.path.join(folder, "store")
    for number, size in enumerate(sizes):
      text = os.path.join(folder, size)
      made = make_text(novels, text, SIZES[size])
      for processes in (1, cores) if number == 0 else (cores,):
        result = measure(text, out, processes, made, args.document)
        results.append({"text": size, **result})
        with open(os.path.join(out, "manifest.json"), "rb") as file:
          hashes.append((size, file.read()))
        plain = measure_plain(text, os.path.join(out, "tokenizer"))
        results[-1]["plain"] = plain
        results[-1]["of_plain"] = results[-1]["without_tokenizer"] / plain
        shutil.rmtree(out)
      shutil.rmtree(text)
  same = len(set(hashes)) == len(sizes)
  report.table(results)
  print(f"stores byte for byte the same: {same}")
  report.finish(
    args,
    f"prepare-{args.document}",
    {"document": args.document, "results": results, "same_bytes": same},
    packages=["flaxmlm", "numpy", "sentencepiece", "ftfy", "pyarrow"],
  )


def measure_plain(text: str, tokenizer: str) -> float:
  """Returns MB/s of SentencePiece alone, on one core: the best of three."""
  model = sentencepiece.SentencePieceProcessor(
    model_file=os.path.join(tokenizer, "tokenizer.model")
  )
  texts, size = [], 0
  for name in sorted(os.listdir(text)):
    path = os.path.join(text, name)
    with open(path, encoding="utf-8") as file:
      texts += file.read().split("\n\n")
    size += os.path.getsize(path)
    if size > 10_000_000:
      break
  seconds = []
  for _ in range(3):
    start = time.perf_counter()
    for i in range(0, len(texts), 1000):
      model.encode(texts[i : i + 1000], out_type="numpy", num_threads=1)
    seconds.append(time.perf_counter() - start)
  return size / 1e6 / min(seconds)


def make_text(novels: str, folder: str, size: int) -> int:
  """Writes perturbed copies of the novels until there are `size` bytes."""
  os.makedirs(folder)
  draw = random.Random(0)
  written = copy = 0
  while written < size:
    for name in sorted(os.listdir(novels)):
      with open(os.path.join(novels, name), encoding="utf-8-sig") as file:
        lines = file.read().split("\n")
      words = " ".join(lines[:200]).split()
      for number, line in enumerate(lines):
        parts = line.split(" ")
        for i in range(draw.randrange(20), len(parts), 20):
          parts[i] = draw.choice(words)
        lines[number] = " ".join(parts)
      path = os.path.join(folder, f"{copy:03d}-{name}")
      with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(lines))
      written += os.path.getsize(path)
      if written >= size:
        break
    copy += 1
  return written


def measure(
  text: str, out: str, processes: int, size: int, document: str
) -> dict:
  """Runs `prepare` and watches it and its workers."""
  command = [
    sys.executable,
    "-m",
    "flaxmlm.prepare",
    f"--out={out}",
    f"--json={out}.json",
    f"--config.data.source={text}",
    f"--config.data.processes={processes}",
    f"--config.data.document={document}",
    # A handful of novels may have none that falls into validation.
    "--config.data.validation_fraction=0",
    # The default of 32,768 pieces is too many for the smallest text.
    f"--config.tokenizer.vocab_size={32768 if size > 5e7 else 8192}",
  ]
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  start = time.perf_counter()
  with subprocess.Popen(command) as process:
    peaks: dict[int, float] = {}
    watcher = threading.Thread(target=watch, args=(process, peaks))
    watcher.start()
    code = process.wait()
    seconds = time.perf_counter() - start
    watcher.join()
  if code:
    raise SystemExit(code)
  with open(f"{out}.json", encoding="utf-8") as file:
    facts = json.load(file)
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
  training = facts["seconds"]["tokenizer"]
  main_peak = peaks.pop(process.pid)
  cores = min(processes, len(os.sched_getaffinity(0)))
  return {
    "processes": processes,
    "seconds": seconds,
    "tokenizer_s": training,
    "cpu_s": cpu,
    "MB/s/core": size / 1e6 / seconds / cores,
    "without_tokenizer": size / 1e6 / (seconds - training) / cores,
    "main_MB": main_peak,
    "workers_MB": max(peaks.values(), default=0.0),
    "documents": facts["documents_kept"],
    "tokens": facts["tokens"],
  }


def watch(process: subprocess.Popen, peaks: dict[int, float]) -> None:
  """Notes the peak memory (VmHWM, in MB) of a process and its children.

  The kernel keeps the peak itself: looking from time to time loses nothing but
  what a process does in its last moment.
  """
  while process.poll() is None:
    for pid in [process.pid, *children(process.pid)]:
      try:
        with open(f"/proc/{pid}/status", encoding="utf-8") as file:
          for line in file:
            if line.startswith("VmHWM:"):
              peaks[pid] = int(line.split()[1]) * 1024 / 1e6
      except OSError:  # it has just ended
        continue
    time.sleep(0.1)


def children(pid: int) -> list[int]:
  try:
    with open(f"/proc/{pid}/task/{pid}/children", encoding="utf-8") as file:
      return [int(child) for child in file.read().split()]
  except OSError:
    return []


if __name__ == "__main__":
  main()
