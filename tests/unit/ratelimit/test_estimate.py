# SPDX-License-Identifier: Apache-2.0
"""How far an estimate of the prompt can be off, before and after anything was learned."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from chassis.errors import Invalid
from chassis.models import ModelCatalogue
from control.cli import check
from ratelimit.adapters import tokenizers as adapter
from ratelimit.adapters.tokenizers import Calibration, bytes_per_token
from ratelimit.core.estimate import PROMPT_SAMPLES_MAX, SAMPLES_MIN, Estimates

REPOSITORY = Path(__file__).resolve().parents[3]
#: A vocabulary of 4,096: about a token a byte, far from what is assumed of an unknown model.
TOKENIZER = REPOSITORY / "control/laptop/models/mock-llama/tokenizer.json"


def catalogue(*models: dict[str, object]) -> ModelCatalogue:
    """A models document of these models."""
    return ModelCatalogue.parse({"models": [{"engine": "vllm", "endpoints": ["h:1"], **model} for model in models]}, source="test")


def test_a_learned_estimate_is_exceeded_by_one_prompt_in_a_thousand_and_by_one_percent_of_the_tokens() -> None:
    """The published bound, on prompts of any length whose bytes per token vary as widely as languages do."""
    draw = random.Random(7)
    estimates, prompts = Estimates(), []
    for _ in range(PROMPT_SAMPLES_MAX + 50_000):
        size = int(draw.lognormvariate(7, 1.5)) + 60
        prompts.append((size, max(1, round(size / min(max(draw.lognormvariate(1.25, 0.25), 1.0), 8.0)))))
    exceeded, over, total = 0, 0, 0
    for number, (size, tokens) in enumerate(prompts):
        if number >= PROMPT_SAMPLES_MAX:
            estimate = estimates.prompt_tokens(model="m", prompt_bytes=size)
            exceeded, over, total = exceeded + (tokens > estimate), over + max(0, tokens - estimate), total + tokens
        estimates.learn(tenant_id="t", model="m", prompt_bytes=size, input_tokens=tokens, output_tokens=1)

    # One in 1,025 is expected, 49 of fifty thousand: seven deviations above it would be no chance.
    assert exceeded <= 49 + 7 * 7
    assert over * 100 <= total


def test_what_was_learned_long_ago_is_forgotten() -> None:
    """An odd prompt is upheld for as many prompts as are kept, and no longer."""
    estimates = Estimates()
    for ratio in (1, *[4] * (PROMPT_SAMPLES_MAX - 1)):
        estimates.learn(tenant_id="t", model="m", prompt_bytes=100 * ratio, input_tokens=100, output_tokens=0)
    before = estimates.prompt_tokens(model="m", prompt_bytes=400)
    estimates.learn(tenant_id="t", model="m", prompt_bytes=400, input_tokens=100, output_tokens=0)

    assert (400, 100) == (before, estimates.prompt_tokens(model="m", prompt_bytes=400))


def test_the_model_s_own_tokenizer_bounds_the_first_prompts() -> None:
    """Texts that it was not calibrated with are estimated at no fewer tokens than they have; by bytes alone they were not."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    estimates, assumed = Estimates(), Estimates()
    Calibration(lambda: catalogue({"name": "m", "tokenizer": str(TOKENIZER)}), estimates).look()

    for path in ("docs/concepts.md", "README.md", "metering/core/journal.py", "envoy/envoy.yaml"):
        body = json.dumps({"model": "m", "messages": [{"role": "user", "content": (REPOSITORY / path).read_text()}]}).encode()
        tokens = len(tokenizer.encode((REPOSITORY / path).read_text()).ids)
        assert assumed.prompt_tokens(model="m", prompt_bytes=len(body)) < tokens
        assert tokens <= estimates.prompt_tokens(model="m", prompt_bytes=len(body)) <= 1.5 * tokens


def test_what_the_engine_counted_stands_above_its_tokenizer() -> None:
    """The truth includes the chat's template, which no tokenizer of a text knows."""
    estimates = Estimates()
    estimates.calibrate({"m": 1.0})
    for _ in range(SAMPLES_MIN):
        estimates.learn(tenant_id="t", model="m", prompt_bytes=300, input_tokens=100, output_tokens=1)

    assert 100 == estimates.prompt_tokens(model="m", prompt_bytes=300)


def test_a_tokenizer_that_is_replaced_is_read_again_and_a_bad_one_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad file leaves its model to its bytes, and the others alone."""
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_bytes(TOKENIZER.read_bytes())
    bad.write_text("{}")
    read: list[Path] = []
    monkeypatch.setattr(adapter, "bytes_per_token", lambda path: (read.append(path), bytes_per_token(path))[1])
    models = catalogue({"name": "good", "tokenizer": str(good)}, {"name": "bad", "tokenizer": str(bad)}, {"name": "none"})
    estimates = Estimates()
    calibration = Calibration(lambda: models, estimates)

    for _ in range(3):
        calibration.look()
    once = sorted(read)
    bad.unlink()
    (tmp_path / "new.json").write_bytes(TOKENIZER.read_bytes())
    (tmp_path / "new.json").rename(bad)
    calibration.look()

    assert [bad, good] == once
    assert [bad] == read[2:]
    assert estimates.prompt_tokens(model="bad", prompt_bytes=100) == estimates.prompt_tokens(model="good", prompt_bytes=100)
    assert 40 == estimates.prompt_tokens(model="none", prompt_bytes=100)


@pytest.mark.parametrize(("content", "said"), [(None, "cannot be read"), (b"\x00" * 10, "no tokenizer.json"), (b"{}", "no tokenizer.json")])
def test_what_is_no_tokenizer_says_so(tmp_path: Path, content: bytes | None, said: str) -> None:
    """One line that names the file."""
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(Invalid, match=said):
        bytes_per_token(path)


def test_a_file_beyond_the_bound_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the bound it is."""
    path = tmp_path / "tokenizer.json"
    path.write_bytes(TOKENIZER.read_bytes())
    size = path.stat().st_size
    monkeypatch.setattr(adapter, "FILE_BYTES_MAX", size)
    at_the_bound = bytes_per_token(path)
    monkeypatch.setattr(adapter, "FILE_BYTES_MAX", size - 1)

    with pytest.raises(Invalid, match="more than"):
        bytes_per_token(path)

    assert 1.0 <= at_the_bound < 1.5


@pytest.mark.parametrize("tokenizer", ["relative.json", "", 7, ["/x"]])
def test_a_tokenizer_that_is_no_absolute_path_is_refused(tokenizer: object) -> None:
    """The document is read by services with other working directories."""
    with pytest.raises(Invalid, match="absolute path"):
        catalogue({"name": "m", "tokenizer": tokenizer})


def test_check_names_a_tokenizer_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its model's first prompts are guessed; a good one is not mentioned."""
    monkeypatch.setenv("PEAJE_HOME", str(tmp_path))
    models = [{"name": name, "engine": "vllm", "endpoints": ["h:1"], "tokenizer": str(path)} for name, path in (("good", TOKENIZER), ("bad", tmp_path))]
    (tmp_path / "envoy").mkdir()
    (tmp_path / "envoy/models.yaml").write_text(json.dumps({"models": models}))

    [found] = check._tokenizers()

    assert str(tmp_path) in found
