# SPDX-License-Identifier: Apache-2.0
"""The lint finds each mistake that Envoy accepts in silence, and nothing in a sound configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from chassis.errors import Invalid
from control import located_yaml
from control.envoy_lint import lint
from control.envoy_resources import publish
from control.finding import Finding
from control.located_yaml import load

_REPOSITORY = Path(__file__).resolve().parents[2]
_FIXTURES = _REPOSITORY / "tests/fixtures/envoy"
_GOOD = _FIXTURES / "good.yaml"
_MISTAKES = sorted((_FIXTURES / "mistakes").glob("*.yaml"))


def make(mistake: Path, directory: Path) -> tuple[Path, dict[str, Any]]:
    """Make one mistake in the sound configuration; the file and what the mistake's own file says."""
    document = yaml.safe_load(mistake.read_text())
    good = _GOOD.read_text()
    assert good.count(document["instead_of"]) == 1, f"{mistake.name} must name one place in good.yaml"
    path = directory / "envoy.yaml"
    path.write_text(good.replace(document["instead_of"], document["write"]))
    return path, document


def lint_file(path: Path) -> list[Finding]:
    """What the lint finds in a file."""
    return lint(load(path), path.name)


def test_a_sound_configuration_gives_no_finding() -> None:
    """The smallest one."""
    assert [] == lint_file(_GOOD)


def test_the_projects_own_configuration_gives_no_finding(tmp_path: Path) -> None:
    """The bootstrap, and the clusters and routes that are built from a models document."""
    models = tmp_path / "models.yaml"
    models.write_text(
        "models:\n"
        '- {name: tiny, engine: dynamo, endpoints: ["127.0.0.1:8000"]}\n'
        '- {name: far, engine: openai, endpoints: ["models.example:8000"]}\n'
    )
    publish(models, tmp_path)

    found = [
        finding
        for path in (_REPOSITORY / "envoy/envoy.yaml", tmp_path / "clusters.yaml", tmp_path / "routes.yaml")
        for finding in lint_file(path)
    ]

    assert [] == found


def test_there_are_mistakes_to_find() -> None:
    """A test over no file would hold for ever."""
    assert len(_MISTAKES) >= 40


@pytest.mark.parametrize("mistake", _MISTAKES, ids=lambda path: path.stem)
def test_a_mistake_gives_its_finding_and_no_other(tmp_path: Path, mistake: Path) -> None:
    """As many findings as the file expects, one for each."""
    path, document = make(mistake, tmp_path)

    found = lint_file(path)

    unmet = [text for text in document["expects"] if not any(text in finding.what for finding in found)]
    assert ([], len(document["expects"])) == (unmet, len(found)), list(map(str, found))


@pytest.mark.parametrize("mistake", _MISTAKES, ids=lambda path: path.stem)
def test_a_finding_names_the_line_and_the_mend(tmp_path: Path, mistake: Path) -> None:
    """One line a person can act on: where, what, how."""
    path, _ = make(mistake, tmp_path)
    lines = path.read_text().splitlines()

    for finding in lint_file(path):
        assert 0 < finding.line <= len(lines)
        assert lines[finding.line - 1].strip()
        assert finding.mend.endswith(".")
        assert f"envoy.yaml:{finding.line}: {finding.what} {finding.mend}" == str(finding)
        assert "\n" not in str(finding)


def test_a_finding_is_told_once_for_an_alias(tmp_path: Path) -> None:
    """An anchor used twice is one place in the file."""
    path = tmp_path / "envoy.yaml"
    text = _GOOD.read_text().replace("  - name: pool\n    type: STATIC\n    connect_timeout: 1s\n", "  - &pool\n    name: pool\n    type: STATIC\n")
    path.write_text(f"{text}  - *pool\n")

    assert ["cluster pool leaves connect_timeout to Envoy's default."] == [finding.what for finding in lint_file(path)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("admin: {}\nadmin: {}\n", ":2: not YAML: admin is given twice."),
        ("failure_mode_allow: 1\nfailureModeAllow: 2\n", ":2: not YAML: failureModeAllow is given twice."),
        ("1: x\n", ":1: not YAML: 1 is not a name."),
        ("- a\n", "not a mapping."),
        ("a: [\n", ":2: not YAML: "),
        ("a: " + "[" * 5000, "nested too deep."),
        ("", "not a mapping."),
    ],
)
def test_yaml_that_two_parsers_could_read_differently_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    """With its line; nothing of it is linted."""
    path = tmp_path / "envoy.yaml"
    path.write_text(text)

    with pytest.raises(Invalid) as refused:
        load(path)

    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [b"a: \xff\n", b"\xff\xfe"])
def test_a_file_that_is_not_text_is_refused(tmp_path: Path, content: bytes) -> None:
    """In one line."""
    path = tmp_path / "envoy.yaml"
    path.write_bytes(content)

    with pytest.raises(Invalid, match=r"envoy\.yaml: not UTF-8\.$"):
        load(path)


def test_a_file_is_read_up_to_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the bound, and not a byte above."""
    path = tmp_path / "envoy.yaml"
    path.write_text("a: 1\n")

    monkeypatch.setattr(located_yaml, "_BYTES_MAX", 5)
    assert {"a": 1} == load(path)
    monkeypatch.setattr(located_yaml, "_BYTES_MAX", 4)
    with pytest.raises(Invalid, match="larger than 4 bytes"):
        load(path)
