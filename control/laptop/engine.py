# SPDX-License-Identifier: Apache-2.0
"""
The model server behind Envoy: NVIDIA Dynamo with its mocker, a fake one, or one that already runs.

Ends in a models document (`envoy/models.yaml`), which every part reads.
"""

from __future__ import annotations

import enum
import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import yaml

from chassis.contract import MODELS_PATH
from chassis.errors import Invalid
from chassis.models import ModelCatalogue
from chassis.secrets import write_private
from control.laptop.errors import Trouble
from control.laptop.parts import Part, base_environment
from control.laptop.places import REPOSITORY, Places
from control.laptop.probes import http_ok, lists_model
from control.laptop.processes import free_port

#: What our own model servers call their model.
SERVED_NAME = "tiny"
_MODEL_DIRECTORY = Path(__file__).parent / "models" / "mock-llama"
_ASK_SECONDS = 5.0
#: `./peaje environment` ends so when a package has no build for this platform.
_NO_BUILD = 4

Say = Callable[[str], None]


class EngineChoice(enum.StrEnum):
    """Which model server `up` starts."""

    DYNAMO = "dynamo"
    FAKE = "fake"


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """The model server: what it is called, the document that leads to it, and its processes, if they are ours."""

    description: str
    document: Mapping[str, Any]
    parts: tuple[Part, ...] = ()
    notes: tuple[str, ...] = field(default_factory=tuple)
    #: The document as somebody wrote it, with its comments; None: nobody did.
    text: str | None = None

    @property
    def models(self) -> list[str]:
        """Served names, in the document's order."""
        return [entry["name"] for entry in self.document["models"]]


def read_models_document(path: Path) -> Engine:
    """The models document that the user wrote (PEAJE_MODELS); its servers are theirs to run."""
    try:
        ModelCatalogue.load(path)
    except Invalid as exc:
        raise Trouble(f"PEAJE_MODELS: {exc}") from exc
    text = path.read_text("utf-8")
    return Engine(description=f"as {path} says", document=yaml.safe_load(text), text=text)


def ask_model_server(url: str) -> Engine:
    """A model server that already runs at *url*: which models, and of which kind."""
    no_url = Trouble(f"--model-server {url} is not a URL.", mend="Give one like http://127.0.0.1:8000.")
    try:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        port = parts.port
    except ValueError as exc:
        raise no_url from exc
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise no_url
    base = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    asked = f"{base}/v1/models"
    try:
        answer = httpx.get(asked, timeout=_ASK_SECONDS, trust_env=False)
        answer.raise_for_status()
        entries = [(entry["id"], str(entry.get("owned_by", ""))) for entry in answer.json()["data"]]
    except httpx.HTTPStatusError as exc:
        raise Trouble(f"The model server answers {exc.response.status_code} to GET {asked}.") from exc
    except httpx.HTTPError as exc:
        raise Trouble(
            f"The model server does not answer: GET {asked}: {exc or type(exc).__name__}.",
            mend="Check --model-server.",
        ) from exc
    except (ValueError, KeyError, TypeError) as exc:
        raise Trouble(f"The model server's answer to GET {asked} is not an OpenAI-style list of models.") from exc
    if not entries:
        raise Trouble(f"The model server at {base} serves no model yet.", mend="Try again when it does.")
    endpoint = base if parts.scheme == "https" else base.removeprefix("http://")
    if port is None and parts.scheme == "http":
        endpoint = f"{endpoint}:80"
    document = {
        "models": [
            {"name": name, "engine": engine_kind(owner), "endpoints": [endpoint]}
            for name, owner in entries
        ]
    }
    return Engine(description=base, document=document)


def engine_kind(owned_by: str) -> str:
    """The engine's kind from `owned_by` of a listed model; "openai" for one we do not know."""
    owner = owned_by.lower()
    if owner == "vllm":
        return "vllm"
    if owner in ("tensorrt_llm", "trtllm"):
        return "trtllm"
    return "dynamo" if owner in ("nvidia", "dynamo") else "openai"


def start_dynamo(
    places: Places, environ: Mapping[str, str], environment: Path, *, say: Say
) -> Engine:
    """Dynamo's frontend and its mocker; the fake engine where Dynamo has no build for this platform."""
    refused = _make_environment(environ, say)
    if refused is not None:
        note = f"NVIDIA Dynamo has no build for this platform ({refused}): the fake engine stands in"
        fake = start_fake(places, environ)
        return Engine(
            description=fake.description, document=fake.document, parts=fake.parts, notes=(note,)
        )
    port = free_port()
    python = str(_dynamo_environment(environment) / "bin" / "python")
    env = _dynamo_settings(places, environ)
    models_url = f"http://127.0.0.1:{port}/v1/models"
    frontend = Part(
        name="engine",
        argv=(
            python, "-m", "dynamo.frontend",
            "--http-host", "127.0.0.1",
            "--http-port", str(port),
            "--enable-anthropic-api",
        ),
        env=env,
        ready=http_ok(models_url),
        ready_within_seconds=60.0,
        ports={"engine": port},
    )
    worker = Part(
        name="engine-worker",
        argv=(
            python, "-m", "dynamo.mocker",
            "--model-path", str(_MODEL_DIRECTORY),
            "--model-name", SERVED_NAME,
            "--speedup-ratio", "10",
            "--block-size", "16",
            "--max-model-len", "8192",
            "--no-kv-events",
        ),
        env=env,
        ready=lists_model(models_url, SERVED_NAME),
        ready_within_seconds=60.0,
    )
    return Engine(
        description=f"NVIDIA Dynamo {dynamo_version(environment)}, frontend and mocker",
        document=_document("dynamo", port, tokenizer=str(_MODEL_DIRECTORY / "tokenizer.json")),
        parts=(frontend, worker),
    )


def start_fake(places: Places, environ: Mapping[str, str]) -> Engine:
    """The tests' model server: it speaks as Dynamo does and keeps a log of what it truly sent."""
    port = free_port()
    part = Part(
        name="engine",
        argv=(
            sys.executable, "-m", "tests.fake_engine",
            "--port", str(port),
            "--engine", "dynamo",
            "--model", SERVED_NAME,
            "--truth", str(places.log / "fake-engine-truth.jsonl"),
        ),
        env={**base_environment(environ), "PYTHONPATH": str(REPOSITORY), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"},
        ready=lists_model(f"http://127.0.0.1:{port}/v1/models", SERVED_NAME),
        ports={"engine": port},
    )
    return Engine(description="the fake engine", document=_document("dynamo", port), parts=(part,))


def publish_document(engine: Engine, places: Places) -> None:
    """Write the models document in place of the last one, whole."""
    text = engine.text if engine.text is not None else yaml.safe_dump(dict(engine.document), sort_keys=False)
    write_private(places.home / MODELS_PATH, text)


def dynamo_version(environment: Path) -> str:
    """The version in Dynamo's own environment, without starting its Python."""
    path = [str(found) for found in _dynamo_environment(environment).glob("lib/python*/site-packages")]
    found = next(iter(importlib.metadata.distributions(name="ai-dynamo", path=path)), None)
    return found.version if found is not None else "unknown"


def _dynamo_environment(environment: Path) -> Path:
    return environment.with_name(environment.name + "-dynamo")


def _document(kind: str, port: int, **more: str) -> dict[str, Any]:
    return {"models": [{"name": SERVED_NAME, "engine": kind, "endpoints": [f"127.0.0.1:{port}"], **more}]}


def _make_environment(environ: Mapping[str, str], say: Say) -> str | None:
    """Make Dynamo's environment by the same means as ours; the reason if there is no build of it."""
    lines: list[str] = []
    with subprocess.Popen(  # noqa: S603 - our own script
        [REPOSITORY / "peaje", "environment", "dynamo"],
        env=dict(environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            text = line.rstrip().removeprefix("peaje: ")
            lines.append(text.strip())
            say(text)
    if process.returncode == 0:
        return None
    if process.returncode == _NO_BUILD:
        return lines[-1] if lines else "no build"
    raise Trouble(
        "The environment of NVIDIA Dynamo could not be made.",
        mend="`./peaje up --engine fake` works without it.",
        details=lines[-8:],
    )


def _dynamo_settings(places: Places, environ: Mapping[str, str]) -> dict[str, str]:
    # Workers of an earlier run are found here, and waited for until their lease ends.
    shutil.rmtree(places.dynamo, ignore_errors=True)
    places.dynamo.mkdir(mode=0o700)
    return {
        **base_environment(environ),
        "HOME": str(places.dynamo),  # it caches model cards in ~/.cache
        "PATH": environ.get("PATH", os.defpath),
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": "dynamo/kv",
        "DYN_REQUEST_PLANE": "tcp",
        "DYN_TCP_RPC_HOST": "127.0.0.1",
        "DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.1",
        # Its event sockets listen on every address of the host. Told of a broker they listen on none;
        # there is no broker, and one worker has nobody to tell where its cache is.
        "DYN_EVENT_PLANE": "zmq",
        "DYN_ZMQ_BROKER_URL": "xsub=tcp://127.0.0.1:1 , xpub=tcp://127.0.0.1:1",
        "DYN_SELF_HOST_METADATA": "0",
        "DYN_LOG": "warn",
        "DYN_SDK_DISABLE_ANSI_LOGGING": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
