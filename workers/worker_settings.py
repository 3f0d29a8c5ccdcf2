"""What one worker is told when it starts: the parts of the configuration that concern it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from antiphon.config import EngineConfig, HandoffConfig, ModelConfig, TracingConfig
from antiphon.listening import ANY_PORT
from antiphon.messages import Role
from antiphon.workers.session import SILENCE_SECONDS


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What one worker needs to know to start."""

    role: Role
    replica_id: str
    host: str  # the address that other nodes reach this one at
    model_folder: Path
    model: ModelConfig
    engine: EngineConfig
    handoff: HandoffConfig
    num_gpus: float = 0.0  # that are reserved for it; below 1 it shares one with others
    target_itl_seconds: float | None = None  # of the router; prefill workers generate under one
    silence_seconds: float = SILENCE_SECONDS  # of the router
    vllm_names: bool = False
    ports: Sequence[int] = ANY_PORT  # of sessions and metrics; the first free one is taken
    tracing: TracingConfig | None = None  # what is in force; no endpoint, no traces
    began_at: float = field(default_factory=time.monotonic)  # when the start did
