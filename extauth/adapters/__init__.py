# SPDX-License-Identifier: Apache-2.0
"""Where extauth's facts come from."""
