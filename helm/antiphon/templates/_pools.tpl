{{/* Numbers of a pool, by the rules of the configuration document: a pool that is not named has its
     default number of workers, one that is named without replicas has one.
     Arguments: dict "root" $ "pool" "prefill". Returns YAML. */}}
{{- define "antiphon.pool" -}}
{{- $values := index .root.Values.pools .pool -}}
{{- $section := get .root.Values.config .pool | default dict -}}
{{- $unnamed := dict "prefill" 1 "decode" 1 "colocated" 0 -}}
{{- $workers := get $unnamed .pool -}}
{{- if hasKey .root.Values.config .pool -}}
{{- $workers = ternary $section.replicas 1 (hasKey $section "replicas") -}}
{{- end -}}
{{- $workers = int $workers -}}
{{- $perPod := int $values.workersPerPod -}}
{{- $filled := div (add $workers (sub $perPod 1)) $perPod | int -}}
{{- $pods := ternary (add $filled $values.sparePods) 0 (gt $workers 0) | int -}}
{{- $cpus := mulf $perPod (ternary $section.num_cpus 1.0 (hasKey $section "num_cpus")) -}}
{{- $gpus := mulf $perPod ($section.num_gpus | default 0.0) -}}
{{- if ne $gpus (floor $gpus) -}}
{{- fail (printf "pools.%s.workersPerPod: %d workers with config.%s.num_gpus %v make %v GPUs for one pod; that has to be a whole number" .pool $perPod .pool $section.num_gpus $gpus) -}}
{{- end -}}
{{- $maxPods := $pods -}}
{{- if .root.Values.autoscaling.enabled -}}
{{- $maxPods = int $values.maxPods -}}
{{- if $values.sparePods -}}
{{- fail (printf "pools.%s.sparePods: got %d, but with autoscaling.enabled a pod without a worker is removed after autoscaling.idleTimeoutSeconds; leave room in maxPods instead" .pool (int $values.sparePods)) -}}
{{- end -}}
{{- if gt $pods $maxPods -}}
{{- fail (printf "pools.%s.maxPods: got %d, but its workers need %d pods; with autoscaling.enabled say how many there may ever be" .pool $maxPods $pods) -}}
{{- end -}}
{{- else if gt (int $values.maxPods) 0 -}}
{{- fail (printf "pools.%s.maxPods: got %d, but autoscaling.enabled is false, so nothing would add pods" .pool (int $values.maxPods)) -}}
{{- end -}}
workers: {{ $workers }}
perPod: {{ $perPod }}
filledPods: {{ $filled }}
pods: {{ $pods }}
maxPods: {{ $maxPods }}
cpus: {{ $cpus }}
gpus: {{ int $gpus }}
drainSeconds: {{ ternary $section.drain_seconds 20 (hasKey $section "drain_seconds") }}
{{- /* Whole numbers: Ray's autoscaler reads no others. Workers are bounded by the pool's own resource. */}}
{{- $offered := dict (include "antiphon.poolResource" .pool) $perPod "antiphon_ingress" 1 -}}
{{- range $name, $amount := $section.resources | default dict -}}
{{- $_ := set $offered $name (mulf $perPod $amount | ceil) -}}
{{- end }}
{{- range $name, $amount := (get .root.Values.config "http" | default dict).resources | default dict -}}
{{- if not (include "antiphon.isOfPool" (dict "config" $.root.Values.config "resource" $name)) -}}
{{- $_ := set $offered $name (ceil $amount) -}}
{{- end -}}
{{- end }}
resources: {{ $offered | toJson }}
{{- end -}}

{{/* Whether some pools' pods offer a resource for their workers, so that it says where an ingress may
     start. What pods of no pool offer, all do. Arguments: dict "config" "resource"; empty for no. */}}
{{- define "antiphon.isOfPool" -}}
{{- range $pool := list "prefill" "decode" "colocated" -}}
{{- $named := (get $.config $pool | default dict).resources | default dict -}}
{{- if or (hasKey $named $.resource) (eq $.resource (include "antiphon.poolResource" $pool)) -}}
true
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "antiphon.poolResource" -}}
{{- printf "antiphon_%s" . -}}
{{- end -}}

{{- define "antiphon.port" -}}
{{- (get .Values.config "http" | default dict).port | default 8000 | int -}}
{{- end -}}

{{/* Where workers and ingresses are scraped; the same whether they are, or scraping would restart them.
     Outside Linux's range for ports that are chosen at start, in which KV links are. Returns YAML. */}}
{{- define "antiphon.metricsPorts" -}}
{{- $metrics := get .Values.config "metrics" | default dict -}}
first: {{ $metrics.first_port | default 20100 | int }}
last: {{ sub (add ($metrics.first_port | default 20100) ($metrics.num_ports | default 100)) 1 }}
{{- end -}}

{{/* The document that Serve deploys. It restarts everything when args change, and nothing when sizes
     do, so these stand in deployments only; `antiphon config serve` does the same. */}}
{{- define "antiphon.serveConfig" -}}
{{- $config := deepCopy .Values.config -}}
{{- $deployments := list -}}
{{- range $pool := list "prefill" "decode" "colocated" -}}
{{- $numbers := include "antiphon.pool" (dict "root" $ "pool" $pool) | fromYaml -}}
{{- if $numbers.workers -}}
{{- $section := omit (get $config $pool | default dict) "replicas" -}}
{{- $place := dict (include "antiphon.poolResource" $pool) 1 -}}
{{- $_ := set $section "resources" (merge $place ($section.resources | default dict)) -}}
{{- $_ := set $config $pool $section -}}
{{- $deployments = append $deployments (dict "name" $pool "num_replicas" (int $numbers.workers)) -}}
{{- else if eq $pool "colocated" -}}
{{- $_ := unset $config $pool -}}
{{- else -}}
{{- $_ := set $config $pool (dict "replicas" 0) -}}
{{- end -}}
{{- end -}}
{{- $http := get $config "http" | default dict -}}
{{- $deployments = append $deployments (dict "name" "ingress" "num_replicas" ($http.ingress_replicas | default 1 | int)) -}}
{{- $http = omit $http "ingress_replicas" -}}
{{- /* Not on the head, whose loss would take it along; any number of them fits on one pod. */}}
{{- $_ := set $http "resources" (merge (dict "antiphon_ingress" 0.001) ($http.resources | default dict)) -}}
{{- with include "antiphon.keyFile" . }}
{{- $_ := set $http "api_key_file" . -}}
{{- end -}}
{{- $_ := set $config "http" $http -}}
{{- $metrics := get $config "metrics" | default dict -}}
{{- $_ := set $metrics "first_port" (include "antiphon.metricsPorts" . | fromYaml).first -}}
{{- $_ := set $config "metrics" $metrics -}}
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: {{ include "antiphon.port" . }}
applications:
  - name: antiphon
    route_prefix: /
    import_path: antiphon.deployment.application:app
    args:
      {{- toYaml $config | nindent 6 }}
    deployments:
      {{- toYaml $deployments | nindent 6 }}
{{- end -}}

{{/* What the workers reserve, and what Ray's own processes and the proxy need. No limit: a throttled
     decode step stalls every stream. Arguments: dict "numbers" "values". */}}
{{- define "antiphon.podCpu" -}}
{{- $ray := .values.rayCpu | toString -}}
{{- $milli := ternary (trimSuffix "m" $ray | float64) (mulf 1000 (float64 $ray)) (hasSuffix "m" $ray) -}}
{{- printf "%dm" (addf (mulf 1000 .numbers.cpus) $milli | int) -}}
{{- end -}}
