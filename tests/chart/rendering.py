# SPDX-License-Identifier: Apache-2.0
"""Render the chart as `helm install` would, offline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import yaml
from helm_python.chart import Chart

REPOSITORY: Final = Path(__file__).resolve().parents[2]
CHART: Final = REPOSITORY / "charts/peaje"
#: What the chart is rendered with in the tests; the first is no file.
PRESETS: Final = ("default", "small", "large", "external-stores")
NAMESPACE: Final = "gateway"

#: libyaml's, where PyYAML was built with it: the scripts in a ConfigMap are long.
_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Object = Mapping[str, Any]


def preset(name: str) -> dict[str, Any]:
    """The values of a preset, as `--values` would read them."""
    return {} if name == "default" else yaml.safe_load((CHART / "presets" / f"{name}.yaml").read_text())


def render(values: Mapping[str, Any], *, name: str = "peaje", chart: Path = CHART) -> list[Object]:
    """Every object of a release; raises helm_python's errors for values that the schema refuses."""
    texts = _load(chart).render(dict(values), name=name, namespace=NAMESPACE)
    return [
        found
        for path, text in sorted(texts.items())
        if path.endswith(".yaml")
        for found in yaml.load_all(text, Loader=_LOADER)
        if found
    ]


@lru_cache(maxsize=4)
def _load(chart: Path) -> Chart:
    return Chart.load(chart)


@lru_cache(maxsize=8)
def rendered(name: str) -> tuple[Object, ...]:
    """Every object of a preset."""
    return tuple(render(preset(name)))


def identity(one: Object) -> str:
    """Kind and name."""
    return f"{one['kind']}/{one['metadata']['name']}"


def find(objects: Sequence[Object], kind: str, name: str) -> Any:
    """The one object of that kind and name."""
    (found,) = [one for one in objects if identity(one) == f"{kind}/{name}"]
    return found


def pods(objects: Sequence[Object]) -> Iterator[tuple[str, Any]]:
    """Each pod template, by what makes it."""
    for one in objects:
        if one["kind"] in ("StatefulSet", "Deployment", "Job"):
            yield identity(one), one["spec"]["template"]


def containers(objects: Sequence[Object]) -> Iterator[tuple[str, Any, Any]]:
    """Each container, init containers and sidecars too: where it is, itself, its pod's spec."""
    for where, template in pods(objects):
        spec = template["spec"]
        for one in [*spec.get("initContainers", []), *spec["containers"]]:
            yield f"{where}/{one['name']}", one, spec


def with_labels(objects: Sequence[Object], labels: Mapping[str, str]) -> list[tuple[str, Any]]:
    """Pod templates that a selector finds."""
    return [(where, pod) for where, pod in pods(objects) if labels.items() <= pod["metadata"]["labels"].items()]


def envoy_files(objects: Sequence[Object]) -> dict[str, str]:
    """What a release puts into Envoy's directory, by the paths that its volume gives them."""
    data = find(objects, "ConfigMap", "peaje-envoy")["data"]
    volumes = find(objects, "StatefulSet", "peaje-gateway")["spec"]["template"]["spec"]["volumes"]
    (volume,) = [one["configMap"] for one in volumes if one["name"] == "envoy-config"]
    assert "peaje-envoy" == volume["name"]
    assert data.keys() == {item["key"] for item in volume["items"]}
    return {item["path"]: data[item["key"]] for item in volume["items"]}


def mount_documents(objects: Sequence[Object], mounts: Path) -> None:
    """Lay out Envoy's files and the models as Kubernetes mounts them, with its `..data` indirection."""
    models = find(objects, "ConfigMap", "peaje-documents")["data"]["models.yaml"]
    for directory, files in (("envoy", envoy_files(objects)), ("models", {"models.yaml": models})):
        for path, text in files.items():
            target = mounts / directory / "..data" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
        for entry in (mounts / directory / "..data").iterdir():
            (mounts / directory / entry.name).symlink_to(Path("..data") / entry.name)


def environment(container: Any) -> dict[str, str]:
    """What a container is told by value; what comes from a Secret or the pod itself is not in it."""
    return {variable["name"]: variable["value"] for variable in container.get("env", []) if "value" in variable}
