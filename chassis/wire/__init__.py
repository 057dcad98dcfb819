# SPDX-License-Identifier: Apache-2.0
"""
Trimmed, wire-compatible Envoy messages for the hot path, compiled by protobuf-upb.

Regenerate after editing a .proto with `python -m chassis.wire.compile`.
"""
