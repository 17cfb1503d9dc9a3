"""What a fetch brings, record by record: without what transactions aborted, and whatever the headers hold.

aiokafka's reader gives up a whole partition at a header whose name is not UTF-8, which any client can send:
such a batch is read again here, with what does not decode replaced. Pure: no I/O.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Final, SupportsIndex

from aiokafka.errors import CorruptRecordException
from aiokafka.record.control_record import ABORT_MARKER, ControlRecord
from aiokafka.record.default_records import DefaultRecordBatch, _DefaultRecordBatchPy
from aiokafka.record.legacy_records import LegacyRecordBatch

_HEAD: Final = struct.Struct(">qi")  # base offset; bytes behind these two fields
_DELTA: Final = struct.Struct(">i")  # last offset of the batch, from its base
_AT_MAGIC: Final = 16
_AT_DELTA: Final = 23
_SHORTEST: Final = 27


class Records:
    """The records in fetched bytes, from an offset on; each is read when it is asked for.

    Arguments:
        data: whole batches, and perhaps the beginning of another.
        aborted: (producer id, first offset) of each transaction that was aborted.
        start: the offset that was asked for; batches begin where they begin.
    """

    __slots__ = ("_iterator", "next_fetch_offset")

    def __init__(self, data: bytes, aborted: Iterable[tuple[int, int]] | None, start: int) -> None:
        self.next_fetch_offset = start  # behind all that was read or passed over
        self._iterator = self._read(data, deque(sorted(aborted or (), key=lambda each: each[1])))

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._iterator)

    def _read(self, data: bytes, aborted: deque[tuple[int, int]]) -> Iterator[Any]:
        gone: set[int] = set()  # producers whose open transaction was aborted
        for piece in _pieces(data):
            batch: Any = _batch(piece)
            if not batch.validate_crc():
                raise CorruptRecordException(f"batch at offset {batch.base_offset}: wrong checksum")
            producer = batch.producer_id
            while aborted and aborted[0][1] <= batch.base_offset:
                gone.add(aborted.popleft()[0])
            if batch.is_control_batch:
                if _is_abort(batch):
                    gone.discard(producer)
            elif not (batch.is_transactional and producer in gone):
                try:
                    yield from self._rest(batch)
                except (UnicodeDecodeError, CorruptRecordException):
                    yield from self._rest(_lenient(piece))
            self.next_fetch_offset = max(self.next_fetch_offset, batch.next_offset)

    def _rest(self, batch: Iterable[Any]) -> Iterator[Any]:
        for record in batch:
            if record.offset >= self.next_fetch_offset:
                self.next_fetch_offset = record.offset + 1
                yield record


def following(data: bytes, start: int) -> int:
    """The offset behind the last whole batch, without reading any record."""
    found = start
    for piece in _pieces(data):
        delta = _DELTA.unpack_from(piece, _AT_DELTA)[0] if piece[_AT_MAGIC] >= 2 else 0
        found = max(found, _HEAD.unpack_from(piece)[0] + delta + 1)
    return found


def _pieces(data: bytes) -> Iterator[memoryview]:
    """Each whole batch."""
    view = memoryview(data)
    position = 0
    while position + _SHORTEST <= len(data):
        end = position + _HEAD.size + _HEAD.unpack_from(data, position)[1]
        if end > len(data):
            return
        yield view[position:end]
        position = end


def _batch(piece: memoryview) -> Any:
    magic = piece[_AT_MAGIC]
    return DefaultRecordBatch(piece) if magic >= 2 else LegacyRecordBatch(piece, magic)


def _is_abort(batch: Iterable[Any]) -> bool:
    marker = next(iter(batch), None)
    return marker is not None and ControlRecord.parse(marker.key) == ABORT_MARKER


class _Replacing(bytearray):
    """Bytes whose parts decode whatever they hold."""

    def __getitem__(self, key: SupportsIndex | slice) -> Any:
        part = super().__getitem__(key)
        return _Replacing(part) if isinstance(part, bytearray) else part

    def decode(self, encoding: str = "utf-8", errors: str = "replace") -> str:
        return super().decode(encoding, errors)


def _lenient(piece: memoryview) -> Iterable[Any]:
    batch: Any = _DefaultRecordBatchPy(piece)
    batch._maybe_uncompress()
    batch._buffer = _Replacing(batch._buffer)
    return batch  # type: ignore[no-any-return]
