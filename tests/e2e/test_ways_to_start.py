"""Other ways in: Serve's own command with an import path, colocated workers, and mistakes."""

import socket
import subprocess
import sys
from pathlib import Path

import openai
import pytest
import yaml
from processes import Product, free_port, wait_for
from tiny_folder import save_tiny_model

pytestmark = pytest.mark.e2e


def test_serve_run_with_a_config_file_a_local_folder_and_colocated_workers(
    tmp_path: Path, smollm2_path: Path
) -> None:
    model = save_tiny_model(tmp_path / "my-model", smollm2_path)
    port = free_port()
    arguments = {
        "model": {"source": str(model), "served_name": "mine"},
        "prefill": {"replicas": 0},
        "decode": {"replicas": 0},
        "colocated": {"replicas": 2, "num_cpus": 0.5},
    }
    application = {
        "name": "antiphon",
        "import_path": "antiphon.deployment.application:app",
        "route_prefix": "/",
        "args": arguments,
    }
    config = {"http_options": {"port": port}, "applications": [application]}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    product = Product(["serve", "run", "serve.yaml"], port, tmp_path)
    try:
        product.wait_until_ready()
        wait_for(lambda: len(product.workers("colocated")) == 2, 60)
        client = openai.OpenAI(base_url=f"{product.url}/v1", api_key="none", max_retries=0)
        answer = client.chat.completions.create(
            model="mine", messages=[{"role": "user", "content": "Hello"}], max_tokens=5
        )
        assert answer.usage is not None
        assert 1 <= answer.usage.completion_tokens <= 5
    finally:
        product.stop()


def run_antiphon(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).parent / "antiphon", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_mistakes_are_explained_before_anything_starts(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("decode:\n  engine:\n    blok_size: 8\n")
    answer = run_antiphon("serve", "--config", str(config))
    assert answer.returncode == 2
    assert "decode.engine.blok_size: unknown key; did you mean 'block_size'?" in answer.stderr

    answer = run_antiphon("serve", "--model", str(tmp_path / "nothing"))
    assert answer.returncode == 2
    assert "nothing" in answer.stderr

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        answer = run_antiphon("serve", "--port", str(port))
    assert answer.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in answer.stderr


def test_a_family_that_cannot_be_served_is_refused_by_name(
    tmp_path: Path, smollm2_path: Path
) -> None:
    model = save_tiny_model(tmp_path / "recurrent", smollm2_path, "qwen3_next")
    answer = run_antiphon("serve", "--model", str(model), "--port", str(free_port()))
    assert answer.returncode == 2
    assert "model family 'qwen3_next' cannot be served" in answer.stderr
