# SPDX-License-Identifier: Apache-2.0
"""
Who may import whom: `control -> {extauth, ratelimit, metering} -> chassis`, and pure cores.

Read from the syntax, not by importing: an import inside a function, under TYPE_CHECKING or by
`importlib.import_module("…")` is an arrow like any other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

#: What each package may import of the others. `bench` and `tests` look at everything and are not shipped.
ALLOWED: Final[dict[str, frozenset[str]]] = {
    "chassis": frozenset(),
    "extauth": frozenset({"chassis"}),
    "ratelimit": frozenset({"chassis"}),
    "metering": frozenset({"chassis"}),
    "control": frozenset({"chassis", "extauth", "ratelimit", "metering"}),
}
SERVICES: Final = ("extauth", "ratelimit", "metering")
OURS: Final = frozenset({*ALLOWED, "bench", "tests"})

#: Inside a service an arrow leads from a higher place to a lower one, or stays in a package.
#: `collector` and `events` are metering's other processes: what a server is, without gRPC. `generic` is ratelimit's
#: second servicer.
PLACES: Final = {
    "__main__": 4, "server": 3, "collector": 3, "events": 3, "servicer": 2, "generic": 2, "adapters": 1, "core": 0, "__init__": 0,
}  # fmt: skip

#: What a core is told by argument, or is none of its business. Held through everything a core imports of ours.
IMPURE: Final = frozenset(
    {
        # Transport and stores.
        "grpc", "grpc_health", "google", "chassis.wire", "chassis.serving",
        "redis", "psycopg", "psycopg_pool", "sqlalchemy", "alembic", "chassis.stores",
        "httpx", "socket", "urllib.request", "http.client", "subprocess",
        # Clock, environment, randomness, files.
        "time", "chassis.clock", "os", "sys", "random", "secrets", "uuid", "pathlib", "io", "tempfile",
        "chassis.settings", "chassis.secrets", "pydantic_settings",
        # Telemetry.
        "logging", "structlog", "chassis.telemetry", "prometheus_client", "opentelemetry",
    }
)  # fmt: skip
#: Calls that read the clock or a file without an import of their own.
_IMPURE_CALLS: Final = frozenset({"now", "utcnow", "today"})
_CLOCKS: Final = frozenset({"datetime", "date"})
_IMPURE_BUILTINS: Final = frozenset({"open", "print", "input"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """One imported name and the line that imports it."""

    line: int
    #: Dotted; `from a import b` is both `a` and `a.b`, because b may be a module.
    name: str


def findings(root: Path) -> list[str]:
    """Every arrow below *root* that leads the wrong way, one line each."""
    modules = _modules(root)
    found = []
    for module, path in modules.items():
        where = path.relative_to(root)
        imports = read_imports(path, module)
        found += [f"{where}:{line}: {what}" for line, what in _between_packages(module, imports)]
        found += [f"{where}:{line}: {what}" for line, what in _inside_a_service(module, imports)]
        if _is_core(module):
            found += [f"{where}:{line}: {what}" for line, what in _impurities(module, modules)]
    return sorted(set(found))


def read_imports(path: Path, module: str) -> list[Import]:
    """Everything *path* imports, wherever in it."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=names):
                found += [Import(line=node.lineno, name=alias.name) for alias in names]
            case ast.ImportFrom(module=source, names=names, level=level):
                base = _resolve(package, source, level)
                found += [Import(line=node.lineno, name=name) for name in (base, *(f"{base}.{a.name}" for a in names))]
            case ast.Call(func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"), args=[first, *_]):
                name = first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else "?"
                found.append(Import(line=node.lineno, name=name))
            case _:
                pass
    return found


def _modules(root: Path) -> dict[str, Path]:
    found = {}
    for package in ALLOWED:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _resolve(package: str, source: str | None, level: int) -> str:
    if level == 0:
        return source or ""
    base = package.split(".")
    return ".".join([*base[: len(base) - level + 1], *([source] if source else [])])


def _between_packages(module: str, imports: list[Import]) -> Iterator[tuple[int, str]]:
    own = module.partition(".")[0]
    for one in imports:
        other = one.name.partition(".")[0]
        if one.name == "?":
            yield one.line, "imports a module whose name is only known when it runs"
        elif other in OURS and other != own and other not in ALLOWED[own]:
            yield one.line, f"{own} may not import {other}"


def _inside_a_service(module: str, imports: list[Import]) -> Iterator[tuple[int, str]]:
    service, place = _place(module)
    if service not in SERVICES:
        return
    if place not in PLACES:
        yield 1, f"{place} has no place in a service: {', '.join(PLACES)}"
        return
    for one in imports:
        other_service, other = _place(one.name)
        if other_service != service or other == place or other not in PLACES or other == "__init__":
            continue
        if PLACES[other] >= PLACES[place]:
            yield one.line, f"{place} may not import {other}"


def _place(module: str) -> tuple[str, str]:
    parts = module.split(".")
    return parts[0], parts[1] if len(parts) > 1 else "__init__"


def _is_core(module: str) -> bool:
    service, place = _place(module)
    return service in SERVICES and place == "core"


def _impurities(module: str, modules: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """What *module* imports or calls that a core may not, itself or through a module of ours."""
    tree = ast.parse(modules[module].read_text())
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name() | ast.Attribute() as owner, attr=name)) if (
                name in _IMPURE_CALLS and ast.unparse(owner).rpartition(".")[2] in _CLOCKS
            ):
                yield node.lineno, f"a core is told the time: .{name}()"
            case ast.Call(func=ast.Name(id=name)) if name in _IMPURE_BUILTINS:
                yield node.lineno, f"a core does no I/O: {name}()"
            case _:
                pass
    for one in read_imports(modules[module], module):
        chain = _way_to_impure(one.name, modules, seen={module})
        if chain:
            yield one.line, f"a core may not import {' -> '.join(chain)}"


def _way_to_impure(name: str, modules: dict[str, Path], *, seen: set[str]) -> list[str]:
    if any(name == impure or name.startswith(f"{impure}.") for impure in IMPURE):
        return [name]
    if name in seen or name not in modules:
        return []
    seen.add(name)
    for one in read_imports(modules[name], name):
        rest = _way_to_impure(one.name, modules, seen=seen)
        if rest:
            return [name, *rest]
    return []
