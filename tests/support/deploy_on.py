"""Deploys the application on a cluster, or updates it, and leaves; nothing there depends on it.

deploy_on.py NAMESPACE ADDRESS CONFIG_FILE
"""

import logging
import sys
import threading
from pathlib import Path

import ray
from network import enter

from antiphon.config_loading import parse_config, read_yaml
from antiphon.deployment.launcher import _deploy


def main(namespace: str, address: str, config: Path) -> None:
    enter(namespace)
    ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    _deploy(parse_config(read_yaml(config), str(config)), address, threading.Event())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
