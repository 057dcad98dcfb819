# SPDX-License-Identifier: Apache-2.0
"""
What a key or a service account may do, as people write it: checked and put in one form.

Every function returns what is stored, or raises `Invalid` naming the first fault. None means
"every" and stays None.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from chassis.contract import SCOPES
from chassis.errors import Invalid

MODELS_MAX: Final = 200
MODEL_LENGTH_MAX: Final = 200
CIDRS_MAX: Final = 100
SCOPES_MAX: Final = 50
LABELS_MAX: Final = 50
LABEL_VALUE_LENGTH_MAX: Final = 100

_PATTERN: Final = re.compile(rf"[\x21-\x7e]{{1,{MODEL_LENGTH_MAX}}}")
#: A scope token as RFC 6749 3.3 has it, less the characters that need quoting in a shell.
_SCOPE: Final = re.compile(r"[a-z0-9][a-z0-9._:/-]{0,63}")
_LABEL_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9._/-]{0,61}[a-z0-9])?")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True, kw_only=True)
class Rights:
    """What keys and service accounts alike may be given, as people write it; None means every."""

    scopes: Sequence[str] | None = None
    models: Sequence[str] | None = None
    denied_models: Sequence[str] = ()

    def checked(self, *, served: Collection[str]) -> dict[str, list[str] | None]:
        """The columns of the same names."""
        return {
            "scopes": scopes(self.scopes),
            "models": allowed_models(self.models, served=served),
            "denied_models": denied_models(self.denied_models, served=served),
        }


def allowed_models(models: Sequence[str] | None, *, served: Collection[str]) -> list[str] | None:
    """
    Models that may be used: names of served ones, or patterns in which `*` stands for any characters.

    >>> allowed_models(["tiny", "llama-*"], served={"tiny"})
    ['llama-*', 'tiny']
    """
    if models is None:
        return None
    if not models:
        raise Invalid("A list of models has at least one name.", mend="Leave it out to allow every model.")
    return _models(models, served=served)


def denied_models(models: Sequence[str], *, served: Collection[str]) -> list[str]:
    """Models that may not be used, even if another rule allows them; none if empty."""
    return _models(models, served=served)


def allowed_cidrs(texts: Sequence[str] | None) -> list[Network] | None:
    """
    Addresses that a key may come from, in CIDR notation; an address alone is itself.

    >>> allowed_cidrs(["192.0.2.7", "2001:db8::/32"])
    [IPv4Network('192.0.2.7/32'), IPv6Network('2001:db8::/32')]
    """
    if texts is None:
        return None
    if not 1 <= len(texts) <= CIDRS_MAX:
        raise Invalid(f"A list of addresses has 1 to {CIDRS_MAX} entries.", mend="Leave it out to allow every address.")
    return sorted({_network(text) for text in texts}, key=lambda it: (it.version, it))


def scopes(names: Sequence[str] | None) -> list[str] | None:
    """What a key may be used for; extauth's policies and the token endpoint read them."""
    if names is None:
        return None
    if not 1 <= len(names) <= SCOPES_MAX:
        raise Invalid(f"A list of scopes has 1 to {SCOPES_MAX} entries.", mend="Leave it out to allow everything.")
    for name in names:
        if not _SCOPE.fullmatch(name):
            raise Invalid("A scope has 1 to 64 characters: small letters, digits and . _ : / -")
    # Words of policies are welcome beside them, but without one of these a key could do nothing at all.
    if not set(names) & set(SCOPES):
        raise Invalid("None of these scopes lets anything pass.", mend=f"Give at least one of {', '.join(SCOPES)}.")
    return sorted(set(names))


def labels(given: Mapping[str, str]) -> dict[str, str]:
    """A project's labels, which policies read."""
    if len(given) > LABELS_MAX:
        raise Invalid(f"A project has at most {LABELS_MAX} labels.")
    for name, value in given.items():
        if not _LABEL_NAME.fullmatch(name):
            raise Invalid("A label's name has 1 to 63 characters: small letters, digits and . _ / - inside.")
        if len(value) > LABEL_VALUE_LENGTH_MAX or not value.isprintable():
            raise Invalid(f"Label {name!r}: a value has at most {LABEL_VALUE_LENGTH_MAX} printable characters.")
    return dict(sorted(given.items()))


def name(text: str, *, what: str, length_max: int) -> str:
    """
    A name for people; *what* says whose in the error.

    Printable, so that it can neither end a line of a log nor colour a terminal.
    """
    if not 1 <= len(text) <= length_max or not text.isprintable() or text.isspace():
        raise Invalid(f"{what} name has 1 to {length_max} printable characters.")
    return text


def _models(models: Iterable[str], *, served: Collection[str]) -> list[str]:
    wanted = sorted(set(models))
    if len(wanted) > MODELS_MAX:
        raise Invalid(f"A list of models has at most {MODELS_MAX} names.")
    for model in wanted:
        if not _PATTERN.fullmatch(model):
            raise Invalid(f"A model's name has 1 to {MODEL_LENGTH_MAX} printable ASCII characters without spaces.")
        # A rule about a model that nobody serves could never act: most likely a slip of the pen.
        if "*" not in model and model not in served:
            raise Invalid(f"Model {model!r} is not served.", mend=f"Served: {', '.join(sorted(served))}; or use a pattern with *.")
    return wanted


def _network(text: str) -> Network:
    try:
        network = ipaddress.ip_network(text)
    except ValueError as exc:
        try:
            whole = ipaddress.ip_network(text, strict=False)
        except ValueError:
            raise Invalid("An address range is not in CIDR notation.", mend="Write 192.0.2.0/24 or 2001:db8::/32.") from exc
        raise Invalid(f"{text} has bits beyond its prefix.", mend=f"Did you mean {whole}?") from exc
    if isinstance(network, ipaddress.IPv6Network) and (network.network_address.ipv4_mapped or network.network_address.scope_id):
        raise Invalid(f"{text} is an IPv4 address in IPv6 clothes.", mend="Write the IPv4 form.")
    return network
