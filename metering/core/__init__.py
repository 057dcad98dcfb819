# SPDX-License-Identifier: Apache-2.0
"""Shape a request, read the journal, judge usage: pure, no I/O, no clock, no transport types."""
