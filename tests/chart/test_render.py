# SPDX-License-Identifier: Apache-2.0
"""Each preset renders, Helm has nothing against the chart, and Kubernetes would take every object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import jsonschema
import kubernetes_validate
import kubernetes_validate.utils
import pytest
import yaml
from helm_python.chart import lint
from helm_python.errors import HelmError

from chassis.models import ModelCatalogue
from extauth.adapters import document as identity_document
from tests.chart.rendering import CHART, PRESETS, Object, find, identity, preset, render, rendered

#: The oldest that the chart says it runs on, one between, the newest whose schemas there are.
KUBERNETES: Final = ("1.29", "1.33", "1.37")
_WARNING: Final = 2

#: Kinds that Kubernetes itself does not have: the fields that we set, a part of their operators' CRDs.
_TEXT: Final = {"type": "string", "minLength": 1}
_DURATION: Final = {"type": "string", "pattern": "^([0-9]+(h|m|s))+$"}
_FOREIGN: Final[Mapping[str, Any]] = {
    "cert-manager.io/v1/Certificate": {
        "type": "object", "additionalProperties": False, "required": ["secretName", "issuerRef", "dnsNames"],
        "properties": {
            "secretName": _TEXT, "commonName": {"type": "string", "maxLength": 64},
            "dnsNames": {"type": "array", "minItems": 1, "items": _TEXT}, "duration": _DURATION, "renewBefore": _DURATION,
            "privateKey": {
                "type": "object", "additionalProperties": False,
                "properties": {"algorithm": {"enum": ["RSA", "ECDSA", "Ed25519"]}, "size": {"type": "integer"}, "rotationPolicy": {"enum": ["Never", "Always"]}},
            },
            "usages": {"type": "array", "items": {"enum": ["digital signature", "key encipherment", "server auth", "client auth"]}},
            "issuerRef": {
                "type": "object", "additionalProperties": False, "required": ["name"],
                "properties": {"name": _TEXT, "kind": {"enum": ["Issuer", "ClusterIssuer"]}, "group": _TEXT},
            },
        },
    },
    "monitoring.coreos.com/v1/PodMonitor": {
        "type": "object", "additionalProperties": False, "required": ["selector", "podMetricsEndpoints"],
        "properties": {
            "selector": {"type": "object", "required": ["matchLabels"]},
            "podMetricsEndpoints": {
                "type": "array", "minItems": 1,
                "items": {
                    "type": "object", "additionalProperties": False,
                    "properties": {
                        "port": {"type": "string", "maxLength": 15}, "path": _TEXT, "interval": _DURATION,
                        "relabelings": {"type": "array", "items": {"type": "object", "required": ["targetLabel", "replacement"]}},
                    },
                },
            },
        },
    },
    "monitoring.coreos.com/v1/PrometheusRule": {
        "type": "object", "additionalProperties": False, "required": ["groups"],
        "properties": {"groups": {"type": "array", "minItems": 1, "items": {"type": "object", "required": ["name", "rules"]}}},
    },
}  # fmt: skip


#: What no preset has, because it names what is around it.
_AROUND: Final[Mapping[str, Any]] = {
    "traces": {"url": "http://otel-collector.observability:4318", "percent": 0.5},
    "networkPolicy": {
        "egress": {
            "enabled": True,
            "postgres": [{"to": [{"ipBlock": {"cidr": "10.1.0.0/24"}}], "ports": [{"port": 5432}]}],
            "redis": [{"to": [{"ipBlock": {"cidr": "10.1.1.0/24"}}], "ports": [{"port": 6379}]}],
            "models": [{"to": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "models"}}}]}],
            "issuers": [{"to": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": ["10.0.0.0/8"]}}], "ports": [{"port": 443}]}],
            "webhooks": [{"to": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": ["10.0.0.0/8"]}}], "ports": [{"port": 443}]}],
            "traces": [{"to": [{"podSelector": {"matchLabels": {"app": "otel"}}, "namespaceSelector": {}}], "ports": [{"port": 4318}]}],
        }
    },
}


def _everything() -> list[Object]:
    """Each different object of all presets, once; and of both placements with all that no preset has."""
    releases = [*map(rendered, PRESETS), *(render({"placement": placement} | dict(_AROUND)) for placement in ("separate", "sidecar"))]
    different = {json.dumps(one, sort_keys=True): one for objects in releases for one in objects}
    return list(different.values())


@pytest.mark.parametrize("name", PRESETS)
def test_helm_has_nothing_against_a_preset(name: str) -> None:
    """Not even a warning."""
    report = lint(CHART, preset(name), strict=True, kube_version="v1.29.0")

    assert [] == report["errors"]
    assert [] == [message for message in report["messages"] if message["severity"] >= _WARNING]


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_takes_every_object(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own schemas, strictly: a field that it does not know is an error."""
    seen = 0
    # Reads all definitions anew for each object.
    monkeypatch.setattr(kubernetes_validate.utils, "schema_contents", lru_cache(kubernetes_validate.utils.schema_contents))
    for one in _everything():
        schema = _FOREIGN.get(f"{one['apiVersion']}/{one['kind']}")
        if schema is not None:
            jsonschema.validate(one["spec"], schema)
            continue
        try:
            kubernetes_validate.validate(one, version, strict=True)
        except kubernetes_validate.ValidationError as exc:
            pytest.fail(f"{identity(one)} at {list(exc.path)}: {exc.message}")
        seen += 1
    assert seen > 50


def test_the_schemas_would_refuse_what_is_wrong() -> None:
    """A validation that cannot fail proves nothing."""
    broken = json.loads(json.dumps(find(rendered("default"), "Deployment", "peaje-extauth")))
    broken["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}

    with pytest.raises(kubernetes_validate.ValidationError, match="livenesProbe"):
        kubernetes_validate.validate(broken, KUBERNETES[0], strict=True)


@pytest.mark.parametrize("name", PRESETS)
def test_every_object_has_a_name_of_its_own(name: str) -> None:
    """Two of a kind with one name would be one."""
    names = [identity(one) for one in rendered(name)]

    assert sorted(set(names)) == sorted(names)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"gatway": {}}, "gatway"),
        ({"placement": "daemonset"}, "placement"),
        ({"gateway": {"replicas": 0}}, "replicas"),
        ({"image": {"services": {"repository": "peaje", "tag": "latest"}}}, "tag"),
        ({"modelsDocument": {"models": []}}, "models"),
        ({"control": {"issuer": "http://control.example.com"}}, "issuer"),
        ({"stores": {"postgres": {"existingSecret": ""}}}, "existingSecret"),
        ({"extauth": {"env": {"peaje-lower": "x"}}}, "peaje-lower"),
        ({"bindAddress": "127.0.0.1"}, "bindAddress"),
        ({"gateway": {"heapMiB": 1024}}, r"heapMiB is 1024.*1Gi"),
        ({"gateway": {"heapMiB": 1000, "resources": {"limits": {"memory": "1.0G"}}}}, r"heapMiB is 1000.*1\.0G"),
        ({"gateway": {"resources": {"limits": {"memory": "900m"}}}}, "900m is no amount of memory"),
        ({"gateway": {"autoscaling": {"minReplicas": 11}}}, r"gateway\.autoscaling\.minReplicas is 11.*10"),
        ({"placement": "sidecar", "gateway": {"autoscaling": {"maxReplicas": 1}}}, r"gateway\.autoscaling\.minReplicas is 2.*1"),
        ({"metering": {"autoscaling": {"maxReplicas": 1}}}, r"metering\.autoscaling\.minReplicas is 2.*1"),
    ],
)
def test_values_that_cannot_be_right_are_refused(values: dict[str, Any], complaint: str) -> None:
    """Named, before anything is rendered."""
    with pytest.raises(HelmError, match=complaint):
        render(values)


@pytest.mark.parametrize(
    "values",
    [
        {"gateway": {"heapMiB": 953, "resources": {"limits": {"memory": "1000000000"}}}},
        {"gateway": {"heapMiB": 1536, "resources": {"limits": {"memory": "1.6Gi"}}}},
        {"gateway": {"autoscaling": {"enabled": False, "minReplicas": 11}}},
        {"placement": "sidecar", "metering": {"autoscaling": {"maxReplicas": 1}}},
    ],
)
def test_values_that_only_look_like_it_are_taken(values: dict[str, Any]) -> None:
    """Memory in each of Kubernetes' units; bounds of scalers that are not made."""
    assert render(values)


def test_the_documents_of_the_values_are_those_of_a_laptop() -> None:
    """What the chart takes for the models and the identity is what our own readers take."""
    identity_text = {"issuers": [{"name": "control", "kind": "service_accounts"}]}
    documents = find(render({"identityDocument": identity_text}), "ConfigMap", "peaje-documents")["data"]

    assert ["example"] == ModelCatalogue.parse(yaml.safe_load(documents["models.yaml"]), source="models").names
    assert identity_text == yaml.safe_load(documents["identity.yaml"])


def test_an_identity_document_is_read_by_extauth(tmp_path: Path) -> None:
    """The rendered text, by the reader that extauth has."""
    documents = find(
        render({"identityDocument": {"issuers": [{"name": "control", "kind": "service_accounts"}]}}), "ConfigMap", "peaje-documents"
    )["data"]
    (tmp_path / "identity.yaml").write_text(documents["identity.yaml"])

    assert identity_document.load_whole(tmp_path / "identity.yaml", home=tmp_path)


@pytest.mark.parametrize("placement", ["separate", "sidecar"])
def test_an_ipv6_cluster_is_listened_to(placement: str) -> None:
    """Brackets where a port follows, none where it does not."""
    objects = render({"placement": placement, "bindAddress": "::"})
    text = json.dumps(objects)

    assert "0.0.0.0" not in text
    assert ("[::]:9001" in text) == (placement == "separate")


def test_rules_and_dashboards_are_those_of_every_installation() -> None:
    """As they are made; and jobs have the names that the rules rely on."""
    monitoring = CHART.parent / "monitoring"
    dashboards = {path.name: path.read_text() for path in (monitoring / "dashboards").glob("*.json")}
    jobs = {
        rule["replacement"] for endpoint in find(rendered("large"), "PodMonitor", "peaje")["spec"]["podMetricsEndpoints"]
        for rule in endpoint["relabelings"] if rule["targetLabel"] == "job"
    }  # fmt: skip
    scraped = yaml.safe_load((monitoring / "prometheus.yaml").read_text())["scrape_configs"]

    assert yaml.safe_load((monitoring / "rules/peaje.yaml").read_text()) == find(rendered("large"), "PrometheusRule", "peaje")["spec"]
    assert dashboards == find(rendered("large"), "ConfigMap", "peaje-dashboards")["data"]
    assert {config["job_name"] for config in scraped} == jobs
