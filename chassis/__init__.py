# SPDX-License-Identifier: Apache-2.0
"""What the services stand on: the contract of names, settings, serving, telemetry, stores, schema."""
