from chassis.wire import envoy_base_pb2 as _envoy_base_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AccessLogCommon(_message.Message):
    __slots__ = ("metadata", "stream_id", "intermediate_log_entry")
    METADATA_FIELD_NUMBER: _ClassVar[int]
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    INTERMEDIATE_LOG_ENTRY_FIELD_NUMBER: _ClassVar[int]
    metadata: _envoy_base_pb2.Metadata
    stream_id: str
    intermediate_log_entry: bool
    def __init__(self, metadata: _Optional[_Union[_envoy_base_pb2.Metadata, _Mapping]] = ..., stream_id: _Optional[str] = ..., intermediate_log_entry: _Optional[bool] = ...) -> None: ...

class HTTPAccessLogEntry(_message.Message):
    __slots__ = ("common_properties",)
    COMMON_PROPERTIES_FIELD_NUMBER: _ClassVar[int]
    common_properties: AccessLogCommon
    def __init__(self, common_properties: _Optional[_Union[AccessLogCommon, _Mapping]] = ...) -> None: ...
