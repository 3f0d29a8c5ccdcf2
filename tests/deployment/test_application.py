"""What Serve is told of the pools."""

import warnings

from antiphon.config import PoolConfig

with warnings.catch_warnings():
    # Importing ray.serve uses pydantic in a way that pydantic deprecates.
    warnings.simplefilter("ignore", DeprecationWarning)
    from antiphon.deployment.application import _pool_deployment


def test_one_failure_is_not_the_end_of_a_pool() -> None:
    """Serve counts a lost node as one too, and starts nothing more once it has counted to this."""
    deployment = _pool_deployment("decode", PoolConfig(replicas=1))
    assert deployment._deployment_config.max_constructor_retry_count >= 3
