{{- /* SPDX-License-Identifier: Apache-2.0 */ -}}
{{- /*
envoy/envoy.yaml as it is, but for what only a cluster knows: the tenants' address, the proxies before it, the memory,
and, if the services have pods of their own, where they are and the certificates. tests/chart holds that nothing else differs.
*/ -}}
{{- define "peaje.envoyConfig" -}}
{{- $root := . -}}
{{- $envoy := .Files.Get "files/envoy/envoy.yaml" | fromYaml -}}
{{- range $listener := $envoy.static_resources.listeners -}}
{{- if eq $listener.name "tenants" -}}
{{- $_ := set $listener.address.socket_address "address" $root.Values.bindAddress -}}
{{- range $chain := $listener.filter_chains -}}{{- range $filter := $chain.filters -}}
{{- $_ := set $filter.typed_config "xff_num_trusted_hops" (int $root.Values.gateway.trustedHops) -}}
{{- end -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- range $monitor := $envoy.overload_manager.resource_monitors -}}
{{- if eq $monitor.name "envoy.resource_monitors.fixed_heap" -}}
{{- $_ := set $monitor.typed_config "max_heap_size_bytes" (mul $root.Values.gateway.heapMiB 1048576) -}}
{{- end -}}
{{- end -}}
{{- if eq .Values.placement "separate" -}}
{{- range $cluster := $envoy.static_resources.clusters -}}
{{- $host := include "peaje.host" (list $root $cluster.name) -}}
{{- $_ := set $cluster "type" "STRICT_DNS" -}}
{{- $_ := set $cluster "dns_lookup_family" (ternary "ALL" "V4_PREFERRED" (contains ":" $root.Values.bindAddress)) -}}
{{- $address := dict "socket_address" (dict "address" $host "port_value" (include "peaje.grpcPort" $cluster.name | int)) -}}
{{- $_ := set $cluster "load_assignment" (dict "cluster_name" $cluster.name "endpoints" (list (dict "lb_endpoints" (list (dict "endpoint" (dict "address" $address)))))) -}}
{{- $_ := set $cluster "transport_socket" (include "peaje.envoyTls" $host | fromYaml) -}}
{{- end -}}
{{- end -}}
{{- toYaml $envoy -}}
{{- end -}}

{{- define "peaje.envoyTls" -}}
name: envoy.transport_sockets.tls
typed_config:
  "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
  sni: {{ . }}
  common_tls_context:
    alpn_protocols: [h2]
    # A client of Envoy stops at 1.2 if nothing is said, and then no handshake succeeds.
    tls_params: {tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}
    tls_certificate_sds_secret_configs:
    - name: gateway
      sds_config: {resource_api_version: V3, path_config_source: {path: envoy/certificate.yaml}}
    combined_validation_context:
      default_validation_context:
        match_typed_subject_alt_names:
        - san_type: DNS
          matcher: {exact: {{ . }}}
      validation_context_sds_secret_config:
        name: authority
        sds_config: {resource_api_version: V3, path_config_source: {path: envoy/authority.yaml}}
{{- end -}}

{{- /* Read again when the mounted secret is replaced. Paths are relative to the state directory, as everywhere. */ -}}
{{- define "peaje.envoyCertificate" -}}
resources:
- "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret
  name: gateway
  tls_certificate:
    certificate_chain: {filename: tls/tls.crt}
    private_key: {filename: tls/tls.key}
    watched_directory: {path: tls}
{{- end -}}

{{- define "peaje.envoyAuthority" -}}
resources:
- "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret
  name: authority
  validation_context:
    trusted_ca: {filename: tls/ca.crt}
    watched_directory: {path: tls}
{{- end -}}
