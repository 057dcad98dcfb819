# SPDX-License-Identifier: Apache-2.0
"""What is delivered besides the chart: images, compose, examples, the release workflow."""
