# SPDX-License-Identifier: Apache-2.0
"""Where the one-machine runner decides something."""
