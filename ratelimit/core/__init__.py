# SPDX-License-Identifier: Apache-2.0
"""Match, reserve, answer: pure, no I/O, no clock, no transport types."""
