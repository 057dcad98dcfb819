# SPDX-License-Identifier: Apache-2.0
"""
Keep the log of what was really produced: one JSON line per exchange, on disk before its last byte.

A line is committed together with all lines that wait at that moment (group commit), so a busy
engine pays one `fdatasync` for many answers.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import Any

import orjson


@dataclass(slots=True, kw_only=True)
class Record:
    """
    The truth about one exchange.

    `prompt_tokens` is 0 when the request was refused before work began. `completion_tokens`,
    `content_chunks_sent` and `usage_reported` (its last value) count only events that the kernel
    took whole; those of the last write are counted just before it, because the record comes first.
    NaN on the wire is the string "NaN" here.
    """

    seq: int = 0
    request_id: str | None
    fairness_id: str | None = None
    traceparent: str | None = None
    response_id: str | None = None
    path: str
    model: str | None = None
    stream: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    content_chunks_sent: int = 0
    usage_reported: dict[str, Any] | None = None
    #: finished | client_closed | injected_error | injected_reset | refused
    outcome: str = "refused"
    started_at: float
    ended_at: float = 0.0


class TruthLog:
    """Append records durably, in the order in which exchanges end."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._waiting: list[tuple[Record, asyncio.Future[None]]] = []
        self._flushing: asyncio.Task[None] | None = None
        self._seq = 0

    def commit(self, record: Record) -> asyncio.Future[None]:
        """Number the record; the future is done once it is on disk."""
        self._seq += 1
        record.seq = self._seq
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        self._waiting.append((record, done))
        if self._flushing is None:
            self._flushing = loop.create_task(self._flush())
        return done

    async def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch, self._waiting = self._waiting, []
            lines = b"".join(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE) for record, _ in batch)
            await loop.run_in_executor(None, self._write, lines)
            for _, done in batch:
                if not done.done():
                    done.set_result(None)
        self._flushing = None

    def _write(self, lines: bytes) -> None:
        while lines:
            lines = lines[os.write(self._file, lines) :]
        os.fdatasync(self._file)
