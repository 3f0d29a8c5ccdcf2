"""Where kernel tests run: on a GPU if there is one, else in Triton's interpreter.

The interpreter is chosen by ``TRITON_INTERPRET=1`` before Triton is imported and cannot share a
process with the compiler, so these tests are a pytest run of their own: ``make test`` makes it.
"""

import os

import pytest
import torch

IN_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available()

if IN_INTERPRETER:
    import interpreter_mend  # noqa: F401


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if IN_INTERPRETER or HAS_GPU:
        return
    waiting = [item for item in items if item.get_closest_marker("interpreter")]
    if waiting:
        config.hook.pytest_deselected(items=waiting)
        items[:] = [item for item in items if not item.get_closest_marker("interpreter")]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if HAS_GPU and not IN_INTERPRETER else "cpu")
