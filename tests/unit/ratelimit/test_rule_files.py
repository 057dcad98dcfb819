# SPDX-License-Identifier: Apache-2.0
"""Operators' files: each mistake by its line, what does nothing, the bounds; and a directory that changes."""

from __future__ import annotations

import os
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from control.cli import check
from ratelimit.adapters import rule_files
from ratelimit.adapters.rule_files import RuleFiles, load
from ratelimit.core.rls import document
from ratelimit.core.rls.document import PATTERNS_MAX, combine, read
from ratelimit.core.rls.fields import DEPTH_MAX, METADATA_MAX
from ratelimit.generic import Options, WhenUnavailable
from ratelimit.server import Settings

GOOD = "domain: d\ndescriptors:\n- key: a\n  rate_limit: {unit: day, requests_per_unit: 1}\n"
LIMIT = "rate_limit: {unit: day, requests_per_unit: 1}"


def told(text: str) -> tuple[list[str], list[str]]:
    """Faults and remarks, without the file's name."""
    found = read(text, file="f")
    return [str(one).removeprefix("f:") for one in found.faults], [str(one).removeprefix("f:") for one in found.remarks]


def of(*lines: str) -> str:
    """A file of domain d with these lines of descriptors."""
    return "domain: d\ndescriptors:\n" + "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("", [" the file is empty."]),
        ("a: [", ["not YAML"]),
        ("a: \x01", ["not YAML"]),
        ("--- \nb: 1\n---\nc: 1", ["3: not YAML"]),
        ("[a]", ["1: a file is not a mapping.", " domain is missing."]),
        ("descriptors: []", [" domain is missing."]),
        ("domain: ''", ["1: domain is missing."]),
        ("domain: [d]", ["1: a text is a mapping or a list.", "1: domain is missing."]),
        ("domain: d\ndescriptors: {}", ["2: descriptors is not a list."]),
        (of("- a", "- {key: b}"), ["3: a descriptor is not a mapping."]),
        (of("- value: x"), ["3: a descriptor has no key."]),
        (of("- key: ''"), ["3: a descriptor has no key."]),
        (of("- key: a*"), ["3: key 'a*' has a *."]),
        (of("- key: a", "- key: b", "- key: a"), ["5: descriptor 'a' with value '' is there twice."]),
        (of("- {key: a, value: x}", "- {key: a, value: x}"), ["4: descriptor 'a' with value 'x' is there twice."]),
        (of("- key: a", "  key: b"), ["4: key is given twice."]),
        (of("- key: a", "  ratelimit: {}"), ["4: ratelimit is not known. Write rate_limit."]),
        (of("- key: a", "  7: x"), ["4: 7 is not known. Here are key, value"]),
        (of("- key: a", "  [x]: x"), ["4: a key that is no text is not known."]),
        (of("- key: a", "  rate_limit: 5"), ["4: rate_limit is not a mapping.", "4: unit is missing.", "4: requests_per_unit is missing."]),
        (of("- key: a", "  rate_limit:", "    requests_per_unit: 1"), ["5: unit is missing."]),
        (of("- key: a", "  rate_limit:", "    unit: day"), ["5: requests_per_unit is missing."]),
        (of("- key: a", "  rate_limit:", "    unit: fortnight", "    requests_per_unit: 1"), ["5: unit 'fortnight' is none."]),
        (of("- key: a", "  rate_limit: {unit: unknown, requests_per_unit: 1}"), ["4: unit 'unknown' is none."]),
        *(
            (of("- key: a", f"  rate_limit: {{unit: day, requests_per_unit: {number}}}"), [f"4: requests_per_unit {shown} is no number"])
            for number, shown in (
                ("-1", "'-1'"), ("4294967296", "'4294967296'"), ("1.5", "'1.5'"), ("'5'", "'5'"), ("many", "'many'"), ("[1]", "a mapping or a list"),
                ("!!int many", "'many'"), ("null", "'null'"), ("true", "'true'"),
            )
        ),
        (of("- key: a", "  rate_limit:", "    requests: 1", "    unit: day"), ["5: requests is not known.", "5: requests_per_unit is missing."]),
        (of("- key: a", "  rate_limit: {unlimited: true, unit: day}"), ["4: an unlimited rule has a unit."]),
        (of("- key: a", f"  {LIMIT}", "  shadow_mode: maybe"), ["5: 'maybe' is neither true nor false."]),
        (of("- key: a", f"  {LIMIT}", "  share_threshold: true"), ["5: share_threshold without a pattern."]),
        (of("- key: a", f"  {LIMIT}", f"  metadata: {{x: 1{'0' * 400}}}"), ["5: '1000000000000000000000000000000000000000' is no number that"]),
        (of("- key: a", f"  {LIMIT}", "  metadata: {x: [.inf, .nan, 1.5]}"), ["5: '.inf' is no", "5: '.nan' is no"]),
        (of("- key: a", f"  {LIMIT}", "  metadata: x"), ["5: metadata is not a mapping."]),
        (of("- key: a", "  rate_limit: {unit: day, requests_per_unit: 1, replaces: x}"), ["4: replaces is not a list."]),
        (of("- key: a", "  rate_limit: {unit: day, requests_per_unit: 1, replaces: [{}]}"), ["4: replaces has an entry without a name."]),
        (of("- key: a", "  rate_limit: {unit: day, requests_per_unit: 1, name: n, replaces: [{name: n}]}"), ["4: rule 'n' replaces itself."]),
        (of("- &a", "  key: a", "  descriptors: [*a]"), ["5: nested too deep."]),
        ("[" * (DEPTH_MAX + 1), ["1: nested too deep."]),
        ("{a: " * 100_000, ["1: nested too deep."]),
        (of(*(f"- {{key: a, value: x{n}*}}" for n in range(PATTERNS_MAX + 1))), [f"{PATTERNS_MAX + 3}: more than {PATTERNS_MAX} patterns"]),
        (of("- <<: [x]", "  key: a"), ["3: << names something else than mappings."]),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_line(text: str, faults: list[str]) -> None:
    """All of them at once, and nothing that only follows from them as a remark."""
    found, remarks = told(text)

    assert len(faults) == len(found), found
    assert all(expected in line for expected, line in zip(faults, found, strict=True)), found
    assert [] == remarks


@pytest.mark.parametrize(
    ("text", "remarks"),
    [
        ("domain: d", ["1: domain 'd' has no descriptors."]),
        (of("- key: a"), ["3: descriptor 'a' has no effect"]),
        (of("- {key: a, value: x}"), ["3: descriptor 'a' has no effect"]),
        # An exception needs something to except from.
        (of("- {key: a, value: x}", f"- {{key: a, {LIMIT}}}"), []),
        (of("- {key: a, value: x1}", f"- {{key: a, value: x*, {LIMIT}}}"), []),
        (of("- {key: a, value: y}", f"- {{key: a, value: x*, {LIMIT}}}"), ["3: descriptor 'a' has no effect"]),
        (of(f"- {{key: a, value: x*, {LIMIT}}}", f"- {{key: a, value: xy*, {LIMIT}}}"), ["4: value 'xy*' has no effect"]),
        (of(f"- {{key: a, value: xy*, {LIMIT}}}", f"- {{key: a, value: x*, {LIMIT}}}"), []),
        (of(f"- {{key: a, {LIMIT}}}", f"- {{key: a, value: '*', {LIMIT}}}"), ["3: key 'a' without a value has no effect"]),
        (of("- key: a", f"  {LIMIT}", "  unit: day"), ["5: unit has no effect"]),
        (of("- key: a", "  rate_limit: {unit: day, requests_per_unit: 1, shadow_mode: true}"), ["4: shadow_mode has no effect"]),
        (of("- key: a", "  shadow_mode: true", f"  descriptors: [{{key: b, {LIMIT}}}]"), ["4: shadow_mode has no effect"]),
        (of("- key: a", "  rate_limit: {unlimited: yes, requests_per_unit: 1}", "  quota_mode: on"), ["4: requests_per_unit has", "5: quota_mode has"]),
        (of(f"- {{key: a, detailed_metric: true, value_to_metric: true, {LIMIT}}}"), ["3: value_to_metric has no effect"]),
        (of("- key: a", "  rate_limit: {unit: day, requests_per_unit: 1, replaces: [{name: n}]}"), ["4: replaces 'n' has no effect"]),
    ],
)  # fmt: skip
def test_what_does_nothing_is_told_and_taken(text: str, remarks: list[str]) -> None:
    """It does nothing elsewhere either: the file is good."""
    faults, found = told(text)

    assert [] == faults
    assert len(remarks) == len(found), found
    assert all(expected in line for expected, line in zip(remarks, found, strict=True)), found


def test_the_guides_example_is_a_good_file() -> None:
    """What operators copy first has neither fault nor remark."""
    guide = (Path(__file__).parents[3] / "docs/ratelimit-rls.md").read_text()
    blocks = [textwrap.dedent(block) for block in re.findall(r"^ *```yaml\n(.*?)^ *```$", guide, re.DOTALL | re.MULTILINE)]
    [example] = [block for block in blocks if "domain: shop\ndescriptors" in block]

    assert ([], []) == told(example)


def test_merged_and_repeated_parts_of_a_file_are_read_as_yaml_has_them() -> None:
    """Anchors and `<<`; what is written beside a merge wins, of two that are merged the first."""
    made = read(of(
        "- &one", "  key: a", "  rate_limit: &limit {unit: day, requests_per_unit: 3}",
        "- {<<: *one, key: b}",
        "- {key: c, rate_limit: {<<: [{unit: hour}, *limit]}, metadata: {<<: {x: 1, y: 1}, y: 2}}",
    ), file="f")  # fmt: skip

    rules, faults = combine([made])
    assert [] == faults
    bound = [rules.match("d", [(key, "x")]) for key in "abc"]
    assert [("day", 3), ("day", 3), ("hour", 3)] == [
        (one.rule.unit.value, one.rule.requests_per_unit) for one in bound if one and one.rule.unit
    ]
    assert bound[2] is not None
    assert {"x": 1, "y": 2} == bound[2].rule.metadata


def test_aliases_cannot_make_a_small_file_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten levels of ten, of metadata, of descriptors and of merges: each stops at its bound, or is read once."""
    metadata = ["- key: a", f"  {LIMIT}", "  metadata:", "    x0: &x0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    metadata += [f"    x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 10)}]" for n in range(1, 10)]
    assert any("too much metadata" in line for line in told(of(*metadata))[0])
    assert METADATA_MAX < 10**5

    monkeypatch.setattr(document, "DESCRIPTORS_MAX", 1_000)
    levels = ["- key: l0", f"  descriptors: &l0 [{', '.join(f'{{key: k{n}}}' for n in range(10))}]"]
    for level in range(1, 10):
        inner = ", ".join(f"{{key: k{n}, descriptors: *l{level - 1}}}" for n in range(10))
        levels += [f"- key: l{level}", f"  descriptors: &l{level} [{inner}]"]
    assert any("more than 1000 descriptors" in line for line in told(of(*levels))[0])

    merges = ["- &m0 {key: m0}", *(f"- &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 10)}], key: m{n}}}" for n in range(1, 40))]
    assert [] == told(of(*merges))[0]


_WORDS = st.sampled_from([
    "key", "value", "rate_limit", "descriptors", "unit", "requests_per_unit", "unlimited", "name", "replaces", "metadata", "shadow_mode",
    "share_threshold", "<<", "a", "x*", "day", "!!int ''", "!!bool x", "!!float x", "!!int 0b", "1:60", "-0", "0x", ".nan", "~", "yes",
    "2026-01-01", "!!binary x", "!x y", "&a b", "*a", "''", "é", "\x07", "=", "\t",
])  # fmt: skip
_NODES = st.recursive(
    _WORDS,
    lambda inner: st.lists(inner, max_size=4).map(lambda items: f"[{', '.join(items)}]")
    | st.lists(st.tuples(_WORDS, inner), max_size=5).map(lambda pairs: "{" + ", ".join(f"{key}: {value}" for key, value in pairs) + "}"),
    max_leaves=20,
)


@settings(max_examples=300)
@given(text=_NODES.map(lambda node: f"domain: d\ndescriptors: {node}") | _NODES | st.text(max_size=60))
def test_whatever_a_file_holds_it_is_read_or_refused(text: str) -> None:
    """Nothing ends the thread that watches the files."""
    made = read(text, file="f")

    combine([made])
    assert made.domain or made.faults


def test_check_tells_faults_and_remarks_of_the_directory_that_ratelimit_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None where nobody has one; a named one must be there."""
    monkeypatch.setenv("PEAJE_HOME", str(tmp_path))
    assert [] == check._rules()

    (tmp_path / "ratelimit.d").mkdir()
    (tmp_path / "ratelimit.d/a.yaml").write_text(of("- key: a"))
    (tmp_path / "ratelimit.d/b.yaml").write_text("domain: peaje")
    assert [f"{tmp_path}/ratelimit.d/b.yaml:1:", f"{tmp_path}/ratelimit.d/a.yaml:3:"] == [line.split(" ")[0] for line in check._rules()]

    monkeypatch.setenv("PEAJE_RATELIMIT_CONFIG", str(tmp_path / "nowhere"))
    assert [f"{tmp_path}/nowhere: No such file or directory. Make the directory, or name another."] == check._rules()


def test_settings_say_what_envoyproxys_variables_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by its own name; nothing is on by itself."""
    assert (Options(), Path("ratelimit.d")) == (Settings().generic, Settings().config)

    for name, value in (("WHEN_UNAVAILABLE", "deny"), ("SHADOW_MODE", "true"), ("HEADERS", "true"), ("DYNAMIC_METADATA", "true")):
        monkeypatch.setenv(f"PEAJE_RATELIMIT_RLS_{name}", value)
    expected = Options(when_unavailable=WhenUnavailable.DENY, shadow_mode=True, headers=True, dynamic_metadata=True)
    assert expected == Settings().generic


def test_bounds_of_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of a file, files, descriptors of all: at the bound good, beyond it one clear fault."""
    path = tmp_path / "a.yaml"
    path.write_text(GOOD)
    monkeypatch.setattr(rule_files, "BYTES_MAX", len(GOOD))
    monkeypatch.setattr(rule_files, "FILES_MAX", 1)
    assert () == load(tmp_path).faults

    path.write_text(GOOD + "#")
    assert [f"{path}: larger than {len(GOOD)} bytes. Split it by domain."] == [str(one) for one in load(tmp_path).faults]
    path.write_text(GOOD)
    (tmp_path / "b.yaml").write_text(GOOD.replace("domain: d", "domain: e"))
    assert [f"{tmp_path}: 2 files. Keep to 1."] == [str(one) for one in load(tmp_path).faults]

    monkeypatch.setattr(rule_files, "FILES_MAX", 2)
    monkeypatch.setattr(document, "DESCRIPTORS_MAX", 1)
    assert [f"{tmp_path}/b.yaml:1: 2 descriptors in all files. Keep to 1."] == [str(one) for one in load(tmp_path).faults]


def test_a_domain_in_two_files_is_refused(tmp_path: Path) -> None:
    """Nobody could tell which one counts. What is no YAML, or hidden, is not read; the first is told."""
    (tmp_path / "a.yaml").write_text(GOOD)
    (tmp_path / "b.yml").write_text(GOOD)
    (tmp_path / ".hidden.yaml").write_text("[")
    (tmp_path / "c.yaml.bak").write_text("[")
    (tmp_path / "d.yaml").write_bytes(b"\xff")
    (tmp_path / "e.yaml").symlink_to(tmp_path / "nowhere")

    loaded = load(tmp_path)

    assert [
        f"{tmp_path}/d.yaml: not UTF-8. Save it as UTF-8.",
        f"{tmp_path}/e.yaml: No such file or directory. Let ratelimit's user read it, or remove it.",
        f"{tmp_path}/b.yml:1: domain 'd' is also in {tmp_path}/a.yaml. Keep a domain in one file.",
    ] == [str(one) for one in loaded.faults]
    assert [f"{tmp_path}/c.yaml.bak: is not read: only .yaml and .yml are."] == [str(one) for one in loaded.remarks]


def current() -> tuple[float, float, float]:
    """Reloads taken, reloads refused, whether what is on the disk is in force."""
    sample = REGISTRY.get_sample_value
    names = ("peaje_ratelimit_rule_reloads_total", {"outcome": "taken"}), ("peaje_ratelimit_rule_reloads_total", {"outcome": "refused"})
    return *(sample(*name) or 0 for name in names), sample("peaje_ratelimit_rules_current") or 0  # type: ignore[return-value]


def test_a_change_is_taken_whole_and_a_fault_keeps_the_last_good(tmp_path: Path) -> None:
    """Told once in the log, and by a metric for as long as it lasts."""
    directory = tmp_path / "ratelimit.d"
    files = RuleFiles(directory)
    assert not files.current.domains
    assert 1 == current()[2]  # nobody wants rules: nothing to alert on
    directory.mkdir()
    (directory / "a.yaml").write_text(GOOD)
    taken, refused, _ = current()

    files.reload_if_changed()
    good = files.current
    assert (("d",), (taken + 1, refused, 1)) == (good.domains, current())
    files.reload_if_changed()
    assert good is files.current

    # One bad file among good ones: nothing of the new is taken.
    (directory / "b.yaml").write_text("domain: e\ndescriptors: [{key: a, unknown: 1}]\n")
    (directory / "c.yaml").write_text(GOOD.replace("domain: d", "domain: f"))
    with capture_logs() as logs:
        for _ in range(3):
            files.reload_if_changed()
    assert good is files.current
    assert (taken + 1, refused + 1, 0) == current()
    assert [("rules_refused", 1)] == [(entry["event"], entry["count"]) for entry in logs]
    [fault] = logs[0]["faults"]
    assert fault.startswith(f"{directory}/b.yaml:2: unknown is not known. Here are key, value, rate_limit, ")

    (directory / "b.yaml").unlink()
    files.reload_if_changed()
    assert (("d", "f"), (taken + 2, refused + 1, 1)) == (files.current.domains, current())

    # As a ConfigMap is replaced: the same names, other files behind them.
    new = tmp_path / "new.yaml"
    new.write_text(GOOD.replace("requests_per_unit: 1", "requests_per_unit: 7"))
    os.replace(new, directory / "a.yaml")
    files.reload_if_changed()
    bound = files.current.match("d", [("a", "x")])
    assert bound is not None
    assert 7 == bound.rule.requests_per_unit


def test_a_directory_that_is_gone_keeps_the_rules_and_an_empty_one_ends_them(tmp_path: Path) -> None:
    """A lost mount is a fault; files that were removed are a decision."""
    directory = tmp_path / "ratelimit.d"
    directory.mkdir()
    (directory / "a.yaml").write_text(GOOD)
    files = RuleFiles(directory)

    directory.rename(tmp_path / "elsewhere")
    files.reload_if_changed()
    assert (("d",), 0) == (files.current.domains, current()[2])

    directory.mkdir()
    files.reload_if_changed()
    assert ((), 1) == (files.current.domains, current()[2])


def test_a_bad_file_at_the_start_leaves_no_rules_and_is_no_reason_not_to_start(tmp_path: Path) -> None:
    """Peaje's own limits do not depend on somebody's file."""
    (tmp_path / "a.yaml").write_text("domain: [")

    files: Any = RuleFiles(tmp_path)
    assert ((), 0) == (files.current.domains, current()[2])

    (tmp_path / "a.yaml").write_text(GOOD)
    files.reload_if_changed()
    assert (("d",), 1) == (files.current.domains, current()[2])
