# SPDX-License-Identifier: Apache-2.0
"""The Helm chart: rendered by Helm's own engine, judged by the schemas of Kubernetes, by Envoy and by rules of ours."""
