# SPDX-License-Identifier: Apache-2.0
"""`peaje doctor` and `peaje top`: what an SRE asks first."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from control.cli.options import Json

if TYPE_CHECKING:
    from rich.console import RenderableType

    from control.core.diagnosis import Remark
    from control.core.rates import Rates
    from control.top import Reading

#: Rows of the live view; the rest is one line.
_TENANTS_SHOWN = 20


def register(app: typer.Typer) -> None:
    """Add the commands to *app*."""

    @app.command("doctor")
    def doctor(as_json: Json = False) -> None:
        """Look at everything that runs and say what to do. Exit status 0: nothing is broken, 1: something is."""
        from control.core.diagnosis import Level

        remarks = _examine()
        if as_json:
            from dataclasses import asdict

            print(json.dumps({"remarks": [asdict(remark) for remark in remarks]}, indent=2))
        else:
            for remark in remarks:
                print(_line(remark))
        raise typer.Exit(1 if any(remark.level is Level.FAULT for remark in remarks) else 0)

    @app.command("top")
    def top(
        once: Annotated[bool, typer.Option("--once", help="Show one view and end.")] = False,
        every: Annotated[float, typer.Option("--every", min=0.2, max=60.0, help="Seconds between two looks.")] = 2.0,
        as_json: Json = False,
    ) -> None:
        """Show tenants by what they use: requests, tokens and refusals a second, what is under way, the ledger's lag."""
        from rich.console import Console
        from rich.live import Live

        from control.cli.database import connect, ledger_url
        from control.top import look

        admin = _admin_address()
        with connect(ledger_url()) as connection:
            before = look(connection, admin)
            console = Console()
            with Live(console=console, screen=console.is_terminal and not once and not as_json, auto_refresh=False) as live:
                while True:
                    time.sleep(every)
                    after = look(connection, admin)
                    if as_json:
                        live.stop()
                        print(json.dumps(_document(before, after), indent=2))
                        return
                    live.update(view(before, after), refresh=True)
                    before = after
                    if once:
                        return


    @app.command("log-level")
    def log_level(
        level: Annotated[str | None, typer.Argument(help="debug, info, warning, error; or default.", show_default=False)] = None,
        as_json: Json = False,
    ) -> None:
        """Change what every process of this installation writes to its log, within a second; `default` takes it back."""
        _set_level(level)
        _show_level(as_json=as_json)


def view(before: Reading, after: Reading) -> RenderableType:
    """The table for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    found = _rates(before, after)
    total = [sum(getattr(one, name) for one in found) for name in _COLUMNS]
    lag = "unread" if after.lag_seconds is None else f"{after.lag_seconds:.1f} s"
    head = Text.assemble(
        ("peaje top  ", "bold"), f"under way {'-' if after.active is None else after.active}   ledger behind ",
        (lag, "red" if after.lag_seconds is None or after.lag_seconds > 5 else "green"), "   exceptions open ",
        (str(after.exceptions_open), "red" if after.exceptions_open else "green"),
    )  # fmt: skip
    table = Table(box=None, pad_edge=False, header_style="bold", footer_style="bold", show_footer=True)
    table.add_column("TENANT", footer=f"{len(found)} tenants", min_width=24)
    for name, sum_ in zip(("REQUESTS/s", "INPUT TOKENS/s", "OUTPUT TOKENS/s", "REFUSED/s"), total, strict=True):
        table.add_column(name, footer=f"{sum_:.1f}", justify="right")
    for one in found[:_TENANTS_SHOWN]:
        table.add_row(one.tenant, *(f"{getattr(one, name):.1f}" for name in _COLUMNS))
    more = len(found) - _TENANTS_SHOWN
    return Group(head, Text(), table, *([Text(f"and {more} more")] if more > 0 else []))


_COLUMNS = ("requests", "input_tokens", "output_tokens", "refused")


def _document(before: Reading, after: Reading) -> dict[str, Any]:
    return {
        "seconds": round(after.at - before.at, 3),
        "active": after.active, "open": after.open_count, "lag_seconds": after.lag_seconds, "exceptions_open": after.exceptions_open,
        "tenants": [
            {"tenant": one.tenant} | {f"{name}_per_second": round(getattr(one, name), 3) for name in _COLUMNS}
            for one in _rates(before, after)
        ],
    }  # fmt: skip


def _rates(before: Reading, after: Reading) -> list[Rates]:
    from control.core.rates import rates

    return rates(before.tenants, after.tenants, seconds=after.at - before.at)


def _level_path() -> Path:
    from chassis.telemetry.log import LEVEL_PATH
    from control.laptop.places import read_home

    return read_home(os.environ) / LEVEL_PATH


def _set_level(level: str | None) -> None:
    from chassis.errors import Invalid
    from chassis.secrets import write_private
    from chassis.telemetry.log import LEVELS

    path = _level_path()
    if level is not None and level not in (*LEVELS, "default"):
        raise Invalid(f"{level[:20]!r} is no level.", mend=f"Use one of {', '.join(LEVELS)}, default.")
    if level is not None and not path.parent.is_dir():
        raise Invalid("There is no installation here.", mend="Start it with ./peaje up, or name its directory in PEAJE_HOME.")
    if level == "default":
        path.unlink(missing_ok=True)
    elif level is not None:
        write_private(path, level + "\n")


def _show_level(*, as_json: bool) -> None:
    from control.cli.show import show

    path = _level_path()
    show({"log_level": path.read_text("utf-8").strip() if path.exists() else "default"}, as_json=as_json)


def _line(remark: Remark) -> str:
    return f"{remark.level:<6} {remark.about:<20} {remark.says}" + (f" {remark.mend}" if remark.mend else "")


def _examine() -> list[Remark]:
    from chassis.errors import Unavailable
    from control.cli.client import call, running_state
    from control.cli.database import ledger_url
    from control.doctor import Addresses, examine
    from control.laptop import state
    from control.laptop.commands import describe
    from control.laptop.places import Places, read_home
    from control.laptop.valkey import valkey_url

    place = Places(read_home(os.environ))
    document = describe(state.read(place), place)
    url = os.environ.get("PEAJE_REDIS_URL")
    if not url and not running_state(place.home):
        raise Unavailable("Peaje is not running here.", mend="Start it with ./peaje up, or set PEAJE_POSTGRES_URL and PEAJE_REDIS_URL.")
    addresses = Addresses(
        postgres_url=ledger_url(), redis_url=url or valkey_url(place), envoy_admin=_admin_address(), home=place.home
    )
    # The store's socket is named relative to it where its path is long.
    if place.home.is_dir():
        os.chdir(place.home)
    return list(examine(addresses, document["parts"], lambda: list(call("GET", "/v1/limits/findings")["findings"])))


def _admin_address() -> str:
    from control.cli.client import running_state
    from control.laptop.places import DEFAULT_ADMIN_PORT, read_home

    ports = running_state(read_home(os.environ)).get("ports") or {}
    return f"http://127.0.0.1:{os.environ.get('PEAJE_ADMIN_PORT') or ports.get('admin', DEFAULT_ADMIN_PORT)}"
