# SPDX-License-Identifier: Apache-2.0
"""How processes tell what they do: logs, metrics, traces."""
