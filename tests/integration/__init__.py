# SPDX-License-Identifier: Apache-2.0
"""One real store or program at a time."""
