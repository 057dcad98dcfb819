# SPDX-License-Identifier: Apache-2.0
"""Tokens that the rows name: one good one, and one for each way in which a token can be wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, Final

import jwt

from tests.bad_inputs.issuer import Issuer, encode

_HOUR: Final = 3600
Make = Callable[[Issuer], str]


def _unsigned(algorithm: str) -> Make:
    def make(issuer: Issuer) -> str:
        header = encode(json.dumps({"alg": algorithm, "typ": "at+jwt", "kid": "one"}).encode())
        return f"{header}.{encode(json.dumps(issuer.claims()).encode())}.{encode(b'x')}"

    return make


def _hmac_with_public_key(lead: bytes) -> Make:
    def make(issuer: Issuer) -> str:
        # By hand: the library refuses to sign with a PEM, an attacker does not.
        import hashlib  # noqa: PLC0415
        import hmac  # noqa: PLC0415

        header = encode(json.dumps({"alg": "HS256", "typ": "at+jwt", "kid": "rsa"}).encode())
        text = f"{header}.{encode(json.dumps(issuer.claims()).encode())}"
        return f"{text}.{encode(hmac.new(lead + issuer.public_pem('rsa'), text.encode(), hashlib.sha256).digest())}"

    return make


def _other_algorithm(issuer: Issuer) -> str:
    # The header says an allowed algorithm, the key is bound to another one.
    return jwt.encode(issuer.claims(), issuer.keys["rsa"], algorithm="PS256", headers={"typ": "at+jwt", "kid": "rsa"})


def _claims_twice(issuer: Issuer) -> str:
    payload = json.dumps(issuer.claims())
    return issuer.signed('{"alg":"ES256","typ":"at+jwt","kid":"one"}', payload[:-1] + ',"tenant":"other"}')


def _raw_claim(text: str) -> Make:
    def make(issuer: Issuer) -> str:
        payload = json.dumps(issuer.claims(exp=None))
        return issuer.signed('{"alg":"ES256","typ":"at+jwt","kid":"one"}', payload[:-1] + f',"exp":{text}}}')

    return make


def _deep(issuer: Issuer) -> str:
    payload = json.dumps(issuer.claims())
    return issuer.signed('{"alg":"ES256","typ":"at+jwt","kid":"one"}', payload[:-1] + ',"x":' + "[" * 2000 + "]" * 2000 + "}")


def _psychic(issuer: Issuer) -> str:
    text = issuer.token().rpartition(".")[0]
    return f"{text}.{encode(bytes(64))}"


def _header(**members: Any) -> Make:
    return lambda issuer: issuer.token(header=members)


def _claims(**changes: Any) -> Make:
    return lambda issuer: issuer.token(**changes)


def _later(**seconds: int) -> Make:
    return lambda issuer: issuer.token(**{name: int(time.time()) + value for name, value in seconds.items()})


def _without_kid(issuer: Issuer) -> str:
    return jwt.encode(issuer.claims(), issuer.keys["one"], algorithm="ES256", headers={"typ": "at+jwt"})


TOKENS: Final[dict[str, Make]] = {
    "good": _claims(),
    "good_rsa": lambda issuer: issuer.token("rsa"),
    "aud_list_with_us": _claims(aud=["other", "peaje"]),
    "expired_within_leeway": _later(exp=-20),
    "none": _unsigned("none"),
    "None": _unsigned("None"),
    "nOnE": _unsigned("nOnE"),
    "hs256_public_key": _hmac_with_public_key(b""),
    "hs256_public_key_space": _hmac_with_public_key(b" \n"),
    "other_algorithm": _other_algorithm,
    "kid_path": _header(kid="../../dev/null"),
    "kid_sql": _header(kid="' OR 1=1 --"),
    "kid_long": _header(kid="k" * 4096),
    "kid_absent": _without_kid,
    "kid_unknown": _header(kid="another"),
    "jku": lambda issuer: issuer.token(header={"jku": f"{issuer.url}/evil"}),
    "x5u": lambda issuer: issuer.token(header={"x5u": f"{issuer.url}/evil"}),
    "jwk": lambda issuer: issuer.token(header={"jwk": json.loads(issuer.document())["keys"][0]}),
    "crit": _header(crit=["x"], x=1),
    "b64": lambda issuer: issuer.signed(
        '{"alg":"ES256","typ":"at+jwt","kid":"one","b64":false}', json.dumps(issuer.claims())
    ),
    "zip": _header(zip="DEF"),
    "expired": _later(exp=-61),
    "not_before": _later(nbf=61),
    "issued_in_future": _later(iat=30 * 24 * _HOUR),
    "exp_text": _raw_claim('"9999999999"'),
    "exp_huge": _raw_claim("1e999"),
    "exp_negative": _raw_claim("-1"),
    "exp_true": _raw_claim("true"),
    "exp_nan": _raw_claim("NaN"),
    "exp_absent": _claims(exp=None),
    "iss_slash": lambda issuer: issuer.token(iss=f"{issuer.url}/"),
    "aud_wrong": _claims(aud="other"),
    "aud_list_without_us": _claims(aud=["other", "peaje2"]),
    "aud_absent": _claims(aud=None),
    "id_token": _header(typ="JWT"),
    "typ_absent": _header(typ=None),
    "claims_twice": _claims_twice,
    "tenant_of_another": _claims(tenant="other"),
    "tenant_absent": _claims(tenant=None),
    "tenant_not_a_slug": _claims(tenant="acme}"),
    "project_unknown": _claims(tenant="acme"),
    "deep": _deep,
    "one_mebibyte": lambda issuer: f"{issuer.token().partition('.')[0]}.{'A' * (1 << 20)}.AAAA",
    "over_the_cap": lambda issuer: issuer.token(pad="x" * 8192),
    "jwe": lambda issuer: ".".join([encode(b'{"alg":"PBES2-HS256+A128KW","enc":"A128GCM","p2c":2147483648}'), "A", "A", "A", "A"]),
    "psychic": _psychic,
    "tampered": lambda issuer: issuer.token()[:-6] + "AAAAAA",
    "scope_of_others": _claims(scope="embeddings"),
    "scope_ours": _claims(scope="openid inference"),
    "subject_absent": _claims(sub=None),
}
