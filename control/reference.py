# SPDX-License-Identifier: Apache-2.0
"""
`python -m control.reference`: write docs/reference/ from the code; `--check` only says what is not current.

Commands from the command line's own tree, settings from their classes and the comments above each, the API from its
OpenAPI document, the metadata contract from `chassis/contract.py`. Nothing is written twice.
"""

from __future__ import annotations

import ast
import inspect
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

import typer.main
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings

from chassis import beacon, contract
from chassis.clock import utc_now
from chassis.models import ModelCatalogue
from chassis.settings import StoreSettings
from chassis.telemetry import traces
from control import pod
from control.api import __main__ as control
from control.api.access import DECLARATION
from control.api.app import build
from control.api.services import Services
from control.cli import app as command_line
from control.cli.environment import variable
from control.minting import Mint
from control.oauth import Issuer
from control.signing_keys import SigningKeys
from control.store import Store
from extauth import server as extauth
from metering import collector, events
from metering import server as metering
from ratelimit import server as ratelimit

REPOSITORY: Final = Path(__file__).resolve().parents[1]
DIRECTORY: Final = REPOSITORY / "docs/reference"
_MADE: Final = "<!-- Written by `python -m control.reference`; change the code instead. -->"
#: Whose settings, in the order in which they are shown.
SETTINGS: Final[tuple[tuple[str, type[BaseSettings]], ...]] = (
    ("All parts", StoreSettings),
    ("Traces", traces.Settings),
    ("extauth", extauth.Settings),
    ("ratelimit", ratelimit.Settings),
    ("metering", metering.Settings),
    ("collector", collector.Settings),
    ("events", events.Settings),
    ("beacon", beacon.Settings),
    ("control", control.Settings),
    ("pods", pod.Settings),
)


def documents() -> dict[str, str]:
    """Every page by its file's name."""
    pages: Mapping[str, Callable[[], str]] = {
        "cli.md": commands, "settings.md": settings, "api.md": api, "contract.md": metadata,
    }  # fmt: skip
    return {name: page().rstrip() + "\n" for name, page in pages.items()}


# --- Commands ------------------------------------------------------------------------------------------


def commands() -> str:
    """Each command with its arguments and options, as `--help` shows them."""
    lines = ["# Command line", "", _MADE, "", "`./peaje COMMAND`. Exit status 0 only on success; each error is one line that says the mend."]
    for path, command in _leaves(typer.main.get_command(command_line), ()):
        lines += ["", f"## peaje {' '.join(path)}", "", _first_paragraph(command.help)]
        rows = [_parameter(parameter) for parameter in command.params if not getattr(parameter, "hidden", False)]
        if rows:
            lines += ["", "| | |", "|---|---|", *rows]
    return "\n".join(lines)


def _leaves(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    children = getattr(command, "commands", None)
    if children is None:
        yield path, command
        return
    for name in sorted(children):
        if not children[name].hidden:
            yield from _leaves(children[name], (*path, name))


def _parameter(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        name = (parameter.name or "").upper().replace("_", "-")
        shown = f"`{name}`" if parameter.required else f"`[{name}]`"
    else:
        shown = ", ".join(f"`{option}`" for option in (*parameter.opts, *parameter.secondary_opts))
    said = _cell(getattr(parameter, "help", None) or "")
    default = parameter.default
    if parameter.param_type_name == "option" and default not in (None, False, True, "", (), []) and not callable(default):
        said = f"{said} Default: `{default}`.".strip()
    return f"| {shown} | {said} |"


# --- Settings ------------------------------------------------------------------------------------------


def settings() -> str:
    """Each environment variable with its default and the comment above its field."""
    lines = ["# Settings", "", _MADE, "", "Environment variables, read once at start. Those of all parts hold for each."]
    for title, kind in SETTINGS:
        said = _field_comments(kind)
        rows = []
        for field, info in kind.model_fields.items():
            if field not in said:
                continue  # declared by a class above, shown there
            rows.append(f"| `{variable(kind, field)}` | {_default(info.default)} | {_cell(said[field])} |")
        lines += ["", f"## {title}", "", "| variable | default | |", "|---|---|---|", *rows]
    return "\n".join(lines)


def _default(value: object) -> str:
    if value is PydanticUndefined:
        return "required"
    return f"`{getattr(value, 'value', value)}`" if value not in ("", None) else ""


def _field_comments(kind: type[BaseSettings]) -> dict[str, str]:
    source = Path(inspect.getfile(kind)).read_text()
    (node,) = [one for one in ast.parse(source).body if isinstance(one, ast.ClassDef) and one.name == kind.__name__]
    found = {}
    for one in node.body:
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
            found[one.target.id] = _comment_above(source.splitlines(), one.lineno)
    return found


def _comment_above(lines: Sequence[str], number: int) -> str:
    """The `#:` lines directly above line *number* (from 1), joined."""
    said: list[str] = []
    for line in reversed(lines[: number - 1]):
        if not line.strip().startswith("#:"):
            break
        said.insert(0, line.strip().removeprefix("#:").strip())
    return " ".join(said)


# --- API -----------------------------------------------------------------------------------------------


def api() -> str:
    """Each route by its noun, from the OpenAPI document that the API itself serves."""
    document = build(_nobody()).openapi()
    lines = ["# Control API", "", _MADE, "", "The whole document, with bodies: `GET /v1/openapi.json`; to try it: `/docs`."]
    nouns: dict[str, list[str]] = {}
    for path, methods in sorted(document["paths"].items()):
        for method, operation in methods.items():
            said = _first_paragraph(operation.get("description") or operation.get("summary"))
            nouns.setdefault(_noun(path), []).append(f"| `{method.upper()} {path}` | `{operation[DECLARATION]}` | {_cell(said)} |")
    for noun, rows in sorted(nouns.items()):
        lines += ["", f"## {noun}", "", "| route | permission | |", "|---|---|---|", *rows]
    return "\n".join(lines)


def _noun(path: str) -> str:
    steps = [step for step in path.split("/") if step and not step.startswith("{")]
    return steps[1] if steps[:1] == ["v1"] and len(steps) > 1 else "without a version"


def _nobody() -> Services:
    """Routes are declared, none is asked: nothing behind them is ever touched."""
    mint = Mint(peppers={}, random_bytes=secrets.token_bytes)
    return Services(
        store=cast("Store", None), mint=mint, issuer=Issuer(url="", keys=SigningKeys(Path()), mint=mint),
        catalogue=lambda: ModelCatalogue(models=()), clock=utc_now, bootstrap_token_path=Path(), scanning_keys_path=None,
    )  # fmt: skip


# --- Contract ------------------------------------------------------------------------------------------


def metadata() -> str:
    """Each name that crosses a process boundary, under the headings that the contract has."""
    path = Path(str(contract.__file__))
    source = path.read_text().splitlines()
    lines = ["# Metadata contract", "", _MADE, "", "Spelled once, in `chassis/contract.py`; Envoy's files spell them again and a test compares."]
    headings = {number: line.strip("# -").strip() for number, line in enumerate(source, start=1) if line.startswith("# --- ")}
    for node in ast.parse("\n".join(source)).body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        passed = [number for number in headings if number < node.lineno]
        for number in passed:
            lines += ["", f"## {headings.pop(number)}", "", "| name | value | |", "|---|---|---|"]
        value = getattr(contract, node.target.id)
        lines.append(f"| `{node.target.id}` | {_value(value)} | {_cell(_comment_above(source, node.lineno))} |")
    return "\n".join(lines)


def _value(value: object) -> str:
    match value:
        case str():
            return f"`{value}`"
        case Mapping():
            return ", ".join(f"`{key}` → `{one}`" for key, one in value.items())
        case tuple():
            return ", ".join(f"`{one}`" for one in value)
        case _:
            return f"`{value}`"


# --- Text ----------------------------------------------------------------------------------------------


def _first_paragraph(text: str | None) -> str:
    return " ".join((text or "").strip().split("\n\n")[0].split())


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def stale(pages: Mapping[str, str], directory: Path) -> list[str]:
    """Names of *pages* that are not in *directory* as they are here."""
    return [name for name, text in pages.items() if not (directory / name).is_file() or (directory / name).read_text() != text]


def main(arguments: Sequence[str]) -> int:
    """Write the pages, or with `--check` name those that are not what the code says; the exit status."""
    pages = documents()
    if list(arguments) == ["--check"]:
        found = stale(pages, DIRECTORY)
        for name in found:
            sys.stderr.write(f"docs/reference/{name} is not current: run python -m control.reference.\n")
        return 1 if found else 0
    DIRECTORY.mkdir(exist_ok=True)
    for name, text in pages.items():
        (DIRECTORY / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
