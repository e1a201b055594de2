"""Protocol buffers, as far as SentencePiece's model files need them."""

from __future__ import annotations

from collections.abc import Iterator

_SIZES = {1: 8, 5: 4}


def fields(
  data: bytes, begin: int = 0, end: int | None = None
) -> Iterator[tuple[int, int | slice]]:
  """Yields number and value of each field of a message.

  The value is an int where the file has a varint, else the place of its bytes
  in `data`. (Encoding: protobuf.dev/programming-guides/encoding.)

  Args:
    data: Holds the message.
    begin: Where it begins.
    end: Where it ends; by default with the data.
  """
  place, end = begin, len(data) if end is None else end
  while place < end:
    key, place = _varint(data, place)
    number, wire = divmod(key, 8)
    if wire == 0:
      value, place = _varint(data, place)
      yield number, value
      continue
    size = _SIZES.get(wire)
    if size is None:
      size, place = _varint(data, place)
    yield number, slice(place, place + size)
    place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
  value = shift = 0
  while data[place] > 127:
    value |= (data[place] & 127) << shift
    place, shift = place + 1, shift + 7
  return value | data[place] << shift, place + 1
