# SPDX-License-Identifier: Apache-2.0
# The managed stores on AWS, and the two secrets by which the chart finds them (presets/external-stores.yaml).
# Postgres is the record: several zones, backups, never deleted by accident. Counters can be lost and are seeded anew.

terraform {
  required_version = ">= 1.9"
  required_providers {
    aws        = { source = "hashicorp/aws", version = "~> 6.0" }
    kubernetes = { source = "hashicorp/kubernetes", version = "~> 2.38" }
    random     = { source = "hashicorp/random", version = "~> 3.7" }
  }
}

resource "random_password" "redis" {
  length  = 48
  special = false
}

resource "random_password" "postgres" {
  length  = 48
  special = false
}

resource "random_id" "pepper" {
  byte_length = 32
  lifecycle {
    prevent_destroy = true
  }
}

resource "aws_security_group" "stores" {
  name        = "${var.name}-stores"
  description = "Postgres and Valkey, from Peaje's nodes only"
  vpc_id      = var.vpc_id
}

resource "aws_vpc_security_group_ingress_rule" "stores" {
  for_each                     = toset(["5432", "6379"])
  security_group_id            = aws_security_group.stores.id
  referenced_security_group_id = var.nodes_security_group_id
  ip_protocol                  = "tcp"
  from_port                    = tonumber(each.value)
  to_port                      = tonumber(each.value)
}

resource "aws_db_subnet_group" "postgres" {
  name       = var.name
  subnet_ids = var.subnet_ids
}

resource "aws_db_parameter_group" "postgres" {
  name   = var.name
  family = "postgres17"

  parameter {
    name  = "rds.force_ssl"
    value = "1"
  }
}

resource "aws_db_instance" "postgres" {
  identifier                 = var.name
  engine                     = "postgres"
  engine_version             = "17"
  instance_class             = var.postgres_class
  allocated_storage          = var.postgres_gib
  max_allocated_storage      = var.postgres_gib * 10
  storage_type               = "gp3"
  storage_encrypted          = true
  db_name                    = "peaje"
  username                   = "peaje"
  password                   = random_password.postgres.result
  parameter_group_name       = aws_db_parameter_group.postgres.name
  db_subnet_group_name       = aws_db_subnet_group.postgres.name
  vpc_security_group_ids     = [aws_security_group.stores.id]
  publicly_accessible        = false
  multi_az                   = true
  backup_retention_period    = 30
  deletion_protection        = true
  skip_final_snapshot        = false
  final_snapshot_identifier  = "${var.name}-final"
  auto_minor_version_upgrade = true
}

resource "aws_elasticache_subnet_group" "valkey" {
  name       = var.name
  subnet_ids = var.subnet_ids
}

resource "aws_elasticache_replication_group" "valkey" {
  replication_group_id       = var.name
  description                = "Peaje's counters"
  engine                     = "valkey"
  engine_version             = "8.0"
  node_type                  = var.valkey_class
  num_cache_clusters         = 2
  automatic_failover_enabled = true
  multi_az_enabled           = true
  subnet_group_name          = aws_elasticache_subnet_group.valkey.name
  security_group_ids         = [aws_security_group.stores.id]
  at_rest_encryption_enabled = true
  transit_encryption_enabled = true
  auth_token                 = random_password.redis.result
}

resource "kubernetes_secret_v1" "postgres" {
  metadata {
    name      = "peaje-postgres"
    namespace = var.namespace
  }
  data = {
    url = "postgresql://peaje:${random_password.postgres.result}@${aws_db_instance.postgres.endpoint}/peaje?sslmode=verify-full&sslrootcert=/etc/peaje/stores/ca.crt"
  }
}

resource "kubernetes_secret_v1" "redis" {
  metadata {
    name      = "peaje-redis"
    namespace = var.namespace
  }
  data = {
    url = "rediss://:${random_password.redis.result}@${aws_elasticache_replication_group.valkey.primary_endpoint_address}:6379/0"
  }
}

resource "kubernetes_secret_v1" "peppers" {
  metadata {
    name      = "peaje-peppers"
    namespace = var.namespace
  }
  data = {
    pepper-1 = random_id.pepper.hex
  }
}
