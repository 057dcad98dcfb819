# SPDX-License-Identifier: Apache-2.0
"""
How the models document is written, and what is wrong with one: every fault, with its line.

    models:
    - name: llama-8b
      aliases: [default]
      pools:
      - {name: stable, engine: vllm, endpoints: ["10.0.0.1:8000", "10.0.0.2:8000"], weight: 90}
      - {name: canary, engine: vllm, endpoints: ["10.0.0.3:8000"], weight: 10, model: llama-8b-next}
      - {name: rented, engine: openai, endpoints: ["https://api.example.com"], fallback: true, credential_file: secrets/rented}

A model with one pool may say what is the pool's beside its own name instead.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from chassis.errors import Invalid
from chassis.files import read_text_bounded
from chassis.served import (
    ENGINES,
    ONLY_POOL,
    Affinity,
    Balance,
    Endpoint,
    EndpointPicker,
    Model,
    Pool,
    PriceHint,
    Retry,
    WhenAway,
)

#: Of the file. A thousand models with a hundred servers each are less.
BYTES_MAX: Final = 4 << 20
MODELS_MAX: Final = 1000
POOLS_MAX: Final = 16
ENDPOINTS_MAX: Final = 256
ALIASES_MAX: Final = 32
#: A document with more faults is not one.
_FAULTS_TOLD_MAX: Final = 20

_ENDPOINT: Final = re.compile(
    r"(?:(?P<scheme>https?)://)?(?P<host>\[[0-9A-Fa-f:]+\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?/?"
)
_NUMERIC: Final = re.compile(r"[0-9.]+")
_LABEL: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_SAID: Final = {
    "extra_forbidden": "unknown field",
    "missing": "required",
    "model_type": "must be a mapping",
    "too_short": "must not be empty",
    "string_type": "must be text, in quotes where it looks like a number",
}
_MODEL_NAME: Final = r"^[\x21-\x7e]{1,200}$"
_POOL_NAME: Final = r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$"
_HEADER_NAME: Final = r"^[a-z0-9][a-z0-9-]{0,62}$"
_PATH: Final = r"^/[\x21-\x7e]{0,199}$"
_CURRENCY: Final = r"^[A-Z]{3}$"
#: What each pattern asks for, in words.
_PATTERNS: Final = {
    _MODEL_NAME: "1 to 200 printable ASCII characters without spaces",
    _POOL_NAME: "1 to 40 lower-case letters, digits and hyphens",
    _HEADER_NAME: "a header's name in lower case",
    _PATH: "a path that begins with /",
    _CURRENCY: "three capital letters",
}

Place = tuple[int | str, ...]


class Faulty(Invalid):
    """A models document that is refused; *faults* are one line each."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("; ".join(fault.rstrip(".") for fault in faults) + ".")
        self.faults = tuple(faults)


def load(path: Path) -> tuple[Model, ...]:
    """Read and check the document at *path*; raises `Faulty`."""
    return read(text_of(path), source=str(path))


def text_of(path: Path) -> str:
    """The document at *path* as it is written; raises `Faulty` for what cannot be one."""
    try:
        return read_text_bounded(path, bytes_max=BYTES_MAX)
    except Invalid as exc:
        raise Faulty([exc.message]) from exc


def read(text: str, *, source: str) -> tuple[Model, ...]:
    """Check the *text* of a document; raises `Faulty`, naming *source* and the line of each fault."""
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        doubles = [f"{source}:{line}: {name} is given twice" for name, line in _doubles(node)]
        document = yaml.safe_load(text)
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark is not None else source
        raise Faulty([f"{where}: cannot read the models document: it is not YAML"]) from exc
    except RecursionError as exc:
        raise Faulty([f"{source}: nested too deep"]) from exc
    if doubles:
        raise Faulty(doubles[:_FAULTS_TOLD_MAX])
    return parse(document, source=source, node=node)


def parse(document: object, *, source: str, node: yaml.Node | None = None) -> tuple[Model, ...]:
    """Check a parsed document; *node* is the same with its lines."""

    def told(faults: list[tuple[Place, str]]) -> Faulty:
        return Faulty([f"{_where(source, node, place)}: {what}" for place, what in faults[:_FAULTS_TOLD_MAX]])

    fields: dict[Any, Any] = document if isinstance(document, dict) else {}
    entries = fields.get("models")
    if not isinstance(entries, list) or not entries:
        raise told([((), "`models` must be a list with at least one model")])
    if len(entries) > MODELS_MAX:
        raise told([(("models",), f"more than {MODELS_MAX} models")])
    written, faults = _entries(entries)
    faults = [((str(name),), "unknown field") for name in fields if name != "models"] + faults
    # Which entry is meant by a place is only known while all of them are right.
    if faults := faults or [*_names_given_twice(written)]:
        raise told(faults)
    return tuple(entry.meant() for entry in written)


def _endpoint(text: str) -> str:
    matched = _ENDPOINT.fullmatch(text)
    if matched is None or (matched["scheme"] is None and matched["port"] is None):
        raise ValueError("an endpoint is host:port or http(s)://host[:port]")
    if not 0 < _port(matched) < 65536:
        raise ValueError(f"{_port(matched)} is not a port")
    host = matched["host"].strip("[]")
    if not _is_host(host, is_bracketed=matched["host"].startswith("[")):
        raise ValueError(f"{host!r} is not a host")
    if matched["scheme"] == "https" and _is_address(host):
        raise ValueError("https needs a host name, an address has no certificate to check")
    return text


def _port(matched: re.Match[str]) -> int:
    return int(matched["port"] or _DEFAULT_PORTS[matched["scheme"]])


def _read_endpoint(text: str) -> Endpoint:
    matched = _ENDPOINT.fullmatch(text)
    assert matched is not None
    return Endpoint(scheme=matched["scheme"] or "http", host=matched["host"].strip("[]"), port=_port(matched))


def _is_host(host: str, *, is_bracketed: bool) -> bool:
    # Envoy refuses the whole resource for one bad address, and every pool with it.
    if is_bracketed or _NUMERIC.fullmatch(host):
        return _is_address(host, version=6 if is_bracketed else 4)
    return len(host) <= 253 and all(_LABEL.fullmatch(label) for label in host.removesuffix(".").split("."))


def _is_address(host: str, version: int | None = None) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return version is None or address.version == version


def _absolute(value: object) -> object:
    if not isinstance(value, str) or not Path(value).is_absolute():
        raise ValueError("must be the absolute path of a tokenizer.json, where ratelimit runs")
    return value


def _below(text: str) -> str:
    if Path(text).is_absolute() or ".." in Path(text).parts:
        raise ValueError("must be a path below the state directory, as secrets/NAME")
    return text


def _amount(text: str) -> str:
    # Money never is a float: 0.1 in YAML would be one.
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
        raise ValueError('must be an amount in quotes, as "0.15"')
    return text


def _known_engine(name: str) -> str:
    if name not in ENGINES:
        raise ValueError(f"must be one of {', '.join(ENGINES)}")
    return name


_ModelName = Annotated[str, Field(pattern=_MODEL_NAME)]
_PoolName = Annotated[str, Field(pattern=_POOL_NAME)]
_Count = Annotated[int, Field(ge=1, le=10_000_000)]
_Endpoints = Annotated[list[Annotated[str, AfterValidator(_endpoint)]], Field(min_length=1, max_length=ENDPOINTS_MAX)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Picker(_Entry):
    address: Annotated[str, AfterValidator(_endpoint)]
    when_away: Literal["open", "close"] = "open"

    def meant(self) -> EndpointPicker:
        """The picker that is meant."""
        return EndpointPicker(address=_read_endpoint(self.address), when_away=WhenAway(self.when_away))


class _Servers(_Entry):
    """What a pool says of its servers."""

    engine: Annotated[str, AfterValidator(_known_engine)]
    endpoints: _Endpoints
    model: _ModelName | None = None
    credential_file: Annotated[str, AfterValidator(_below)] | None = None
    requests_max: _Count | None = None
    slow_start_seconds: Annotated[int, Field(ge=0, le=3600)] = 30
    health_path: Annotated[str, Field(pattern=_PATH)] | None = None
    balance: Literal["least_request", "orca"] = "least_request"
    endpoint_picker: _Picker | None = None

    @model_validator(mode="after")
    def _check(self) -> _Servers:
        read = [_read_endpoint(text) for text in self.endpoints]
        if len(set(read)) < len(read):
            raise ValueError("an endpoint is listed twice")
        # One pool is one Envoy cluster, and a cluster either speaks TLS or does not.
        if len({endpoint.scheme for endpoint in read}) > 1:
            raise ValueError("endpoints must be all http or all https")
        if self.endpoint_picker is not None and self.balance == "orca":
            raise ValueError("choose by endpoint_picker or by balance: orca, not both")
        return self

    def pool(self, name: str, weight: int) -> Pool:
        """The pool of this *name* and *weight*."""
        return Pool(
            name=name,
            engine=self.engine,
            endpoints=tuple(_read_endpoint(text) for text in self.endpoints),
            weight=weight,
            model=self.model,
            credential_file=None if self.credential_file is None else Path(self.credential_file),
            requests_max=self.requests_max,
            slow_start_seconds=self.slow_start_seconds,
            health_path=self.health_path,
            balance=Balance(self.balance),
            endpoint_picker=None if self.endpoint_picker is None else self.endpoint_picker.meant(),
        )


class _NamedPool(_Servers):
    name: _PoolName
    weight: Annotated[int, Field(ge=1, le=1000)] = 1
    fallback: bool = False

    @model_validator(mode="after")
    def _check_fallback(self) -> _NamedPool:
        if self.fallback and "weight" in self.model_fields_set:
            raise ValueError("a fallback pool has no weight: it gets all requests, and only when the others are dead")
        if self.fallback and self.endpoint_picker is not None:
            raise ValueError("a fallback pool has no endpoint_picker: who answers is known only after pickers were asked")
        return self


class _Affinity(_Entry):
    header: Annotated[str, Field(pattern=_HEADER_NAME)] | None = None
    prefix_bytes: Annotated[int, Field(ge=32, le=65536)] | None = None

    @model_validator(mode="after")
    def _check(self) -> _Affinity:
        if (self.header is None) == (self.prefix_bytes is None):
            raise ValueError("name either header or prefix_bytes")
        return self


class _PriceHint(_Entry):
    input: Annotated[str, AfterValidator(_amount)]
    output: Annotated[str, AfterValidator(_amount)]
    cached: Annotated[str, AfterValidator(_amount)] | None = None
    currency: Annotated[str, Field(pattern=_CURRENCY)] = "USD"


class _Served(_Entry):
    """What a model says of itself, whoever serves it."""

    name: _ModelName
    aliases: Annotated[list[_ModelName], Field(max_length=ALIASES_MAX)] = []
    tokenizer: Annotated[str, BeforeValidator(_absolute)] | None = None
    affinity: _Affinity | None = None
    retry: Literal["unsent", "unanswered"] = "unsent"
    output_tokens_max: _Count | None = None
    price_hint: _PriceHint | None = None

    def _pools(self) -> tuple[Pool, ...]:
        raise NotImplementedError

    def meant(self) -> Model:
        """The model that is meant."""
        affinity, hint = self.affinity, self.price_hint
        return Model(
            name=self.name,
            pools=self._pools(),
            aliases=tuple(self.aliases),
            tokenizer=None if self.tokenizer is None else Path(self.tokenizer),
            affinity=None if affinity is None else Affinity(header=affinity.header, prefix_bytes=affinity.prefix_bytes or 0),
            retry=Retry(self.retry),
            output_tokens_max=self.output_tokens_max,
            price_hint=None if hint is None else PriceHint(
                input=Decimal(hint.input), output=Decimal(hint.output),
                cached=None if hint.cached is None else Decimal(hint.cached), currency=hint.currency,
            ),
        )  # fmt: skip


    @model_validator(mode="after")
    def _check_who_chooses(self) -> _Served:
        chosen = any(pool.endpoint_picker is not None or pool.balance is Balance.ORCA for pool in self._pools())
        if chosen and self.affinity is not None:
            raise ValueError("affinity chooses the server, and so would endpoint_picker or balance: orca; not both")
        return self


class _Pooled(_Served):
    pools: Annotated[list[_NamedPool], Field(min_length=1, max_length=POOLS_MAX)]

    def _pools(self) -> tuple[Pool, ...]:
        return tuple(entry.pool(entry.name, 0 if entry.fallback else entry.weight) for entry in self.pools)

    @model_validator(mode="after")
    def _check(self) -> _Pooled:
        names = Counter(entry.name for entry in self.pools)
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"pool {twice[0]!r} is listed twice")
        if all(entry.fallback for entry in self.pools):
            raise ValueError("every pool is a fallback: one at least has to have a weight")
        return self


class _Alone(_Served, _Servers):
    """A model with one pool, in one entry."""

    def _pools(self) -> tuple[Pool, ...]:
        return (self.pool(ONLY_POOL, 1),)


def _entries(documents: list[Any]) -> tuple[list[_Pooled | _Alone], list[tuple[Place, str]]]:
    """Check each entry by the shape that it has; the entries that are right, and all faults of the others."""
    read: list[_Pooled | _Alone] = []
    faults: list[tuple[Place, str]] = []
    for index, entry in enumerate(documents):
        shape = _Pooled if isinstance(entry, dict) and "pools" in entry else _Alone
        try:
            read.append(shape.model_validate(entry))
        except ValidationError as exc:
            faults += [_told(("models", index), error) for error in exc.errors(include_url=False)]
    return read, faults


def _told(place: Place, error: Any) -> tuple[Place, str]:
    """Where and what, in our words where pydantic's are of its own world; never the value, which may be a secret."""
    whole = (*place, *error["loc"])
    kind = str(error["type"])
    if kind == "value_error":
        return whole, str(error["ctx"]["error"])
    if kind == "string_pattern_mismatch":
        return whole, f"must be {_PATTERNS[error['ctx']['pattern']]}"
    if kind in _SAID:
        return whole, _SAID[kind]
    told = str(error["msg"]).removeprefix("Input should ").removeprefix("be ")
    return whole, f"must be {told}" if str(error["msg"]).startswith("Input should be") else told


def _names_given_twice(written: list[_Pooled | _Alone]) -> Iterator[tuple[Place, str]]:
    owner: dict[str, str] = {}
    for index, entry in enumerate(written):
        if entry.name in owner:
            yield ("models", index, "name"), f"model {entry.name!r} is listed twice"
        owner[entry.name] = entry.name
    for index, entry in enumerate(written):
        for number, alias in enumerate(entry.aliases):
            if alias in owner:
                whose = "is a model's own name" if owner[alias] == alias else f"is an alias of {owner[alias]!r} already"
                yield ("models", index, "aliases", number), f"{alias!r} {whose}"
            owner.setdefault(alias, entry.name)


def _doubles(node: yaml.Node | None) -> Iterator[tuple[str, int]]:
    """Names that one mapping has twice, of which YAML keeps the last in silence."""
    pending, seen = [node], set[int]()
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, yaml.MappingNode):
            names = Counter(str(key.value) for key, _ in current.value if key.tag != "tag:yaml.org,2002:merge")
            for key, value in current.value:
                pending.append(value)
                if names.pop(str(key.value), 0) > 1:
                    yield str(key.value), key.start_mark.line + 1
        elif isinstance(current, yaml.SequenceNode):
            pending.extend(current.value)


def _where(source: str, node: yaml.Node | None, place: Place) -> str:
    """The file, the line and the way to a place in it: `models.yaml:7: models[1].pools[0].weight`."""
    line = _line(node, place)
    way = ""
    for step in place:
        way += f"[{step}]" if isinstance(step, int) else f".{step}" if way else str(step)
    return ": ".join(part for part in (f"{source}:{line}" if line else source, way) if part)


def _line(node: yaml.Node | None, place: Place) -> int:
    """The line of the innermost thing on the way that the text has; 0 without a text."""
    for step in place:
        below: yaml.Node | None = None
        if isinstance(node, yaml.MappingNode):
            below = next((value for key, value in node.value if key.value == step), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            below = node.value[step]
        if below is None:
            break
        node = below
    return node.start_mark.line + 1 if node is not None else 0
