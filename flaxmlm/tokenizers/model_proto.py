"""SentencePiece's ModelProto, by any version of protobuf.

The file that comes with SentencePiece was generated for protobuf 7.36, and an
older one refuses it for that alone: Apache Beam's, for example, which is to be
before 7. There is nothing in it that an older one can't read.
"""

from __future__ import annotations

import os

_FLAG = "TEMPORARILY_DISABLE_PROTOBUF_VERSION_CHECK"
_before = os.environ.get(_FLAG)
os.environ[_FLAG] = "true"
try:
  from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec
finally:
  del os.environ[_FLAG]
  if _before is not None:
    os.environ[_FLAG] = _before

__all__ = ["ModelProto", "TrainerSpec"]
