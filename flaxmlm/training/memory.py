"""How the memory of a process is allocated on a CPU."""

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

  Does nothing if the setting is made already, or if there is no glibc. To be
  called first of all in a program: what it did before is lost.
  """
  try:
    os.confstr("CS_GNU_LIBC_VERSION")
  except (AttributeError, OSError, ValueError):  # another system, another libc
    return
  given = os.environ.get(_TUNABLES, "")
  if "glibc.malloc.hugetlb" in given:
    return
  os.environ[_TUNABLES] = ":".join(filter(None, [given, _HUGE_PAGES]))
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
