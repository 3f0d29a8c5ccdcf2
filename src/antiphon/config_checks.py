"""What the sections of a configuration must have in common, beyond the bounds of each key.

The chart refuses the same before anything is installed (``helm/antiphon/templates/_checks.tpl``).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from antiphon.config import AntiphonConfig

# torch gives communicators one of so many streams, in turn. Two links on one stream wait for each
# other's peers, so one that hangs would break the other.
MAX_NCCL_LINKS = 32


def check_together(config: "AntiphonConfig") -> None:
    """Check what no key says alone.

    Raises:
        ValueError: Names the keys that do not go together.
    """
    if config.http.metrics_need_key and config.http.api_key_file is None:
        raise ValueError("http.metrics_need_key is true, but http.api_key_file is not set")
    if config.decode.replicas + config.colocated.replicas == 0:
        raise ValueError("decode.replicas and colocated.replicas are both 0: nothing can decode")
    if config.prefill.replicas and not config.decode.replicas:
        raise ValueError(
            f"prefill.replicas is {config.prefill.replicas} but decode.replicas is 0; "
            "prefill workers need decode workers to send to"
        )
    if config.handoff.transport == "nccl":
        _check_nccl(config)


def _check_nccl(config: "AntiphonConfig") -> None:
    for role, pool in config.pools.items():
        if pool.num_gpus % 1:  # 0 is for the worker to judge: `antiphon serve` may give it one
            raise ValueError(
                f"handoff.transport is nccl, but {role}.num_gpus is {pool.num_gpus:g}: "
                "NCCL connects whole GPUs"
            )
    if config.handoff.max_links > MAX_NCCL_LINKS:
        raise ValueError(
            f"handoff.transport is nccl, but handoff.max_links is {config.handoff.max_links}: "
            f"torch has streams for {MAX_NCCL_LINKS}"
        )
