# SPDX-License-Identifier: Apache-2.0
"""The billing dashboard's questions, asked of a ledger by the role that may read views and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psycopg
import pytest

from control.monitoring.dashboards import panels
from tests.journals import collect, exchanges, write_apart

QUERIES = {panel.title: panel.queries[0][0] for panel in panels() if panel.is_sql}


@pytest.mark.parametrize("title", QUERIES)
def test_each_question_has_an_answer(ledger_url: str, tmp_path: Path, title: str) -> None:
    """With the columns that it names."""
    live = write_apart(tmp_path / "journal/journal.jsonl", exchanges(20))
    collect(ledger_url, live)

    with psycopg.connect(ledger_url) as connection:
        connection.execute("set local role peaje_billing")
        query: Any = QUERIES[title]
        found = connection.execute(query)

    assert found.description
