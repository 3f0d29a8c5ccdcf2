"""Says when a worker's pod is ready: a worker serves in it, none loads, Serve's proxy is well.

The proxy alone is well while the workers beside it still load a model. Such a pod would count for
the disruption budget, and emptying one node after another would stop the workers that serve before
their successors do. A pod without a worker is never ready, so spare ones do not count either.

    constructor begins    the worker holds the file ``loading``
    it serves             it holds ``serving``, and lets ``loading`` go
    it is to stop         it lets go

Several workers of a pod hold the same files. They are held by locks: the kernel takes those of a
process that has died, however it died. The probe, ``python -m antiphon.deployment.pod_readiness``
with the folder and the proxy's port, tries them, and says on its standard error what is missing.
"""

import fcntl
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from antiphon.deployment.endpoint import is_serve

# In a pod the chart says where; elsewhere nobody asks, and nothing is written.
FOLDER_VARIABLE = "ANTIPHON_READINESS_FOLDER"
_LOADING, _SERVING = "loading", "serving"
_PROXY_SECONDS = 3.0  # the kubelet ends the probe after 5 s


class PodReadiness:
    """What one worker says to the probe of its pod; to nobody without a folder."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        folder = environment.get(FOLDER_VARIABLE)
        self._folder = Path(folder) if folder else None
        self._held: int | None = None

    def loading(self) -> None:
        """The worker begins to load."""
        self._hold(_LOADING)

    def serving(self) -> None:
        """The worker takes requests."""
        self._hold(_SERVING)

    def leaving(self) -> None:
        """The worker takes nothing more; a second call does nothing."""
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def _hold(self, name: str) -> None:
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._folder / name, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits for the microseconds of a probe at most
        self.leaving()
        self._held = descriptor


def why_not_ready(folder: Path, port: int) -> str | None:
    """Say what a pod lacks, or None if it is ready.

    Args:
        folder: Where its workers hold their files.
        port: Of Serve's proxy.
    """
    if _is_held(folder / _LOADING):
        return "a worker still loads"
    if not _is_held(folder / _SERVING):
        return "no worker serves here"
    if not is_serve("127.0.0.1", port, _PROXY_SECONDS):
        return "Serve's proxy takes no requests"
    return None


def _is_held(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


if __name__ == "__main__":
    sys.exit(why_not_ready(Path(sys.argv[1]), int(sys.argv[2])))
