"""Peers that take turns, each in a process of its own.

In one process they would be in one another's way: threads that spin after their
work is done (OpenMP's, ONNX Runtime's) take the cores from the next one, which
makes it up to half slower, and memory that one frees is what the next one gets.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

Turn = Callable[..., tuple[float, Any]]
"""`(*given) -> (seconds, result)` of a call there."""


def start(make: Callable[..., Callable[..., Any]], *args: Any) -> Turn:
  """Returns what calls the function that `make(*args)` makes, over there.

  It is made at the first call, whose seconds have that in them. EOFError: the
  process has ended.
  """
  context = multiprocessing.get_context("spawn")
  here, there = context.Pipe()
  process = context.Process(
    target=_serve, args=(there, make, args), daemon=True
  )
  process.start()
  there.close()

  def turn(*given: Any) -> tuple[float, Any]:
    here.send(given)
    return here.recv()

  return turn


def _serve(
  connection: Connection,
  make: Callable[..., Callable[..., Any]],
  args: tuple[Any, ...],
) -> None:
  """Calls the function when it is told to, until nobody is there any more."""
  function = None
  while True:
    try:
      given = connection.recv()
    except EOFError:
      return
    began = time.perf_counter()
    if function is None:
      function = make(*args)
    result = function(*given)
    connection.send((time.perf_counter() - began, result))
