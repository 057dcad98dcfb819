# SPDX-License-Identifier: Apache-2.0
"""The contract and Envoy's configuration spell the same names; each way to differ is noticed."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType

import pytest

from chassis import contract
from tests.house import names


@pytest.fixture
def other_contract() -> ModuleType:
    """The contract, to be changed by a test."""
    copy = ModuleType("contract")
    copy.__dict__.update({name: value for name, value in vars(contract).items() if name.isupper()})
    return copy


@pytest.fixture
def tree(repository: Path, tmp_path: Path) -> Path:
    """A copy of what the rules read, to be broken by a test."""
    shutil.copytree(repository / "envoy", tmp_path / "envoy")
    return tmp_path


def rewrite(path: Path, old: str, new: str) -> None:
    """Replace the first *old* in *path*, which must be there."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_envoy_and_the_contract_spell_the_same_names(repository: Path) -> None:
    """Headers, namespaces, keys, descriptors, journal members, clusters, sockets, paths, codes."""
    assert [] == names.findings(repository, contract)


def test_every_error_code_is_said_by_somebody(repository: Path) -> None:
    """The closed list has no dead entries."""
    assert [] == names.unsaid_codes(repository, contract)


def test_an_excuse_is_for_a_name_that_exists() -> None:
    """An excuse that outlives its name would cover the next one."""
    assert set() == names.NOT_ENVOYS.keys() - vars(contract).keys()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("NEW_HEADER", "x-peaje-new", "envoy/ does not spell NEW_HEADER: x-peaje-new"),
        ("CLUSTER_EXTAUTH", "authorizer", "envoy/ does not spell CLUSTER_EXTAUTH: authorizer"),
        ("SOCKETS", {"extauth": "run/other.sock"}, "envoy/ does not spell SOCKETS: run/other.sock"),
        ("EPOCH_ENVIRONMENT", "PEAJE_EPOCH", "envoy/ does not spell EPOCH_ENVIRONMENT: PEAJE_EPOCH"),
        ("REQUEST_KEYS", (*contract.REQUEST_KEYS, "temperature"), "no script writes peaje.request:temperature"),
        ("REQUEST_KEYS", contract.REQUEST_KEYS[1:], "the contract does not have peaje.request:started_at"),
        ("USAGE_KEYS", contract.USAGE_KEYS[:-1], "the contract does not have peaje.usage:anomaly"),
        ("ADMIT_KEYS", contract.ADMIT_KEYS[::-1], "the admit descriptor has phase, request_id,"),
        ("SETTLE_KEYS", (*contract.SETTLE_KEYS, "model"), "the settle descriptor has phase, request_id,"),
        ("JOURNAL_KEYS", (*contract.JOURNAL_KEYS, "shape"), "no record has the journal member shape"),
        ("JOURNAL_KEYS", contract.JOURNAL_KEYS[:-1], "the contract has no journal member epoch"),
        ("PATHS", contract.PATHS | {"/v1/batches": "openai.batches"}, "gate.lua and the contract differ in /v1/batches"),
        ("ERROR_CODES", contract.ERROR_CODES[1:], "says the error code missing_credential, which is not on the closed list"),
        ("ID_TENANT", "account", "envoy.yaml reads envoy.filters.http.ext_authz:tenant, which the contract does not have"),
    ],
)  # fmt: skip
def test_a_contract_that_envoy_does_not_follow_is_found(
    repository: Path, other_contract: ModuleType, name: str, value: object, expected: str
) -> None:
    """Each kind of name, renamed or added on our side only."""
    setattr(other_contract, name, value)

    found = names.findings(repository, other_contract)

    assert any(expected in one for one in found), found


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("gate.lua", "(NAMESPACE, 'shape'", "(NAMESPACE, 'form'", "the contract does not have peaje.request:form"),
        ("gate.lua", "(NAMESPACE, 'shape'", "(NAMESPACE, key", "whose name cannot be read: key"),
        ("gate.lua", "'peaje.request'", "'peaje.requests'", "gate.lua writes to peaje.requests"),
        ("gate.lua", "['/v1/messages']", "['/v1/message']", "gate.lua and the contract differ in /v1/message"),
        ("gate.lua", "code = 'not_found'", "code = 'unknown_path'", "says the error code unknown_path"),
        ("tap.lua", "(USAGE, 'total'", "(IDENTITY, 'total'", "tap.lua writes to envoy.filters.http.ext_authz"),
        ("lua/answer.lua", "tell('output'", "tell('spent'", "the contract does not have peaje.usage:spent"),
        ("lua/express.lua", "(IDENTITY, 'key_id'", "(IDENTITY, 'key'", "express.lua writes to envoy.filters.http.ext_authz"),
        ("lua/journal.lua", '"epoch":', '"life":', "the start record has the member life"),
        ("envoy.yaml", "descriptor_value: admit", "descriptor_value: enter", "the admit descriptor has no keys"),
        ("envoy.yaml", "path: [{key: seen}]", "path: [{key: saw}]", "envoy.yaml reads peaje.usage:saw"),
        ("envoy.yaml", "(peaje.usage:total)", "(peaje.usage:sum)", "envoy.yaml reads peaje.usage:sum"),
        ("envoy.yaml", 'epoch: "%ENV', 'life: "%ENV', "the contract has no journal member life"),
        ("envoy.yaml", "code: upstream_timeout", "code: too_slow", "envoy.yaml says the error code too_slow"),
        ("envoy.yaml", "prefix: x-peaje-,", "prefix: x-toll-,", "envoy/ does not spell OWN_HEADER_PREFIX: x-peaje-"),
    ],
)  # fmt: skip
def test_an_envoy_configuration_that_leaves_the_contract_is_found(
    tree: Path, file: str, old: str, new: str, expected: str
) -> None:
    """Each kind of name, renamed on Envoy's side only."""
    rewrite(tree / "envoy" / file, old, new)

    found = names.findings(tree, contract)

    assert any(expected in one for one in found), found


def test_a_name_in_a_comment_is_not_spelled(tree: Path, other_contract: ModuleType) -> None:
    """Only what Envoy reads counts."""
    vars(other_contract)["NEW"] = "x-peaje-new"
    for name, comment in (("gate.lua", "-- x-peaje-new\n"), ("envoy.yaml", "# x-peaje-new\n")):
        path = tree / "envoy" / name
        path.write_text(comment + path.read_text())

    assert ["envoy/ does not spell NEW: x-peaje-new"] == names.findings(tree, other_contract)


def test_an_error_code_that_nobody_says_is_found(repository: Path, other_contract: ModuleType) -> None:
    """A dead entry of the closed list."""
    vars(other_contract)["ERROR_CODES"] = (*contract.ERROR_CODES, "teapot")

    assert ["nobody says the error code teapot"] == names.unsaid_codes(repository, other_contract)
