# SPDX-License-Identifier: Apache-2.0
"""The one migration history of Postgres, and the partitions that usage rows fall into."""
