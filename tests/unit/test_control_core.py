# SPDX-License-Identifier: Apache-2.0
"""What the control plane decides without any I/O: roles, the audit chain, rights, the token endpoint's words."""

from __future__ import annotations

import base64
import doctest
import secrets
from datetime import UTC, datetime, timedelta, timezone
from itertools import pairwise
from typing import Any
from urllib.parse import quote_plus, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chassis import keys
from chassis.errors import Invalid, Unavailable
from control.act import ALL_TENANTS, Act, OneTenant
from control.cli import client, options, reports
from control.cli import keys as keys_command
from control.cli.show import show
from control.core import chain, rights, roles, tokens
from control.core.roles import PERMISSIONS, PLATFORM_ONLY, Permission, Role, can_be_held, may
from control.core.tokens import Refused, TokenRequest
from control.durations import duration, moment_ahead
from control.minting import Hashed, Mint
from control.money import nano

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)

# --- Examples in the docstrings ---------------------------------------------------------------


@pytest.mark.parametrize("module", [chain, client, keys_command, options, reports, rights, roles, tokens, keys])
def test_the_examples_in_docstrings_hold(module: Any) -> None:
    """They are what a reader learns from."""
    found = doctest.testmod(module)

    assert (0, True) == (found.failed, found.attempted > 0)


# --- Roles --------------------------------------------------------------------------------------


def test_every_role_has_its_permissions_and_nothing_is_nobodys() -> None:
    """A permission that no role has would close a route for good."""
    assert set(Role) == set(PERMISSIONS)
    assert set(Permission) == set().union(*PERMISSIONS.values())


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("permission", sorted(PLATFORM_ONLY))
def test_what_is_the_platforms_own_is_nobodys_within_a_tenant(role: Role, permission: Permission) -> None:
    """Whatever the table says of the role."""
    assert not may(role, permission, tenant_id="acme")


@pytest.mark.parametrize("role", [Role.BILLING_READER, Role.AUDITOR])
def test_readers_change_nothing(role: Role) -> None:
    """Not even by a permission that is added later: it must end in `:write` to be one."""
    assert [] == [permission for permission in PERMISSIONS[role] if permission.endswith(":write")]


def test_a_developer_makes_keys_and_changes_nobodys_rights() -> None:
    """Neither operators nor limits nor service accounts."""
    assert {Permission.KEYS_WRITE} == {it for it in PERMISSIONS[Role.DEVELOPER] if it.endswith(":write")}


def test_roles_exist_where_the_schema_has_them() -> None:
    """The schema's two checks, said again in Python."""
    everywhere = {Role.PLATFORM_ADMIN, Role.BILLING_READER, Role.BILLING_ADMIN, Role.AUDITOR}
    assert everywhere == {it for it in Role if can_be_held(it, tenant_id=None)}
    assert set(Role) - {Role.PLATFORM_ADMIN, Role.BILLING_ADMIN} == {it for it in Role if can_be_held(it, tenant_id="acme")}


def test_an_acts_tenant_is_its_scopes() -> None:
    """None only for the value that says all."""

    def of(scope: Any) -> str | None:
        return Act(actor="op_x", scope=scope, request_id="r", now=NOW).tenant_id

    assert ("acme", None) == (of(OneTenant("acme")), of(ALL_TENANTS))


# --- The audit chain ----------------------------------------------------------------------------

DETAILS = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    ),
    max_size=4,
)  # fmt: skip


def chained(details: list[dict[str, Any]]) -> list[chain.Link]:
    links: list[chain.Link] = []
    previous = chain.GENESIS
    for number, detail in enumerate(details, 1):
        entry = chain.Entry(
            sequence=number, at=NOW + timedelta(seconds=number), actor="op_x", tenant_id=None, action="a.b", object="o",
            request_id="r", detail=detail,
        )  # fmt: skip
        links.append(chain.Link(entry=entry, previous_hash=previous, hash=chain.link(previous, entry)))
        previous = links[-1].hash
    return links


def end_of(links: list[chain.Link]) -> chain.End:
    return chain.End(sequence=len(links), hash=links[-1].hash if links else chain.GENESIS)


@given(st.lists(DETAILS, max_size=6))
def test_a_chain_that_nobody_touched_holds(details: list[dict[str, Any]]) -> None:
    """The empty one too."""
    links = chained(details)

    assert chain.Verdict(end=end_of(links), fault=None) == chain.verify(links, head=end_of(links))


@given(st.lists(DETAILS, min_size=2, max_size=6), st.data())
def test_any_entry_left_out_or_swapped_is_found(details: list[dict[str, Any]], data: st.DataObject) -> None:
    """Wherever it is."""
    links = chained(details)
    index = data.draw(st.integers(0, len(links) - 1))
    other = data.draw(st.integers(0, len(links) - 1).filter(lambda it: it != index))
    swapped = list(links)
    swapped[index], swapped[other] = swapped[other], swapped[index]

    assert chain.verify(links[:index] + links[index + 1 :], head=end_of(links)).fault is not None
    assert chain.verify(swapped, head=end_of(links)).fault is not None


def test_an_anchor_on_the_chain_holds_and_one_beside_it_does_not() -> None:
    """Also at the very beginning, and beyond the end."""
    links = chained([{"n": 1}, {"n": 2}, {"n": 3}])
    places = [chain.End(sequence=0, hash=chain.GENESIS), *(chain.End(sequence=n, hash=it.hash) for n, it in enumerate(links, 1))]

    for place in places:
        assert chain.verify(links, head=end_of(links), anchor=place).fault is None
    for here, there in pairwise(places):
        wrong = chain.End(sequence=here.sequence, hash=there.hash)
        assert chain.verify(links, head=end_of(links), anchor=wrong).fault is not None
    assert chain.verify(links, head=end_of(links), anchor=chain.End(sequence=4, hash=links[2].hash)).fault is not None


def test_the_canonical_form_does_not_depend_on_order_or_zone() -> None:
    """Postgres gives names back in an order of its own, and times in the session's zone."""
    common: dict[str, Any] = {
        "sequence": 1, "actor": "a", "tenant_id": "t", "action": "x", "object": "o", "request_id": "r"
    }  # fmt: skip
    one = chain.Entry(at=NOW, detail={"a": 1, "b": 2}, **common)
    other = chain.Entry(at=NOW.astimezone(timezone(timedelta(hours=-3.5))), detail={"b": 2, "a": 1}, **common)

    assert chain.canonical(one) == chain.canonical(other)


# --- Rights -------------------------------------------------------------------------------------


@given(st.lists(st.ip_addresses(network=None), min_size=1, max_size=5))
def test_an_address_alone_is_a_range_of_itself(addresses: list[Any]) -> None:
    """Whichever, in one order; an IPv4 address in IPv6 clothes is refused."""
    texts = [str(address) for address in addresses]
    if any(address.version == 6 and address.ipv4_mapped for address in addresses):
        with pytest.raises(Invalid):
            rights.allowed_cidrs(texts)
    else:
        found = rights.allowed_cidrs(texts)
        assert found is not None
        assert set(addresses) == {network.network_address for network in found}


@given(st.text(max_size=60))
def test_any_text_is_a_range_or_a_plain_refusal(text: str) -> None:
    """`Invalid`, and nothing else, for what people may type."""
    said = ""
    try:
        rights.allowed_cidrs([text])
    except Invalid as exc:
        said = str(exc)

    assert "\n" not in said


def test_bounds_of_lists_are_exact() -> None:
    """At the bound it passes, beyond it does not."""
    assert rights.MODELS_MAX == len(rights.denied_models([f"m{n}*" for n in range(rights.MODELS_MAX)], served=()))
    assert rights.SCOPES_MAX == len(rights.scopes(["inference", *(f"s{n}" for n in range(1, rights.SCOPES_MAX))]) or ())
    assert rights.CIDRS_MAX == len(rights.allowed_cidrs([f"10.0.0.{n}" for n in range(rights.CIDRS_MAX)]) or ())
    assert rights.LABELS_MAX == len(rights.labels({f"l{n}": "" for n in range(rights.LABELS_MAX)}))
    for function, item, most in (
        (lambda it: rights.denied_models(it, served=()), "m{}*", rights.MODELS_MAX), (rights.scopes, "s{}", rights.SCOPES_MAX),
        (rights.allowed_cidrs, "10.0.0.{}", rights.CIDRS_MAX), (lambda it: rights.labels(dict.fromkeys(it, "")), "l{}", rights.LABELS_MAX),
    ):  # fmt: skip
        with pytest.raises(Invalid):
            function([item.format(n) for n in range(most + 1)])


def test_scopes_that_let_nothing_pass_are_refused() -> None:
    """A word of a policy's own is welcome beside one that extauth knows, not instead."""
    assert ["embeddings", "team:red"] == rights.scopes(["team:red", "embeddings"])
    with pytest.raises(Invalid, match="lets anything pass"):
        rights.scopes(["team:red"])


# --- The token endpoint ---------------------------------------------------------------------------


def basic(client_id: str, secret: str) -> str:
    return "Basic " + base64.b64encode(f"{quote_plus(client_id)}:{quote_plus(secret)}".encode()).decode()


@given(st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=20))
def test_both_ways_to_sign_in_say_the_same(client_id: str, secret: str) -> None:
    """Form-encoded in both, as RFC 6749 2.3.1 has it."""
    form = {"grant_type": tokens.GRANT_TYPE}
    in_header = tokens.read_request(
        authorization=basic(client_id, secret), content_type=tokens.FORM, body=urlencode(form).encode()
    )
    in_form = tokens.read_request(
        authorization=None, content_type=f"{tokens.FORM}; charset=utf-8",
        body=urlencode(form | {"client_id": client_id, "client_secret": secret}).encode(),
    )  # fmt: skip

    assert TokenRequest(client_id=client_id, client_secret=secret, scopes=None) == in_header == in_form


@given(st.text(max_size=40) | st.none(), st.text(max_size=40) | st.none(), st.binary(max_size=80))
def test_any_request_is_read_or_refused(authorization: str | None, content_type: str | None, body: bytes) -> None:
    """A refusal is a value; nothing is raised, whatever is sent."""
    for kind in (content_type, tokens.FORM):
        found = tokens.read_request(authorization=authorization, content_type=kind, body=body)
        assert isinstance(found, Refused | TokenRequest)


def test_a_request_does_not_show_its_secret() -> None:
    """It may be in a traceback."""
    assert "hidden" not in repr(TokenRequest(client_id="c", client_secret="hidden", scopes=None))


moments = st.lists(st.integers(0, 10_000), min_size=1, max_size=5, unique=True).map(
    lambda seconds: [NOW + timedelta(seconds=second) for second in sorted(seconds)]
)


@given(moments, st.integers(0, 20_000))
def test_the_key_that_signs_is_published_and_was_so_for_long_enough(created: list[datetime], later: int) -> None:
    """And every key that signed within a token's life is still published."""
    now = created[0] + timedelta(seconds=later)
    known = [moment for moment in created if moment <= now]

    signing = tokens.signer(known, now=now)

    assert signing == 0 or known[signing] + tokens.PUBLISH_AHEAD <= now
    assert signing in tokens.published(known, now=now)
    for age in range(0, int((tokens.TOKEN_LIFETIME + tokens.LEEWAY).total_seconds()), 30):
        then = now - timedelta(seconds=age)
        known_then = [moment for moment in known if moment <= then]
        if known_then:
            assert tokens.signer(known_then, now=then) in tokens.published(known, now=now)


def test_tokens_live_no_longer_than_a_quarter_of_an_hour() -> None:
    """A suspended account is refused by extauth at once; a stolen token by nobody."""
    account = tokens.Account(service_account_id="sa_x", tenant_id="t", project_id="p")
    claims = tokens.claims(account, issuer="i", scopes=None, token_id="j", now=NOW)

    assert timedelta(0) < timedelta(seconds=claims["exp"] - claims["iat"]) <= timedelta(minutes=15)
    assert "scope" not in claims


# --- Secrets of every kind -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [keys.OPERATOR_TOKEN, keys.CLIENT_SECRET, keys.BOOTSTRAP_TOKEN])
def test_a_secret_of_another_kind_is_no_api_key(kind: str) -> None:
    """extauth must not even look for it."""
    minted = keys.mint_token(kind, secrets.token_bytes)

    assert keys.parse(minted.token) is None
    parsed = keys.parse_token(minted.token)
    assert parsed is not None
    assert (kind, minted.token_id) == (parsed.kind, parsed.token_id)
    assert minted.token not in repr(minted) + repr(parsed)


def test_an_api_key_is_read_as_before() -> None:
    """Its form has not changed."""
    minted = keys.mint("test", secrets.token_bytes)

    parsed = keys.parse(minted.key)
    assert parsed is not None
    assert (minted.key_id, "test", minted.key) == (parsed.key_id, parsed.environment, parsed.key)


def test_a_mint_knows_old_peppers_and_hashes_with_the_newest() -> None:
    """Which one a secret matches, whatever else is kept beside it."""
    old = Mint(peppers={1: b"1" * 32}, random_bytes=secrets.token_bytes)
    both = Mint(peppers={1: b"1" * 32, 2: b"2" * 32}, random_bytes=secrets.token_bytes)
    minted, stored = old.token(keys.OPERATOR_TOKEN)

    assert stored is both.match(minted.token, stored)
    assert stored is both.match(minted.token, both.hashed("another"), stored)
    assert both.is_outdated(stored)
    assert Hashed(hash=keys.hash_key(b"2" * 32, minted.token), pepper_version=2) == both.hashed(minted.token)
    assert both.match(minted.token, None) is None
    assert both.match("another", stored) is None
    assert "1111" not in repr(both)


def test_a_mint_without_the_pepper_of_a_secret_does_not_call_it_wrong() -> None:
    """Our fault, not its holder's; one beside it whose pepper is there is good all the same."""
    old = Mint(peppers={1: b"1" * 32}, random_bytes=secrets.token_bytes)
    new = Mint(peppers={2: b"2" * 32}, random_bytes=secrets.token_bytes)
    minted, stored = old.token(keys.OPERATOR_TOKEN)
    current = new.hashed(minted.token)

    assert current is new.match(minted.token, current, stored)
    with pytest.raises(Unavailable):
        new.match(minted.token, stored)
    with pytest.raises(Unavailable):
        new.match("another", current, stored)


# --- What people type, and what they are shown --------------------------------------------------


def test_names_with_brackets_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """A name is text: it colours nothing, hides nothing and breaks no list."""
    show({"keys": [{"name": "[/red] [bold]x[/bold] :smile:", "allowed_cidrs": ["[a]"]}]}, as_json=False)

    assert "[/red] [bold]x[/bold] :smile:  [a]" in capsys.readouterr().out


def test_nothing_and_lists_within_an_answer_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """An empty object is no failure; a list of objects is a table."""
    show({"records": {}, "steps": [{"rule": "a", "passes": True}, {"rule": "b", "passes": False}]}, as_json=False)

    assert ["records:", "steps:", "rule  passes", "a       True", "b      False"] == [
        line.rstrip() for line in capsys.readouterr().out.splitlines()
    ]


@pytest.mark.parametrize("text", ["36526d", "999999d", "876601h", "1y", "", "1.5h", "-1d"])
def test_a_duration_that_is_none_or_beyond_a_century_is_refused(text: str) -> None:
    """In words, before the calendar ends."""
    with pytest.raises(Invalid, match="since is"):
        duration(text, what="since")
    assert timedelta(days=36_525) == duration("36525d", what="since")


@pytest.mark.parametrize("text", ["9999-12-31T23:59:59-12:00", "2026-12-31T23:59:60Z", "soon", "2026-02-30"])
def test_a_moment_that_is_none_in_utc_is_refused(text: str) -> None:
    """The last hours of 9999 in the west lie beyond the calendar; no second is a leap second."""
    with pytest.raises(Invalid, match="expires is"):
        moment_ahead(text, what="expires", now=NOW)
    assert datetime(2026, 12, 1, 10, tzinfo=UTC) == moment_ahead("2026-12-01T12:00+02:00", what="expires", now=NOW)


@pytest.mark.parametrize("text", ["1000000000", "9" * 19, "1e3", "-1", "0.0000000001", "NaN", "٣"])
def test_an_amount_says_how_many_digits_it_may_have(text: str) -> None:
    """Large ones too."""
    with pytest.raises(Invalid, match="at most nine digits before the point and after it"):
        nano(text, what="input")
