"""Several processes, on one machine or many, that train one model together.

Each is given the same command line. They share the workdir; the first of them
alone writes into it, and to the terminal. Without others there is nothing to
do here, and JAX isn't imported.
"""

from __future__ import annotations

import collections
import contextlib
import glob
import hashlib
import http.client
import os
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flaxmlm import InputError

# As JAX has them, and two that it lacks.
ADDRESS = "JAX_COORDINATOR_ADDRESS"
PROCESSES, PROCESS = "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
METADATA = "GCE_METADATA_HOST"
# How long the others wait while the first one prepares the text.
_PATIENCE_SECONDS = 7 * 24 * 3600
# One that doesn't say for so long that it lives has ended, or was stopped.
_HEARTBEAT_SECONDS = 60
# After the last meeting they all end within moments.
_SHUTDOWN_SECONDS = 20


def join() -> tuple[int, int]:
  """Joins the other processes, if there are any; before any use of JAX.

  They are those of the environment: JAX_COORDINATOR_ADDRESS (HOST:PORT of the
  first one), JAX_NUM_PROCESSES and JAX_PROCESS_ID; on a Cloud TPU, under Slurm
  and on GKE JAX finds them by itself.

  Returns:
    The number of this process, from 0, and how many there are.

  Raises:
    InputError: The environment says half of it.
  """
  given = {
    name: os.environ[name]
    for name in (ADDRESS, PROCESSES, PROCESS)
    if name in os.environ
  }
  if not given and not _may_have_others():
    return 0, 1
  import jax

  # It would catch SIGTERM, and do nothing, until the loop does.
  jax.config.update("jax_enable_preemption_service", False)
  seconds = {
    "heartbeat_timeout_seconds": _HEARTBEAT_SECONDS,
    "shutdown_timeout_seconds": _SHUTDOWN_SECONDS,
  }
  if given:
    jax.distributed.initialize(*_checked(given), **seconds)
  else:
    try:
      jax.distributed.initialize(**seconds)
    except ValueError as error:
      if "coordinator_address" not in str(error):
        raise
      return 0, 1  # a TPU that no cluster speaks of
  if jax.process_index() != 0:
    # To the end of the process.
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
  return jax.process_index(), jax.process_count()


def _checked(given: Mapping[str, str]) -> tuple[str, int, int]:
  """Returns the address, the number of processes and that of this one."""
  missing = {ADDRESS, PROCESSES, PROCESS} - set(given)
  if missing:
    raise InputError(
      f"the environment has {', '.join(sorted(given))} without"
      f" {', '.join(sorted(missing))}; set all three, or none"
    )
  texts = given[PROCESSES], given[PROCESS]
  if not all(text.isdecimal() for text in texts) or not (
    int(texts[1]) < int(texts[0])
  ):
    raise InputError(
      f"the environment has {PROCESS}={texts[1]} of {PROCESSES}={texts[0]};"
      " processes are counted from 0"
    )
  return given[ADDRESS], int(texts[0]), int(texts[1])


def _may_have_others() -> bool:
  """Whether this is a machine with a TPU, or one of several Slurm tasks."""
  tpu = []
  if "tpu" in os.environ.get("JAX_PLATFORMS", "tpu"):
    tpu = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
  tasks = os.environ.get("SLURM_NTASKS", "1")
  return bool(tpu) or (tasks != "1" and "SLURM_PROCID" in os.environ)


def wait(name: str, count: int) -> None:
  """Waits until all `count` processes have come to the meeting of this name."""
  if count == 1:
    return
  from orbax.checkpoint import multihost

  meet = multihost.get_barrier_sync_fn(processes=set(range(count)))
  meet(key=f"flaxmlm/{name}", timeout_ms=1000 * _PATIENCE_SECONDS)


def leave() -> None:
  """Parts from the other processes, at the end of all their work.

  Python's own end would first wait for threads that were given up, of which one
  may wait for another process.
  """
  import jax

  if jax.process_count() > 1:
    jax.distributed.shutdown()


def check_alike(values: Mapping[str, Any]) -> None:
  """Raises InputError unless all processes have the same values.

  Args:
    values: What must be alike, by name.
  """
  import jax

  if jax.process_count() == 1:
    return
  import numpy as np
  from jax.experimental import multihost_utils

  names = list(values)
  own = np.stack(
    [
      np.frombuffer(hashlib.sha256(repr(values[n]).encode()).digest(), np.uint8)
      for n in names
    ]
  )
  every = multihost_utils.process_allgather(own)
  unlike = (every != every[0]).any(axis=2)
  for process, column in np.argwhere(unlike):
    raise InputError(
      f"{names[column]} isn't the same in process {process} as in process 0"
      f" (here: {values[names[column]]}); start all alike"
    )


def any_of(flag: bool) -> bool:
  """Whether any process says True; all ask, and wait for one another."""
  import jax

  if jax.process_count() == 1:
    return flag
  import numpy as np
  from jax.experimental import multihost_utils

  return bool(multihost_utils.process_allgather(np.array(flag)).any())


def is_lost(error: Exception) -> bool:
  """Whether an error says that another process is gone, as gloo and NCCL do."""
  if isinstance(error, InputError) or not _has_others():
    return False
  text = str(error).lower()
  return any(
    word in text
    for word in ("gloo", "nccl", "connection", "unavailable", "heartbeat")
  )


def _has_others() -> bool:
  """Whether other processes were joined; JAX isn't imported for it."""
  jax = sys.modules.get("jax")
  return jax is not None and jax.distributed.is_initialized()


def make_vote() -> Callable[[Sequence[int]], tuple[int, ...]]:
  """Returns `flags -> flags`: for each, the largest that any process has said.

  They are False and True, or numbers.

  All have to call it once a step. With several processes the answer is that of
  two steps ago, the same in all of them, so that none waits for a device that
  is still at work.
  """
  import jax
  import numpy as np
  from jax.sharding import AxisType, NamedSharding
  from jax.sharding import PartitionSpec as P

  if jax.process_count() == 1:
    return tuple
  count = (jax.device_count(),)
  mesh = jax.make_mesh(count, ("all",), axis_types=(AxisType.Auto,))
  split = NamedSharding(mesh, P("all"))
  gather = jax.jit(
    lambda x: x.max(axis=0), out_shardings=NamedSharding(mesh, P())
  )
  votes: collections.deque[Any] = collections.deque(maxlen=3)

  def vote(flags: Sequence[int]) -> tuple[int, ...]:
    own = np.tile(np.array(flags, np.int32), (jax.local_device_count(), 1))
    votes.append(gather(jax.make_array_from_process_local_data(split, own)))
    if len(votes) < 3:
      return (0,) * len(flags)
    return tuple(map(int, np.asarray(votes[0])))

  return vote


def watch_preemption() -> Callable[[], bool]:
  """Returns whether Google has given notice that it takes this machine away.

  A thread asks the machine's metadata server each second; elsewhere than on
  Google Cloud nothing is asked. $GCE_METADATA_HOST says where that server is,
  as to Google's own libraries. Compute Engine's documentation, "Create and use
  Spot VMs", "Detect preemption of Spot VMs".
  """
  host = os.environ.get(METADATA)
  if host is None and not _is_google():
    return lambda: False
  request = urllib.request.Request(
    f"http://{host or 'metadata.google.internal'}"
    "/computeMetadata/v1/instance/preempted",
    headers={"Metadata-Flavor": "Google"},
  )
  directly = urllib.request.build_opener(urllib.request.ProxyHandler({}))
  notice = threading.Event()

  def watch() -> None:
    while not notice.is_set():
      with (
        contextlib.suppress(OSError, http.client.HTTPException),
        directly.open(request, timeout=5) as answer,
      ):
        if answer.read(16).strip() == b"TRUE":
          notice.set()
      time.sleep(1)

  threading.Thread(target=watch, name="pre-emption", daemon=True).start()
  return notice.is_set


def _is_google() -> bool:
  """Whether this is a machine of Google Cloud."""
  try:
    with open("/sys/class/dmi/id/product_name", encoding="utf-8") as file:
      return file.read().startswith("Google")
  except (OSError, ValueError):
    return False
