# SPDX-License-Identifier: Apache-2.0
"""Where counters live and where limits come from."""
