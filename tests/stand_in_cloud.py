"""Stands in for gcloud, and for uv on a TPU VM: no network, no cost.

A machine is a folder of `$CLOUD/machines`, a worker of it a home folder; what
is sent by ssh runs here, with that home. A command line that contains a line of
`$CLOUD/faults` fails. `$CLOUD/calls` gets every command line.
"""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

CLOUD = pathlib.Path(os.environ["CLOUD"])
MACHINES = CLOUD / "machines"
WORKERS = int(os.environ.get("WORKERS", "1"))


def main(name: str, args: list[str]) -> int:
  line = " ".join([name, *args])
  with open(CLOUD / "calls", "a") as file:
    print(line, file=file)
  faults = CLOUD / "faults"
  if faults.exists() and any(
    w in line for w in faults.read_text().splitlines()
  ):
    print(f"stand-in: {line} fails", file=sys.stderr)
    return 1
  if name == "uv":
    return uv(args)
  flags = dict(re.findall(r"^--([a-z-]+)=(.*)", "\n".join(args), re.M))
  words = [arg for arg in args if not arg.startswith("--")]
  return VERBS[words[3]](words[4:], flags)


def uv(args: list[str]) -> int:
  """Makes the environment of a VM; what is in it, is here already."""
  if args[0] == "venv":
    python = pathlib.Path(args[-1]) / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    here = os.environ.get("TRAIN", sys.executable)
    python.write_text(f'#!/usr/bin/env bash\nexec {here} "$@"\n')
    python.chmod(0o755)
  return 0


def create(words: list[str], flags: dict[str, str]) -> int:
  machine = MACHINES / words[0]
  if machine.exists():
    return 1
  for worker in range(WORKERS):
    (machine / str(worker) / "home").mkdir(parents=True)
  queued = "node-id" in flags
  (machine / "state").write_text("PROVISIONING" if queued else "READY")
  return 0


def show(words: list[str], flags: dict[str, str]) -> int:
  for machine in MACHINES.iterdir():
    state = (machine / "state").read_text()
    print(f"{machine.name},{state}")
    if state == "PROVISIONING":  # it takes a while
      (machine / "state").write_text("ACTIVE")
  return 0


def homes(machine: str, flags: dict[str, str]) -> list[pathlib.Path]:
  folder = MACHINES / machine
  if not folder.exists():
    return []
  if (folder / "state").read_text() not in ("READY", "ACTIVE"):
    return []
  which = flags["worker"]
  numbers = range(WORKERS) if which == "all" else [int(which)]
  return [folder / str(number) / "home" for number in numbers]


def ssh(words: list[str], flags: dict[str, str]) -> int:
  found = homes(words[0], flags)
  codes = [
    subprocess.run(
      ["bash", "-c", flags["command"]],
      cwd=home,
      env=os.environ | {"HOME": str(home), "TMUX_TMPDIR": str(home.parent)},
    ).returncode
    for home in found
  ]
  return max(codes, default=255)


def scp(words: list[str], flags: dict[str, str]) -> int:
  source, target = words
  machine, _, path = (source if ":" in source else target).partition(":")
  found = homes(machine, flags)
  for home in found:
    if ":" in source:
      shutil.copy(home / path, target)
    else:
      shutil.copy(source, home / path)
  return 0 if found else 255


def kill(machine: pathlib.Path) -> None:
  """Ends at once what runs there: what has its home there."""
  mark = f"HOME={machine}/".encode()
  for process in pathlib.Path("/proc").glob("[0-9]*"):
    try:
      variables = (process / "environ").read_bytes().split(b"\0")
      if any(v.startswith(mark) for v in variables):
        os.kill(int(process.name), signal.SIGKILL)
    except OSError:
      continue  # somebody else's, or gone


def preempt(words: list[str], flags: dict[str, str]) -> int:
  """No command of gcloud's: what Google does with a spot machine."""
  machine = MACHINES / words[0]
  kill(machine)
  (machine / "state").write_text("SUSPENDED")
  return 0


def delete(words: list[str], flags: dict[str, str]) -> int:
  machine = MACHINES / words[0]
  if not machine.exists():
    return 1
  kill(machine)
  gone = CLOUD / "gone"
  gone.mkdir(exist_ok=True)
  machine.rename(gone / f"{len(list(gone.iterdir()))}")
  return 0


VERBS = {
  "create": create,
  "list": show,
  "ssh": ssh,
  "scp": scp,
  "preempt": preempt,
  "delete": delete,
}

if __name__ == "__main__":
  sys.exit(main(pathlib.Path(sys.argv[0]).name, sys.argv[1:]))
