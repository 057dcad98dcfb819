# SPDX-License-Identifier: Apache-2.0
"""The journal file and the ledger's tables."""
