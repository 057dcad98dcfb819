# SPDX-License-Identifier: Apache-2.0
"""Connections to Postgres and Valkey/Redis, the same for every service."""
