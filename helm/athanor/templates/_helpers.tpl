{{/* Name of the operator's objects: the release's name, with the chart's name unless it is in there. */}}
{{- define "athanor.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- printf "%s-operator" (.Release.Name | trunc 54 | trimSuffix "-") -}}
{{- else -}}
{{- printf "%s-athanor-operator" (.Release.Name | trunc 46 | trimSuffix "-") -}}
{{- end -}}
{{- end -}}

{{- define "athanor.selectorLabels" -}}
app.kubernetes.io/name: athanor
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end -}}

{{- define "athanor.labels" -}}
{{ include "athanor.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "athanor.serviceAccountName" -}}
{{- default (include "athanor.fullname" .) .Values.serviceAccount.name -}}
{{- end -}}

{{/* One image's reference: (dict "context" $ "name" "trainer"). */}}
{{- define "athanor.image" -}}
{{- $image := index .context.Values.images .name -}}
{{- $registry := .context.Values.images.registry -}}
{{- $repository := ternary (printf "%s/%s" $registry $image.repository) $image.repository (not (empty $registry)) -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $repository $image.digest -}}
{{- else -}}
{{- $variant := ternary "-cuda" "" (hasSuffix "Cuda" .name) -}}
{{- $common := printf "%s%s" (coalesce .context.Values.images.tag .context.Chart.AppVersion) $variant -}}
{{- printf "%s:%s" $repository (coalesce $image.tag $common) -}}
{{- end -}}
{{- end -}}

{{- define "athanor.progressAddress" -}}
{{- default (printf "http://%s.%s.svc:9443" (include "athanor.fullname" .) .Release.Namespace) .Values.operator.progressAddress -}}
{{- end -}}
