# SPDX-License-Identifier: Apache-2.0
"""Alembic's entry: run versions on the connection, and in the transaction, that migrate.py made."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
