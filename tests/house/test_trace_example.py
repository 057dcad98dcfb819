# SPDX-License-Identifier: Apache-2.0
"""The example of a collector of traces: whole, and about attributes that spans have."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from chassis.telemetry import traces


@pytest.fixture
def example(repository: Path) -> dict[str, Any]:
    """As the file says it."""
    document = yaml.safe_load((repository / "charts/monitoring/traces.yaml").read_text("utf-8"))
    assert isinstance(document, dict)
    return document


def test_each_part_of_its_pipelines_is_set_and_each_that_is_set_is_used(example: dict[str, Any]) -> None:
    """A part that no pipeline names does nothing, in silence."""
    for kind in ("receivers", "processors", "exporters"):
        used = {name for pipeline in example["service"]["pipelines"].values() for name in pipeline[kind]}
        assert set(example[kind]) == used


def test_it_listens_where_the_docs_send_spans_and_keeps_what_services_mark(example: dict[str, Any], repository: Path) -> None:
    """The attribute of a refusal is spelled once in the code; errors are a span's status."""
    policies = {policy["name"]: policy for policy in example["processors"]["tail_sampling"]["policies"]}
    operations = (repository / "docs/operations.md").read_text("utf-8")

    assert len(policies) == len(example["processors"]["tail_sampling"]["policies"])
    assert all(policy["type"] in policy for policy in policies.values())
    assert f'"{policies["refused"]["string_attribute"]["key"]}"' in inspect.getsource(traces)
    assert "StatusCode.ERROR" in inspect.getsource(traces)
    port = urlsplit(f"//{example['receivers']['otlp']['protocols']['http']['endpoint']}").port
    assert f"PEAJE_TRACES_URL=http://127.0.0.1:{port}" in operations
