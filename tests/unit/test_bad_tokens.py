# SPDX-License-Identifier: Apache-2.0
"""Every bad token of tests/bad_inputs/tokens.yaml, as a pure function and over gRPC; and made-up ones without end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chassis.clock import utc_now
from chassis.refusals import Refusal
from chassis.wire import ext_authz_pb2 as wire
from extauth.adapters.jose import parse_set
from extauth.adapters.jwks import FixedKeys
from extauth.adapters.tokens import Verifiers
from extauth.core import issuers
from tests.identities import FakeAccounts, bearer, document_for, rows, serving
from tests.provider import Provider

PROVIDER = Provider(url="https://id.example.com")
PROVIDER.add("es", "ES256")
PROVIDER.add("rs", "RS256")


def verifiers() -> Verifiers:
    """What the provider's own key set makes of its tokens, without any network."""
    document = document_for(PROVIDER, inline=True)
    del document["issuers"][1]
    parsed = issuers.parse(document, source="test")
    keys = parse_set(PROVIDER.jwks(), algorithms=("ES256", "RS256", "PS256"))
    assert not isinstance(keys, str)
    return Verifiers(parsed, keys={PROVIDER.url: FixedKeys(keys.keys)}, introspections=[])


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., wire.CheckResponse]]:
    """Ask an extauth that listens on a socket."""
    accounts = FakeAccounts()
    accounts.add("acme")
    made = verifiers()
    with serving(tmp_path_factory.mktemp("s") / "x", lambda: made, accounts) as ask:
        yield ask


@pytest.mark.parametrize("kid", ["es", "rs"])
def test_a_good_token_passes_at_both_levels(check: Callable[..., wire.CheckResponse], kid: str) -> None:
    """Without this the rows below would prove nothing."""
    token = PROVIDER.mint(kid)

    answer = check(bearer(token))

    assert not isinstance(verifiers().bearer(token, utc_now()), Refusal)
    assert answer.WhichOneof("http_response") == "ok_response"
    assert "acme" == answer.dynamic_metadata.fields["tenant"].string_value
    assert answer.dynamic_metadata.fields["key_id"].string_value.startswith("sub_")


@pytest.mark.parametrize("row", rows())
def test_a_bad_token_is_refused_by_the_function(row: dict[str, Any]) -> None:
    """The token's own judgement; what only our record of tenants knows is not asked here."""
    answer = verifiers().bearer(PROVIDER.cook(row["token"]), utc_now())

    if row["id"] == "J12-project":
        assert not isinstance(answer, Refusal)
        return
    expected = row.get("function", row["expect"])
    assert isinstance(answer, Refusal)
    assert (expected["status"], expected["code"]) == (answer.status, answer.code)


@pytest.mark.parametrize("row", rows())
def test_a_bad_token_is_refused_over_grpc(check: Callable[..., wire.CheckResponse], row: dict[str, Any]) -> None:
    """With the status and the code of its row, and a body in the caller's dialect."""
    answer = check(bearer(PROVIDER.cook(row["token"])))

    assert answer.WhichOneof("http_response") == "denied_response"
    denied = answer.denied_response
    assert (row["expect"]["status"], row["expect"]["code"]) == (
        denied.status.code, json.loads(denied.body)["error"]["code"],
    )


GOOD = PROVIDER.mint(exp=4_102_444_800)
ANYTHING = st.text(max_size=400) | st.binary(max_size=400).map(lambda data: data.decode("latin-1"))


@st.composite
def mutations(draw: st.DrawFn) -> str:
    """A good token with something cut out, put in, doubled, or its parts in another order."""
    text = GOOD
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + draw(st.sampled_from([1, 4, 400])))))
        piece = draw(st.sampled_from(["", ".", "=", "A", "eyJ", text[start:end] * 2]) | st.text("ab-_.e0", max_size=8))
        text = text[:start] + piece + text[end:]
    if draw(st.booleans()):
        text = ".".join(draw(st.permutations(text.split("."))))
    return text


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=mutations() | ANYTHING | ANYTHING.map(lambda text: f"eyJ{text}"))
def test_no_made_up_token_passes_or_crashes(text: str) -> None:
    """Only the good token itself is good."""
    answer = VERIFIERS.bearer(text, utc_now()) if text.isascii() else None

    assert text == GOOD or answer is None or isinstance(answer, Refusal)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(["exp", "nbf", "iat", "aud", "iss", "tenant", "project", "sub", "scope", "models", "cnf"])


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(changes=st.dictionaries(NAMES, JSON, min_size=1, max_size=3))
def test_no_claims_however_well_signed_crash_the_check(changes: dict[str, Any]) -> None:
    """An issuer may sign anything; what passes names the fenced tenant and ends in time."""
    recipe = {"claims": {name: value for name, value in changes.items()}}

    answer = VERIFIERS.bearer(PROVIDER.cook(recipe), utc_now())

    if not isinstance(answer, Refusal):
        assert "acme" == answer[0].tenant_id
        assert answer[0].expires_at is not None
        assert answer[0].expires_at > utc_now()


VERIFIERS = verifiers()
