# SPDX-License-Identifier: Apache-2.0

variable "name" {
  description = "Name of the stores."
  type        = string
  default     = "peaje"
}

variable "namespace" {
  description = "Namespace of the chart's release."
  type        = string
  default     = "peaje"
}

variable "vpc_id" {
  description = "VPC of the cluster."
  type        = string
}

variable "subnet_ids" {
  description = "Private subnets in at least two zones."
  type        = list(string)
}

variable "nodes_security_group_id" {
  description = "Security group of the cluster's nodes; nobody else reaches the stores."
  type        = string
}

variable "postgres_class" {
  description = "Instance class. A row is about 1 kB with its indexes; the collector writes them in batches."
  type        = string
  default     = "db.m7g.large"
}

variable "postgres_gib" {
  description = "GiB at first; grows to ten times that."
  type        = number
  default     = 100
}

variable "valkey_class" {
  description = "Node type. Counters are small; what counts is the round trip."
  type        = string
  default     = "cache.m7g.large"
}
