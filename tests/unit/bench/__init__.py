# SPDX-License-Identifier: Apache-2.0
"""The bench, without an installation."""
