# SPDX-License-Identifier: Apache-2.0
"""
A kill storm: load that misbehaves, parts that die under it, and the judgement afterwards.

Who paid can be told from the engine's side alone: each tenant's prompts have a length of their own, which the
engine counts and writes down. Everything chosen comes from one seed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.dataplane.installation import Installation, Tenant, chat

#: What is killed; the fake engine is the instrument and lives.
PARTS = ("envoy", "collector", "postgres", "valkey", "extauth", "ratelimit", "metering", "beacon", "control")
CONNECTIONS = 24
#: Requests sent between two deaths of Envoy, on average. Each takes what is under way with it, up to `CONNECTIONS`, and
#: about as many that were over within the 50 ms before: this decides what share of the rows are checkpoints.
REQUESTS_PER_ENVOY_DEATH = 40_000
TENANTS = 5
DISCONNECTS, UPSTREAM_ERRORS, RETRIES = 0.10, 0.05, 0.05
#: Of the requests that do not stream, those that are metered by more than the tokens of a chat: an eighth of all.
METERED = 0.3
_CHAT, _RERANK, _IMAGES, _SPEECH = "/v1/chat/completions", "/v1/rerank", "/v1/images/generations", "/v1/audio/speech"
#: Images that are asked for.
_IMAGES_ASKED = 2
#: Rows that are not exact although no Envoy died over them: a thousandth, and flagged.
INEXACT_SHARE_MAX = 0.001
_EXACT = {"reported", "running", "none"}
#: A whole answer is read within this, whatever is away; a connection that hangs longer is given up.
_ANSWER_SECONDS = 60.0
_SETTLED_SECONDS = 120.0
#: After an answer of 5xx. Refusals are quick: without a pause they would be most of a storm where parts start slowly.
_REFUSED_PAUSE_SECONDS = 0.1
#: Between looks at whether a part is due to die.
_LOOK_SECONDS = 0.02
#: Rows that the report names of those that should not be there.
_NAMED_MAX = 20


@dataclass(slots=True)
class Heard:
    """What the clients know."""

    #: Request id → the tenant whose key was sent, and the content chunks that came.
    tenants: dict[str, str] = field(default_factory=dict)
    chunks: dict[str, int] = field(default_factory=dict)
    #: Ids of answers of 200 that were read to their end.
    whole: set[str] = field(default_factory=set)
    statuses: Counter[int] = field(default_factory=Counter)
    #: Ids of streams that the client left at a chunk.
    cut: set[str] = field(default_factory=set)
    sent: int = 0


@dataclass(slots=True, kw_only=True)
class Storm:
    """
    One storm: *requests* requests while parts of *parts* die, one every *between* seconds on average.

    Envoy, if it is among them, dies by itself, once in *requests_per_envoy_death* requests on average.
    """

    road: Installation
    requests: int
    seed: int
    between: float
    parts: tuple[str, ...] = PARTS
    requests_per_envoy_death: int = REQUESTS_PER_ENVOY_DEATH
    heard: Heard = field(default_factory=Heard)
    deaths: Counter[str] = field(default_factory=Counter)
    #: By the clock of the day, as the engine's truth has it.
    began_at: float = 0.0
    seconds: float = 0.0
    tenants: list[Tenant] = field(default_factory=list)

    def rage(self) -> None:
        """Send everything, and kill until it is sent."""
        self.tenants = self.tenants or [self.road.new_tenant("storm") for _ in range(TENANTS)]
        over = threading.Event()
        killer = threading.Thread(target=self._kill, args=(over,))
        self.began_at, began = time.time(), time.monotonic()
        killer.start()
        try:
            asyncio.run(self._load())
        finally:
            over.set()
            killer.join()
        self.seconds = time.monotonic() - began

    def _kill(self, over: threading.Event) -> None:
        chance = random.Random(f"kills {self.seed}")
        others = [part for part in self.parts if part != "envoy"]
        due = time.monotonic() + chance.uniform(0.5, 1.5) * self.between
        envoy_due = chance.uniform(0.5, 1.5) * self.requests_per_envoy_death
        while not over.wait(_LOOK_SECONDS):
            if "envoy" in self.parts and self.heard.sent >= envoy_due and self._dies("envoy"):
                envoy_due += chance.uniform(0.5, 1.5) * self.requests_per_envoy_death
            if others and time.monotonic() >= due:
                self._dies(chance.choice(others))
                due += chance.uniform(0.5, 1.5) * self.between

    def _dies(self, part: str) -> bool:
        """Whether there was one to be killed."""
        pid = _pid(self.road, part)
        if pid is None:
            return False
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        self.deaths[part] += 1
        return True

    async def _load(self) -> None:
        numbers = iter(range(self.requests))
        await asyncio.gather(*(self._client(client, numbers) for client in range(CONNECTIONS)))

    async def _client(self, client: int, numbers: Any) -> None:
        chance = random.Random(f"client {client} {self.seed}")
        link: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        for number in numbers:
            again = 2 if chance.random() < RETRIES else 1
            tenant = number % TENANTS
            stream, cut_after, fault = _behaviour(chance)
            is_metered = not stream and chance.random() < METERED
            path = chance.choice((_RERANK, _IMAGES, _SPEECH)) if is_metered else _CHAT
            message = _message(self.tenants[tenant].key, path, _body(path, tenant, stream=stream), number, fault=fault)
            for _ in range(again):
                while link is None:
                    try:
                        link = await asyncio.open_connection("127.0.0.1", self.road.port)
                    except OSError:
                        await asyncio.sleep(0.05)
                self.heard.sent += 1
                try:
                    is_whole = await asyncio.wait_for(self._exchange(*link, message, tenant, cut_after), _ANSWER_SECONDS)
                except (OSError, asyncio.IncompleteReadError, TimeoutError):
                    is_whole = False
                if not is_whole:
                    link[1].transport.abort()
                    link = None
        if link is not None:
            link[1].close()

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, message: bytes, tenant: int, cut_after: int | None
    ) -> bool:
        """Whether the answer came whole and the connection can go on."""
        writer.write(message)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        status = int(head[9:12])
        self.heard.statuses[status] += 1
        request_id = head.partition(b"x-request-id: ")[2].partition(b"\r\n")[0].decode()
        if status == 200:
            self.heard.tenants[request_id] = self.tenants[tenant].tenant_id
        if b"transfer-encoding: chunked" not in head:
            await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0]))
        else:
            while size := int(await reader.readuntil(b"\r\n"), 16):
                piece = await reader.readexactly(size + 2)
                self.heard.chunks[request_id] = self.heard.chunks.get(request_id, 0) + piece.count(b'"content":" ')
                if cut_after is not None and self.heard.chunks[request_id] >= cut_after:
                    self.heard.cut.add(request_id)
                    return False
            await reader.readexactly(2)
        if status == 200:
            self.heard.whole.add(request_id)
        elif status >= 500:
            await asyncio.sleep(_REFUSED_PAUSE_SECONDS)
        return b"connection: close" not in head

    def settled(self) -> list[dict[str, Any]]:
        """All rows of the storm's tenants, once no exchange of theirs is open and every record was read."""
        ids = [tenant.tenant_id for tenant in self.tenants]
        deadline = time.monotonic() + _SETTLED_SECONDS
        while not (_all_ready(self.road) and self.road.is_healthy()) and time.monotonic() < deadline:
            time.sleep(0.2)
        # A record of the life of Envoy that is there now tells which lives are over.
        self.road.post(self.road.new_tenant("after-storm"), json=chat())
        while time.monotonic() < deadline:
            [look] = self.road.sql(
                "select (select count(*) from open_exchange where entry -> 'identity' ->> 'tenant' = any(%s)) as open, "
                "(select min(read_until) from journal_state) > now() - interval '2 seconds' as is_read",
                ids,
            )
            if look["open"] == 0 and look["is_read"]:
                break
            time.sleep(0.5)
        return self.road.sql("select * from billing_usage_v1 where tenant = any(%s)", ids)


@contextlib.contextmanager
def down(road: Installation, part: str) -> Iterator[None]:
    """*part* is killed and stays away: its supervisor is halted meanwhile."""
    supervisor = json.loads((road.home / "run/state.json").read_text())["supervisor"]["pid"]
    pid = _pid(road, part)
    assert pid is not None
    os.kill(supervisor, signal.SIGSTOP)
    try:
        os.kill(pid, signal.SIGKILL)
        yield
    finally:
        os.kill(supervisor, signal.SIGCONT)


def judge(storm: Storm, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The report: every way in which the ledger and the engine's truth could differ, counted; `wrong` is empty if none does."""
    truth = _truth(storm)
    by_id = Counter(row["request_id"] for row in rows)
    payers = [tenant.tenant_id for tenant in storm.tenants]
    wrong: dict[str, list[str]] = {name: [] for name in ("lost", "double", "tenant", "exact", "delivered", "metered", "unflagged")}
    wrong["double"] = [request_id for request_id, count in by_id.items() if count > 1]
    wrong["lost"] = sorted((truth.keys() | storm.heard.whole) - by_id.keys())
    bases: Counter[str] = Counter()
    dialects: Counter[str] = Counter()
    for row in rows:
        request_id, said = row["request_id"], truth.get(row["request_id"])
        bases[row["basis"]] += 1
        dialects[row["dialect"]] += 1
        if row["tenant"] != storm.heard.tenants.get(request_id, row["tenant"]):
            wrong["tenant"].append(request_id)
        if said is not None and said["prompt_tokens"] and payers[said["prompt_tokens"] - _WORDS_MIN] != row["tenant"]:
            wrong["tenant"].append(request_id)
        produced = (0, 0) if said is None else (said["prompt_tokens"], said["completion_tokens"])
        if row["basis"] == "reported" and (row["input_tokens"], row["output_tokens"]) != produced:
            wrong["exact"].append(request_id)
        # A cut stream is billed what was delivered: no less than the client saw, no more than was generated.
        seen = storm.heard.chunks.get(request_id, 0)
        if row["basis"] == "running" and not seen <= row["output_tokens"] <= produced[1]:
            wrong["delivered"].append(request_id)
        most = _quantities(payers.index(row["tenant"])).get(row["dialect"], 0)
        if row["quantity"] > most or (row["outcome"] == "ok" and row["quantity"] != most):
            wrong["metered"].append(request_id)
        if row["outcome"] == "lost" and row["basis"] != "checkpoint":
            wrong["unflagged"].append(request_id)
    inexact = [row for row in rows if not _is_exact(row)]
    with_envoy = [row["request_id"] for row in inexact if row["outcome"] == "lost"]
    otherwise = [row for row in inexact if row["outcome"] != "lost"]
    under_way = [it for it in with_envoy if it not in storm.heard.whole and it not in storm.heard.cut]
    return {
        "seed": storm.seed, "requests": storm.heard.sent, "rows": len(rows), "engine_saw": len(truth),
        "seconds": round(storm.seconds, 1), "connections": CONNECTIONS,
        "requests_per_envoy_death": storm.requests_per_envoy_death, "deaths": dict(storm.deaths),
        "statuses": dict(storm.heard.statuses), "disconnects": len(storm.heard.cut), "bases": dict(bases),
        "dialects": dict(dialects),
        "inexact": len(inexact), "inexact_share": len(inexact) / max(1, len(rows)),
        "inexact_with_their_envoy": {
            # No more can be under way than there are connections: this many an Envoy that dies, whatever the ledger does.
            "under_way": len(under_way), "under_way_at_most": CONNECTIONS * storm.deaths["envoy"],
            # Over for the client, and Envoy was killed within the 50 ms in which it writes its end to the journal.
            "just_over": len(with_envoy) - len(under_way),
        },
        "inexact_otherwise": {
            "rows": len(otherwise), "share": len(otherwise) / max(1, len(rows)),
            "kinds": Counter(f"{row['basis']} {row['outcome']} {row['status']}" for row in otherwise),
            "named": [row["request_id"] for row in otherwise[:_NAMED_MAX]],
        },
        # With 0 wrong of n the rate is below 3/n at 95 %.
        "rate_below_at_95_percent": 3 / max(1, len(rows)),
        "wrong": {name: found[:5] for name, found in wrong.items() if found},
    }


#: Prompt tokens of the first tenant; the next has one more. None is what another test sends.
_WORDS_MIN = 41


def _truth(storm: Storm) -> dict[str, dict[str, Any]]:
    """The engine's last word on each of the storm's requests; a retry of Envoy's has the same id."""
    lines = (storm.road.home / "log/fake-engine-truth.jsonl").read_text().splitlines()
    ours = range(_WORDS_MIN, _WORDS_MIN + TENANTS)
    return {
        it["request_id"]: it for it in map(json.loads, lines)
        # Another storm on the same road was over before this one began.
        if it["prompt_tokens"] in ours and it["started_at"] >= storm.began_at
    }


def _behaviour(chance: random.Random) -> tuple[bool, int | None, dict[str, Any]]:
    """Whether it streams, after how many chunks the client goes away, and what the engine does wrong."""
    stream = chance.random() < 0.5
    luck = chance.random()
    if luck < DISCONNECTS:
        # Only a stream can be cut at a chunk.
        return True, chance.randint(1, 6), {"chunk_ms": 2}
    if luck < DISCONNECTS + UPSTREAM_ERRORS:
        kind = chance.choice(("error_before", "error_after", "reset_after"))
        return stream, None, {kind: 500 if kind == "error_before" else chance.randint(0, 5)}
    return stream, None, {}


def _text(tenant: int) -> str:
    return " ".join(["toll"] * (_WORDS_MIN + tenant))


def _body(path: str, tenant: int, *, stream: bool) -> dict[str, Any]:
    """A request of which the engine counts as many prompt tokens as the tenant's have, whatever it is for."""
    text = _text(tenant)
    return {
        _CHAT: chat(text, stream=stream, max_tokens=8),
        _RERANK: {"model": "tiny", "query": text.removeprefix("toll "), "documents": ["toll"]},
        _IMAGES: {"model": "tiny", "prompt": text, "n": _IMAGES_ASKED},
        _SPEECH: {"model": "tiny", "input": text},
    }[path]


def _quantities(tenant: int) -> dict[str, int]:
    """What a whole answer to a tenant is metered at besides tokens, by dialect."""
    return {"openai.images": _IMAGES_ASKED, "openai.speech": len(_text(tenant))}


def _is_exact(row: dict[str, Any]) -> bool:
    """Nobody reports tokens of speech: what was asked for was counted, and is what was delivered."""
    return row["basis"] in _EXACT or (row["dialect"], row["basis"], row["outcome"]) == ("openai.speech", "counted", "ok")


def _message(key: str, path: str, asked: dict[str, Any], number: int, *, fault: dict[str, Any]) -> bytes:
    body = json.dumps(asked).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: storm\r\nauthorization: Bearer {key}\r\n"
        # Sent again with the same one; it must never choose a billing id.
        f"x-request-id: client-{number}\r\nx-fake-engine: {json.dumps(fault)}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _all_ready(road: Installation) -> bool:
    try:
        parts = json.loads((road.home / "run/state.json").read_text())["parts"]
    except (OSError, ValueError):
        return False
    return all(part["state"] in ("ready", "done") for part in parts)


def _pid(road: Installation, part: str) -> int | None:
    """From the supervisor's own file: asking by command would cost more than the storm."""
    try:
        document = json.loads((road.home / "run/state.json").read_text())
    except (OSError, ValueError):
        return None
    process = next((it.get("process") for it in document["parts"] if it["name"] == part), None)
    return process["pid"] if process else None
