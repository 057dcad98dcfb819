# SPDX-License-Identifier: Apache-2.0
"""
`chassis/contract.py` and `envoy/` spell the same names, both ways.

Envoy cannot import the contract, so its YAML and Lua spell each name again. Read from their
structure where that says more than a word found somewhere: which keys a script writes to which
namespace, which descriptors are sent, which members a journal record has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import yaml

#: Names of the contract that Envoy has no reason to spell, and why.
NOT_ENVOYS: Final[dict[str, str]] = {
    "MODELS_PATH": "control reads it and writes what Envoy reads instead: clusters.yaml and routes.yaml",
    "MODELS_READ_PATH": "services write it and control reads it",
    "LOAD_FORMAT_HEADER": "set by what control writes: clusters.yaml",
    "POOL_HEADER": "set, read and removed by what control writes: clusters.yaml",
    "IDENTITY_PATH": "extauth reads it; Envoy asks extauth",
    "SERVICE_ACCOUNT_AUDIENCE": "said in tokens, which Envoy does not read",
    "PHASE_RENEW": "metering says it to ratelimit; Envoy's phases are admit and settle",
    "ADM_SLICE_TOKENS": "metering reads it; Envoy only asks whether there is a slice",
    "USE_STOPPED": "metering's answer to ext_proc writes it, and Envoy puts it into the journal with the rest",
    "DIALECT_SCOPES": "extauth's rule; Envoy knows dialects, not what they need",
    "SCOPES": "extauth's rule, as above",
    "DIALECT_METERS": "what ratelimit and the ledger call what the scripts count",
    "METERS": "as above",
    "EPOCH_HEIR": "whoever starts Envoy makes names of lives with it, and the collector reads them",
    "ERROR_CODES": "most are said by a service; see unsaid_codes",
}
#: Namespaces that Lua fills, all of their keys.
_WRITTEN_BY_LUA: Final = {"NS_REQUEST": "REQUEST_KEYS", "NS_USAGE": "USAGE_KEYS", "NS_PICKED": "PICKED_KEYS"}
#: Namespaces that a service's answer fills, and on the express lane, by this script alone, what it remembers of one.
_REMEMBERED: Final = {"NS_IDENTITY": "ID_", "NS_ADMISSION": "ADM_"}
_REMEMBERED_BY: Final = "express.lua"

_LUA_COMMENT: Final = re.compile(r"--.*")
_LUA_LOCAL: Final = re.compile(r"^local (\w+) = '([^']*)'", re.MULTILINE)
_LUA_SET: Final = re.compile(r":set\(\s*([\w']+[\w.]*'?)\s*,\s*([^,]+?)\s*,")
#: What a script says through a helper of its own: `tell('key', value)` sets the key in `USAGE`.
_LUA_TELL: Final = re.compile(r"\btell\('(\w+)'")
_LUA_TELLER: Final = "metadata:set(USAGE, name, value)"
_LUA_CODE: Final = re.compile(r"\bcode = '([^']+)'")
_LUA_DIALECT: Final = re.compile(r"\['(/[^']*)'\] = '([^']+)'")
_JSON_MEMBER: Final = re.compile(r"\"(\w+)\":")


def findings(root: Path, contract: ModuleType) -> list[str]:
    """Every name that one side spells and the other does not, one line each."""
    bootstrap = _parse((root / "envoy/envoy.yaml").read_text())
    lua = {path.name: _LUA_COMMENT.sub("", path.read_text()) for path in sorted((root / "envoy").rglob("*.lua"))}
    return [
        *_unspelled(contract, "\n".join([*map(str, _scalars(bootstrap)), *lua.values(), (root / "envoy/tracing.yaml").read_text()])),
        *_metadata(contract, lua),
        *_metadata_read(contract, bootstrap),
        *_descriptors(contract, bootstrap),
        *_journal(contract, bootstrap, lua.get("journal.lua", ""), _parse((root / "envoy/tracing.yaml").read_text())["journal"]),
        *_dialects(contract, lua.get("gate.lua", "")),
        *_codes(contract, bootstrap, lua),
    ]


def unsaid_codes(root: Path, contract: ModuleType) -> list[str]:
    """Codes of the closed list that neither Envoy nor a service ever says."""
    sources = [
        *(root / "envoy").rglob("*.lua"), root / "envoy/envoy.yaml",
        *(path for name in ("extauth", "ratelimit", "metering") for path in (root / name).rglob("*.py")),
        root / "chassis/refusals.py",
    ]  # fmt: skip
    said = "\n".join(path.read_text() for path in sources if path.exists())
    return [f"nobody says the error code {code}" for code in contract.ERROR_CODES if not _is_spelled(code, said)]


@lru_cache
def _parse(text: str) -> Any:
    return yaml.safe_load(text)


def _unspelled(contract: ModuleType, text: str) -> Iterator[str]:
    for name, value in vars(contract).items():
        if not name.isupper() or name in NOT_ENVOYS:
            continue
        for one in _leaves(value):
            if not _is_spelled(one, text):
                yield f"envoy/ does not spell {name}: {one}"


def _is_spelled(name: str, text: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(name)}(?![\w])", text) is not None


def _leaves(value: object) -> Iterator[str]:
    match value:
        case str():
            yield value
        case Mapping():
            for key, inner in value.items():
                yield from (*_leaves(key), *_leaves(inner))
        case tuple() | frozenset():
            for inner in value:
                yield from _leaves(inner)
        case _:
            pass


def _scalars(node: Any) -> Iterator[object]:
    """Every name and value of parsed YAML; comments do not count as spelling."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield key
            yield from _scalars(value)
    elif isinstance(node, list):
        for value in node:
            yield from _scalars(value)
    else:
        yield node


def _metadata(contract: ModuleType, lua: Mapping[str, str]) -> Iterator[str]:
    """What the scripts write to metadata is exactly what the contract says is there."""
    keys_of = {getattr(contract, name): set(getattr(contract, keys)) for name, keys in _WRITTEN_BY_LUA.items()}
    remembered = {getattr(contract, name): _prefixed(contract, prefix) for name, prefix in _REMEMBERED.items()}
    written: dict[str, set[str]] = {namespace: set() for namespace in keys_of}
    for file, text in lua.items():
        named = dict(_LUA_LOCAL.findall(text))
        written[contract.NS_USAGE] |= set(_LUA_TELL.findall(text))
        for first, second in _LUA_SET.findall(text.replace(_LUA_TELLER, "")):
            namespace = named.get(first, first.strip("'"))
            if file == _REMEMBERED_BY and second.strip("'") in remembered.get(namespace, ()):
                continue
            if namespace not in keys_of:
                yield f"{file} writes to {namespace}, which is not a namespace that Lua fills"
            elif not second.startswith("'"):
                yield f"{file} writes a key to {namespace} whose name cannot be read: {second}"
            else:
                written[namespace].add(second.strip("'"))
    for namespace, keys in keys_of.items():
        yield from (f"the contract does not have {namespace}:{key}" for key in sorted(written[namespace] - keys))
        yield from (f"no script writes {namespace}:{key}" for key in sorted(keys - written[namespace]))


def _prefixed(contract: ModuleType, prefix: str) -> set[str]:
    return {value for name, value in vars(contract).items() if name.startswith(prefix)}


def _metadata_read(contract: ModuleType, bootstrap: Any) -> Iterator[str]:
    """Metadata that Envoy's own filters read exists."""
    known = {
        contract.NS_REQUEST: set(contract.REQUEST_KEYS),
        contract.NS_USAGE: set(contract.USAGE_KEYS),
        contract.NS_IDENTITY: _prefixed(contract, "ID_"),
        contract.NS_ADMISSION: _prefixed(contract, "ADM_"),
    }
    for mapping in _mappings(bootstrap):
        namespace = mapping.get("filter", mapping.get("key"))
        steps = mapping.get("path")
        if not isinstance(steps, list) or not isinstance(namespace, str):
            continue
        if namespace not in known:
            yield f"envoy.yaml reads metadata {namespace}, which the contract does not have"
        elif steps[0]["key"] not in known[namespace]:
            yield f"envoy.yaml reads {namespace}:{steps[0]['key']}, which the contract does not have"
    for text in map(str, _scalars(bootstrap)):
        for namespace, key in re.findall(r"%DYNAMIC_METADATA\(([\w.]+)(?::(\w+))?\)%", text):
            if namespace not in known or (key and key not in known[namespace]):
                yield f"envoy.yaml reads {namespace}:{key}, which the contract does not have"


def _descriptors(contract: ModuleType, bootstrap: Any) -> Iterator[str]:
    """The admit and the settle descriptor have the contract's keys, in its order."""
    sent: dict[str, tuple[str, ...]] = {}
    for mapping in _mappings(bootstrap):
        for entry in mapping.get("rate_limits", ()):
            keys = tuple(_descriptor_key(next(iter(action.values()))) for action in entry["actions"])
            phase = next((a["generic_key"]["descriptor_value"] for a in entry["actions"] if "generic_key" in a), "")
            sent[phase] = keys
    for phase, keys in ((contract.PHASE_ADMIT, contract.ADMIT_KEYS), (contract.PHASE_SETTLE, contract.SETTLE_KEYS)):
        if sent.get(phase) != keys:
            yield f"the {phase} descriptor has {', '.join(sent.get(phase, ())) or 'no keys'}; the contract says {', '.join(keys)}"
    for phase in sorted(sent.keys() - {contract.PHASE_ADMIT, contract.PHASE_SETTLE}):
        yield f"envoy.yaml sends a descriptor of phase {phase or '(none)'}, which the contract does not have"


def _descriptor_key(action: Mapping[str, Any]) -> str:
    """What an action calls its entry; an extension says it in its own configuration."""
    return str(action.get("typed_config", action)["descriptor_key"])


def _journal(contract: ModuleType, bootstrap: Any, journal_lua: str, where_traced: Any) -> Iterator[str]:
    """Envoy's records have all members of the contract; the start record no others, and ours in it by name."""
    formats = [mapping["json_format"] for mapping in _mappings(bootstrap) if mapping.get("omit_empty_values") is True]
    members = set(where_traced).union(*formats)
    yield from (f"the contract has no journal member {name}" for name in sorted(members - set(contract.JOURNAL_KEYS)))
    yield from (f"no record has the journal member {name}" for name in sorted(set(contract.JOURNAL_KEYS) - members))
    for name in sorted(set(_JSON_MEMBER.findall(journal_lua)) - set(contract.JOURNAL_KEYS)):
        yield f"the start record has the member {name}, which the contract does not have"


def _dialects(contract: ModuleType, gate: str) -> Iterator[str]:
    """The gate's allow-list is the contract's."""
    listed = dict(_LUA_DIALECT.findall(gate))
    for path in sorted(listed.items() ^ contract.PATHS.items()):
        yield f"gate.lua and the contract differ in {path[0]}: {path[1]}"


def _codes(contract: ModuleType, bootstrap: Any, lua: Mapping[str, str]) -> Iterator[str]:
    """No code is said that is not on the closed list."""
    said = {code: file for file, text in lua.items() for code in _LUA_CODE.findall(text)}
    said |= {str(mapping["code"]): "envoy.yaml" for mapping in _mappings(bootstrap) if {"code", "message"} <= mapping.keys()}
    for code, file in sorted(said.items()):
        if code not in contract.ERROR_CODES:
            yield f"{file} says the error code {code}, which is not on the closed list"


def _mappings(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from _mappings(value)
    elif isinstance(node, list):
        for value in node:
            yield from _mappings(value)
