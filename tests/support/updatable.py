"""Runs the application as ``antiphon serve`` does, and changes it while it serves.

    updatable.py PORT MODEL_FOLDER

SIGUSR1 starts a rolling update of every deployment; SIGUSR2 takes one decode worker away. Each
prints a line when Serve says that the application runs again. SIGINT and SIGTERM end it.
"""

import signal
import sys
import threading
from typing import Any

from antiphon.config import AntiphonConfig
from antiphon.config_loading import parse_config
from antiphon.deployment.launcher import _deploy, launch


def config(port: int, model: str, num_decode: int = 2, num_blocks: int = 64) -> AntiphonConfig:
    pool: dict[str, Any] = {
        "num_cpus": 0.3,
        "drain_seconds": 1.0,
        "engine": {"kv_cache_bytes": num_blocks * 16 * 2048, "max_batch_tokens": 64},
    }
    return parse_config(
        {
            "model": {"source": model, "served_name": "tiny"},
            "prefill": {"replicas": 1, **pool},
            "decode": {"replicas": num_decode, **pool},
            "http": {"port": port, "drain_seconds": 20},
            "router": {"local_prefill_max_tokens": 0, "replay_wait_seconds": 60},
        }
    )


def main(port: int, model: str) -> None:
    def change(**changes: int) -> None:
        _deploy(config(port, model, **changes), None, threading.Event())
        print("changed", flush=True)

    def on_signal(**changes: int) -> None:
        threading.Thread(target=change, kwargs=changes, daemon=True).start()

    signal.signal(signal.SIGUSR1, lambda *_: on_signal(num_blocks=80))
    signal.signal(signal.SIGUSR2, lambda *_: on_signal(num_decode=1, num_blocks=80))
    launch(config(port, model), None)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
