# SPDX-License-Identifier: Apache-2.0
"""No overspend and no false refusal, shown on real processes and a real store."""
