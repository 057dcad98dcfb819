# SPDX-License-Identifier: Apache-2.0
"""Through real Envoy, the real services, Valkey and Postgres, to a model server."""
