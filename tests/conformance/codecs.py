# SPDX-License-Identifier: Apache-2.0
"""
Our trimmed protos (protobuf-upb) and Envoy's own messages (envoy-data-plane), field by field.

A value is written down as a tree that neither codec knows, built into a message by one codec, sent,
read by the other and written down again. A leaf carries the type its reader declares for it, so that
types which look alike on the wire (string and bytes, bool and uint32) are told apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta
from importlib import import_module
from typing import Any, Final

import betterproto2
from envoy_data_plane.google import protobuf as typed_google
from envoy_data_plane.message_pool import default_message_pool
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory, struct_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor, FileDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet
from hypothesis import strategies as st

from chassis.wire import (
    envoy_base_pb2,
    envoy_type_pb2,
    ext_authz_pb2,
    ext_proc_pb2,
    ratelimit_descriptor_pb2,
    ratelimit_pb2,
)

FILES: Final[tuple[FileDescriptor, ...]] = tuple(
    module.DESCRIPTOR
    for module in (
        envoy_base_pb2, envoy_type_pb2, ext_authz_pb2, ext_proc_pb2, ratelimit_descriptor_pb2, ratelimit_pb2,
    )
)  # fmt: skip

Tree = dict[str, Any]

_TYPE_URL: Final = "type.googleapis.com/"
#: Google's own messages, which each codec represents in its own way: written down as plain values.
_STRUCT: Final = "google.protobuf.Struct"
_DURATION: Final = "google.protobuf.Duration"
_UINT64: Final = "google.protobuf.UInt64Value"
_LEAVES: Final = frozenset({_STRUCT, _DURATION, _UINT64})
#: `details` is a list of Any, which nobody here reads or writes.
_NOT_USED: Final = frozenset({"google.rpc.Status.details"})
_TYPE_NAMES: Final = {
    number: name.removeprefix("TYPE_").lower()
    for name, number in descriptor_pb2.FieldDescriptorProto.Type.items()
}

#: A value per type that the wrong type would read as another one, or not at all.
_SAMPLES: Final[dict[str, Any]] = {
    "string": "pêche\n\x00",
    "bytes": b"\xff\x00\xfe",
    "bool": True,
    "int32": -2,
    "sint32": -2,
    "uint32": 2**32 - 1,
    "uint64": 2**64 - 1,
    _STRUCT: {"text": "x", "number": -1.5, "flag": False, "nothing": None, "list": [1.0, {"deep": ""}]},
    _DURATION: 1_500_000,
    _UINT64: 2**64 - 1,
}
_STRUCT_VALUES: Final = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_STRATEGIES: Final[dict[str, st.SearchStrategy[Any]]] = {
    "string": st.text(max_size=20),
    "bytes": st.binary(max_size=20),
    "bool": st.booleans(),
    "int32": st.integers(-(2**31), 2**31 - 1),
    "uint32": st.integers(0, 2**32 - 1),
    _STRUCT: st.dictionaries(st.text(max_size=8), _STRUCT_VALUES, max_size=4),
    # Microseconds, as a timedelta holds them. Never negative: envoy-data-plane writes a negative fraction
    # of a second as Google's own messages do not read it, and no time until a reset is negative.
    _DURATION: st.integers(0, 10**12),
    _UINT64: st.integers(0, 2**64 - 1),
}


def message_types() -> list[Descriptor]:
    """Every message of ours, nested ones too; the entries that stand for maps aside."""

    def below(descriptor: Descriptor) -> Iterator[Descriptor]:
        if not descriptor.GetOptions().map_entry:
            yield descriptor
            for nested in descriptor.nested_types:
                yield from below(nested)

    return [found for file in FILES for top in file.message_types_by_name.values() for found in below(top)]


def typed_class(descriptor: Descriptor) -> type[betterproto2.Message]:
    """Envoy's own message of the same name; KeyError if there is none."""
    import_module(f"envoy_data_plane.{descriptor.file.package}")  # which registers its messages
    cls: type[betterproto2.Message] = default_message_pool.url_to_type[_TYPE_URL + descriptor.full_name]
    return cls


def about(cls: type[betterproto2.Message]) -> Any:
    """What Envoy's message knows of its own fields; the library keeps it to itself and untyped."""
    return cls._betterproto  # type: ignore[arg-type]


def upb_class(descriptor: Descriptor) -> type[Message]:
    """The class of a descriptor, ours or a mutated one."""
    cls: type[Message] = message_factory.GetMessageClass(descriptor)
    return cls


# --- What is declared ------------------------------------------------------------------------------


def declared(field: FieldDescriptor) -> tuple[object, ...]:
    """Number, type, cardinality and oneof as our proto declares them."""
    oneof = field.containing_oneof.name if field.containing_oneof is not None else None
    if _is_map(field):
        return field.number, "map", _map_types(field), oneof
    return field.number, _TYPE_NAMES[field.type], "many" if field.is_repeated else "one", oneof


def typed_declared(cls: type[betterproto2.Message], name: str) -> tuple[object, ...] | None:
    """The same as Envoy's message declares it; None if it has no such field."""
    meta = about(cls).meta_by_field_name.get(name)
    if meta is None:
        return None
    if meta.proto_type == betterproto2.TYPE_MAP:
        assert meta.map_meta is not None
        return meta.number, "map", tuple(inner.proto_type for inner in meta.map_meta), meta.group
    return meta.number, meta.proto_type, "many" if meta.repeated else "one", meta.group


# --- Values ------------------------------------------------------------------------------------------


def sample(field: FieldDescriptor) -> Any:
    """A value for *field* that is not its default, with every field of a message inside it."""
    if _is_map(field):
        return {"key": _sample_one(field.message_type.fields_by_name["value"])}
    one = _sample_one(field)
    return [one, one] if field.is_repeated else one


def _sample_one(field: FieldDescriptor) -> Any:
    if field.enum_type is not None:
        return field.enum_type.values[-1].number
    if field.message_type is None or field.message_type.full_name in _LEAVES:
        return _SAMPLES[_leaf_name(field)]
    # Of a oneof the last wins.
    chosen = {_oneof_or_name(inner): inner for inner in _used_fields(field.message_type)}
    return {inner.name: sample(inner) for inner in chosen.values()}


def trees(descriptor: Descriptor) -> st.SearchStrategy[Tree]:
    """All trees of a message: any of its fields, at most one of each oneof."""
    groups: dict[str, list[FieldDescriptor]] = {}
    for field in _used_fields(descriptor):
        groups.setdefault(_oneof_or_name(field), []).append(field)
    choices: list[st.SearchStrategy[Tree]] = [
        st.just({}) | st.one_of([st.tuples(st.just(field.name), _values(field)).map(lambda item: dict([item])) for field in fields])
        for fields in groups.values()
    ]
    return st.tuples(*choices).map(lambda parts: {name: value for part in parts for name, value in part.items()})


def _values(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if _is_map(field):
        return st.dictionaries(st.text(max_size=8), _values_of_one(field.message_type.fields_by_name["value"]), max_size=3)
    one = _values_of_one(field)
    return st.lists(one, max_size=3) if field.is_repeated else one


def _values_of_one(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.enum_type is not None:
        return st.sampled_from([value.number for value in field.enum_type.values])
    if field.message_type is None or field.message_type.full_name in _LEAVES:
        return _STRATEGIES[_leaf_name(field)]
    return trees(field.message_type)


# --- Our codec -------------------------------------------------------------------------------------------


def to_upb(descriptor: Descriptor, tree: Tree) -> Message:
    """Build our message."""
    message = upb_class(descriptor)()
    for name, value in tree.items():
        field = descriptor.fields_by_name[name]
        target = getattr(message, name)
        if _is_map(field):
            inner = field.message_type.fields_by_name["value"]
            for key, one in value.items():
                if inner.message_type is None:
                    target[key] = one
                else:
                    target[key].CopyFrom(_upb_value(inner, one))
        elif field.is_repeated:
            target.extend(_upb_value(field, one) for one in value)
        elif field.message_type is not None:
            target.CopyFrom(_upb_value(field, value))
        else:
            setattr(message, name, value)
    return message


def _upb_value(field: FieldDescriptor, value: Any) -> Any:
    if field.message_type is None:
        return value
    if field.message_type.full_name not in _LEAVES:
        return to_upb(field.message_type, value)
    message = upb_class(field.message_type)()
    match field.message_type.full_name:
        case "google.protobuf.Struct":
            json_format.ParseDict(value, message)
        case "google.protobuf.Duration":
            message.FromMicroseconds(value)
        case _:
            message.value = value
    return message


def from_upb(message: Message) -> Tree:
    """Write our message down; what was not understood is written down too."""
    tree: Tree = {}
    for field, value in message.ListFields():
        if _is_map(field):
            inner = field.message_type.fields_by_name["value"]
            tree[field.name] = {key: _upb_leaf(inner, one) for key, one in value.items()}
        elif field.is_repeated:
            tree[field.name] = [_upb_leaf(field, one) for one in value]
        else:
            tree[field.name] = _upb_leaf(field, value)
    unknown = [one.field_number for one in UnknownFieldSet(message)]
    return tree | ({"(unknown)": unknown} if unknown else {})


def _upb_leaf(field: FieldDescriptor, value: Any) -> Any:
    if field.message_type is None:
        return _TYPE_NAMES[field.type], value
    match field.message_type.full_name:
        case "google.protobuf.Struct":
            return "struct", _plain_struct(value)
        case "google.protobuf.Duration":
            return "duration", value.ToMicroseconds()
        case "google.protobuf.UInt64Value":
            return "uint64 value", value.value
        case _:
            return from_upb(value)


def _plain_struct(struct: struct_pb2.Struct) -> dict[str, Any]:
    return {key: _plain_value(value) for key, value in struct.fields.items()}


def _plain_value(value: struct_pb2.Value) -> Any:
    match value.WhichOneof("kind"):
        case "struct_value":
            return _plain_struct(value.struct_value)
        case "list_value":
            return [_plain_value(one) for one in value.list_value.values]
        case "null_value":
            return None
        case kind:
            return getattr(value, kind)


# --- Envoy's own messages ---------------------------------------------------------------------------------


def to_typed(cls: type[betterproto2.Message], tree: Tree) -> betterproto2.Message:
    """Build Envoy's message."""
    fields = about(cls)
    values: Tree = {}
    for name, value in tree.items():
        meta = fields.meta_by_field_name[name]
        if meta.proto_type == betterproto2.TYPE_MAP:
            inner = fields.cls_by_field[f"{name}.value"]
            values[name] = {key: _typed_value(inner, one) for key, one in value.items()}
        elif meta.repeated:
            values[name] = [_typed_value(fields.cls_by_field[name], one) for one in value]
        else:
            values[name] = _typed_value(fields.cls_by_field[name], value)
    return cls(**values)


def _typed_value(cls: Any, value: Any) -> Any:
    if cls is typed_google.Struct:
        return typed_google.Struct.from_dict(value)
    if cls is timedelta:
        return timedelta(microseconds=value)
    if issubclass(cls, betterproto2.Message):
        return to_typed(cls, value)
    return cls(value)


def from_typed(message: betterproto2.Message) -> Tree:
    """Write Envoy's message down; what was not understood is written down too."""
    tree: Tree = {}
    for name, meta in about(type(message)).meta_by_field_name.items():
        value = getattr(message, name)
        # Only a field of a oneof and a message know "set to the default" from "not set".
        if value is None or (not value and not meta.optional and meta.group is None):
            continue
        kind, unwraps = meta.proto_type, meta.unwrap is not None
        if kind == betterproto2.TYPE_MAP:
            assert meta.map_meta is not None
            inner = meta.map_meta[1]
            tree[name] = {key: _typed_leaf(inner.proto_type, inner.unwrap is not None, one) for key, one in value.items()}
        elif meta.repeated:
            tree[name] = [_typed_leaf(kind, unwraps, one) for one in value]
        else:
            tree[name] = _typed_leaf(kind, unwraps, value)
    return tree | ({"(unknown)": message._unknown_fields} if message._unknown_fields else {})


def _typed_leaf(kind: str, unwraps: bool, value: Any) -> Any:
    match value:
        case typed_google.Struct():
            return "struct", value.to_dict()
        case timedelta():
            return "duration", value // timedelta(microseconds=1)
        case betterproto2.Message():
            return from_typed(value)
        case int() if unwraps:
            return "uint64 value", value
        case _ if kind == betterproto2.TYPE_ENUM:
            return kind, int(value)
        case _:
            return kind, value


# --- Both ---------------------------------------------------------------------------------------------------


def differences(descriptor: Descriptor, tree: Tree, *, our_tree: Tree | None = None) -> list[str]:
    """
    Send *tree* both ways; where what arrives is not what was sent, one line each.

    *our_tree* stands in for it on our side when a mutated proto cannot hold the same value.
    """
    cls = typed_class(descriptor)
    found = []
    ours = to_upb(descriptor, tree if our_tree is None else our_tree)
    sent = from_upb(ours)
    try:
        arrived = from_typed(cls.parse(ours.SerializeToString()))
    except (ValueError, UnicodeDecodeError) as exc:
        found.append(f"{descriptor.full_name}: Envoy's message cannot read ours: {exc}")
    else:
        found += _compare(f"{descriptor.full_name} to Envoy", sent, arrived)
    theirs = to_typed(cls, tree)
    try:
        read = upb_class(descriptor).FromString(bytes(theirs))
    except DecodeError as exc:
        found.append(f"{descriptor.full_name}: our message cannot read Envoy's: {exc}")
    else:
        found += _compare(f"{descriptor.full_name} from Envoy", from_typed(theirs), from_upb(read))
    return found


def _compare(what: str, sent: Any, arrived: Any) -> list[str]:
    if not isinstance(sent, Mapping) or not isinstance(arrived, Mapping):
        return [] if sent == arrived else [f"{what}: sent {sent!r}, arrived {arrived!r}"]
    return [
        line
        for name in sorted(sent.keys() | arrived.keys())
        for line in _compare(f"{what}: {name}", sent.get(name, "(absent)"), arrived.get(name, "(absent)"))
    ]


def mutated(field: FieldDescriptor, **changes: Any) -> Descriptor:
    """The message of *field*, compiled from a proto in which that field is declared otherwise."""
    owner = field.containing_type
    pool = descriptor_pool.DescriptorPool()
    _add_dependencies(pool, owner.file)
    proto = descriptor_pb2.FileDescriptorProto()
    owner.file.CopyToProto(proto)
    target = next(one for one in _find_message(proto, owner).field if one.name == field.name)
    for name, value in changes.items():
        if value is None:
            target.ClearField(name)
        else:
            setattr(target, name, value)
    pool.Add(proto)
    return pool.FindMessageTypeByName(owner.full_name)


def _add_dependencies(pool: descriptor_pool.DescriptorPool, file: FileDescriptor) -> None:
    for dependency in file.dependencies:
        _add_dependencies(pool, dependency)
        proto = descriptor_pb2.FileDescriptorProto()
        dependency.CopyToProto(proto)
        pool.Add(proto)


def _find_message(proto: descriptor_pb2.FileDescriptorProto, owner: Descriptor) -> descriptor_pb2.DescriptorProto:
    names = owner.full_name.removeprefix(f"{proto.package}.").split(".")
    found = next(one for one in proto.message_type if one.name == names[0])
    for name in names[1:]:
        found = next(one for one in found.nested_type if one.name == name)
    return found


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def _map_types(field: FieldDescriptor) -> tuple[str, ...]:
    return tuple(_TYPE_NAMES[field.message_type.fields_by_name[name].type] for name in ("key", "value"))


def _leaf_name(field: FieldDescriptor) -> str:
    return str(field.message_type.full_name if field.message_type is not None else _TYPE_NAMES[field.type])


def _oneof_or_name(field: FieldDescriptor) -> str:
    return str(field.containing_oneof.name if field.containing_oneof is not None else field.name)


def _used_fields(descriptor: Descriptor) -> list[FieldDescriptor]:
    return [field for field in descriptor.fields if field.full_name not in _NOT_USED]
