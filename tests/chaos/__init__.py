# SPDX-License-Identifier: Apache-2.0
"""Long kill storms: `./peaje test --chaos`."""
