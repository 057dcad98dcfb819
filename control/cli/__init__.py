# SPDX-License-Identifier: Apache-2.0
"""
The command line: a thin face on the control API, plus what runs on this machine.

Exit status 0 only on success; every error is one line on stderr with the mend.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from chassis.errors import PeajeError
from control.cli import (
    audit,
    credits,  # noqa: A004 - the noun; nobody uses the interpreter's own
    invoices,
    journal,
    keys,
    ledger,
    limits,
    operate,
    operators,
    prices,
    projects,
    reconcile,
    reports,
    reratings,
    routing,
    service_accounts,
    signing_keys,
    tenants,
    webhooks,
)
from control.cli.options import Json
from control.laptop import commands as laptop

app = typer.Typer(
    name="peaje", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Keys, limits and exact metering for your model servers, beside Envoy.",
)
app.add_typer(tenants.app, name="tenants")
app.add_typer(projects.app, name="projects")
app.add_typer(keys.app, name="keys")
app.add_typer(service_accounts.app, name="service-accounts")
app.add_typer(operators.app, name="operators")
app.add_typer(limits.app, name="limits")
app.add_typer(audit.app, name="audit")
app.add_typer(signing_keys.app, name="signing-keys")
app.add_typer(prices.app, name="prices")
app.add_typer(ledger.app, name="ledger")
app.add_typer(journal.app, name="journal")
app.add_typer(credits.app, name="credits")
app.add_typer(webhooks.app, name="webhooks")
app.add_typer(reconcile.app, name="reconcile")
invoices.register(app)
reratings.register(app)
reports.register(app)
operate.register(app)
routing.register(app)
laptop.register(app)


@app.command("check")
def check_configuration(
    directory: Annotated[str | None, typer.Argument(help="An envoy/ directory; default: this installation's source.")] = None,
    as_json: Json = False,
) -> None:
    """Check settings, Envoy's configuration and limits; refuses what would silently do nothing."""
    from control.cli.check import check

    raise typer.Exit(check(directory, as_json=as_json))


@app.command("psql", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run_psql(
    context: typer.Context,
    billing: Annotated[bool, typer.Option("--billing", help="As the role that reads views and nothing else.")] = False,
) -> None:
    """Open psql on the ledger; further arguments go to psql."""
    from control.cli.psql import run

    raise typer.Exit(run(context.args, billing=billing))


def main() -> int:
    """Run the command line; the exit status."""
    try:
        result = app(standalone_mode=False, prog_name="peaje")
    except PeajeError as exc:
        sys.stderr.write(f"{exc}\n")
        return 1
    except typer.Abort:
        return 130
    except Exception as exc:
        # Typer's own usage errors know how to show themselves; anything else is a defect.
        if hasattr(exc, "format_message"):
            sys.stderr.write(f"{exc.format_message()}\n")
            return 2
        raise
    return result if isinstance(result, int) else 0
