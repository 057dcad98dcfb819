# SPDX-License-Identifier: Apache-2.0
"""What the gateway must survive, as data: one row a case, run at every level that applies."""
