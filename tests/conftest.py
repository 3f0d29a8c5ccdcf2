"""Fixtures that several folders of tests share, and where kernel tests run.

Those marked ``interpreter`` run on a GPU if there is one, else in Triton's interpreter, which is
chosen by ``TRITON_INTERPRET=1`` before Triton is imported and cannot share a process with the
compiler: they are a pytest run of their own, which ``make test`` makes. Others leave them out.
"""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from antiphon.config import DEFAULT_MODEL
from antiphon.workers.model_source import resolve_model

IN_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available()

if IN_INTERPRETER:
    import interpreter_mend  # noqa: F401

# Shells let what they start in the background ignore Ctrl-C, and all that it starts: `serve run`
# could not be stopped.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if IN_INTERPRETER or HAS_GPU:
        return
    waiting = [item for item in items if item.get_closest_marker("interpreter")]
    if waiting:
        config.hook.pytest_deselected(items=waiting)
        items[:] = [item for item in items if not item.get_closest_marker("interpreter")]


@pytest.fixture(scope="session", autouse=True)
def ray_of_its_own(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let tests find no Ray of this machine, running or gone, and let that find none of theirs.

    Ray keeps the address of the last cluster that was started in its folder, where it outlives the
    cluster. The path is short because Ray's sockets are in it; logs are kept if a test failed.
    """
    folder = Path(tempfile.mkdtemp(prefix="ray-tests-", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_TMPDIR", str(folder))
        yield
    if not request.session.testsfailed:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if HAS_GPU and not IN_INTERPRETER else "cpu")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Return the folder of the default model; converting it takes half a minute, once a machine."""
    return resolve_model(DEFAULT_MODEL)
