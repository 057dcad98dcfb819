# SPDX-License-Identifier: Apache-2.0
"""Every command in the README and every query in the docs is run, as it is written."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.dataplane.installation import REPOSITORY, Installation, chat

README = (REPOSITORY / "README.md").read_text()
BILLING = (REPOSITORY / "docs/billing.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_the_readme_does_what_it_says(dynamo: Installation) -> None:
    """401, 200, 429 and the row, typed one after the other in one shell, against the real engine."""
    two_commands, *typed = blocks(README, "sh")
    script = "\n".join(typed).replace("127.0.0.1:10000", f"127.0.0.1:{dynamo.port}")

    done = subprocess.run(
        ["sh", "-eu", "-c", script], cwd=REPOSITORY, env=dynamo.environment, capture_output=True, text=True,
        timeout=120, check=False,
    )

    assert 0 == done.returncode, done.stderr
    statuses = re.findall(r"HTTP/1\.1 (\d{3})", done.stdout)
    assert ["401", "200"] == statuses[:2]
    assert ["200", "429"] == statuses[2:]
    # The row that the README shows, to the letter.
    [shown] = re.findall(r"^ acme .*$", README, re.MULTILINE)
    assert shown in done.stdout.splitlines(), done.stdout
    # `up` is what the fixture ran, `test` is what runs this.
    assert ["./peaje up --detach", "./peaje test"] == [line.split("  ")[0] for line in two_commands.splitlines()]


@pytest.mark.parametrize("query", blocks(BILLING, "sql"), ids=lambda q: q.splitlines()[0].strip("- ")[:50])
def test_the_billing_queries_run_as_the_billing_role(road: Installation, query: str) -> None:
    """The role that reads views and nothing else."""
    tenant = road.new_tenant("docs")
    road.post(tenant, json=chat())
    road.rows(tenant, 1)

    answer = road.run("psql", "--billing", "-v", "ON_ERROR_STOP=1", "-c", query)

    assert 0 == answer.returncode, answer.stderr
    assert "row" in answer.stdout


def test_the_billing_role_cannot_read_a_table(road: Installation) -> None:
    """Keys are not for billing."""
    answer = road.run("psql", "--billing", "-v", "ON_ERROR_STOP=1", "-c", "select * from api_key")

    assert 0 != answer.returncode
    assert "permission denied" in answer.stderr


def test_the_readme_stays_a_front_door() -> None:
    """120 lines."""
    assert len(README.splitlines()) <= 120


@pytest.mark.parametrize("page", ["README.md", "docs/concepts.md", "docs/billing.md", "docs/operations.md"])
def test_links_lead_somewhere(page: str) -> None:
    """Relative links name files that exist."""
    path = REPOSITORY / page
    links = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text())

    assert [] == [link for link in links if not Path(os.path.normpath(path.parent / link)).exists()]
