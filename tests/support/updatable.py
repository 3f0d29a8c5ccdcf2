"""Runs the application as ``antiphon serve`` does, and changes it while it serves.

    updatable.py PORT MODEL_FOLDER

Changes are documents for ``serve deploy``, as `antiphon config serve` makes them. SIGUSR1 brings
other arguments, so a rolling update of every deployment; after it each SIGUSR2 brings the next of
``SIZES``. Each prints a line when Serve says that the application runs again. SIGINT and SIGTERM
end it.
"""

import signal
import sys
import threading
import time
from typing import Any

from antiphon.config_loading import parse_config
from antiphon.deployment.launcher import launch
from antiphon.deployment.serve_document import APP_NAME, serve_document

SIZES = [(3, 2), (1, 1)]  # decode workers, of which there are two at first, and ingresses
_DEPLOY_SECONDS = 120.0
_POLL_SECONDS = 0.1


def config(
    port: int, model: str, num_blocks: int, num_decode: int = 2, num_ingresses: int = 1
) -> dict[str, Any]:
    pool: dict[str, Any] = {
        "num_cpus": 0.3,
        "drain_seconds": 1.0,
        "engine": {"kv_cache_bytes": num_blocks * 16 * 2048, "max_batch_tokens": 64},
    }
    return {
        "model": {"source": model, "served_name": "tiny"},
        "prefill": {"replicas": 1, **pool},
        "decode": {"replicas": num_decode, **pool},
        "http": {"port": port, "ingress_replicas": num_ingresses, "drain_seconds": 20},
        "router": {"local_prefill_max_tokens": 0, "replay_wait_seconds": 60},
    }


def deploy(document: dict[str, Any]) -> None:
    """What ``serve deploy`` does, without a dashboard to ask; returns when it runs."""
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(document))
    deadline = time.monotonic() + _DEPLOY_SECONDS
    while serve.status().applications[APP_NAME].status.value != "RUNNING":
        assert time.monotonic() < deadline, serve.status()
        time.sleep(_POLL_SECONDS)


def main(port: int, model: str) -> None:
    sizes = iter(SIZES)

    def change(num_decode: int = 2, num_ingresses: int = 1) -> None:
        deploy(serve_document(config(port, model, 80, num_decode, num_ingresses)))
        print("changed", flush=True)

    def on_signal(*size: int) -> None:
        threading.Thread(target=change, args=size, daemon=True).start()

    signal.signal(signal.SIGUSR1, lambda *_: on_signal())
    signal.signal(signal.SIGUSR2, lambda *_: on_signal(*next(sizes)))
    launch(parse_config(config(port, model, 64)), None)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
