# SPDX-License-Identifier: Apache-2.0
"""Both codecs agree on the wire, for every message and field of ours; a proto that drifts does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.descriptor_pb2 import FieldDescriptorProto as Proto
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chassis.wire.compile import compile_protos
from tests.conformance import codecs

MESSAGES = codecs.message_types()
FIELDS = [field for message in MESSAGES for field in message.fields]
REPOSITORY = Path(__file__).resolve().parents[2]

#: A number that none of Envoy's messages uses.
_FREE_NUMBER = 199
#: To what each type is changed: where there is one, to a type that looks the same on the wire.
_OTHER_TYPE = {
    Proto.TYPE_STRING: Proto.TYPE_BYTES,
    Proto.TYPE_BYTES: Proto.TYPE_STRING,
    Proto.TYPE_BOOL: Proto.TYPE_UINT32,
    Proto.TYPE_UINT32: Proto.TYPE_UINT64,
    Proto.TYPE_INT32: Proto.TYPE_SINT32,
    Proto.TYPE_ENUM: Proto.TYPE_INT32,
    Proto.TYPE_MESSAGE: Proto.TYPE_BYTES,
}


def name(value: Descriptor | FieldDescriptor) -> str:
    """A test's id."""
    return str(value.full_name).removeprefix("envoy.")


def is_map(field: FieldDescriptor) -> bool:
    """Maps cannot be declared otherwise without another message."""
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def test_there_are_messages_to_compare() -> None:
    """Those of all three services."""
    names = {message.full_name for message in MESSAGES}

    assert {
        "envoy.service.auth.v3.CheckRequest", "envoy.service.auth.v3.CheckResponse",
        "envoy.service.ratelimit.v3.RateLimitRequest", "envoy.service.ratelimit.v3.RateLimitResponse",
        "envoy.service.ext_proc.v3.ProcessingRequest", "envoy.service.ext_proc.v3.ProcessingResponse",
        "envoy.service.ratelimit.v3.RateLimitResponse.DescriptorStatus",
    } <= names  # fmt: skip
    assert len(FIELDS) > 60


@pytest.mark.parametrize("field", FIELDS, ids=name)
def test_a_field_is_declared_as_envoy_declares_it(field: FieldDescriptor) -> None:
    """Name, number, type, cardinality, oneof."""
    cls = codecs.typed_class(field.containing_type)

    assert codecs.typed_declared(cls, field.name) == codecs.declared(field)


@pytest.mark.parametrize("field", FIELDS, ids=name)
def test_a_field_alone_arrives_on_the_other_side(field: FieldDescriptor) -> None:
    """Written by either, read by the other, with everything inside it."""
    assert [] == codecs.differences(field.containing_type, {field.name: codecs.sample(field)})


@pytest.mark.parametrize("message", MESSAGES, ids=name)
@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_any_value_of_a_message_arrives_on_the_other_side(message: Descriptor, data: st.DataObject) -> None:
    """Zero, empty, extreme; any combination of fields."""
    tree = data.draw(codecs.trees(message))

    assert [] == codecs.differences(message, tree)


@pytest.mark.parametrize("field", [field for field in FIELDS if field.enum_type is not None], ids=name)
def test_an_enum_has_envoys_numbers(field: FieldDescriptor) -> None:
    """Ours may have fewer values, never others."""
    cls = codecs.about(codecs.typed_class(field.containing_type)).cls_by_field[field.name]

    theirs = {value.name: value.value for value in cls}
    ours = {value.name: value.number for value in field.enum_type.values}
    assert ours.items() <= theirs.items()


@pytest.mark.parametrize("field", FIELDS, ids=name)
def test_a_renumbered_field_would_be_noticed(field: FieldDescriptor) -> None:
    """By what arrives, not only by what is declared."""
    drifted = codecs.mutated(field, number=_FREE_NUMBER)

    found = codecs.differences(drifted, {field.name: codecs.sample(field)})

    assert any("to Envoy" in line for line in found), found
    assert any("from Envoy" in line for line in found), found


@pytest.mark.parametrize("field", [field for field in FIELDS if not is_map(field)], ids=name)
def test_a_retyped_field_would_be_noticed(field: FieldDescriptor) -> None:
    """Also where the bytes on the wire stay the same."""
    drifted = codecs.mutated(field, type=_OTHER_TYPE[field.type], type_name=None)
    other = drifted.fields_by_name[field.name]

    found = codecs.differences(
        drifted, {field.name: codecs.sample(field)}, our_tree={field.name: codecs.sample(other)}
    )

    assert found
    assert codecs.declared(other) != codecs.typed_declared(
        codecs.typed_class(drifted), field.name
    )


@pytest.mark.parametrize("field", [f for f in FIELDS if not is_map(f) and f.containing_oneof is None], ids=name)
def test_a_field_that_is_one_instead_of_many_would_be_noticed(field: FieldDescriptor) -> None:
    """And the reverse."""
    other_label = Proto.LABEL_OPTIONAL if field.is_repeated else Proto.LABEL_REPEATED
    drifted = codecs.mutated(field, label=other_label)
    other = drifted.fields_by_name[field.name]

    found = codecs.differences(
        drifted, {field.name: codecs.sample(field)}, our_tree={field.name: codecs.sample(other)}
    )

    assert found


def test_the_compiled_modules_are_those_of_the_protos(tmp_path: Path) -> None:
    """`python -m chassis.wire.compile` would change nothing."""
    assert 0 == compile_protos(tmp_path)

    made = sorted(path.name for path in (tmp_path / "chassis/wire").iterdir())
    kept = sorted(path.name for path in (REPOSITORY / "chassis/wire").glob("*_pb2.py*"))
    assert kept == made
    for file in made:
        assert (tmp_path / "chassis/wire" / file).read_text() == (REPOSITORY / "chassis/wire" / file).read_text()
