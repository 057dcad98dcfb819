# SPDX-License-Identifier: Apache-2.0
"""`peaje usage` and `peaje explain`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from chassis.errors import Invalid
from control.cli.client import at, call
from control.cli.options import AnyTenant, Json
from control.cli.show import show

#: Items of one call; a line is at most as long that they fit into its body.
_BATCH = 500
_LINE_BYTES_MAX = 2000
_IMPORT_SECONDS = 120.0
#: How the API names an item of a call.
_ITEM = re.compile(r"(?:Item |items\.)([0-9]+)(?:: |\.)")


def _batches(file: Path) -> Iterator[dict[int, Any]]:
    """Items of *file* by their lines, some at a time; a line that is no object is named, and nothing after it is sent."""
    items: dict[int, Any] = {}
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    item = json.loads(line) if len(line) <= _LINE_BYTES_MAX else None
                except ValueError:
                    item = None
                if not isinstance(item, dict):
                    raise Invalid(f"{file}:{number} is not a JSON object of at most {_LINE_BYTES_MAX} bytes.")
                items[number] = item
                if len(items) == _BATCH:
                    yield items
                    items = {}
    except OSError as exc:
        raise Invalid(f"{file} cannot be read: {exc.strerror}.") from exc
    if items:
        yield items


def _post(items: dict[int, Any], file: Path) -> Any:
    try:
        return call("POST", "/v1/usage", body={"items": list(items.values())}, timeout_seconds=_IMPORT_SECONDS)
    except Invalid as exc:
        raise Invalid(_at_its_line(str(exc), file, list(items))) from exc


def _at_its_line(message: str, file: Path, lines: list[int]) -> str:
    """
    What the API says of an item of a call, as a place in *file*.

    >>> _at_its_line("Item 1: a count is from 0 to 9.", Path("a.jsonl"), [7, 9])
    'a.jsonl:9: a count is from 0 to 9.'
    >>> _at_its_line("There is no tenant 'x'.", Path("a.jsonl"), [7, 9])
    "a.jsonl, lines 7 to 9: There is no tenant 'x'."
    """
    named = _ITEM.match(message)
    if named is None or int(named[1]) >= len(lines):
        return f"{file}, lines {lines[0]} to {lines[-1]}: {message}"
    return f"{file}:{lines[int(named[1])]}: {message[named.end():]}"


def register(app: typer.Typer) -> None:
    """Add the commands to *app*."""
    usage = typer.Typer(help="Sum up requests and tokens; `import` adds what did not pass by Envoy.")
    app.add_typer(usage, name="usage")

    @usage.callback(invoke_without_command=True)
    def show_usage(
        context: typer.Context,
        tenant: AnyTenant = None,
        since: Annotated[str, typer.Option("--since", help="A duration such as 1h or 30d.")] = "24h",
        by: Annotated[str, typer.Option("--by", help="model, key, hour or tenant.")] = "model",
        as_json: Json = False,
    ) -> None:
        """Sum up requests and tokens; `import` adds what did not pass by Envoy."""
        if context.invoked_subcommand is not None:
            return
        answer = call("GET", "/v1/usage", query={"tenant": tenant, "since": since, "by": by})
        show(answer if as_json else {"usage": answer["usage"]}, as_json=as_json)

    @usage.command("import")
    def import_usage(
        file: Annotated[Path, typer.Argument(help="One JSON object a line, as POST /v1/usage takes items.")], as_json: Json = False
    ) -> None:
        """Add usage from a file; a line whose id is known already changes nothing, so an import can be repeated."""
        done = {"added": 0, "known": 0}
        try:
            for items in _batches(file):
                answer = _post(items, file)
                done = {name: count + answer[name] for name, count in done.items()}
        except Invalid as exc:
            so_far = f"Lines before these were added ({done['added']}); mend it and import the file again." if any(done.values()) else None
            raise Invalid(str(exc), mend=so_far) from exc
        show(done, as_json=as_json)

    @app.command("explain")
    def explain(
        request_id: Annotated[str | None, typer.Argument(help="What became of this request.", show_default=False)] = None,
        key_id: Annotated[str | None, typer.Option("--key-id", help="Or: would this key be let through?")] = None,
        service_account: Annotated[str | None, typer.Option("--service-account", help="Or this service account?")] = None,
        tenant: Annotated[str | None, typer.Option("--tenant", help="Or anybody of this tenant?")] = None,
        project: Annotated[str | None, typer.Option("--project", help="With --tenant.")] = None,
        model: Annotated[str | None, typer.Option("--model")] = None,
        dialect: Annotated[str | None, typer.Option("--dialect", help="openai.chat if left out.")] = None,
        address: Annotated[str | None, typer.Option("--address", help="Where it would come from.")] = None,
        time: Annotated[str | None, typer.Option("--time", help="When, with its zone; now if left out.")] = None,
        as_json: Json = False,
    ) -> None:
        """Say what became of a request (its id is in the x-request-id header), or whether one would be let through."""
        if request_id is not None:
            show(call("GET", at("/v1/requests/{}", request_id)), as_json=as_json)
            return
        if [key_id, service_account, tenant].count(None) != 2:
            raise Invalid("Name a request's id, or exactly one of --key-id, --service-account and --tenant.")
        asked = {
            "key_id": key_id, "service_account_id": service_account, "tenant": tenant, "project": project,
            "model": model, "dialect": dialect, "address": address, "time": time,
        }  # fmt: skip
        body = {name: value for name, value in asked.items() if value is not None}
        show(call("POST", "/v1/explain", body=body), as_json=as_json)
