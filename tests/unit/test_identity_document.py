# SPDX-License-Identifier: Apache-2.0
"""The identity document: every fault at once, each with its path; replaced whole, or not at all."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from chassis.errors import Invalid
from extauth.adapters.document import load_whole, parse
from extauth.core.credential import NAMES_MAX
from extauth.core.identity import Denial, Identity
from tests.identities import (
    SECRET_FILE,
    SPIFFE_ID,
    FakeDirectory,
    ask_function,
    bearer,
    document_for,
    identities_in,
    write_document,
    write_home,
)
from tests.provider import Provider, running_provider

REPOSITORY = Path(__file__).resolve().parents[2]
PROVIDER = Provider(url="https://id.example.com")


def document() -> dict[str, Any]:
    """A good one, for a test to spoil."""
    return yaml.safe_load(yaml.safe_dump(document_for(PROVIDER)))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("issuers[0].algorithms[0]", ["HS256"]), ("issuers[0].algorithms[0]", ["none"]), ("issuers[0].algorithms", []),
        ("issuers[0].audiences", []), ("issuers[0].tenants", []), ("issuers[0].tenants[0]", ["Acme"]),
        ("issuers[0].jwks_url", 7), ("issuers[0].issuer", ""), ("issuers[0].surprise", 1), ("issuers[1].client_id", None),
        ("issuers[1].token_prefix", 7), ("certificates[0].tenant", "*"), ("certificates[0].san", ""),
    ],
)  # fmt: skip
def test_a_fault_is_told_with_its_path(path: str, value: object) -> None:
    """The field is named, not what stands in it."""
    spoiled = document()
    part, _, rest = path.partition("[")
    index, _, name = rest.partition("].")
    spoiled[part][int(index)][name.partition("[")[0]] = value

    with pytest.raises(Invalid) as refused:
        parse(spoiled)

    assert path in refused.value.message


@pytest.mark.parametrize("url", ["http://id.example.com/k", "https://u:p@id.example.com/k", "file:///etc/passwd", "https:///k", "//x"])
def test_keys_come_over_https_or_from_this_machine(url: str) -> None:
    """Also no user and no password in a URL, which would end up in logs."""
    spoiled = document()
    spoiled["issuers"][0]["jwks_url"] = url

    with pytest.raises(Invalid):
        parse(spoiled)


def test_every_fault_is_told_at_once() -> None:
    """Nobody mends a document one refusal at a time."""
    spoiled = document()
    spoiled["issuers"][0]["algorithms"] = ["HS256"]
    spoiled["issuers"][0]["jwks_url"] = "http://id.example.com/keys"
    spoiled["issuers"][1]["client_id"] = 7
    spoiled["certificates"][0]["tenant"] = "*"
    spoiled["more"] = 1

    with pytest.raises(Invalid) as refused:
        parse(spoiled)

    places = ("issuers[0].algorithms[0]", "issuers[0].jwks_url: must be https", "issuers[1].client_id", "certificates[0].tenant", "more")
    assert [] == [place for place in places if place not in refused.value.message]


def test_what_is_there_twice_is_told_with_both_places() -> None:
    """An issuer, a prefix, a name: whichever counted would be a guess."""
    spoiled = document()
    spoiled["issuers"] += spoiled["issuers"]

    with pytest.raises(Invalid) as refused:
        parse(spoiled)

    for field in ("issuers[2].issuer: the same as issuers[0].issuer", "issuers[3].token_prefix: the same as issuers[1]"):
        assert field in refused.value.message


def test_a_secret_file_that_is_not_fit_is_a_fault(tmp_path: Path) -> None:
    """Told before anything runs on the document, without its content."""
    write_home(tmp_path, document())
    path = tmp_path / "identity.yaml"
    load_whole(path, home=tmp_path)
    (tmp_path / SECRET_FILE).chmod(0o644)

    with pytest.raises(Invalid) as refused:
        load_whole(path, home=tmp_path)

    assert "issuers[1].client_secret_file" in refused.value.message
    assert (tmp_path / SECRET_FILE).read_text() not in refused.value.message


def test_a_bad_document_changes_nothing_and_a_good_one_everything(tmp_path: Path) -> None:
    """Build, validate, swap; a token that was verified a moment ago is out with its issuer."""
    with running_provider() as provider:
        good = document_for(provider)
        write_home(tmp_path, good)
        identities = identities_in(tmp_path, FakeDirectory())
        token = bearer(provider.mint())
        first = ask_function(identities, token)

        write_document(tmp_path, "issuers: [{kind: jwt}]")
        identities.reload_if_changed()
        after_bad = ask_function(identities, token)
        write_document(tmp_path, {"certificates": good["certificates"]})
        identities.reload_if_changed()
        after_none = ask_function(identities, token)

    assert isinstance(first, Identity)
    assert first == after_bad
    assert isinstance(after_none, Denial)
    assert "invalid_token" == after_none.refusal.code


def test_a_token_that_comes_again_is_not_verified_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until its issuer's keys change."""
    from extauth.adapters import tokens  # noqa: PLC0415 - to count in it

    with running_provider() as provider:
        write_home(tmp_path, document_for(provider))
        identities = identities_in(tmp_path, FakeDirectory())
        [source] = identities._built.sources.values()
        ask_function(identities, bearer(provider.mint(jti="first")))  # the keys are here now
        checked: list[str] = []
        decode = tokens._jws.decode
        monkeypatch.setattr(tokens._jws, "decode", lambda *a, **k: (checked.append("."), decode(*a, **k))[1])
        token = bearer(provider.mint())

        answers = [ask_function(identities, token) for _ in range(10)]
        once = len(checked)
        provider.add("next", "ES256")
        source.refresh()
        ask_function(identities, token)

    assert [] == [answer for answer in answers if isinstance(answer, Denial)]
    assert (1, 2) == (once, len(checked))


def test_a_withdrawn_key_takes_its_verified_tokens_along(tmp_path: Path) -> None:
    """At the next fetch, not when the token would be verified again."""
    with running_provider() as provider:
        write_home(tmp_path, document_for(provider))
        identities = identities_in(tmp_path, FakeDirectory())
        [source] = identities._built.sources.values()
        token = bearer(provider.mint())
        before = ask_function(identities, token)

        provider.published = {"rs"}
        source.refresh()
        after = ask_function(identities, token)

    assert isinstance(before, Identity)
    assert isinstance(after, Denial)


def test_a_service_account_may_do_what_both_its_token_and_its_record_allow(tmp_path: Path) -> None:
    """Scopes are cut, state is the record's, and the token's tenant must be the account's."""
    with running_provider() as provider:
        entry = {"name": "control", "kind": "service_accounts", "issuer": provider.url}
        write_home(tmp_path, {"issuers": [entry]})
        directory = FakeDirectory()
        directory.add_account("sa_1", scopes=frozenset({"inference", "models"}))
        directory.add_account("sa_2", is_active=False)
        directory.add_account("sa_3", tenant_id="globex")
        identities = identities_in(tmp_path, directory)
        [source] = identities._built.sources.values()
        source._url = f"{provider.url}/jwks"
        source.refresh()
        tokens = {name: bearer(provider.mint(sub=name, project="default", scope="inference embeddings")) for name in ("sa_1", "sa_2", "sa_3", "sa_4")}

        answers = {name: ask_function(identities, token) for name, token in tokens.items()}

    good = answers["sa_1"]
    assert isinstance(good, Identity)
    assert (frozenset({"inference"}), "sa_1") == (good.scopes, good.key_id)
    codes = {name: answer.refusal.code for name, answer in answers.items() if isinstance(answer, Denial)}
    assert {"sa_2": "service_account_suspended", "sa_3": "tenant_not_allowed", "sa_4": "invalid_token"} == codes


def test_a_certificate_that_envoy_validated_is_an_identity(tmp_path: Path) -> None:
    """By its first URI name, to the letter; a header of that name is nothing."""
    write_home(tmp_path, {"certificates": document_for(PROVIDER)["certificates"]})
    identities = identities_in(tmp_path, FakeDirectory())
    claimed = ("x-forwarded-client-cert", f"URI={SPIFFE_ID}".encode())

    known, other, forged = (
        ask_function(identities, subject=SPIFFE_ID),
        ask_function(identities, subject=SPIFFE_ID + "/x"),
        ask_function(identities, claimed),
    )

    assert isinstance(known, Identity)
    assert "acme" == known.tenant_id
    assert isinstance(other, Denial)
    assert isinstance(forged, Denial)
    assert "missing_credential" == forged.refusal.code


def test_every_name_of_a_certificate_is_looked_at(tmp_path: Path) -> None:
    """Whichever is known; two that stand for different holders are a contradiction, and too many are not read."""
    entries = [
        {"name": "chat", "san": SPIFFE_ID, "tenant": "acme"},
        {"name": "other", "san": "chat.example", "tenant": "acme"},
    ]
    write_home(tmp_path, {"certificates": entries})
    identities = identities_in(tmp_path, FakeDirectory())

    second = ask_function(identities, subject=("first.example", SPIFFE_ID))
    twice = ask_function(identities, subject=(SPIFFE_ID, SPIFFE_ID))
    several = ask_function(identities, subject=(SPIFFE_ID, "chat.example"))
    at_the_bound = ask_function(identities, subject=(SPIFFE_ID, *(f"{number}.example" for number in range(NAMES_MAX - 1))))
    beyond = ask_function(identities, subject=(SPIFFE_ID, *(f"{number}.example" for number in range(NAMES_MAX))))

    assert ["cert:chat"] * 3 == [one.key_id for one in (second, twice, at_the_bound) if isinstance(one, Identity)]
    assert isinstance(several, Denial)
    assert ("certificate_of_several", 400) == (several.rule, several.refusal.status)
    assert isinstance(beyond, Denial)
    assert "too_long" == beyond.rule


def test_a_document_that_does_not_look_changed_is_read_from_time_to_time(tmp_path: Path) -> None:
    """Its time and place are the old ones, as some file systems leave them; so is a secret that it names."""
    write_home(tmp_path, document_for(PROVIDER))
    identities = identities_in(tmp_path, FakeDirectory())
    path = tmp_path / "identity.yaml"
    before, built = path.stat(), identities._built
    identities.reload_if_changed(anyway=True)
    assert built is identities._built

    path.write_text(yaml.safe_dump({"certificates": [{"name": "new", "san": SPIFFE_ID, "tenant": "acme"}]}))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    identities.reload_if_changed()
    assert built is identities._built
    identities.reload_if_changed(anyway=True)

    assert ["new"] == [entry.name for entry in identities._built.certificates.values()]


def test_a_new_client_secret_is_taken_over_though_the_document_is_the_same(tmp_path: Path) -> None:
    """It is a file of its own; one that nobody may read keeps the last good one."""
    write_home(tmp_path, document_for(PROVIDER))
    identities = identities_in(tmp_path, FakeDirectory())
    built = identities._built

    (tmp_path / SECRET_FILE).unlink()
    identities.reload_if_changed(anyway=True)
    assert built is identities._built
    (tmp_path / SECRET_FILE).write_text("another-secret-of-the-length-that-one-needs")
    (tmp_path / SECRET_FILE).chmod(0o600)
    identities.reload_if_changed(anyway=True)

    assert built is not identities._built


def test_while_postgres_is_away_nobody_unknown_is_let_in(tmp_path: Path) -> None:
    """503: the token is good, but whether its tenant is cannot be said."""
    with running_provider() as provider:
        write_home(tmp_path, document_for(provider))
        identities = identities_in(tmp_path, FakeDirectory(is_away=True))

        answer = ask_function(identities, bearer(provider.mint()))

    assert isinstance(answer, Denial)
    assert 503 == answer.refusal.status


def test_the_document_of_the_manual_is_a_good_one() -> None:
    """As it stands in docs/operations.md."""
    blocks = re.findall(r"^```yaml\n(.*?)^```", (REPOSITORY / "docs/operations.md").read_text(), re.DOTALL | re.MULTILINE)
    [shown] = [block for block in blocks if block.startswith("issuers:")]

    assert 3 == len(parse(yaml.safe_load(shown)).issuers)
