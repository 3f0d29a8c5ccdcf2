{{/* What a schema cannot say. */}}
{{- define "antiphon.checks" -}}
{{- $name := include "antiphon.name" . -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) -}}
{{- fail (printf "the release's name makes the name %q, which KubeRay does not accept: set nameOverride to lower case letters, digits and hyphens that begin with a letter" $name) -}}
{{- end -}}
{{- $numbers := dict -}}
{{- range $pool := list "prefill" "decode" "colocated" -}}
{{- $_ := set $numbers $pool (include "antiphon.pool" (dict "root" $ "pool" $pool) | fromYaml) -}}
{{- end -}}
{{- if not (or $numbers.decode.workers $numbers.colocated.workers) -}}
{{- fail "config.decode.replicas and config.colocated.replicas are both 0: nothing can decode" -}}
{{- end -}}
{{- if and $numbers.prefill.workers (not $numbers.decode.workers) -}}
{{- fail (printf "config.prefill.replicas is %v but config.decode.replicas is 0; prefill workers need decode workers to send to" $numbers.prefill.workers) -}}
{{- end -}}
{{- $http := get .Values.config "http" | default dict -}}
{{- $drain := ternary $http.drain_seconds 60 (hasKey $http "drain_seconds") | float64 -}}
{{- range $pool, $n := $numbers -}}
{{- if $n.workers -}}
{{- $drain = maxf $drain $n.drainSeconds -}}
{{- end -}}
{{- end -}}
{{- $needed := add (ceil $drain) 40 | int -}}
{{- if lt (int .Values.terminationGracePeriodSeconds) $needed -}}
{{- fail (printf "terminationGracePeriodSeconds: got %d; requests on a pod that leaves may take %v s to finish, and 40 s are needed around that: at least %d" (int .Values.terminationGracePeriodSeconds) $drain $needed) -}}
{{- end -}}
{{- if and .Values.apiKeys.keys .Values.apiKeys.existingSecret -}}
{{- fail (printf "apiKeys.keys and apiKeys.existingSecret are both set; put all keys into the Secret %s" .Values.apiKeys.existingSecret) -}}
{{- end -}}
{{- if and $http.api_key_file (include "antiphon.keyFile" .) -}}
{{- fail (printf "config.http.api_key_file is %s, but with apiKeys the chart sets it" $http.api_key_file) -}}
{{- end -}}
{{- if and $http.metrics_need_key (not (or $http.api_key_file (include "antiphon.keyFile" .))) -}}
{{- fail "config.http.metrics_need_key is true, but apiKeys has no keys" -}}
{{- end -}}
{{- if and .Values.scrapeConfig.enabled $http.metrics_need_key (not .Values.scrapeConfig.keySecret.name) -}}
{{- fail "scrapeConfig.keySecret.name: config.http.metrics_need_key is true, so Prometheus needs one of the keys: name a Secret that holds it alone" -}}
{{- end -}}
{{- if and .Values.modelCache.persistentVolumeClaim.existingClaim (not .Values.modelCache.persistentVolumeClaim.enabled) -}}
{{- fail "modelCache.persistentVolumeClaim.existingClaim is set but modelCache.persistentVolumeClaim.enabled is false" -}}
{{- end -}}
{{- $ports := include "antiphon.metricsPorts" . | fromYaml -}}
{{- if and (le 32768 (int $ports.last)) (ge 60999 (int $ports.first)) -}}
{{- fail (printf "config.metrics.first_port: ports %v to %v are among those that Linux chooses, 32768 to 60999, so Prometheus would be let to KV links, which ask for no key" $ports.first $ports.last) -}}
{{- end -}}
{{- $port := include "antiphon.port" . | int -}}
{{- $others := dict "6379" "Ray's head" "8080" "Ray's metrics" "8265" "Ray's dashboard" "52365" "Ray's agent" -}}
{{- with get $others (toString $port) -}}
{{- fail (printf "config.http.port: %d is the port of %s" $port .) -}}
{{- end -}}
{{- if and (le (int $ports.first) $port) (ge (int $ports.last) $port) -}}
{{- fail (printf "config.http.port: %d is among the ports of config.metrics, %v to %v, where a worker could take it before Serve's proxy" $port $ports.first $ports.last) -}}
{{- end -}}
{{- $state := .Values.head.state -}}
{{- if and (eq $state.store "redis") (not $state.redis.address) -}}
{{- fail "head.state.store is redis, but head.state.redis.address is empty" -}}
{{- end -}}
{{- if and $state.redis.address (ne $state.store "redis") -}}
{{- fail (printf "head.state.redis.address is set, but head.state.store is %s" $state.store) -}}
{{- end -}}
{{- range $pool, $n := $numbers -}}
{{- if $n.workers -}}
{{- include "antiphon.checkNetwork" (dict "root" $ "pool" $pool "numbers" $n) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.networkPolicy.egress (not .Values.networkPolicy.restrictEgress) -}}
{{- fail "networkPolicy.egress is set but networkPolicy.restrictEgress is false, so everything is allowed" -}}
{{- end -}}
{{- end -}}

{{/* NCCL and the network of one pool. Arguments: dict "root" $ "pool" "prefill" "numbers". */}}
{{- define "antiphon.checkNetwork" -}}
{{- $values := index .root.Values.pools .pool -}}
{{- $nccl := or $values.nccl.socketIfname $values.nccl.ibHca $values.nccl.env -}}
{{- $handoff := get .root.Values.config "handoff" | default dict -}}
{{- $transport := $handoff.transport | default "gloo" -}}
{{- $gpus := (get .root.Values.config .pool | default dict).num_gpus | default 0 -}}
{{- if and (eq $transport "nccl") (or (not $gpus) (ne (float64 $gpus) (floor $gpus))) -}}
{{- fail (printf "config.handoff.transport is nccl, but config.%s.num_gpus is %v: NCCL connects whole GPUs" .pool $gpus) -}}
{{- end -}}
{{- if and (eq $transport "nccl") (gt (int $handoff.max_links) 32) -}}
{{- fail (printf "config.handoff.transport is nccl, but config.handoff.max_links is %v: torch has streams for 32" $handoff.max_links) -}}
{{- end -}}
{{- if and $nccl (ne $transport "nccl") -}}
{{- fail (printf "pools.%s.nccl is set, but config.handoff.transport is %s" .pool $transport) -}}
{{- end -}}
{{- range $name, $value := dict "NCCL_SOCKET_IFNAME" "socketIfname" "NCCL_IB_HCA" "ibHca" -}}
{{- if hasKey $values.nccl.env $name -}}
{{- fail (printf "pools.%s.nccl.env: %s is what pools.%s.nccl.%s sets" $.pool $name $.pool $value) -}}
{{- end -}}
{{- end -}}
{{- if hasKey $values.extraResources $values.gpu.resource -}}
{{- fail (printf "pools.%s.extraResources: %s follows from config.%s.num_gpus" .pool $values.gpu.resource .pool) -}}
{{- end -}}
{{- if and $values.hostNetwork .root.Values.networkPolicy.enabled -}}
{{- fail (printf "pools.%s.hostNetwork: network policies neither protect nor recognise pods in the node's network, so the others would refuse them; with networkPolicy.enabled: false see to the same otherwise" .pool) -}}
{{- end -}}
{{- end -}}
