{{- /* SPDX-License-Identifier: Apache-2.0 */ -}}
{{- /*
What no schema can compare. Refused before anything is sent: the migrations run first, and a release of which Kubernetes then
refuses an object is half a release.
*/ -}}
{{- define "peaje.check" -}}
{{- $gateway := .Values.gateway -}}
{{- $limit := $gateway.resources.limits.memory -}}
{{- if ge (mul $gateway.heapMiB 1048576) (include "peaje.bytes" $limit | int64) -}}
{{- fail (printf "gateway.heapMiB is %v, and gateway.resources.limits.memory is %s: Envoy would be ended, with every stream, before it refuses requests." $gateway.heapMiB $limit) -}}
{{- end -}}
{{- range $part := include "peaje.scaled" . | fromYamlArray -}}
{{- $scaling := (index $.Values $part).autoscaling -}}
{{- if and $scaling.enabled (gt (int $scaling.minReplicas) (int $scaling.maxReplicas)) -}}
{{- fail (printf "%s.autoscaling.minReplicas is %v, and maxReplicas is %v." $part $scaling.minReplicas $scaling.maxReplicas) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* The parts that scale, each by itself. */ -}}
{{- define "peaje.scaled" -}}
{{- ternary (list "gateway") (list "gateway" "extauth" "ratelimit" "metering") (eq .Values.placement "sidecar") | toJson -}}
{{- end -}}

{{- /* A quantity of Kubernetes in bytes. */ -}}
{{- define "peaje.bytes" -}}
{{- $number := regexFind "^[0-9.]+" . -}}
{{- $units := dict "" 1 "k" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- $unit := trimPrefix $number . -}}
{{- if not (hasKey $units $unit) -}}
{{- fail (printf "%s is no amount of memory for a container: write it in Mi or Gi." .) -}}
{{- end -}}
{{- mulf $number (get $units $unit) | int64 -}}
{{- end -}}
