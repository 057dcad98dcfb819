# SPDX-License-Identifier: Apache-2.0
"""What people watch: the catalogue of metrics, and the dashboards that are made of it."""
