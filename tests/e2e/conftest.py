from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import Product, free_port


@pytest.fixture(scope="session")
def product(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Iterator[Product]:
    """The default ``antiphon serve``: Ray, HTTP, one prefill and one decode worker, real model."""
    port = free_port()
    started = Product(
        ["antiphon", "serve", "--port", str(port)], port, tmp_path_factory.mktemp("product")
    )
    try:
        started.wait_until_ready()
        yield started
    finally:
        started.stop()
