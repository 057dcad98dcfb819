# SPDX-License-Identifier: Apache-2.0
"""Run Envoy's pure Lua modules in LuaJIT, the interpreter that Envoy embeds, with bytes in and out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lupa import luajit21

from metering.core.shape import Running

ROOT = Path(__file__).parents[2]

# The loops over splits run in Lua: a call from Python for each of a million pieces would be the test's whole cost.
_DRIVER = b"""
local usage = require('envoy.lua.usage')
local function read(kind, wants, body, bounds, meter)
  local reader, out = usage.reader(kind, wants, meter), {}
  local from = 1
  for _, last in ipairs(bounds) do
    local piece = string.sub(body, from, last)
    out[#out + 1] = reader:feed(piece) or piece
    from = last + 1
  end
  return reader, table.concat(out)
end
local function state(reader, out)
  local c = reader.counts
  return { c.input, c.output, c.cached, c.reasoning, reader.seen, reader.frames, reader.anomaly,
    usage.total(reader), out, reader.quantity }, 10
end
local function same(a, b)
  for i = 1, 10 do if a[i] ~= b[i] then return false end end
  return true
end
local M = {}
function M.read(kind, wants, body, bounds, meter)
  local reader, out = read(kind, wants, body, bounds, meter)
  return reader, out, usage.total(reader)
end
-- Position of the first cut (in two; from `three` on also in three) that changes anything, else 0.
function M.first_difference(kind, wants, body, meter)
  local whole = state(read(kind, wants, body, { #body }, meter))
  for cut = 1, #body - 1 do
    if not same(whole, state(read(kind, wants, body, { cut, #body }, meter))) then return cut end
    if cut + 1 < #body and not same(whole, state(read(kind, wants, body, { cut, cut + 1, #body }, meter))) then return -cut end
  end
  return 0
end
return M
"""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the tap read of one answer, and what it sent on."""

    input: int | None
    output: int | None
    cached: int | None
    reasoning: int | None
    seen: str
    frames: int
    anomaly: str | None
    total: int
    sent: bytes
    quantity: int | None = None


@cache
def runtime() -> Any:
    """Give the one interpreter, whose modules are found as Envoy finds them: from the directory above `envoy/`."""
    lua = luajit21.LuaRuntime(encoding=None, unpack_returned_tuples=True)
    lua.execute(b"package.path = '%s/?.lua'" % str(ROOT).encode())
    return lua


@cache
def module(name: str) -> Any:
    """Require `envoy/lua/<name>.lua`."""
    return runtime().eval(b"require('envoy.lua.%s')" % name.encode())


@cache
def _driver() -> Any:
    return runtime().execute(_DRIVER)


def table(value: Any) -> dict[str, Any]:
    """Copy a flat Lua table; bytes become text as Envoy's metadata would hold it."""
    return {key.decode(): text(item) for key, item in value.items()}


def text(value: Any) -> Any:
    """Decode a Lua string, leave anything else."""
    return value.decode() if isinstance(value, bytes) else value


def read_request(body: bytes, dialect: str = "openai.chat") -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Give the facts or the refusal of a request body; where its prompt begins is `prefix_of`'s."""
    answer = module("request")[b"read"](body, dialect.encode())
    facts, refusal = answer if isinstance(answer, tuple) else (answer, None)
    read = None if facts is None else {name: fact for name, fact in table(facts).items() if name != "prompt_at"}
    return read, (table(refusal) if refusal is not None else None)


def prefix_of(body: bytes, dialect: str, most: int) -> str:
    """Give what the beginning of a body's prompt is hashed to."""
    facts = module("request")[b"read"](body, dialect.encode())
    return str(text(module("affinity")[b"prefix"](body, facts[b"prompt_at"], most)))


def complete(report: str | None) -> str | None:
    """What load.lua makes of a load report; None where it leaves it alone."""
    made: bytes | None = module("report")[b"complete"](None if report is None else report.encode())
    return None if made is None else made.decode()


def rename(body: bytes, name: str) -> bytes | None:
    """Name the model of a body as its server does, None where it already does."""
    renamed: bytes | None = module("shape")[b"rename"](body, name.encode())
    return renamed


def ask_in_lua(body: bytes, dialect: str, running: Running) -> bytes | None:
    """Shape *body* as the tap does, None where it leaves it alone."""
    facts, _ = read_request(body, dialect)
    assert facts is not None
    return module("shape")[b"ask_for_usage"](body, facts["shape"].encode(), running.value)


def read_answer(kind: str, wants: str, pieces: Sequence[bytes], meter: str | None = None) -> Reading:
    """Feed *pieces* of an answer ("events" or "object") to a reader for a caller who asked for *wants*, of *meter* if any."""
    bounds, end = [], 0
    for piece in pieces:
        end += len(piece)
        bounds.append(end)
    read = _driver()[b"read"]
    of_meter = None if meter is None else meter.encode()
    reader, sent, total = read(kind.encode(), wants.encode(), b"".join(pieces), runtime().table_from(bounds), of_meter)
    counts = table(reader[b"counts"])
    return Reading(
        input=counts.get("input"),
        output=counts.get("output"),
        cached=counts.get("cached"),
        reasoning=counts.get("reasoning"),
        seen=text(reader[b"seen"]),
        frames=reader[b"frames"],
        anomaly=text(reader[b"anomaly"]),
        total=total,
        sent=sent,
        quantity=reader[b"quantity"],
    )


def bytewise(body: bytes) -> list[bytes]:
    """Cut *body* into single bytes."""
    return [body[i : i + 1] for i in range(len(body))]


def first_difference(kind: str, wants: str, body: bytes, meter: str | None = None) -> int:
    """
    Find a cut of *body* that changes what is read or sent, 0 if there is none.

    Tries every cut in two and every cut around a single byte (its answer is then negative).
    """
    return _driver()[b"first_difference"](kind.encode(), wants.encode(), body, None if meter is None else meter.encode())
