{{- /* SPDX-License-Identifier: Apache-2.0 */ -}}
{{- define "peaje.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "peaje.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "peaje.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "peaje.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- /* What selects the pods of a component: (list root component). Never changes: selectors are immutable. */ -}}
{{- define "peaje.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "peaje.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "peaje.labels" -}}
{{- $root := index . 0 -}}
{{ include "peaje.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{- /* (list root "services"|"gateway") */ -}}
{{- define "peaje.image" -}}
{{- $root := index . 0 -}}
{{- $image := index $root.Values.image (index . 1) -}}
{{- $repository := printf "%s%s" $root.Values.image.registry $image.repository -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $repository (default $root.Chart.AppVersion $image.tag) -}}
{{- end -}}
{{- end -}}

{{- /* The name under which a service is known to others, and to which its certificate belongs. */ -}}
{{- define "peaje.host" -}}
{{- $root := index . 0 -}}
{{- printf "%s-%s.%s.svc.%s" (include "peaje.fullname" $root) (index . 1) $root.Release.Namespace $root.Values.clusterDomain -}}
{{- end -}}

{{- define "peaje.tlsSecret" -}}
{{- $root := index . 0 -}}
{{- if eq $root.Values.tls.mode "certManager" -}}
{{- printf "%s-%s-tls" (include "peaje.fullname" $root) (index . 1) -}}
{{- else -}}
{{- index $root.Values.tls.secrets (index . 1) -}}
{{- end -}}
{{- end -}}

{{- define "peaje.documents" -}}
{{- default (printf "%s-documents" (include "peaje.fullname" .)) .Values.documentsConfigMap -}}
{{- end -}}

{{- /* host:port to listen on: (list root port) */ -}}
{{- define "peaje.listen" -}}
{{- $host := (index . 0).Values.bindAddress -}}
{{- if contains ":" $host -}}[{{ $host }}]{{- else -}}{{ $host }}{{- end -}}:{{ index . 1 }}
{{- end -}}

{{- define "peaje.grpcPort" -}}
{{- get (dict "extauth" "9001" "ratelimit" "9002" "metering" "9003") . -}}
{{- end -}}

{{- define "peaje.metricsPort" -}}
{{- get (dict "extauth" "9091" "ratelimit" "9092" "metering" "9093" "collector" "9094" "beacon" "9095" "events" "9096" "envoy" "9902") . -}}
{{- end -}}

{{- /* Processes that share a limit while the counter store is away: as many as there can be. */ -}}
{{- define "peaje.ratelimitProcesses" -}}
{{- $part := ternary .Values.gateway .Values.ratelimit (eq .Values.placement "sidecar") -}}
{{- ternary $part.autoscaling.maxReplicas $part.replicas $part.autoscaling.enabled -}}
{{- end -}}

{{- /* What makes a process send its spans; nothing where no collector of traces is named. */ -}}
{{- define "peaje.tracesEnv" -}}
{{- with (.Values.traces).url -}}
{{- if hasPrefix "https:" . -}}
{{- fail "traces.url is https, and spans are sent by plain HTTP. Name a collector in the cluster, which passes them on by TLS with the credentials that it needs." -}}
{{- end -}}
PEAJE_TRACES_URL: {{ . | quote }}
{{- end -}}
{{- end -}}
