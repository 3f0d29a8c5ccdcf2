{{/* The pod of one Ray node.
     Arguments: dict "root" $ "component" "head" or a pool, "values" its values, "container" its name,
     "ports", "resources", and for a pool "numbers". */}}
{{- define "antiphon.pod" -}}
{{- $root := .root -}}
{{- $isHead := eq .component "head" -}}
{{- /* Where an ingress may start. There is no checksum of the keys in the template, which would start a
       second cluster: the kubelet brings changes, and an ingress looks once a second. */}}
{{- $hasKeys := and (not $isHead) (include "antiphon.keyFile" $root) -}}
metadata:
  labels:
    {{- include "antiphon.selectorLabels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
  {{- $annotations := deepCopy .values.podAnnotations }}
  {{- if not $isHead }}
  {{- /* KubeRay ignores changed numbers of pods; a changed template makes it act. */}}
  {{- $_ := set $annotations (ternary "antiphon/max-pods" "antiphon/pods" $root.Values.autoscaling.enabled) (toString .numbers.maxPods) }}
  {{- end }}
  {{- with $annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- if not (and $isHead $root.Values.autoscaling.enabled) }}
  serviceAccountName: {{ include "antiphon.serviceAccount" $root }}
  automountServiceAccountToken: false
  {{- end }}
  {{- with $root.Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- if not $isHead }}
  {{- with .values.gpu.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- if .values.hostNetwork }}
  hostNetwork: true
  dnsPolicy: ClusterFirstWithHostNet
  {{- end }}
  terminationGracePeriodSeconds: {{ int $root.Values.terminationGracePeriodSeconds }}
  {{- if $root.Values.autoscaling.enabled }}
  restartPolicy: Never
  {{- end }}
  {{- end }}
  securityContext:
    runAsNonRoot: true
    runAsUser: {{ int $root.Values.securityContext.userId }}
    runAsGroup: {{ int $root.Values.securityContext.groupId }}
    fsGroup: {{ int $root.Values.securityContext.groupId }}
    # Changing the owner of every file of a large model would delay each start by minutes.
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile:
      type: RuntimeDefault
  {{- $selector := deepCopy .values.nodeSelector }}
  {{- if and (not $isHead) .values.gpu.product }}
  {{- $_ := set $selector (printf "%s.product" .values.gpu.resource) .values.gpu.product }}
  {{- end }}
  {{- with $selector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if and (not $isHead) .values.topologyKey }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: {{ .values.topologyKey }}
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "antiphon.selectorLabels" $root | nindent 10 }}
          app.kubernetes.io/component: {{ .component }}
  {{- end }}
  containers:
    - name: {{ .container }}
      image: {{ include "antiphon.image" $root | quote }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      ports:
        {{- toYaml .ports | nindent 8 }}
      env:
        {{- include "antiphon.env" $root | nindent 8 }}
        {{- if not $isHead }}
        - name: ANTIPHON_READINESS_FOLDER
          value: {{ include "antiphon.readinessFolder" $root }}
        {{- with include "antiphon.nccl" .values.nccl }}
        {{- . | nindent 8 }}
        {{- end }}
        {{- end }}
        {{- with concat $root.Values.env .values.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      resources:
        {{- toYaml .resources | nindent 8 }}
      {{- include "antiphon.probes" (dict "root" $root "isHead" $isHead) | nindent 6 }}
      {{- if not $isHead }}
      lifecycle:
        preStop:
          exec:
            command: [antiphon, drain, --within, {{ sub $root.Values.terminationGracePeriodSeconds 10 | toString | quote }}]
      {{- end }}
      securityContext:
        {{- include "antiphon.containerSecurity" .values | nindent 8 }}
      volumeMounts:
        {{- include "antiphon.mounts" (dict "root" $root "isHead" $isHead) | nindent 8 }}
        {{- if $hasKeys }}
        - name: api-keys
          mountPath: {{ dir (include "antiphon.keyFile" $root) }}
          readOnly: true
        {{- end }}
  volumes:
    {{- include "antiphon.volumes" (dict "root" $root "isHead" $isHead) | nindent 4 }}
    {{- if $hasKeys }}
    - name: api-keys
      secret:
        secretName: {{ include "antiphon.keySecret" $root }}
        defaultMode: 0440
    {{- end }}
{{- end -}}

{{- define "antiphon.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
  {{- if .ipcLock }}
  add: [IPC_LOCK]
  {{- end }}
{{- end -}}

{{/* Both ends of a link read these when it is made. */}}
{{- define "antiphon.nccl" -}}
{{- $variables := deepCopy .env -}}
{{- with .socketIfname }}
{{- $_ := set $variables "NCCL_SOCKET_IFNAME" . -}}
{{- end -}}
{{- with .ibHca }}
{{- $_ := set $variables "NCCL_IB_HCA" . -}}
{{- end -}}
{{- $listed := list -}}
{{- range $name, $value := $variables -}}
{{- $listed = append $listed (dict "name" $name "value" $value) -}}
{{- end -}}
{{- with $listed -}}
{{- toYaml . -}}
{{- end -}}
{{- end -}}

{{/* Everything that is written lies in /tmp or in the cache: the root file system is read-only. */}}
{{- define "antiphon.env" -}}
- name: HOME
  value: /tmp
- name: XDG_CACHE_HOME
  value: {{ .Values.modelCache.mountPath }}
- name: HF_HOME
  value: {{ .Values.modelCache.mountPath }}/huggingface
- name: TRITON_CACHE_DIR
  value: {{ .Values.modelCache.mountPath }}/triton
- name: OMP_WAIT_POLICY
  value: PASSIVE
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
{{- /* An update goes on though some new workers die; Ray would stop it, and leave the pool short for good. */}}
- name: RAY_SERVE_STOP_FAILED_ROLLING_UPDATES
  value: "0"
{{- /* Where packets vanish, a proxy's request to an ingress elsewhere ends after 10 s, not minutes. */}}
{{- range $name := list "grpc_client_keepalive_time_ms" "grpc_client_keepalive_timeout_ms" "grpc_keepalive_time_ms" "grpc_keepalive_timeout_ms" }}
- name: RAY_{{ $name }}
  value: "5000"
{{- end }}
{{- end -}}

{{/* Those that KubeRay would inject need wget, and would leave the proxy out of the head's.
     A worker's pod is ready, for HTTP traffic and for its disruption budget, when a worker serves in it
     and its proxy has routes; models load without bound. */}}
{{- define "antiphon.probes" -}}
livenessProbe:
  httpGet:
    path: /api/healthz
    port: agent
  initialDelaySeconds: 30
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 12
readinessProbe:
  {{- if .isHead }}
  httpGet:
    path: /api/healthz
    port: agent
  {{- else }}
  exec:
    command: [python, -m, antiphon.deployment.pod_readiness, {{ include "antiphon.readinessFolder" .root }}, {{ include "antiphon.port" .root | quote }}]
  {{- end }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ ternary 3 1 .isHead }}
{{- end -}}

{{- define "antiphon.readinessFolder" -}}
/tmp/antiphon
{{- end -}}

{{/* No claim on the head, where neither a worker nor an ingress runs: one that can be mounted on a single
     node would tie it to the pools'. Arguments of both: dict "root" $ "isHead". */}}
{{- define "antiphon.mounts" -}}
- name: tmp
  mountPath: /tmp
- name: shared-memory
  mountPath: /dev/shm
- name: cache
  mountPath: {{ .root.Values.modelCache.mountPath }}
{{- if and .root.Values.models.existingClaim (not .isHead) }}
- name: models
  mountPath: {{ .root.Values.models.mountPath }}
  readOnly: true
{{- end }}
{{- end -}}

{{- define "antiphon.volumes" -}}
{{- $values := .root.Values -}}
- name: tmp
  emptyDir: {}
- name: shared-memory
  emptyDir:
    medium: Memory
    sizeLimit: {{ $values.sharedMemory }}
- name: cache
{{- if and $values.modelCache.persistentVolumeClaim.enabled (not .isHead) }}
  persistentVolumeClaim:
    claimName: {{ include "antiphon.cacheClaim" .root }}
{{- else }}
  emptyDir:
    sizeLimit: {{ $values.modelCache.sizeLimit }}
{{- end }}
{{- if and $values.models.existingClaim (not .isHead) }}
- name: models
  persistentVolumeClaim:
    claimName: {{ $values.models.existingClaim }}
    readOnly: true
{{- end }}
{{- end -}}

{{/* KubeRay gives the head what it needs for its store, and workers 600 s to wait for the next head. The
     field backend is new in 1.7, and redis what its absence means. Argument: head.state. */}}
{{- define "antiphon.headState" -}}
{{- if eq .store "redis" -}}
redisAddress: {{ .redis.address | quote }}
{{- with .redis.username }}
redisUsername:
  value: {{ . | quote }}
{{- end }}
{{- with .redis.passwordSecret }}
{{- if .name }}
redisPassword:
  valueFrom:
    secretKeyRef:
      name: {{ .name }}
      key: {{ .key }}
{{- end }}
{{- end }}
{{- else -}}
backend: rocksdb
storage:
  size: {{ .rocksdb.size }}
  {{- with .rocksdb.storageClassName }}
  storageClassName: {{ . }}
  {{- end }}
{{- end -}}
{{- end -}}
