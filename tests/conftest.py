"""Fixtures that several folders of tests share."""

from pathlib import Path

import pytest

from antiphon.config import DEFAULT_MODEL
from antiphon.workers.model_source import resolve_model


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Return the folder of the default model; converting it takes half a minute, once a machine."""
    return resolve_model(DEFAULT_MODEL)
