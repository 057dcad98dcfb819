# SPDX-License-Identifier: Apache-2.0
"""Everything that proves Peaje; what is shipped never imports it."""
