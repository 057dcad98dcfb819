# SPDX-License-Identifier: Apache-2.0
"""
`peaje check`: what would silently do nothing, or the wrong thing, before it is live.

Settings, Envoy's own validation, our lint, the models and identity documents, tokenizers, generic rules, and limits that can never
act.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from chassis.contract import IDENTITY_PATH, MODELS_PATH
from chassis.errors import PeajeError, Unavailable
from chassis.models import ModelCatalogue
from chassis.models_document import Faulty, read
from control import price_hints
from control.apply import validate_inlined
from control.cli import environment
from control.cli.client import call
from control.envoy_lint import lint
from control.envoy_resources import render_all, write
from control.finding import Finding
from control.laptop.binaries import find_envoy
from control.laptop.envoy import TLS_EXAMPLE, TLS_PATH, find_source
from control.laptop.places import Places, read_home
from control.located_yaml import load
from extauth.adapters.document import load_whole as load_identity
from ratelimit.adapters.rule_files import DIRECTORY as RULES_DIRECTORY
from ratelimit.adapters.rule_files import load as load_rules
from ratelimit.adapters.tokenizers import bytes_per_token

_EXAMPLE_MODELS = 'models: [{name: example, engine: openai, endpoints: ["127.0.0.1:1"]}]\n'


def check(directory: str | None, *, as_json: bool) -> int:
    """Print findings, one line each; 0 if there are none."""
    try:
        source = Path(directory) if directory else find_source(os.environ)
    except PeajeError as exc:
        return _tell([str(exc)], as_json=as_json)
    return _tell([*_settings(), *_envoy(source), *_tokenizers(), *_identity(), *_rules(), *_limits(), *_price_hints()], as_json=as_json)


def _settings() -> list[str]:
    from control.reference import SETTINGS

    return environment.faults(os.environ, [kind for _, kind in SETTINGS])


def _tell(findings: Sequence[str | Finding], *, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"findings": [str(finding) for finding in findings]}, indent=2))
    else:
        print("\n".join(map(str, findings)) or "Nothing to mend.")
    return 1 if findings else 0


def _envoy(source: Path) -> list[str | Finding]:
    found: list[str | Finding] = []
    with tempfile.TemporaryDirectory(prefix="peaje-check-") as directory:
        home = Path(directory)
        for name in ("run", "journal"):
            (home / name).mkdir()
        try:
            shutil.copytree(source, home / "envoy")
            rendered = render_all(_catalogue(), read_home(os.environ))
            write(rendered, home / "envoy")
            for name in ("envoy.yaml", "clusters.yaml", "routes.yaml"):
                found += lint(load(home / "envoy" / name), str(source / name))
            for path in (source / TLS_EXAMPLE, read_home(os.environ) / TLS_PATH):
                if path.exists():
                    found += lint(load(path), str(path))
            validate_inlined(find_envoy(os.environ), Places(home), rendered, secrets=read_home(os.environ) / "secrets")
        except Faulty as exc:
            found += exc.faults
        except PeajeError as exc:
            found.append(str(exc).replace(str(home / "envoy"), str(source)))
        except OSError as exc:
            found.append(f"{source}: {exc.strerror}.")
    return found


def _catalogue() -> ModelCatalogue:
    """The models document in force, or one that stands for any."""
    models = read_home(os.environ) / MODELS_PATH
    return ModelCatalogue.load(models) if models.exists() else ModelCatalogue(models=read(_EXAMPLE_MODELS, source="example"))


def _tokenizers() -> list[str]:
    """Tokenizers in the models document in force that are none: their models' first prompts would be guessed."""
    models = read_home(os.environ) / MODELS_PATH
    found = []
    try:
        named = [model.tokenizer for model in ModelCatalogue.load(models).models if model.tokenizer] if models.exists() else []
    except PeajeError:
        return []  # said above
    for path in named:
        try:
            bytes_per_token(path)
        except PeajeError as exc:
            found.append(str(exc))
    return found


def _identity() -> list[str]:
    """What is wrong with the document that the next `up` would use, or that is in force."""
    home, named = read_home(os.environ), os.environ.get("PEAJE_IDENTITY")
    path = Path(named) if named else home / IDENTITY_PATH
    try:
        if named or path.exists():
            load_identity(path, home=home)
    except PeajeError as exc:
        return [str(exc)]
    return []


def _rules() -> list[str]:
    """What is wrong with the rules that ratelimit would read, and what in them does nothing."""
    named = os.environ.get("PEAJE_RATELIMIT_CONFIG")
    directory = read_home(os.environ) / (named or RULES_DIRECTORY)
    if not named and not directory.exists():
        return []
    loaded = load_rules(directory)
    return [str(remark) for remark in (*loaded.faults, *loaded.remarks)]


def _limits() -> list[str]:
    try:
        return list(call("GET", "/v1/limits/findings")["findings"])
    except Unavailable:
        return []  # not running: there is nothing to ask


def _price_hints() -> list[str]:
    """Hints of the models document in force that no price follows."""
    try:
        models = _catalogue().models
        return price_hints.findings(models, call("GET", "/v1/prices", query={"in_force": "true"})["prices"])
    except Unavailable:
        return []  # not running: there is nothing to ask
    except Faulty:
        return []  # said above
