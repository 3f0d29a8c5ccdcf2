"""What runs on each node on behalf of ``antiphon doctor``.

Ray is sent this module by value, so it also runs on a node where the package is missing or another
version, and can say so. It imports the standard library alone until more than versions is asked.
"""

import importlib
import importlib.metadata
import os
import platform
from typing import Any

PACKAGES = ("antiphon", "ray", "torch", "triton", "transformers")
# Ray empties them for an actor that reserves no GPU. All of a node's are looked at here.
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


def read_versions() -> dict[str, str | None]:
    """Versions of Python and of the packages; None for one that is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


class Agent:
    """Answers for one node.

    Args:
        address: The node's own, that other nodes reach it at.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._examiner: Any = None

    def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        """``read_versions``, or a method of the node's ``Examiner``."""
        if method == "versions":
            return read_versions()
        if self._examiner is None:
            for name in _VISIBLE:
                if os.environ.get(name) == "":
                    del os.environ[name]
            module = importlib.import_module("antiphon.deployment.doctor.examiner")
            self._examiner = self._examiner or module.Examiner(self._address)
        return getattr(self._examiner, method)(*arguments)

    def close(self) -> None:
        """Close what was opened."""
        if self._examiner is not None:
            self._examiner.close()
