"""How a process gets its memory: huge pages for XLA's arrays on a CPU."""

from __future__ import annotations

import os
import sys

_TUNABLES = "GLIBC_TUNABLES"
_HUGE_PAGES = "glibc.malloc.hugetlb=1"


def use_huge_pages() -> None:
  """Has glibc ask for huge pages; for that it starts this program again.

  XLA allocates the temporaries of a CPU step anew each time. In pages of 4 KiB
  a 4x256 BERT takes 170,000 page faults a step, a fifth of its time; in huge
  pages 900 (`python -m benchmarks.train_step` without and with
  `--small_pages`).
  glibc reads the setting when a process starts and never again (glibc manual,
  "Memory Allocation Tunables").

  Does nothing if the setting is made already, if there is no glibc, or if this
  program isn't what the process was started for by `python -m` (a notebook's
  kernel would start again). The processes that it starts don't inherit the
  setting. To be called first of all: what the program did before is lost.
  """
  try:
    os.confstr("CS_GNU_LIBC_VERSION")
  except (AttributeError, OSError, ValueError):  # another system, another libc
    return
  given = os.environ.get(_TUNABLES, "")
  if "glibc.malloc.hugetlb" in given:
    rest = [part for part in given.split(":") if part != _HUGE_PAGES]
    os.environ.pop(_TUNABLES)
    if rest:
      os.environ[_TUNABLES] = ":".join(rest)
    return
  module = sys.modules["__main__"].__spec__
  if module is None or ["-m", module.name] not in [
    sys.orig_argv[i : i + 2] for i in range(len(sys.orig_argv))
  ]:
    return
  os.environ[_TUNABLES] = ":".join(filter(None, [given, _HUGE_PAGES]))
  try:
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
  except OSError:  # slower, and no more than that
    os.environ[_TUNABLES] = given
