import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import Product, free_port


@pytest.fixture(scope="session")
def product(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Iterator[Product]:
    """The default ``antiphon serve``: Ray, HTTP, one prefill and one decode worker, real model.

    It starts a Ray of its own beside two addresses that it must not try: the one that Ray notes
    on a machine, here of a cluster that has ended, and one in the environment.
    """
    port, folder = free_port(), tmp_path_factory.mktemp("product")
    note = Path(os.environ["RAY_TMPDIR"]) / "ray/ray_current_cluster"
    note.parent.mkdir(exist_ok=True)
    note.write_text("127.0.0.1:9")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "127.0.0.1:9")
        started = Product(["antiphon", "serve", "--port", str(port)], port, folder)
    try:
        started.wait_until_ready()
        yield started
    finally:
        started.stop()
