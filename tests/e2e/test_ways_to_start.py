"""Other ways in: Serve's own command, two ingresses over colocated workers, and mistakes."""

import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import yaml
from processes import Product, free_port, sample_sum, wait_for
from tiny_folder import save_tiny_model

pytestmark = pytest.mark.e2e


def test_serve_run_with_a_config_file_a_local_folder_colocated_workers_and_a_key(
    tmp_path: Path, smollm2_path: Path
) -> None:
    model = save_tiny_model(tmp_path / "my-model", smollm2_path)
    port, first_port = free_port(), 21100  # below those that Linux chooses
    arguments = {
        "model": {"source": str(model), "served_name": "mine"},
        "prefill": {"replicas": 0},
        "decode": {"replicas": 0},
        "colocated": {"replicas": 2, "num_cpus": 0.5},
        "http": {"ingress_replicas": 2, "api_key_file": str(tmp_path / "keys")},
        "metrics": {"vllm_names": True, "first_port": first_port, "num_ports": 50},
    }
    application = {
        "name": "antiphon",
        "import_path": "antiphon.deployment.application:app",
        "route_prefix": "/",
        "args": arguments,
    }
    config = {"http_options": {"port": port}, "applications": [application]}
    (tmp_path / "keys").write_text("sk-mine\n")
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    # local: not a cluster that happens to run on this machine
    product = Product(["serve", "run", "--address", "local", "serve.yaml"], port, tmp_path)
    try:
        product.wait_until_ready()  # /ready asks for no key
        # Both ingresses know both workers.
        wait_for(lambda: product.metric("antiphon_router_workers", pool="colocated") == 4, 60)
        client = openai.OpenAI(base_url=f"{product.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
        assert product.metric("antiphon_unauthorized_total", reason="unknown") == 1
        client.api_key = product.api_key = "sk-mine"
        answer = client.chat.completions.create(
            model="mine", messages=[{"role": "user", "content": "Hello"}], max_tokens=5
        )
        assert answer.usage is not None
        assert 1 <= answer.usage.completion_tokens <= 5
        every_process_is_scraped_once_and_nothing_is_counted_twice(product, client)
        scraped = [target["targets"][0] for target in product.get("/metrics/targets")]
        ports = {int(host_port.rpartition(":")[2]) for host_port in scraped}
        assert len(ports) == 4
        assert ports <= set(range(first_port, first_port + 50))
    finally:
        product.stop()


def every_process_is_scraped_once_and_nothing_is_counted_twice(
    product: Product, client: openai.OpenAI
) -> None:
    """The ingresses share requests; the sums over all targets are those of the clients."""

    def targets() -> dict[str, str]:
        return {t["targets"][0]: t["labels"]["pool"] for t in product.get("/metrics/targets")}

    known = targets()
    assert sorted(known.values()) == ["colocated", "colocated", "ingress", "ingress"]
    assert all(targets() == known for _ in range(8)), "each ingress must name all of them"

    def total(name: str, **labels: str) -> float:
        return sum(sample_sum(host_port, name, **labels) for host_port in known)

    def ask(index: int) -> int:
        prompt = f"Number {index}."
        named = {"X-Request-Id": f"number/{index}"}
        answer = client.completions.create(
            model="mine", prompt=prompt, max_tokens=4, extra_headers=named
        )
        assert answer.usage is not None
        return answer.usage.completion_tokens

    names = ["antiphon_requests_total", "antiphon_worker_requests_total"]
    names += ["antiphon_time_to_first_token_seconds_count", "antiphon_router_decisions_total"]
    tokens = ["antiphon_generation_tokens_total", "antiphon_request_generation_tokens_sum"]
    before = {name: total(name) for name in names + tokens}
    with ThreadPoolExecutor(6) as pool:
        num_tokens = sum(pool.map(ask, range(6)))
    added = {name: total(name) - before[name] for name in names + tokens}
    assert added == dict.fromkeys(names, 6) | dict.fromkeys(tokens, num_tokens)
    served_by = set()
    for index in range(6):  # whichever ingress answers, it finds what either of them served
        found = product.get(f"/requests/number%2F{index}")  # as it was sent
        assert (found["num_ingresses"], found["num_silent"]) == (2, 0)
        (request,) = found["requests"]
        assert request["choices"][0]["num_output_tokens"] > 0
        served_by.add(request["ingress"])
    assert served_by <= {t["labels"]["worker"] for t in product.get("/metrics/targets")}
    whole = total("antiphon_time_to_first_token_seconds_sum")
    assert total("antiphon_time_to_first_token_part_seconds_sum") == pytest.approx(whole)
    assert total("vllm:cache_config_info", model_name="mine") == 4
    assert total("antiphon_workers_wanted", pool="colocated") == 4  # two say two


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

    answer = run_antiphon("serve", "--api-key-file", "no-keys", "--port", str(free_port()))
    assert answer.returncode == 2
    assert f"http.api_key_file: {Path('no-keys').absolute()} cannot be read" in answer.stderr

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
