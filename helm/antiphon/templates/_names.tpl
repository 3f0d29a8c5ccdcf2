{{/* KubeRay appends to the name of a RayService, and refuses what becomes too long. */}}
{{- define "antiphon.name" -}}
{{- if .Values.nameOverride -}}
{{- .Values.nameOverride -}}
{{- else if contains "antiphon" .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-antiphon" .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "antiphon.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
app.kubernetes.io/name: antiphon
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{/* What every pod of the release carries. Not app.kubernetes.io/name: KubeRay selects its head pods
     by its own value of that. */}}
{{- define "antiphon.selectorLabels" -}}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/part-of: antiphon
{{- end -}}

{{- define "antiphon.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $image.repository ($image.tag | default .Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{- define "antiphon.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "antiphon.name" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{- define "antiphon.keySecret" -}}
{{- .Values.apiKeys.existingSecret | default (printf "%s-api-keys" (include "antiphon.name" .)) -}}
{{- end -}}

{{/* Where the file of API keys lies in the pods of workers, or nothing. */}}
{{- define "antiphon.keyFile" -}}
{{- if or .Values.apiKeys.keys .Values.apiKeys.existingSecret -}}
/etc/antiphon/api-keys/{{ .Values.apiKeys.secretKey }}
{{- end -}}
{{- end -}}

{{- define "antiphon.cacheClaim" -}}
{{- .Values.modelCache.persistentVolumeClaim.existingClaim | default (printf "%s-cache" (include "antiphon.name" .)) -}}
{{- end -}}
