# SPDX-License-Identifier: Apache-2.0
"""What no pod of ours may do and what each must have, in every preset; and each rule is seen to find what breaks it."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest
from helm_python.errors import HelmError

from chassis import contract
from ratelimit.adapters.rule_files import DIRECTORY as RULES
from tests.chart.rendering import (
    PRESETS,
    Object,
    containers,
    environment,
    find,
    identity,
    pods,
    preset,
    render,
    rendered,
    with_labels,
)

Finding = Iterator[str]
_GRPC_PORTS: Final = {"extauth": 9001, "ratelimit": 9002, "metering": 9003}
#: Not long enough to be told from a word; our own secrets and those in a store's URL are.
_SECRET: Final = re.compile(r"password|pepper-\d+:|BEGIN [A-Z ]*PRIVATE KEY|://[^/\s\"]*:[^/\s\"]+@|peaje_(live|test|op|sa)_", re.IGNORECASE)


def unsafe_containers(objects: list[Object]) -> Finding:
    """Root, privileges, a root file system that can be written, an unconfined system call."""
    for where, one, pod in containers(objects):
        security, of_pod = one.get("securityContext", {}), pod.get("securityContext", {})
        wanted = {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "runAsNonRoot": True,
            "capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "RuntimeDefault"},
        }  # fmt: skip
        for field, value in wanted.items():
            if security.get(field) != value:
                yield f"{where}: {field} is {security.get(field)}"
        if not of_pod.get("runAsUser") or not of_pod.get("runAsGroup") or security.get("runAsUser") == 0:
            yield f"{where}: runs as root"
        if security.get("privileged") or pod.get("hostNetwork") or pod.get("hostPID") or pod.get("hostIPC"):
            yield f"{where}: is not fenced off its machine"


def unbounded_containers(objects: list[Object]) -> Finding:
    """No requests, no limit of memory."""
    for where, one, _pod in containers(objects):
        resources = one.get("resources", {})
        for kind, name in (("requests", "cpu"), ("requests", "memory"), ("limits", "memory")):
            if not resources.get(kind, {}).get(name):
                yield f"{where}: no {kind} of {name}"


def unpinned_images(objects: list[Object]) -> Finding:
    """No tag or digest, or one that moves."""
    for where, one, _pod in containers(objects):
        if not re.search(r"(@sha256:[0-9a-f]{64}|:[0-9][A-Za-z0-9_.-]*)$", one["image"]):
            yield f"{where}: {one['image']}"


def unprobed_containers(objects: list[Object]) -> Finding:
    """Whatever stays running says when it has started and whether it lives; whatever is asked, whether it is ready."""
    for where, one, pod in containers(objects):
        stays = one in pod["containers"] or one.get("restartPolicy") == "Always"
        if where.startswith("Job/") or not stays:
            continue
        missing = {"startupProbe", "livenessProbe"} - one.keys()
        if one["name"] in ("envoy", "extauth", "ratelimit", "metering", "control"):
            missing |= {"readinessProbe"} - one.keys()
        for probe in sorted(missing):
            yield f"{where}: no {probe}"


def writable_places(objects: list[Object]) -> Finding:
    """Every mount has its volume; secrets and documents are read only; what is read as a secret stays off disks."""
    claims: dict[str, Any] = {claim["metadata"]["name"]: {} for one in objects for claim in one.get("spec", {}).get("volumeClaimTemplates", [])}
    for where, one, pod in containers(objects):
        volumes = (claims if where.startswith("StatefulSet/") else {}) | {volume["name"]: volume for volume in pod["volumes"]}
        for mount in one["volumeMounts"]:
            volume = volumes.get(mount["name"])
            if volume is None:
                yield f"{where}: nothing is called {mount['name']}"
            elif ("secret" in volume or "configMap" in volume) and not mount.get("readOnly"):
                yield f"{where}: {mount['mountPath']} can be written"
            if mount.get("subPath"):
                yield f"{where}: {mount['mountPath']} would never change with its source"


def talkative_pods(objects: list[Object]) -> Finding:
    """A token for Kubernetes, or variables that a Service's name makes and that our settings would read."""
    for where, pod in pods(objects):
        if pod["spec"].get("automountServiceAccountToken") is not False:
            yield f"{where}: has a token for Kubernetes"
        if pod["spec"].get("enableServiceLinks") is not False:
            yield f"{where}: reads PEAJE_… variables that a Service makes"


def told_secrets(objects: list[Object]) -> Finding:
    """A secret in a ConfigMap, an argument, or a variable's value; a Secret of the chart's own."""
    for one in objects:
        if one["kind"] == "Secret":
            yield f"{identity(one)}: the chart makes a secret"
        if one["kind"] == "ConfigMap":
            for key, text in one["data"].items():
                if not key.endswith(".lua") and (found := _SECRET.search(text)):
                    yield f"{identity(one)}/{key}: {found[0]}"
    for where, one, _pod in containers(objects):
        values = [variable["value"] for variable in one.get("env", []) if "value" in variable]
        for text in [*values, *one["command"], *one.get("args", [])]:
            if _SECRET.search(text):
                yield f"{where}: {text}"


def open_ports(objects: list[Object]) -> Finding:
    """A pod without a policy, a port that no policy lets in or that lets everybody in but the tenants'."""
    for where, pod in pods(objects):
        policies = [
            one for one in objects
            if one["kind"] == "NetworkPolicy" and one["spec"]["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        ]
        if len(policies) != 1:
            yield f"{where}: {len(policies)} policies"
            continue
        rules = policies[0]["spec"].get("ingress", [])
        let_in = {port["port"] for rule in rules for port in rule["ports"]}
        declared = {
            port["containerPort"] for one in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]
            for port in one.get("ports", [])
        }
        if declared != let_in:
            yield f"{where}: has {sorted(declared)}, the policy lets in {sorted(let_in)}"
        for rule in rules:
            if not rule.get("from") and [port["port"] for port in rule["ports"]] != [10000]:
                yield f"{where}: everybody reaches {rule['ports']}"


_RULES: Final[tuple[Callable[[list[Object]], Finding], ...]] = (
    unsafe_containers, unbounded_containers, unpinned_images, unprobed_containers, writable_places, talkative_pods,
    told_secrets, open_ports,
)  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("rule", _RULES, ids=lambda rule: rule.__name__)
def test_a_preset_keeps_the_rule(name: str, rule: Callable[[list[Object]], Finding]) -> None:
    """No exception is made."""
    assert [] == list(rule(list(rendered(name))))


def _extauth(objects: list[Any]) -> Any:
    return find(objects, "Deployment", "peaje-extauth")["spec"]["template"]["spec"]


def _spoil_security(objects: list[Any]) -> None:
    _extauth(objects)["containers"][0]["securityContext"]["readOnlyRootFilesystem"] = False


def _spoil_resources(objects: list[Any]) -> None:
    del _extauth(objects)["containers"][0]["resources"]["limits"]


def _spoil_image(objects: list[Any]) -> None:
    _extauth(objects)["initContainers"][0]["image"] = "peaje/services:latest"


def _spoil_probes(objects: list[Any]) -> None:
    del _extauth(objects)["containers"][0]["readinessProbe"]


def _spoil_mounts(objects: list[Any]) -> None:
    next(mount for mount in _extauth(objects)["containers"][0]["volumeMounts"] if mount["name"] == "tls").pop("readOnly")


def _spoil_links(objects: list[Any]) -> None:
    del _extauth(objects)["enableServiceLinks"]


def _spoil_secrets(objects: list[Any]) -> None:
    _extauth(objects)["containers"][0]["env"].append({"name": "URL", "value": "redis://:s3cret@redis:6379/0"})


def _spoil_policies(objects: list[Any]) -> None:
    del find(objects, "NetworkPolicy", "peaje-ratelimit")["spec"]["ingress"][0]["from"]


@pytest.mark.parametrize(
    ("rule", "spoil"),
    [
        (unsafe_containers, _spoil_security),
        (unbounded_containers, _spoil_resources),
        (unpinned_images, _spoil_image),
        (unprobed_containers, _spoil_probes),
        (writable_places, _spoil_mounts),
        (talkative_pods, _spoil_links),
        (told_secrets, _spoil_secrets),
        (open_ports, _spoil_policies),
    ],
    ids=lambda part: part.__name__.lstrip("_"),
)
def test_a_rule_finds_what_breaks_it(rule: Callable[[list[Object]], Finding], spoil: Callable[[list[Any]], None]) -> None:
    """One thing wrong is one finding."""
    objects = copy.deepcopy(list(rendered("default")))
    spoil(objects)

    assert 1 == len(list(rule(objects)))


def test_each_grpc_port_is_reached_by_envoy_only() -> None:
    """And ratelimit's by metering, which has the next slice of a stream held there."""
    objects = list(rendered("default"))
    for service, port in _GRPC_PORTS.items():
        rules = find(objects, "NetworkPolicy", f"peaje-{service}")["spec"]["ingress"]
        (rule,) = [rule for rule in rules if port in {one["port"] for one in rule["ports"]}]
        callers = {where for peer in rule["from"] for where, _ in with_labels(objects, peer["podSelector"]["matchLabels"])}

        expected = {"StatefulSet/peaje-gateway"} | ({"Deployment/peaje-metering"} if service == "ratelimit" else set())
        assert expected == callers
        assert all(peer.keys() == {"podSelector"} for peer in rule["from"])


def _out(**named: str) -> dict[str, Any]:
    """Values that let pods out to what is named: each has an address of its own, by which tests tell the rules apart."""
    addresses = {"postgres": "10.0.0.1/32", "redis": "10.0.0.2/32", "models": "10.0.0.3/32"} | named
    return {"networkPolicy": {"egress": {"enabled": True} | {name: [{"to": [{"ipBlock": {"cidr": cidr}}]}] for name, cidr in addresses.items()}}}


def _outside(objects: list[Object], cidr: str) -> set[str]:
    """Pods that may go out to an address."""
    return {
        where for where, pod in pods(objects) for one in objects
        if one["kind"] == "NetworkPolicy" and one["spec"]["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        and any({"ipBlock": {"cidr": cidr}} in rule["to"] for rule in one["spec"].get("egress", []))
    }  # fmt: skip


def _told(objects: list[Object], variable: str) -> set[str]:
    """Pods of which a container has that variable."""
    return {where.rpartition("/")[0] for where, one, _ in containers(objects) if variable in {entry["name"] for entry in one.get("env", [])}}


def _between(objects: list[Object], direction: str, peers: str) -> set[tuple[str, str, int]]:
    """Each way between pods that policies of that direction open: from, to, port."""
    found = set()
    for policy in (one for one in objects if one["kind"] == "NetworkPolicy"):
        own = [where for where, _ in with_labels(objects, policy["spec"]["podSelector"]["matchLabels"])]
        for rule in policy["spec"].get(direction, []):
            others = [
                where for peer in rule.get(peers, []) if peer.keys() == {"podSelector"}
                for where, _ in with_labels(objects, peer["podSelector"]["matchLabels"])
            ]  # fmt: skip
            pairs = [(other, mine) if direction == "ingress" else (mine, other) for mine in own for other in others]
            found |= {(*pair, port["port"]) for pair in pairs for port in rule["ports"]}
    return found


def test_unless_asked_the_chart_does_not_say_where_pods_may_go() -> None:
    """A rule for one way out would close all the others."""
    assert [["Ingress"]] * 7 == [one["spec"]["policyTypes"] for one in rendered("default") if one["kind"] == "NetworkPolicy"]


@pytest.mark.parametrize("placement", ["separate", "sidecar"])
@pytest.mark.parametrize("exposed", [True, False])
def test_a_pod_is_let_out_to_whoever_lets_it_in(placement: str, exposed: bool) -> None:
    """Where ways out are closed, each way in has its other end, and there is no other between pods."""
    objects = render({"placement": placement, "control": {"exposed": exposed}} | _out())

    ways = _between(objects, "egress", "to")
    assert ways == _between(objects, "ingress", "from")
    assert len(ways) == (4 if placement == "separate" else 0) + exposed


@pytest.mark.parametrize("placement", ["separate", "sidecar"])
def test_a_pod_is_let_out_to_what_it_is_told_of_and_to_nothing_else(placement: str) -> None:
    """Stores by who has their address; model servers by Envoy and the collector, which asks engines what they counted."""
    objects = render(
        {"placement": placement, "traces": {"url": "http://collector:4318"}}
        | _out(issuers="10.0.0.4/32", webhooks="10.0.0.5/32", traces="10.0.0.6/32", dns="10.0.0.7/32")
    )

    key_reader = "Deployment/peaje-extauth" if placement == "separate" else "StatefulSet/peaje-gateway"
    assert _told(objects, "PEAJE_POSTGRES_URL") == _outside(objects, "10.0.0.1/32")
    assert _told(objects, "PEAJE_REDIS_URL") == _outside(objects, "10.0.0.2/32")
    assert {"StatefulSet/peaje-gateway"} == _outside(objects, "10.0.0.3/32")
    assert {key_reader} == _outside(objects, "10.0.0.4/32")
    assert {"Deployment/peaje-events"} == _outside(objects, "10.0.0.5/32")
    assert _told(objects, "PEAJE_TRACES_URL") == _outside(objects, "10.0.0.6/32")
    assert {where for where, _ in pods(objects)} == _outside(objects, "10.0.0.7/32")
    assert {("Ingress", "Egress")} == {tuple(one["spec"]["policyTypes"]) for one in objects if one["kind"] == "NetworkPolicy"}


def test_without_traces_nobody_is_let_out_to_their_collector() -> None:
    """Whatever the policy's values still say of it."""
    assert set() == _outside(render(_out(traces="10.0.0.6/32")), "10.0.0.6/32")


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"networkPolicy": {"egress": {"enabled": True}}}, "egress/postgres"),
        (_out(dns="10.0.0.7/32") | {"traces": {"url": "http://collector:4318"}}, "egress/traces"),
        ({"networkPolicy": {"egress": {"redis": [{"to": []}]}}}, "egress/redis/0/to"),
        ({"networkPolicy": {"egress": {"redis": [{"ports": [{"port": 6379}]}]}}}, "egress/redis/0.*'to'"),
        ({"networkPolicy": {"egress": {"stores": []}}}, "stores"),
    ],
)
def test_ways_out_that_lead_nowhere_or_everywhere_are_refused(values: dict[str, Any], complaint: str) -> None:
    """Without its stores no request passes; Kubernetes takes an empty list of peers for all there are."""
    with pytest.raises(HelmError, match=complaint):
        render(values)


def test_services_with_pods_of_their_own_ask_for_a_certificate() -> None:
    """Each has its own, listens on TCP with it, and there is no other way in."""
    objects = list(rendered("default"))
    for service, port in _GRPC_PORTS.items():
        pod = find(objects, "Deployment", f"peaje-{service}")["spec"]["template"]["spec"]
        environment = {variable["name"]: variable.get("value") for variable in pod["containers"][0]["env"]}

        assert f"0.0.0.0:{port}" == environment[f"PEAJE_{service.upper()}_LISTEN"]
        assert "/etc/peaje/tls" == environment["PEAJE_TLS_DIRECTORY"]
        assert [f"peaje-{service}-tls"] == [v["secret"]["secretName"] for v in pod["volumes"] if v["name"] == "tls"]


@pytest.mark.parametrize("placement", ["separate", "sidecar"])
def test_extauth_believes_the_authority_of_the_control_apis_certificate(placement: str) -> None:
    """Of what signs for Peaje alone it sees no key but its own; without the API exposed there is nothing to believe."""
    objects = render({"placement": placement, "control": {"exposed": True, "issuer": "https://peaje-control.gateway.svc.cluster.local:10001"}})
    [(extauth, pod)] = [(one, pod) for _, one, pod in containers(objects) if one["name"] == "extauth"]

    path = environment(extauth)["PEAJE_CONTROL_AUTHORITY"]
    [mount] = [mount for mount in extauth["volumeMounts"] if path.startswith(f"{mount['mountPath']}/")]
    [volume] = [volume["secret"] for volume in pod["volumes"] if volume["name"] == mount["name"]]
    assert path == f"{mount['mountPath']}/ca.crt"
    assert ("peaje-extauth-tls" if placement == "separate" else "peaje-control-tls") == volume["secretName"]
    assert ("items" in volume) == (placement == "sidecar")
    assert all(item == {"key": "ca.crt", "path": "ca.crt"} for item in volume.get("items", []))
    unexposed = render({"placement": placement, "control": {"exposed": False}})
    assert "PEAJE_CONTROL_AUTHORITY" not in json.dumps([one for one in unexposed if one["kind"] != "ConfigMap"])
    assert [] == [*writable_places(objects), *writable_places(unexposed)]


def test_sidecars_listen_on_sockets_alone() -> None:
    """No gRPC port, no certificate: nothing of them leaves the pod."""
    text = json.dumps([one for one in rendered("small") if one["kind"] != "ConfigMap"])

    assert "_LISTEN" not in text
    assert "PEAJE_TLS_DIRECTORY" not in text
    assert not any(str(port) in text for port in _GRPC_PORTS.values())
    sockets = {one["name"]: one["readinessProbe"]["exec"]["command"][-1] for _, one, _ in containers(list(rendered("small"))) if one["name"] in _GRPC_PORTS}
    assert contract.SOCKETS == sockets


@pytest.mark.parametrize("name", PRESETS)
def test_only_those_who_check_keys_see_peppers(name: str) -> None:
    """extauth, control and events; never Envoy, never the collector."""
    holders = {
        one["name"] for _, one, _ in containers(list(rendered(name)))
        if {"peppers", "secrets"} & {mount["name"] for mount in one["volumeMounts"]}
    }

    assert {"prepare", "extauth", "control", "events"} == holders


@pytest.mark.parametrize("name", PRESETS)
def test_envoy_and_its_helpers_know_no_store_that_they_do_not_need(name: str) -> None:
    """Envoy has no URL of a store at all; counters are ratelimit's alone."""
    urls: dict[str, set[str]] = {}
    for _, one, _pod in containers(list(rendered(name))):
        urls.setdefault(one["name"], set()).update(v["name"] for v in one.get("env", []) if v["name"].endswith("_URL") and "valueFrom" in v)

    assert {"envoy", "pools", "prepare"} == {name for name, found in urls.items() if not found}
    assert {"ratelimit"} == {name for name, found in urls.items() if "PEAJE_REDIS_URL" in found}


@pytest.mark.parametrize("name", PRESETS)
def test_envoy_ends_before_what_reads_its_journal(name: str) -> None:
    """Sidecars outlive the container that is no sidecar, and the pod waits longer than Envoy may drain."""
    spec = find(list(rendered(name)), "StatefulSet", "peaje-gateway")["spec"]["template"]["spec"]
    drain = next(int(v["value"]) for v in spec["containers"][0]["env"] if v["name"] == "PEAJE_POD_DRAIN_SECONDS")
    sidecars = [one["name"] for one in spec["initContainers"] if one.get("restartPolicy") == "Always"]

    assert ["envoy"] == [one["name"] for one in spec["containers"]]
    assert {"collector", "beacon", "pools"} <= set(sidecars)
    assert "drain" == spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
    assert spec["terminationGracePeriodSeconds"] > drain


@pytest.mark.parametrize("name", ["default", "large", "external-stores"])
def test_a_release_of_metering_resets_no_stream_that_passes_it(name: str) -> None:
    """It has as long as a gateway's streams, and Kubernetes waits longer than it turns others away and then lets them end."""
    objects = list(rendered(name))
    [envoy] = find(objects, "StatefulSet", "peaje-gateway")["spec"]["template"]["spec"]["containers"]
    pod = find(objects, "Deployment", "peaje-metering")["spec"]["template"]["spec"]
    told = environment(pod["containers"][0])

    assert environment(envoy)["PEAJE_POD_DRAIN_SECONDS"] == told["PEAJE_METERING_STREAM_SECONDS"]
    assert pod["terminationGracePeriodSeconds"] > float(told["PEAJE_DRAIN_SECONDS"]) + float(told["PEAJE_METERING_STREAM_SECONDS"])


@pytest.mark.parametrize("name", PRESETS)
def test_everybody_sees_the_same_journal(name: str) -> None:
    """Envoy writes it and the collector reads it, on a volume that outlives the pod, named by the pod."""
    gateway = find(list(rendered(name)), "StatefulSet", "peaje-gateway")["spec"]
    mounts = {one["name"]: one for where, one, _ in containers(list(rendered(name))) if where.startswith("StatefulSet/")}

    for part in ("envoy", "collector"):
        assert "/var/lib/peaje/journal" in {m["mountPath"] for m in mounts[part]["volumeMounts"] if m["name"] == "journal"}
    assert ["journal"] == [claim["metadata"]["name"] for claim in gateway["volumeClaimTemplates"]]
    assert {"whenDeleted": "Retain", "whenScaled": "Retain"} == gateway["persistentVolumeClaimRetentionPolicy"]
    assert {"name": "PEAJE_COLLECTOR_JOURNAL", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}} in mounts["collector"]["env"]


def test_scaling_follows_what_each_is_short_of() -> None:
    """CPU of each; of Envoy also requests under way, where somebody serves that metric."""
    scalers = {one["spec"]["scaleTargetRef"]["name"]: one["spec"] for one in rendered("large") if one["kind"] == "HorizontalPodAutoscaler"}

    assert {"peaje-gateway", "peaje-extauth", "peaje-ratelimit", "peaje-metering"} == scalers.keys()
    assert all("cpu" == spec["metrics"][0]["resource"]["name"] for spec in scalers.values())
    assert ["envoy_http_downstream_rq_active"] == [
        metric["pods"]["metric"]["name"] for metric in scalers["peaje-gateway"]["metrics"] if metric["type"] == "Pods"
    ]
    for one in rendered("large"):
        if one["kind"] in ("StatefulSet", "Deployment") and one["metadata"]["name"] in scalers:
            assert "replicas" not in one["spec"]


@pytest.mark.parametrize("name", PRESETS)
def test_every_selector_finds_its_pods(name: str) -> None:
    """Services, budgets, policies and scalers that select nobody would do nothing, in silence."""
    objects = list(rendered(name))
    workloads = {identity(one) for one in objects}
    for one in objects:
        spec = one.get("spec", {})
        match one["kind"]:
            case "Service":
                labels = spec["selector"]
            case "PodDisruptionBudget" | "StatefulSet" | "Deployment":
                labels = spec["selector"]["matchLabels"]
            case "NetworkPolicy":
                labels = spec["podSelector"]["matchLabels"]
            case "HorizontalPodAutoscaler":
                assert f"{spec['scaleTargetRef']['kind']}/{spec['scaleTargetRef']['name']}" in workloads
                continue
            case _:
                continue
        assert 1 == len(with_labels(objects, labels)), identity(one)


def test_what_is_said_of_every_pod_is_on_every_pod() -> None:
    """Migrations too: where a mesh is told by an annotation to leave a pod alone, a job that has it never ends."""
    said = {
        "annotations": {"sidecar.istio.io/inject": "false"}, "labels": {"team": "gateway"}, "nodeSelector": {"pool": "edge"},
        "tolerations": [{"key": "edge", "operator": "Exists"}], "priorityClassName": "high",
    }  # fmt: skip

    for where, pod in pods(render({"pod": said})):
        assert said["annotations"].items() <= pod["metadata"].get("annotations", {}).items(), where
        assert said["labels"].items() <= pod["metadata"]["labels"].items(), where
        assert {name: said[name] for name in ("nodeSelector", "tolerations", "priorityClassName")} == {
            name: pod["spec"].get(name) for name in ("nodeSelector", "tolerations", "priorityClassName")
        }, where


@pytest.mark.parametrize("placement", ["separate", "sidecar"])
def test_ratelimit_finds_rules_and_tokenizers_where_it_looks(placement: str) -> None:
    """In either placement, read only; nobody else has them."""
    objects = render({"placement": placement, "ratelimit": {"rulesConfigMap": "rules", "tokenizersClaim": "models"}})
    mounts = {
        one["name"]: {mount["mountPath"] for mount in one["volumeMounts"] if mount["name"] in ("rules", "tokenizers")}
        for _, one, _pod in containers(objects)
    }

    assert {f"/var/lib/peaje/{RULES}", "/srv/models"} == mounts.pop("ratelimit")
    assert set() == set().union(*mounts.values())
    assert [] == list(writable_places(objects))


def test_a_store_that_is_away_is_shared_by_as_many_as_there_can_be() -> None:
    """Each counts its share of a limit alone: of replicas that may yet come, too."""

    def processes(values: dict[str, Any]) -> str:
        return next(
            str(variable["value"]) for _, one, _ in containers(render(values)) for variable in one.get("env", [])
            if variable["name"] == "PEAJE_RATELIMIT_PROCESSES"
        )  # fmt: skip

    assert "30" == processes(preset("large"))
    assert "1" == processes(preset("small"))
    assert "4" == processes({"ratelimit": {"replicas": 4, "autoscaling": {"enabled": False}}})
