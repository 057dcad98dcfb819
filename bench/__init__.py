# SPDX-License-Identifier: Apache-2.0
"""Reproducible figures, always side by side with bare Envoy in the same run."""
