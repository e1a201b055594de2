"""A disk that hangs: python hanging_disk.py FOLDER MOUNTPOINT, as root.

Shows the files of a folder at another place, read-only, by Linux' FUSE. After
SIGUSR1 nothing of them is in memory any more, and no read is answered. It ends
when it is killed, and then reads fail. Numbers are those of linux/fuse.h, 7.23.
"""

import contextlib
import ctypes
import errno
import os
import signal
import struct
import sys

LOOKUP, FORGET, GETATTR, OPEN, READ, INIT, OPENDIR = 1, 2, 3, 14, 15, 26, 27
READDIR, INTERRUPT, BATCH_FORGET = 28, 36, 42
CLOSING = {18, 29}  # release, releasedir; flush would have the end wait too
MS_RDONLY, INVALIDATE = 1, 2


def main(folder: str, mountpoint: str) -> None:
  device = os.open("/dev/fuse", os.O_RDWR)
  libc = ctypes.CDLL(None, use_errno=True)
  options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
  names = (b"fuse", mountpoint.encode(), b"fuse", MS_RDONLY)
  if libc.mount(*names, options.encode()):
    raise OSError(ctypes.get_errno(), "can't be mounted", mountpoint)
  paths = [None, folder]  # by inode

  def hang(number: int, frame: object) -> None:
    for inode in range(1, len(paths)):
      body = struct.pack("<Qqq", inode, 0, -1)
      head = struct.pack("<IiQ", 16 + len(body), INVALIDATE, 0)
      with contextlib.suppress(FileNotFoundError):  # forgotten by the kernel
        os.write(device, head + body)
    print("hangs", flush=True)
    while True:
      signal.pause()

  signal.signal(signal.SIGUSR1, hang)
  print("there", flush=True)
  while True:
    request = os.read(device, 1 << 20)
    _, opcode, unique, inode = struct.unpack_from("<IIQQ", request)
    if opcode in (FORGET, INTERRUPT, BATCH_FORGET):
      continue
    try:
      body = answer(opcode, inode, request[40:], paths)
      head = struct.pack("<IiQ", 16 + len(body), 0, unique)
    except OSError as error:
      body, head = b"", struct.pack("<IiQ", 16, -error.errno, unique)
    os.write(device, head + body)


def answer(opcode: int, inode: int, data: bytes, paths: list) -> bytes:
  if opcode == INIT:
    numbers = (7, 23, 1 << 16, 0, 16, 12, 4096, 1)
    return struct.pack("<IIIIHHII", *numbers) + bytes(36)
  path = paths[inode]
  if opcode == LOOKUP:
    path = os.path.join(path, data.rstrip(b"\0").decode())
    found = os.stat(path)
    if path not in paths:
      paths.append(path)
    number = paths.index(path)
    return struct.pack("<QQQQII", number, 0, 9, 9, 0, 0) + state(number, found)
  if opcode == GETATTR:
    return struct.pack("<QII", 9, 0, 0) + state(inode, os.stat(path))
  if opcode in (OPEN, OPENDIR):
    return struct.pack("<QII", 0, 0, 0)
  if opcode == READ:
    _, offset, size = struct.unpack_from("<QQI", data)
    with open(path, "rb") as file:
      return os.pread(file.fileno(), size, offset)
  if opcode == READDIR:
    _, offset, _ = struct.unpack_from("<QQI", data)
    entries = b""
    for number, name in enumerate(sorted(os.listdir(path)), 1):
      raw = name.encode()
      if number > offset:
        entry = struct.pack("<QQII", 1, number, len(raw), 0) + raw
        entries += entry + bytes(-len(entry) % 8)
    return entries[:4096] if len(entries) <= 4096 else b""
  if opcode in CLOSING:
    return b""
  raise OSError(errno.ENOSYS, "not known here")


def state(inode: int, found: os.stat_result) -> bytes:
  time = int(found.st_mtime)
  blocks = (found.st_size + 511) // 512
  seconds = (inode, found.st_size, blocks, time, time, time)
  return struct.pack("<6Q", *seconds) + struct.pack(
    "<10I", 0, 0, 0, found.st_mode, 1, 0, 0, 0, 4096, 0
  )


if __name__ == "__main__":
  main(*sys.argv[1:])
