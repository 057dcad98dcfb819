# SPDX-License-Identifier: Apache-2.0
"""
Hostile requests as rows: keys and framing, to the last byte of the wire.

`rows.yaml` says what is sent and what it must get, against the pure decision and through real Envoy.
What tokens are attacked with is in `tests/bad_inputs/`.
"""
