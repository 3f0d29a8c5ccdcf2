from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import Product, free_port


@pytest.fixture(scope="session")
def product(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Iterator[Product]:
    """``antiphon serve``: Ray, HTTP, two ingresses, a prefill and a decode worker, real model."""
    port, folder = free_port(), tmp_path_factory.mktemp("product")
    config = folder / "config.yaml"
    config.write_text("http: {ingress_replicas: 2}\n")
    started = Product(
        ["antiphon", "serve", "--config", str(config), "--port", str(port)], port, folder
    )
    try:
        started.wait_until_ready()
        yield started
    finally:
        started.stop()
