# SPDX-License-Identifier: Apache-2.0
"""The bench's upstream answers whole requests, and its load generator tells answers from failures."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.cpu import cpu_seconds
from bench.load import Load, run
from bench.peers import Peer, serving
from bench.upstream import CHUNKS, Connection
from tests.conformance.road import ROOT
from tests.dataplane.installation import free_ports


async def exchange(*pieces: bytes, until: bytes = b"}") -> bytes:
    """Send *pieces* one by one to an upstream of its own and read its answer, which ends with *until*."""
    server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", 0)
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        answer = await reader.readuntil(b"\r\n\r\n")
        while not answer.endswith(until):
            answer += await reader.read(65_536)
        assert reader.at_eof() is False
        writer.close()
        await writer.wait_closed()
    return answer


def post(body: bytes) -> bytes:
    """A request whole."""
    return b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


@pytest.mark.parametrize("cut", [10, 60, 90])
def test_a_request_in_pieces_is_answered_once(cut: int) -> None:
    """In the head, in the length, in the body."""
    whole = post(json.dumps({"model": "tiny", "messages": []}).encode())

    head, _, body = asyncio.run(exchange(whole[:cut], whole[cut:])).partition(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 200 OK")
    assert 4 == json.loads(body)["usage"]["completion_tokens"]


def test_a_stream_has_its_chunks_its_usage_and_an_end() -> None:
    """As many as are said."""
    answer = asyncio.run(exchange(post(b'{"stream": true}'), until=b"0\r\n\r\n"))

    assert CHUNKS == answer.count(b'"content":" word"')
    assert 1 == answer.count(b'"completion_tokens":%d' % CHUNKS)
    assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_a_health_check_finds_the_model() -> None:
    """What Envoy looks for."""
    assert b'"tiny"' in asyncio.run(exchange(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n"))


def test_a_peer_is_started_loaded_with_several_keys_and_ended(tmp_path: Path) -> None:
    """The upstream itself as a peer: all answers count, nothing of it is left."""
    [port] = free_ports(1)
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv[1:] = [{str(port)!r}]; from bench.upstream import main; main()"
    peer = Peer(name="twin", command=lambda _upstream, _port, _directory: [sys.executable, "-c", program])
    load = Load(port=port, path="/", headers={}, body=b"{}", requests=20, connections=4, keys=("a", "b", "c"))

    with serving(peer, upstream=1, port=port, directory=tmp_path, ready=_listening(port)) as pid:
        result = asyncio.run(run(load))
        assert cpu_seconds(pid) > 0

    assert (20, 0) == (len(result.latencies), result.failures)
    assert not Path(f"/proc/{pid}").exists()


def test_a_peer_that_ends_at_once_is_told_with_its_last_words(tmp_path: Path) -> None:
    """And nothing is measured."""
    peer = Peer(name="broken", command=lambda *_: [sys.executable, "-c", "raise SystemExit('no such model')"])

    with pytest.raises(RuntimeError, match="broken did not start: no such model"), serving(
        peer, upstream=1, port=1, directory=tmp_path, ready=lambda: False
    ):
        pass


def _listening(port: int) -> Callable[[], bool]:
    def ask() -> bool:
        try:
            _, writer = asyncio.run(_open(port))
        except OSError:
            return False
        return writer is not None

    async def _open(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()
        await writer.wait_closed()
        return reader, writer

    return ask


async def _at_rate(rate: float, requests: int, stall: float) -> tuple[list[float], float]:
    """Latencies of *requests* at *rate* over one connection, to a server that stalls before its first answer only."""
    stalls = [stall]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"x-end: 1\r\n\r\n"):
            await asyncio.sleep(stalls.pop() if stalls else 0)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    load = Load(port=server.sockets[0].getsockname()[1], path="/", headers={"x-end": "1"}, body=b"", requests=requests,
                connections=1, rate=rate)  # fmt: skip
    result = await run(load)
    server.close()
    return result.latencies, result.seconds


def test_at_a_fixed_rate_requests_wait_for_their_moment_and_a_stall_is_part_of_those_behind_it() -> None:
    """Ten at fifty a second take no less than what lies between the first and the last; all behind a stall are late."""
    latencies, seconds = asyncio.run(_at_rate(50, 10, 0.3))

    assert seconds >= 9 / 50
    # The stall outlasts the moments of all ten: each was kept waiting for what was left of it.
    assert 10 == sum(latency >= 0.3 - 9 / 50 - 0.001 for latency in latencies)
    assert latencies[-1] >= 0.3
