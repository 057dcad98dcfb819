# SPDX-License-Identifier: Apache-2.0
"""
An upgrade from the last released chart does what charts/peaje/UPGRADING.md says, and nothing that Kubernetes refuses.

After a release: `python -m tests.chart.test_upgrade` writes the new snapshot, and UPGRADING.md gets a section that
starts from it.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from tests.chart.rendering import CHART, Object, find, identity, rendered

_GOLDEN: Final = Path(__file__).parent / "golden"
_DOCUMENT: Final = CHART / "UPGRADING.md"
#: Said by each release anew, of every object.
_OF_EACH_RELEASE: Final = ("helm.sh/chart", "app.kubernetes.io/version")
#: Kubernetes refuses a change of these.
_FIXED: Final = {
    "StatefulSet": (("selector",), ("serviceName",), ("volumeClaimTemplates",), ("podManagementPolicy",)),
    "Deployment": (("selector",),),
    "PersistentVolumeClaim": (("accessModes",), ("storageClassName",)),
    "Service": (("clusterIP",),),
}


def changes(old: list[Object], new: list[Object]) -> list[str]:
    """One line for each field that differs: `Kind/name path: old -> new`; texts of a ConfigMap by their line."""
    before, after = ({identity(one): one for one in objects} for objects in (old, new))
    found = [f"{name} removed" for name in sorted(before.keys() - after.keys())]
    found += [f"{name} added" for name in sorted(after.keys() - before.keys())]
    for name in sorted(before.keys() & after.keys()):
        found += [f"{name} {line}" for line in _differences(before[name], after[name], "")]
    return found


def refused(old: list[Object], new: list[Object]) -> list[str]:
    """Fields that cannot be changed and were."""
    after = {identity(one): one for one in new}
    return [
        f"{identity(one)} {path}"
        for one in old if identity(one) in after
        for path in _FIXED.get(one["kind"], ())
        if _at(one["spec"], path) != _at(after[identity(one)]["spec"], path)
    ]  # fmt: skip


def _at(value: Any, path: tuple[str, ...]) -> Any:
    for step in path:
        value = (value or {}).get(step)
    return value


def _differences(old: Any, new: Any, path: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if key not in _OF_EACH_RELEASE:
                yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _differences(before, after, f"{path}[{index}]")
    elif old != new:
        yield f"{path}: {_say(old)} -> {_say(new)}"


def _say(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value, sort_keys=True)
    return text if len(text) <= 80 and "\\n" not in text else f"({len(text)} characters)"


def _released() -> tuple[str, list[Object]]:
    (path,) = _GOLDEN.glob("*.yaml")
    return path.stem, [one for one in yaml.safe_load_all(path.read_text()) if one]


def _documented(version: str) -> list[str]:
    """The lines that UPGRADING.md has in its section about *version*; none where it says that nothing changes."""
    section = re.search(rf"^## From {re.escape(version)}\n(.*?)(?=^## |\Z)", _DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    assert section is not None, f"{_DOCUMENT.name} has no section about {version}"
    lines = re.findall(r"^- `(.+)`", section[1], re.MULTILINE)
    assert lines or "Nothing." in section[1]
    return lines


def test_an_upgrade_changes_what_is_documented() -> None:
    """Scripts and bootstrap are envoy/'s own history and left out here; a change of theirs shows as the pods' checksum."""
    version, old = _released()
    found = [line for line in changes(old, list(rendered("default"))) if not line.startswith("ConfigMap/peaje-envoy data") and "checksum/envoy" not in line]

    assert _documented(version) == found


def test_an_upgrade_asks_for_nothing_that_kubernetes_refuses() -> None:
    """Selectors, names of volumes and of the StatefulSet's Service."""
    _, old = _released()

    assert [] == refused(old, list(rendered("default")))


def test_a_change_is_seen() -> None:
    """Added, removed, changed deep inside; a new version's own labels are no change."""
    old, new = (copy.deepcopy(list(rendered("default"))) for _ in range(2))
    new.remove(find(new, "PodDisruptionBudget", "peaje-metering"))
    for one in new:
        one["metadata"]["labels"]["helm.sh/chart"] = "peaje-9.9.9"
    find(new, "StatefulSet", "peaje-gateway")["spec"]["template"]["spec"]["containers"][0]["env"][0]["value"] = "/elsewhere"
    find(new, "StatefulSet", "peaje-gateway")["spec"]["serviceName"] = "other"

    assert [
        "PodDisruptionBudget/peaje-metering removed",
        'StatefulSet/peaje-gateway spec.serviceName: "peaje-gateway-pods" -> "other"',
        'StatefulSet/peaje-gateway spec.template.spec.containers[0].env[0].value: "/var/lib/peaje" -> "/elsewhere"',
    ] == changes(old, new)
    assert ["StatefulSet/peaje-gateway ('serviceName',)"] == refused(old, new)


@pytest.mark.parametrize("version", ["0.0.9", "9.9.9"])
def test_a_version_that_is_not_documented_is_missed(version: str) -> None:
    """A release without its section fails here."""
    with pytest.raises(AssertionError, match="no section"):
        _documented(version)


def _write() -> None:
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["version"]
    for path in _GOLDEN.glob("*.yaml"):
        path.unlink()
    objects = copy.deepcopy([dict(one) for one in rendered("default")])
    scripts = find(objects, "ConfigMap", "peaje-envoy")["data"]
    scripts.update(dict.fromkeys(scripts, "see envoy/"))
    text = yaml.safe_dump_all(objects, sort_keys=False, width=160)
    (_GOLDEN / f"{version}.yaml").write_text(f"# SPDX-License-Identifier: Apache-2.0\n{text}")


if __name__ == "__main__":
    _write()
