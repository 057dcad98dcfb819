# SPDX-License-Identifier: Apache-2.0
"""Every bad token of tests/bad_inputs/tokens.yaml, as a function and over gRPC; and made-up ones without end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chassis.clock import utc_now
from chassis.wire import ext_authz_pb2 as wire
from extauth.adapters.identities import Identities
from extauth.core.identity import Denial, Identity
from tests.identities import FakeDirectory, ask_function, bearer, document_for, identities_in, rows, serving, write_home
from tests.provider import Provider, running_provider


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    """A provider that behaves."""
    with running_provider() as running:
        yield running


@pytest.fixture(scope="module")
def identities(provider: Provider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Identities]:
    """Trusts the provider for acme."""
    home = tmp_path_factory.mktemp("home")
    write_home(home, document_for(provider))
    made = identities_in(home, FakeDirectory())
    yield made
    made.close()


@pytest.fixture(scope="module")
def check(identities: Identities, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., wire.CheckResponse]]:
    """Ask an extauth that listens on a socket."""
    with serving(tmp_path_factory.mktemp("s") / "x", identities) as ask:
        yield ask


@pytest.mark.parametrize("row", rows("accepted"))
def test_a_good_token_passes_at_both_levels(
    provider: Provider, identities: Identities, check: Callable[..., wire.CheckResponse], row: dict[str, Any]
) -> None:
    """Without this the rows below would prove nothing."""
    header = bearer(provider.cook(row["token"]))

    identity, answer = ask_function(identities, header), check(header)

    assert isinstance(identity, Identity)
    assert "ok_response" == answer.WhichOneof("http_response")
    assert "acme" == answer.dynamic_metadata.fields["tenant"].string_value
    assert identity.key_id == answer.dynamic_metadata.fields["key_id"].string_value


@pytest.mark.parametrize("row", rows())
def test_a_bad_token_is_refused_by_the_function(provider: Provider, identities: Identities, row: dict[str, Any]) -> None:
    """With the status and the code of its row."""
    denial = ask_function(identities, bearer(provider.cook(row["token"])))

    assert isinstance(denial, Denial)
    assert (row["expect"]["status"], row["expect"]["code"]) == (denial.refusal.status, denial.refusal.code)


@pytest.mark.parametrize("row", rows())
def test_a_bad_token_is_refused_over_grpc(
    provider: Provider, check: Callable[..., wire.CheckResponse], row: dict[str, Any]
) -> None:
    """The same, with a body in the caller's dialect; and nobody went where a token pointed."""
    answer = check(bearer(provider.cook(row["token"])))

    denied = answer.denied_response
    assert "denied_response" == answer.WhichOneof("http_response")
    assert (row["expect"]["status"], row["expect"]["code"]) == (denied.status.code, json.loads(denied.body)["error"]["code"])
    assert 0 == provider.elsewhere


PROVIDER = Provider(url="https://id.example.com")
PROVIDER.add("es", "ES256")
GOOD = PROVIDER.mint(exp=4_102_444_800)
ANYTHING = st.text(max_size=400) | st.binary(max_size=400).map(lambda data: data.decode("latin-1"))


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Identities:
    """Trusts a provider whose keys come without a network."""
    home: Path = tmp_path_factory.mktemp("fuzzed")
    write_home(home, {"issuers": document_for(PROVIDER)["issuers"][:1]})
    made = identities_in(home, FakeDirectory())
    [source] = made._built.sources.values()
    source._fetch = lambda _url: json.dumps(PROVIDER.jwks()).encode()
    source.refresh()
    return made


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


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(text=mutations() | ANYTHING | ANYTHING.map(lambda text: f"eyJ{text}"))
def test_no_made_up_token_passes_or_crashes(fuzzed: Identities, text: str) -> None:
    """Only the good token itself is good."""
    answer = ask_function(fuzzed, ("authorization", b"Bearer " + text.encode("utf-8", "surrogatepass")))

    assert text.lstrip(" ") == GOOD or isinstance(answer, Denial)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(["exp", "nbf", "iat", "aud", "iss", "tenant", "project", "sub", "scope", "models", "cnf"])


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(NAMES, JSON, min_size=1, max_size=3))
def test_no_claims_however_well_signed_crash_the_decision(fuzzed: Identities, changes: dict[str, Any]) -> None:
    """An issuer may sign anything; what passes is of the fenced tenant."""
    answer = ask_function(fuzzed, bearer(PROVIDER.cook({"claims": changes})))

    if not isinstance(answer, Denial):
        assert ("acme", "default") == (answer.tenant_id, answer.project_id)
        assert changes.get("exp", utc_now().timestamp() + 1) > utc_now().timestamp() - 30
