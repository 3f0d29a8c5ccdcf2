"""The configuration of a deployment: every key with its type, bounds, default and description.

One document serves the command line, ``serve run`` and the chart; ``config_loading`` parses it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ByteSize, ConfigDict, Field, model_validator

from antiphon.byte_sizes import Bytes, PositiveBytes
from antiphon.config_checks import MAX_NCCL_LINKS, check_together
from antiphon.listening import ANY_PORT
from antiphon.messages import MAX_PREFILL_CANDIDATES

DEFAULT_MODEL = "smollm2-135m-instruct"
KVDtype = Literal["auto", "float32", "float16", "bfloat16", "int8", "fp8"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Section):
    """Which weights to serve, and under what name."""

    source: Annotated[str, Field(pattern="[^/.][^/]*/*$")] = Field(  # ends in a name, not in ".."
        DEFAULT_MODEL,
        description="A folder with safetensors, a GGUF file, a hub name or a built-in model.",
    )
    served_name: str | None = Field(
        None, description="The name clients use; default: the last part of the source."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Of weights and KV. auto: float32 on CPU, the checkpoint's on GPU.",
    )
    max_context_tokens: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Prompt plus output; default: the model's own limit."
    )

    @property
    def name(self) -> str:
        """The name under which the model is served."""
        return self.served_name or Path(self.source.rstrip("/")).name


class EngineConfig(_Section):
    """One worker's engine."""

    block_size: Annotated[int, Field(ge=1, le=1024)] = Field(16, description="Tokens per KV block.")
    kv_cache_bytes: PositiveBytes | None = Field(
        None, description="Memory for KV, such as 2GiB; default: derived from what is free."
    )
    kv_cache_dtype: KVDtype = Field(
        "auto",
        description="Of K and V in this pool's cache; auto: the model's. int8 and fp8 halve a "
        "16-bit cache at some loss of accuracy.",
    )
    max_batch_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="Token budget of one step, prompts in what decode steps leave; "
        "default: 128 on CPU, 2048 on GPU.",
    )
    max_num_requests: Annotated[int, Field(ge=1)] = Field(
        64, description="Requests that may run at once."
    )
    max_waiting_requests: Annotated[int, Field(ge=0)] = Field(
        256, description="Requests that may wait; further ones are refused as busy."
    )
    num_threads: Annotated[int, Field(ge=1)] = Field(1, description="CPU threads of a step.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: the GPU that num_gpus reserves, without one the CPU."
    )
    prefix_cache: bool = Field(True, description="Keep finished blocks for later prompts.")
    cuda_graphs: bool = Field(
        True, description="On a GPU, replay decode steps from CUDA graphs captured at start."
    )


class PoolConfig(_Section):
    """One pool of workers."""

    replicas: Annotated[int, Field(ge=0)] = Field(0, description="Workers in the pool.")
    num_cpus: Annotated[float, Field(ge=0)] = Field(1.0, description="CPUs Ray reserves for each.")
    num_gpus: Annotated[float, Field(ge=0)] = Field(0.0, description="GPUs Ray reserves for each.")
    resources: dict[str, float] = Field(
        default_factory=dict,
        description="Custom Ray resources of each, to place the pool on nodes.",
    )
    drain_seconds: Annotated[float, Field(ge=0)] = Field(
        20.0,
        description="A worker that is to stop finishes requests for this long; "
        "what is left then goes on at another worker.",
    )
    max_surge_percent: Annotated[int, Field(ge=0, le=100)] = Field(
        0,
        description="Extra workers that an update may start before it stops old ones; they need "
        "free CPUs or GPUs.",
    )
    engine: EngineConfig = EngineConfig()


class HandoffConfig(_Section):
    """How KV crosses from prefill to decode workers."""

    transport: Literal["gloo", "nccl"] = Field(
        "gloo",
        description="What carries KV: gloo through host memory, nccl between GPUs.",
    )
    wire_dtype: KVDtype = Field(
        "auto",
        description="Of K and V between the pools, whatever their caches hold; auto: the model's. "
        "If it rounds (int8, fp8, a smaller float), answers depend on who computed the prompt.",
    )
    timeout_seconds: Annotated[float, Field(gt=0)] = Field(
        60.0,
        description="From asking the first prefill worker to the last segment, all attempts "
        "together; then computed by decode.",
    )
    stall_seconds: Annotated[float, Field(gt=0)] = Field(
        20.0,
        description="A prefill worker that sends nothing for this long, be it that the prompt "
        "waits there or that piece_bytes take long to compute, is given up for the next one.",
    )
    max_prefill_attempts: Annotated[int, Field(ge=1, le=MAX_PREFILL_CANDIDATES)] = Field(
        MAX_PREFILL_CANDIDATES, description="Prefill workers that are asked for one prompt."
    )
    max_fallback_tokens: Annotated[int, Field(ge=0)] = Field(
        8192,
        description="Prompt tokens that may be queued on a decode worker when it computes a prompt "
        "that prefill failed; above that it says busy. It takes one if none is queued.",
    )
    piece_bytes: Bytes = Field(
        ByteSize(2 << 20),
        description="Less KV than this is not sent before the prompt is done, so that a short "
        "prompt goes in one piece; more is sent while later tokens are computed. To compute so "
        "much must take far less than stall_seconds, since nothing comes until then.",
    )
    max_links: Annotated[int, Field(ge=1)] = Field(
        64,
        description="Open links of one worker. With nccl at most 32, which is the default then: "
        "torch has no streams of their own for more.",
    )
    max_pending: Annotated[int, Field(ge=1)] = Field(
        32, description="Prompts that one decode worker may await from prefill workers at once."
    )

    @model_validator(mode="before")
    @classmethod
    def _nccl_has_fewer_links(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("transport") == "nccl":
            return {"max_links": MAX_NCCL_LINKS, **data}
        return data


class RouterConfig(_Section):
    """How a pair of workers is chosen."""

    local_prefill_max_tokens: Annotated[int, Field(ge=0)] = Field(
        64,
        description="Prompts with at most this many uncached tokens are computed by decode.",
    )
    link_bytes_per_second: Annotated[float, Field(gt=0)] = Field(
        1.5e9, description="Assumed rate of a link, to predict what a hand-off takes."
    )
    max_replays: Annotated[int, Field(ge=0)] = Field(
        3, description="Workers that a request may lose; one that stops and gives it back is none."
    )
    replay_wait_seconds: Annotated[float, Field(ge=0)] = Field(
        20.0,
        description="A stream that lost its worker waits this long for another one with room; "
        "then it ends with an error.",
    )
    silence_seconds: Annotated[float, Field(ge=1)] = Field(
        7.5,
        description="A session whose other end answers no ping for this long is given up, and what "
        "it carried goes on elsewhere. A process that stands still for a third of it may lose its "
        "sessions.",
    )
    target_ttft_seconds: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Wanted time to the first token. Where a pair comes close to it, a decode "
        "worker may compute the prompt.",
    )
    target_itl_seconds: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Wanted time between two tokens. Where decode comes close to it, a prefill "
        "worker may generate; and prompts get only the part of a step that running streams leave.",
    )


class HttpConfig(_Section):
    """The OpenAI-compatible endpoint."""

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for all.")
    port: Annotated[int, Field(ge=1, le=65535)] = Field(8000, description="Port to listen on.")
    ingress_replicas: Annotated[int, Field(ge=1)] = Field(1, description="Ingress processes.")
    resources: dict[str, float] = Field(
        default_factory=dict,
        description="Custom Ray resources of each ingress, to keep it off the head, for example.",
    )
    max_concurrent_requests: Annotated[int, Field(ge=1)] = Field(
        512, description="Choices one ingress generates at once; above that: 503."
    )
    drain_seconds: Annotated[float, Field(ge=0)] = Field(
        60.0, description="An ingress that is to stop finishes open requests for this long."
    )
    api_key_file: Annotated[str, Field(pattern="^/")] | None = Field(
        None,
        description="A file with one API key per line, at this absolute path wherever an ingress "
        "runs; read again when it changes. Without it everybody may use the endpoint.",
    )
    metrics_need_key: bool = Field(
        False,
        description="Ask for an API key at /metrics and /metrics/targets too; Prometheus then "
        "sends one as its bearer token.",
    )


class MetricsConfig(_Section):
    """What Prometheus reads."""

    vllm_names: bool = Field(
        False,
        description="Serve vLLM's five scheduler gauges too, as vllm:*, for gateways that route by "
        "them.",
    )
    first_port: Annotated[int, Field(ge=1024, le=55000)] | None = Field(
        None,
        description="Every worker and ingress is scraped, and a worker has its sessions, at the "
        "first free port from here on, to which a firewall can let Prometheus; default: any port.",
    )
    num_ports: Annotated[int, Field(ge=1, le=10000)] = Field(
        100, description="Of these: for all workers and ingresses of a node, also during updates."
    )

    @property
    def ports(self) -> Sequence[int]:
        """To try in this order; 0 is any."""
        first = self.first_port
        return ANY_PORT if first is None else range(first, first + self.num_ports)


class TracingConfig(_Section):
    """Traces of requests."""

    endpoint: Annotated[str, Field(pattern="^https?://[^/]")] | None = Field(
        None,
        description="An OpenTelemetry collector that takes OTLP over HTTP, such as "
        "http://collector:4318. Default: OTEL_EXPORTER_OTLP_ENDPOINT, and no traces without it.",
    )
    sample_ratio: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None,
        description="Of requests whose client does not say whether they are sampled. "
        "Default: OTEL_TRACES_SAMPLER, and all without it.",
    )
    kept_timelines: Annotated[int, Field(ge=0)] = Field(
        1000,
        description="Choices that have ended and whose timeline an ingress keeps for "
        "`antiphon trace`, with traces or without.",
    )


class AntiphonConfig(_Section):
    """A whole deployment."""

    model: ModelConfig = ModelConfig()
    prefill: PoolConfig = PoolConfig(replicas=1)
    decode: PoolConfig = PoolConfig(replicas=1)
    colocated: PoolConfig = PoolConfig()
    handoff: HandoffConfig = HandoffConfig()
    router: RouterConfig = RouterConfig()
    http: HttpConfig = HttpConfig()
    metrics: MetricsConfig = MetricsConfig()
    tracing: TracingConfig = TracingConfig()

    @model_validator(mode="before")
    @classmethod
    def _pools_default_to_what_is_named(cls, data: Any) -> Any:
        """A pool that is named without ``replicas`` has one worker, not none."""
        if isinstance(data, Mapping):
            data = dict(data)
            for pool in ("prefill", "decode", "colocated"):
                section = data.get(pool)
                if isinstance(section, Mapping) and "replicas" not in section:
                    data[pool] = {**section, "replicas": 1}
        return data

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Self:
        check_together(self)
        return self

    @property
    def pools(self) -> dict[str, PoolConfig]:
        """The pools that have workers, by role."""
        pools = {"prefill": self.prefill, "decode": self.decode, "colocated": self.colocated}
        return {role: pool for role, pool in pools.items() if pool.replicas}
