{{- /* SPDX-License-Identifier: Apache-2.0 */ -}}
{{- define "peaje.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "peaje.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .Values.pod.userId }}
runAsGroup: {{ .Values.pod.userId }}
fsGroup: {{ .Values.pod.userId }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- /* What all pods have: (list root component) */ -}}
{{- define "peaje.pod" -}}
{{- $root := index . 0 -}}
serviceAccountName: {{ include "peaje.fullname" $root }}
automountServiceAccountToken: false
# Else a Service called …-control sets PEAJE_CONTROL_PORT to something that is no port.
enableServiceLinks: false
securityContext:
  {{- include "peaje.podSecurity" $root | nindent 2 }}
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $root.Values.pod.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $root.Values.pod.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $root.Values.pod.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
{{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
- topologyKey: {{ . }}
  maxSkew: 1
  whenUnsatisfiable: {{ $root.Values.topologySpread.whenUnsatisfiable }}
  labelSelector:
    matchLabels:
      {{- include "peaje.selector" (list $root (index $ 1)) | nindent 6 }}
{{- end }}
{{- end -}}

{{- define "peaje.podMeta" -}}
{{- $root := index . 0 -}}
labels:
  {{- /* Nothing that each release changes: pods would go, and streams with them, for a label. */}}
  {{- include "peaje.selector" . | nindent 2 }}
  {{- with $root.Values.pod.labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- /* A container of ours: dict root name image command env grpc probes resources mounts sidecar ports */ -}}
{{- define "peaje.container" -}}
{{- $root := .root -}}
name: {{ .name }}
image: {{ include "peaje.image" (list $root (default "services" .image)) | quote }}
imagePullPolicy: {{ $root.Values.image.pullPolicy }}
command: {{ toJson .command }}
workingDir: /var/lib/peaje
{{- if .sidecar }}
restartPolicy: Always
{{- end }}
env:
- {name: PEAJE_HOME, value: /var/lib/peaje}
{{- if .postgres }}
- name: PEAJE_POSTGRES_URL
  valueFrom: {secretKeyRef: {name: {{ $root.Values.stores.postgres.existingSecret }}, key: {{ $root.Values.stores.postgres.key }}}}
{{- end }}
{{- if .redis }}
- name: PEAJE_REDIS_URL
  valueFrom: {secretKeyRef: {name: {{ $root.Values.stores.redis.existingSecret }}, key: {{ $root.Values.stores.redis.key }}}}
{{- end }}
{{- range $key, $value := .env }}
- name: {{ $key }}
  value: {{ $value | quote }}
{{- end }}
{{- with .podName }}
- name: {{ . }}
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
{{- end }}
{{- with .ports }}
ports:
{{- range $name, $port := . }}
- {name: {{ $name }}, containerPort: {{ $port }}, protocol: TCP}
{{- end }}
{{- end }}
{{- with .probes }}
{{- toYaml . | nindent 0 }}
{{- end }}
resources:
  {{- toYaml .resources | nindent 2 }}
securityContext:
  {{- include "peaje.containerSecurity" $root | nindent 2 }}
volumeMounts:
- {name: state, mountPath: /var/lib/peaje}
- {name: tmp, mountPath: /tmp}
{{- if and $root.Values.stores.authority.existingSecret (or .postgres .redis) }}
- {name: stores-authority, mountPath: /etc/peaje/stores, readOnly: true}
{{- end }}
{{- with .mounts }}
{{- toYaml . | nindent 0 }}
{{- end }}
{{- end -}}

{{- /* Volumes that every pod of ours has. */ -}}
{{- define "peaje.volumes" -}}
- name: state
  emptyDir: {sizeLimit: 64Mi}
- name: tmp
  emptyDir: {sizeLimit: 64Mi}
{{- with .Values.stores.authority }}
{{- if .existingSecret }}
- name: stores-authority
  secret: {secretName: {{ .existingSecret }}, items: [{key: {{ .key | quote }}, path: ca.crt}]}
{{- end }}
{{- end }}
{{- end -}}

{{- /* Secrets live in memory only; the control plane's stay, with its signing keys. */ -}}
{{- define "peaje.peppersVolumes" -}}
- name: peppers
  secret: {secretName: {{ .Values.peppers.existingSecret }}, defaultMode: 0440}
{{- end -}}

{{- define "peaje.documentsVolumes" -}}
- name: models
  configMap: {name: {{ include "peaje.documents" . }}, items: [{key: models.yaml, path: models.yaml}]}
{{- if or .Values.identityDocument .Values.documentsConfigMap }}
- name: identity
  configMap: {name: {{ include "peaje.documents" . }}, items: [{key: identity.yaml, path: identity.yaml}]}
{{- end }}
{{- end -}}

{{- define "peaje.documentsMounts" -}}
- {name: models, mountPath: /etc/peaje/models, readOnly: true}
{{- if or .Values.identityDocument .Values.documentsConfigMap }}
- {name: identity, mountPath: /etc/peaje/identity, readOnly: true}
{{- end }}
{{- end -}}

{{- /* What ratelimit alone reads: rules of the operator's other routes, the models' tokenizers. */ -}}
{{- define "peaje.ratelimitVolumes" -}}
{{- with .Values.ratelimit.rulesConfigMap }}
- name: rules
  configMap: {name: {{ . }}}
{{- end }}
{{- with .Values.ratelimit.tokenizersClaim }}
- name: tokenizers
  persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}
{{- end }}
{{- end -}}

{{- define "peaje.ratelimitMounts" -}}
{{- if .Values.ratelimit.rulesConfigMap }}
- {name: rules, mountPath: /var/lib/peaje/ratelimit.d, readOnly: true}
{{- end }}
{{- if .Values.ratelimit.tokenizersClaim }}
- {name: tokenizers, mountPath: /srv/models, readOnly: true}
{{- end }}
{{- end -}}

{{- /* Lays out the state directory: dict root image env mounts */ -}}
{{- define "peaje.prepare" -}}
{{- include "peaje.container" (dict
  "root" .root "name" "prepare" "image" .image "command" (list "python" "-m" "control.pod" "prepare")
  "env" .env "resources" .root.Values.gateway.helpers.resources
  "mounts" (concat (include "peaje.documentsMounts" .root | fromYamlArray) .mounts)) -}}
{{- end -}}

{{- /* One of the three services, in either placement: dict root name */ -}}
{{- define "peaje.service" -}}
{{- $root := .root -}}
{{- $values := index $root.Values .name -}}
{{- $prefix := printf "PEAJE_%s" (upper .name) -}}
{{- $metrics := include "peaje.metricsPort" .name -}}
{{- $grpc := include "peaje.grpcPort" .name -}}
{{- $sidecar := eq $root.Values.placement "sidecar" -}}
{{- $env := dict "PEAJE_METRICS_HOST" $root.Values.bindAddress (printf "%s_METRICS_PORT" $prefix) $metrics -}}
{{- $ports := dict (printf "m-%s" .name) $metrics -}}
{{- $mounts := include "peaje.documentsMounts" $root | fromYamlArray -}}
{{- $ready := dict "exec" (dict "command" (list "test" "-S" (printf "run/%s.sock" .name))) -}}
{{- if not $sidecar -}}
{{- $_ := set $env (printf "%s_LISTEN" $prefix) (include "peaje.listen" (list $root $grpc)) -}}
{{- $_ := set $env "PEAJE_TLS_DIRECTORY" "/etc/peaje/tls" -}}
{{- $_ := set $env "PEAJE_DRAIN_SECONDS" "5" -}}
{{- $_ := set $ports "grpc" $grpc -}}
{{- $ready = dict "tcpSocket" (dict "port" "grpc") -}}
{{- $mounts = append $mounts (dict "name" "tls" "mountPath" "/etc/peaje/tls" "readOnly" true) -}}
{{- end -}}
{{- if eq .name "extauth" -}}
{{- $_ := set $env "PEAJE_CONTROL_ISSUER" $root.Values.control.issuer -}}
{{- $mounts = append $mounts (dict "name" "secrets" "mountPath" "/var/lib/peaje/secrets" "readOnly" true) -}}
{{- if $root.Values.control.exposed -}}
{{- /* Its certificate is of Peaje's own authority, unless something public stands before it. */ -}}
{{- $_ := set $env "PEAJE_CONTROL_AUTHORITY" (ternary "/etc/peaje/control/ca.crt" "/etc/peaje/tls/ca.crt" $sidecar) -}}
{{- if $sidecar -}}
{{- $mounts = append $mounts (dict "name" "control-authority" "mountPath" "/etc/peaje/control" "readOnly" true) -}}
{{- end -}}
{{- end -}}
{{- else if eq .name "ratelimit" -}}
{{- $_ := set $env "PEAJE_RATELIMIT_PROCESSES" (include "peaje.ratelimitProcesses" $root) -}}
{{- $_ := set $env "PEAJE_RATELIMIT_CLUSTER" $root.Values.stores.redis.cluster -}}
{{- $mounts = concat $mounts (include "peaje.ratelimitMounts" $root | fromYamlArray) -}}
{{- else if not $sidecar -}}
{{- $_ := set $env "PEAJE_METERING_STREAM_SECONDS" $root.Values.gateway.drainSeconds -}}
{{- $_ := set $env "PEAJE_METERING_RATELIMIT" (printf "%s:%s" (include "peaje.host" (list $root "ratelimit")) (include "peaje.grpcPort" "ratelimit")) -}}
{{- end -}}
{{- $alive := dict "httpGet" (dict "path" "/" "port" (printf "m-%s" .name)) "periodSeconds" 10 "timeoutSeconds" 5 -}}
{{- include "peaje.container" (dict
  "root" $root "name" .name "command" (list "python" "-m" .name) "sidecar" $sidecar "image" (ternary "gateway" "services" $sidecar)
  "postgres" true "redis" (eq .name "ratelimit") "env" (merge $env (include "peaje.tracesEnv" $root | fromYaml) $values.env) "ports" $ports "resources" $values.resources "mounts" $mounts
  "probes" (dict
    "startupProbe" (merge (dict "periodSeconds" 1 "failureThreshold" 120) $ready)
    "readinessProbe" (merge (dict "periodSeconds" 5 "timeoutSeconds" 2) $ready)
    "livenessProbe" $alive)) -}}
{{- end -}}
