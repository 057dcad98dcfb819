# SPDX-License-Identifier: Apache-2.0
"""Compose, GitOps and Terraform: what can be said of them without Docker, a cluster or a cloud."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import hcl2
import pytest
import yaml

from chassis.models import ModelCatalogue
from control.laptop.parts import service_parts
from control.laptop.places import Ports
from control.laptop.scale import Scale
from tests.chart.rendering import CHART, find, render, rendered

_REPOSITORY: Final = Path(__file__).resolve().parents[2]
_EXAMPLES: Final = _REPOSITORY / "examples"
_TERRAFORM: Final = _EXAMPLES / "terraform/aws"
_COMPOSE: Final[Any] = yaml.safe_load((_REPOSITORY / "compose.yaml").read_text())
_STORES: Final = {"postgres", "valkey"}
_VERSION: Final = yaml.safe_load((CHART / "Chart.yaml").read_text())["version"]


# --- compose.yaml ---------------------------------------------------------------------------------


def test_compose_has_the_parts_of_a_laptop() -> None:
    """Each with the command that `up` gives it; and what only a container needs."""
    laptop = {
        part.name: list(part.argv[1:])
        for part in service_parts({}, Ports(tenants=1, control=2, admin=3), Scale(), stores=())
    }  # fmt: skip
    composed = {name: one["command"][1:] for name, one in _COMPOSE["services"].items() if name not in _STORES}

    assert {"prepare", "pools", "envoy"} == composed.keys() - laptop.keys()
    assert laptop == {name: command for name, command in composed.items() if name in laptop}


def test_compose_gives_no_part_more_than_it_needs() -> None:
    """No root, no privilege, a root file system that is read, ports on loopback, images that do not move."""
    for name, one in _COMPOSE["services"].items():
        assert re.search(r":[0-9][\w.-]*$", one["image"]), name
        assert all(port.startswith("127.0.0.1:") for port in one.get("ports", [])), name
        assert not {"privileged", "pid", "ipc", "user"} & one.keys(), name
        if name not in _STORES:
            assert ["ALL"] == one["cap_drop"]
            assert ["no-new-privileges:true"] == one["security_opt"]
            # Compose copies a secret of the environment into the container: only this one may be written to.
            assert (name != "prepare") == one["read_only"]


def test_compose_waits_for_what_a_part_needs() -> None:
    """Every name is there, a condition of health has a health check, and whatever stays is started again."""
    services = _COMPOSE["services"]
    for name, one in services.items():
        for needed, how in one.get("depends_on", {}).items():
            assert needed in services, name
            assert "healthcheck" in services[needed] or how["condition"] == "service_completed_successfully", (name, needed)
        if one.get("network_mode"):
            assert one["network_mode"].removeprefix("service:") in services
        one_shot = name in ("prepare", "migrations")
        assert ("no" if one_shot else "unless-stopped") == one["restart"], name


def test_compose_holds_no_secret() -> None:
    """Each comes from outside, and without one nothing starts."""
    text = (_REPOSITORY / "compose.yaml").read_text()
    used = set(re.findall(r"\$\{(\w+)[^}]*\}", text)) | {one["environment"] for one in _COMPOSE["secrets"].values()}

    assert {"PEAJE_POSTGRES_PASSWORD", "PEAJE_REDIS_PASSWORD", "PEAJE_PEPPER"} == used
    assert all(":?" in reference for reference in re.findall(r"\$\{[^}]*\}", text))
    assert used <= {f"PEAJE_{name}" for name in re.findall(r"(PEPPER|POSTGRES_PASSWORD|REDIS_PASSWORD)=", text)}
    assert "/etc/peaje/secrets/pepper-1" == _COMPOSE["services"]["prepare"]["secrets"][0]["target"]


def test_compose_mounts_what_prepare_looks_for() -> None:
    """Envoy's files as they are edited, the models of the example, one state directory for all."""
    mounts = _COMPOSE["services"]["prepare"]["volumes"]

    assert ["state:/var/lib/peaje", "./envoy:/etc/peaje/envoy:ro", "./examples/compose:/etc/peaje/models:ro"] == mounts
    assert ["example"] == ModelCatalogue.load(_EXAMPLES / "compose/models.yaml").names
    for name, one in _COMPOSE["services"].items():
        assert name in _STORES or "state:/var/lib/peaje" in one["volumes"]
    assert {"state", "postgres", "valkey"} == _COMPOSE["volumes"].keys()


# --- GitOps ----------------------------------------------------------------------------------------


def _argo() -> Any:
    return yaml.safe_load((_EXAMPLES / "gitops/argocd/application.yaml").read_text())


def _flux() -> list[Any]:
    return list(yaml.safe_load_all((_EXAMPLES / "gitops/flux/peaje.yaml").read_text()))


@pytest.mark.parametrize(
    ("values", "expected"),
    [(_argo()["spec"]["source"]["helm"]["valuesObject"], "PodMonitor/peaje"), (_flux()[1]["spec"]["values"], "StatefulSet/peaje-gateway")],
    ids=["argocd", "flux"],
)
def test_the_values_of_a_gitops_example_are_the_charts(values: dict[str, Any], expected: str) -> None:
    """By its schema; and what they ask for is rendered."""
    kind, name = expected.split("/")
    objects = render(values)

    assert find(objects, kind, name)
    document = find(objects, "ConfigMap", "peaje-documents")["data"]["models.yaml"]
    assert ["llama-3.3-70b"] == ModelCatalogue.parse(yaml.safe_load(document), source="models").names


def test_gitops_names_the_version_and_lets_the_autoscalers_decide() -> None:
    """A range would change a cluster without a commit; a replica count that is drift would undo a scaler."""
    argo, (source, release) = _argo(), _flux()

    assert _VERSION == argo["spec"]["source"]["targetRevision"] == source["spec"]["ref"]["tag"]
    assert {"Deployment", "StatefulSet"} == {one["kind"] for one in argo["spec"]["ignoreDifferences"]}
    assert {"Deployment", "StatefulSet"} == {one["target"]["kind"] for one in release["spec"]["driftDetection"]["ignore"]}
    assert source["metadata"]["name"] == release["spec"]["chartRef"]["name"]


def test_two_renders_of_a_release_are_the_same() -> None:
    """Nothing is made up while rendering: GitOps would see a change each time."""
    assert render({}) == render({})


# --- Terraform -------------------------------------------------------------------------------------


def _terraform() -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for path in sorted(_TERRAFORM.glob("*.tf")):
        for kind, blocks in hcl2.loads(path.read_text()).items():
            merged.setdefault(kind, []).extend(blocks)
    return merged


def _plain(value: Any) -> Any:
    """Without the quotes that the parser keeps around names and texts."""
    match value:
        case dict():
            return {_plain(key): _plain(one) for key, one in value.items() if not str(key).startswith("__")}
        case list():
            return [_plain(one) for one in value]
        case str():
            return value.removeprefix('"').removesuffix('"')
        case _:
            return value


def _resources() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for block in _plain(_terraform()["resource"]):
        for kind, named in block.items():
            for name, body in named.items():
                yield kind, name, body


def test_terraform_keeps_the_record_safe() -> None:
    """Encrypted, in several zones, backed up, not deleted by accident, not on the internet; TLS is asked for."""
    bodies = {kind: body for kind, _, body in _resources()}
    postgres, valkey = bodies["aws_db_instance"], bodies["aws_elasticache_replication_group"]

    for field, value in {
        "storage_encrypted": True, "multi_az": True, "deletion_protection": True, "publicly_accessible": False, "skip_final_snapshot": False,
    }.items():  # fmt: skip
        assert str(value).lower() == str(postgres[field]).lower(), field
    assert int(postgres["backup_retention_period"]) >= 7
    for field in ("at_rest_encryption_enabled", "transit_encryption_enabled", "automatic_failover_enabled", "multi_az_enabled"):
        assert "true" == str(valkey[field]).lower(), field
    assert "rds.force_ssl" == bodies["aws_db_parameter_group"]["parameter"][0]["name"]


def test_terraform_makes_the_secrets_that_the_chart_reads() -> None:
    """By the names and keys of its default values; each value is a reference, none is written there."""
    made = {
        body["metadata"][0]["name"]: body["data"] for kind, _, body in _resources() if kind == "kubernetes_secret_v1"
    }  # fmt: skip
    stores = yaml.safe_load((CHART / "values.yaml").read_text())

    assert {"url"} == made[stores["stores"]["postgres"]["existingSecret"]].keys()
    assert {"url"} == made[stores["stores"]["redis"]["existingSecret"]].keys()
    assert {"pepper-1"} == made[stores["peppers"]["existingSecret"]].keys()
    text = (_TERRAFORM / "main.tf").read_text()
    assert not re.search(r"(password|auth_token)\s*=\s*\"", text)
    assert "sslmode=verify-full" in text
    assert "rediss://" in text


def test_every_reference_of_terraform_resolves() -> None:
    """To a resource or a variable that there is; and every variable is described and used."""
    text = "\n".join(re.sub(r"#.*", "", path.read_text()) for path in _TERRAFORM.glob("*.tf"))
    there = {f"{kind}.{name}" for kind, name, _ in _resources()}
    variables = {name: body for block in _plain(_terraform()["variable"]) for name, body in block.items()}

    used = set(re.findall(r"\bvar\.(\w+)", text))
    assert used == variables.keys()
    assert all(body.get("description") for body in variables.values())
    referred = set(re.findall(r"(?<![\w.\"/])((?:aws|random|kubernetes)_\w+\.\w+)\.", text))
    assert referred <= there
    assert {"aws_db_instance.postgres", "random_id.pepper"} <= referred


def test_the_default_preset_is_what_the_examples_speak_of() -> None:
    """A name in them that the chart has no more would be found here."""
    assert find(rendered("default"), "StatefulSet", "peaje-gateway")
