# SPDX-License-Identifier: Apache-2.0
"""The models document: what it means, and what is said of each thing that is wrong in it."""

from __future__ import annotations

import os
import re
from decimal import Decimal
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from chassis import models, models_document
from chassis.contract import MODELS_PATH, MODELS_READ_PATH
from chassis.marks import digest, lagging
from chassis.models import ModelCatalogue
from chassis.models_document import Faulty, load, read
from chassis.secrets import write_private
from chassis.served import Affinity, Balance, Endpoint, EndpointPicker, Model, Pool, PriceHint, Retry, WhenAway
from tests.waiting import until

WHOLE = """
models:
- name: org/llama
  aliases: [default, small]
  affinity: {prefix_bytes: 512}
  retry: unanswered
  output_tokens_max: 4096
  price_hint: {input: "0.15", output: "0.60", currency: EUR}
  pools:
  - {name: stable, engine: vllm, endpoints: ["10.0.0.1:8000", "10.0.0.2:8000"], weight: 90, requests_max: 64}
  - {name: canary, engine: dynamo, endpoints: ["10.0.0.3:8000"], weight: 10, model: llama-next, slow_start_seconds: 0}
  - name: rented
    engine: openai
    endpoints: ["https://api.example.com"]
    fallback: true
    credential_file: secrets/rented
    health_path: /up
- {name: tiny, engine: trtllm, endpoints: ["[::1]:1"]}
"""


def test_a_whole_document_means_what_it_says() -> None:
    """Every field, and the defaults of those that are left out."""
    llama, tiny = read(WHOLE, source="x")

    assert Model(
        name="org/llama",
        aliases=("default", "small"),
        affinity=Affinity(prefix_bytes=512),
        retry=Retry.UNANSWERED,
        output_tokens_max=4096,
        price_hint=PriceHint(input=Decimal("0.15"), output=Decimal("0.60"), currency="EUR"),
        pools=(
            Pool(
                name="stable", engine="vllm", weight=90, requests_max=64,
                endpoints=(Endpoint(scheme="http", host="10.0.0.1", port=8000), Endpoint(scheme="http", host="10.0.0.2", port=8000)),
            ),
            Pool(
                name="canary", engine="dynamo", weight=10, model="llama-next", slow_start_seconds=0,
                endpoints=(Endpoint(scheme="http", host="10.0.0.3", port=8000),),
            ),
            Pool(
                name="rented", engine="openai", weight=0, credential_file=Path("secrets/rented"), health_path="/up",
                endpoints=(Endpoint(scheme="https", host="api.example.com", port=443),),
            ),
        ),
    ) == llama  # fmt: skip
    [pool] = tiny.pools
    assert ("main", 1, Endpoint(scheme="http", host="::1", port=1)) == (pool.name, pool.weight, pool.endpoints[0])


def test_the_example_in_the_docs_is_a_document() -> None:
    """As it is written there, and every field that exists is explained."""
    text = (Path(__file__).parents[2] / "docs/models.md").read_text()
    [example] = re.findall(r"^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)

    tiny, llama, coder = read(example, source="docs")

    assert ("tiny", "llama-3.1-8b", "coder") == (tiny.name, llama.name, coder.name)
    assert [90, 10, 0] == [pool.weight for pool in llama.pools]
    explained = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    fields = models_document._Pooled.model_fields.keys() | models_document._Alone.model_fields.keys() | models_document._NamedPool.model_fields.keys()
    assert fields == explained


def test_aliases_are_names_of_models_and_not_models() -> None:
    """Who looks for what is served finds the models' own names; one engine that cannot tell makes it none that can."""
    catalogue = ModelCatalogue(models=read(WHOLE, source="x"))

    assert {"org/llama", "tiny"} == catalogue.served
    assert {"default": "org/llama", "small": "org/llama"} == catalogue.aliases
    assert (False, True, False) == tuple(map(catalogue.sends_running_usage, ("org/llama", "tiny", "default")))


POOL = '{name: a, engine: vllm, endpoints: ["h:1"]%s}'
ALONE = 'engine: vllm, endpoints: ["h:1"]'
WRONG = {
    "- {name: a, engine: vlm, endpoints: ['h:1']}": "x:2: models[0].engine: must be one of vllm, dynamo, trtllm, openai",
    "- {name: a, engine: 7, endpoints: ['h:1']}": "x:2: models[0].engine: must be text, in quotes where it looks like a number",
    "- {name: a, engine: vllm}": "x:2: models[0].endpoints: required",
    f"- {{name: a b, {ALONE}}}": "x:2: models[0].name: must be 1 to 200 printable ASCII characters without spaces",
    f"- {{name: {'a' * 201}, {ALONE}}}": "x:2: models[0].name: must be 1 to 200 printable ASCII characters without spaces",
    f"- {{name: a, engin: b, {ALONE}}}": "x:2: models[0].engin: unknown field",
    "- a": "x:2: models[0]: must be a mapping",
    "- {name: a, engine: vllm, endpoints: [h]}": "x:2: models[0].endpoints[0]: an endpoint is host:port or http(s)://host[:port]",
    "- {name: a, engine: vllm, endpoints: ['h:70000']}": "x:2: models[0].endpoints[0]: 70000 is not a port",
    "- {name: a, engine: vllm, endpoints: ['1.2.3:80']}": "x:2: models[0].endpoints[0]: '1.2.3' is not a host",
    "- {name: a, engine: vllm, endpoints: ['https://10.0.0.1']}": "x:2: models[0].endpoints[0]: https needs a host name, an address has no certificate to check",
    "- {name: a, engine: vllm, endpoints: ['h:1', 'h:1']}": "x:2: models[0]: an endpoint is listed twice",
    "- {name: a, engine: vllm, endpoints: ['h:1', 'https://h']}": "x:2: models[0]: endpoints must be all http or all https",
    f"- {{name: a, {ALONE}, credential_file: /secrets/x}}": "x:2: models[0].credential_file: must be a path below the state directory, as secrets/NAME",
    f"- {{name: a, {ALONE}, credential_file: a/../../x}}": "x:2: models[0].credential_file: must be a path below the state directory, as secrets/NAME",
    f"- {{name: a, {ALONE}, affinity: {{}}}}": "x:2: models[0].affinity: name either header or prefix_bytes",
    f"- {{name: a, {ALONE}, retry: always}}": "x:2: models[0].retry: must be 'unsent' or 'unanswered'",
    f"- {{name: a, {ALONE}, requests_max: 0}}": "x:2: models[0].requests_max: must be greater than or equal to 1",
    f"- {{name: a, {ALONE}, health_path: health}}": "x:2: models[0].health_path: must be a path that begins with /",
    f"- {{name: a, {ALONE}, balance: orcas}}": "x:2: models[0].balance: must be 'least_request' or 'orca'",
    f"- {{name: a, {ALONE}, endpoint_picker: {{}}}}": "x:2: models[0].endpoint_picker.address: required",
    f"- {{name: a, {ALONE}, endpoint_picker: {{address: epp}}}}": "x:2: models[0].endpoint_picker.address: an endpoint is host:port or http(s)://host[:port]",
    f"- {{name: a, {ALONE}, endpoint_picker: {{address: 'epp:1', when_away: shut}}}}": "x:2: models[0].endpoint_picker.when_away: must be 'open' or 'close'",
    f"- {{name: a, {ALONE}, balance: orca, endpoint_picker: {{address: 'epp:1'}}}}": "x:2: models[0]: choose by endpoint_picker or by balance: orca, not both",
    f"- {{name: a, {ALONE}, balance: orca, affinity: {{header: x-a}}}}": "x:2: models[0]: affinity chooses the server, and so would endpoint_picker or balance: orca; not both",
    f"- name: a\n  affinity: {{header: x-a}}\n  pools:\n  - {POOL % ', endpoint_picker: {address: epp:1}'}": "x:2: models[0]: affinity chooses the server, and so would endpoint_picker or balance: orca; not both",
    f"- name: a\n  pools:\n  - {POOL % ', fallback: true, endpoint_picker: {address: epp:1}'}": "x:4: models[0].pools[0]: a fallback pool has no endpoint_picker: who answers is known only after pickers were asked",
    f'- {{name: a, {ALONE}, price_hint: {{input: "1e3", output: "1"}}}}': 'x:2: models[0].price_hint.input: must be an amount in quotes, as "0.15"',
    f"- {{name: a, engine: vllm, pools: [{POOL % ''}]}}": "x:2: models[0].engine: unknown field",
    f"- name: a\n  pools:\n  - {POOL % ', weight: 0'}": "x:4: models[0].pools[0].weight: must be greater than or equal to 1",
    f"- name: a\n  pools:\n  - {POOL % ', weight: 1001'}": "x:4: models[0].pools[0].weight: must be less than or equal to 1000",
    f"- name: a\n  pools:\n  - {POOL % ', fallback: true'}": "x:2: models[0]: every pool is a fallback: one at least has to have a weight",
    f"- name: a\n  pools:\n  - {POOL % ', fallback: true, weight: 1'}": "x:4: models[0].pools[0]: a fallback pool has no weight: it gets all requests, and only when the others are dead",
    f"- name: a\n  pools:\n  - {POOL % ''}\n  - {POOL % ''}": "x:2: models[0]: pool 'a' is listed twice",
    '- name: a\n  pools:\n  - {name: A, engine: vllm, endpoints: ["h:1"]}': "x:4: models[0].pools[0].name: must be 1 to 40 lower-case letters, digits and hyphens",
    "- name: a\n  pools: []": "x:3: models[0].pools: must not be empty",
    f"- {{name: a, {ALONE}}}\n- {{name: a, {ALONE}}}": "x:3: models[1].name: model 'a' is listed twice",
    f"- {{name: a, {ALONE}, aliases: [b]}}\n- {{name: b, {ALONE}}}": "x:2: models[0].aliases[0]: 'b' is a model's own name",
    f"- {{name: a, {ALONE}, aliases: [c]}}\n- {{name: b, {ALONE}, aliases: [c]}}": "x:3: models[1].aliases[0]: 'c' is an alias of 'a' already",
}


@pytest.mark.parametrize(("entry", "said"), WRONG.items(), ids=[said.partition(": ")[2][:60] for said in WRONG.values()])
def test_each_wrong_thing_is_told_with_its_place(entry: str, said: str) -> None:
    """The line, the way to it, and what it should be."""
    with pytest.raises(Faulty) as refused:
        read(f"models:\n{entry}\n", source="x")

    assert (said,) == refused.value.faults


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "x: `models` must be a list with at least one model"),
        ("models: []", "x:1: `models` must be a list with at least one model"),
        ("models:\n- {name: a", "x:2: cannot read the models document: it is not YAML"),
        (f"models:\n- {{name: a, name: b, {ALONE}}}", "x:2: name is given twice"),
        (f"modells: 1\nmodels:\n- {{name: a, {ALONE}}}", "x:1: modells: unknown field"),
        ("[" * 5000, "x: nested too deep"),
    ],
)
def test_a_document_that_is_none_is_told_so(text: str, said: str) -> None:
    """Before anything in it is looked at."""
    with pytest.raises(Faulty) as refused:
        read(text, source="x")

    assert (said,) == refused.value.faults


def test_all_faults_are_told_at_once_up_to_a_bound() -> None:
    """Twenty; a document with more is none."""
    for count in (19, 20, 21):
        text = "models:\n" + "- {name: a, engine: vllm}\n" * count
        with pytest.raises(Faulty) as refused:
            read(text, source="x")
        assert min(count, 20) == len(refused.value.faults)


def test_a_document_is_read_up_to_its_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes and models: at the bound, and not one above."""
    path = tmp_path / "models.yaml"
    path.write_text("".join(["models:\n", *(f"- {{name: m{number}, {ALONE}}}\n" for number in range(5))]))

    monkeypatch.setattr(models_document, "MODELS_MAX", 5)
    monkeypatch.setattr(models_document, "BYTES_MAX", path.stat().st_size)
    assert 5 == len(load(path))
    monkeypatch.setattr(models_document, "MODELS_MAX", 4)
    with pytest.raises(Faulty, match="more than 4 models"):
        load(path)
    monkeypatch.setattr(models_document, "BYTES_MAX", path.stat().st_size - 1)
    with pytest.raises(Faulty, match="larger than"):
        load(path)


def test_a_faulty_document_keeps_the_last_good_one_and_says_so(tmp_path: Path) -> None:
    """Until it is mended; whoever watches it sees that, by a metric, and whoever changed it by its mark."""
    path = tmp_path / MODELS_PATH
    path.parent.mkdir()
    path.write_text(f"models:\n- {{name: a, {ALONE}}}\n")
    watched = models.WatchedCatalogue(tmp_path, process="extauth")
    seen = []

    for text in (f"- {{name: b, {ALONE}}}", "- {name: c}", f"- {{name: d, {ALONE}}}"):
        write_private(path, f"models:\n{text}\n")
        watched.look()
        late = lagging(tmp_path / MODELS_READ_PATH, digest(path.read_bytes()))
        seen.append((watched.current().names, REGISTRY.get_sample_value("peaje_models_refused"), late))

    process = [f"extauth-{os.getpid()}"]
    assert [(["b"], 0, []), (["b"], 1, process), (["d"], 0, [])] == seen


def test_a_document_is_watched_from_then_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has to ask for it: an idle process reads a new one as well."""
    path = tmp_path / MODELS_PATH
    path.parent.mkdir()
    path.write_text(f"models:\n- {{name: a, {ALONE}}}\n")
    monkeypatch.setattr(models, "LOOK_EVERY_SECONDS", 0.01)
    watched = models.WatchedCatalogue(tmp_path, process="extauth").watch()

    write_private(path, f"models:\n- {{name: b, {ALONE}}}\n")

    until(lambda: watched.current().names == ["b"])


def test_who_chooses_the_server_is_read() -> None:
    """Envoy by itself, unless the document says otherwise; a picker that is away does not stop a request."""
    [by_itself], [by_load], [by_picker] = (
        read(f"models:\n- {{name: a, {ALONE}{more}}}\n", source="x")[0].pools
        for more in ("", ", balance: orca", ", endpoint_picker: {address: 'https://epp.example:9002'}")
    )

    assert (Balance.LEAST_REQUEST, None) == (by_itself.balance, by_itself.endpoint_picker)
    assert Balance.ORCA is by_load.balance
    picker = EndpointPicker(address=Endpoint(scheme="https", host="epp.example", port=9002), when_away=WhenAway.OPEN)
    assert picker == by_picker.endpoint_picker


def test_no_value_is_repeated_in_a_fault() -> None:
    """A credential may have been written where its file's name belongs."""
    with pytest.raises(Faulty) as refused:
        read(f"models:\n- {{name: a, {ALONE}, credential_file: /sk-secret}}\n", source="x")

    assert "sk-secret" not in str(refused.value)
