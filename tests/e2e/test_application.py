"""The real application, started as a user starts it and called with the official client."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest
from processes import Product, wait_for
from real_model import MAX_TOKENS, assert_equal_tokens, oracle, prompts

from antiphon.config import DEFAULT_MODEL
from antiphon.workers.tokenizer import Tokenizer

pytestmark = pytest.mark.e2e
LONG_PROMPT = "The quick brown fox jumps over the lazy dog again and again. " * 12


@pytest.fixture
def client(product: Product) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{product.url}/v1", api_key="none", max_retries=0, timeout=120)


def is_idle(product: Product) -> bool:
    """No request anywhere, and every KV block is free or evictable."""
    return all(
        worker["load"] is not None
        and worker["load"]["num_running"] == 0
        and worker["load"]["num_waiting"] == 0
        and worker["load"]["num_free_blocks"] == worker["num_blocks"]
        for worker in product.get("/workers")
    )


def complete(client: openai.OpenAI, prompt: str, max_tokens: int = 8) -> str:
    answer = client.completions.create(
        model=DEFAULT_MODEL, prompt=prompt, max_tokens=max_tokens, temperature=0
    )
    return answer.choices[0].text


def test_says_what_runs_where_and_a_curl_line_that_works(product: Product) -> None:
    wait_for(lambda: "Ctrl-C stops it." in product.log.read_text(), 10)
    log = product.log.read_text()
    assert f"{product.url}/v1" in log
    assert re.search(r"prefill +on .*, process \d+, KV cache of \d+ tokens", log)
    assert re.search(r"decode +on .*, process \d+, KV cache of \d+ tokens", log)
    line = next(line for line in log.splitlines() if line.startswith("curl "))
    answer = subprocess.run(["bash", "-c", line], capture_output=True, timeout=60, check=True)
    assert answer.stdout.decode().strip().endswith("data: [DONE]")


def test_greedy_answers_equal_generate_at_concurrency_8(
    product: Product, smollm2_path: Path
) -> None:
    """Token for token: text and number of tokens over HTTP, tokens where those differ."""
    tokenizer = Tokenizer(smollm2_path)
    remote_before = product.metric("antiphon_time_to_first_token_seconds_count", path="remote")

    async def ask() -> list[tuple[str, int]]:
        slots = asyncio.Semaphore(8)
        async with openai.AsyncOpenAI(base_url=f"{product.url}/v1", api_key="none") as client:

            async def one(prompt: str) -> tuple[str, int]:
                async with slots:
                    stream = await client.completions.create(
                        model=DEFAULT_MODEL,
                        prompt=tokenizer.encode(prompt),
                        max_tokens=MAX_TOKENS,
                        temperature=0,
                        stream=True,
                        stream_options={"include_usage": True},
                    )
                    text, num_tokens = "", 0
                    async for chunk in stream:
                        text += chunk.choices[0].text if chunk.choices else ""
                        num_tokens = chunk.usage.completion_tokens if chunk.usage else num_tokens
                    return text, num_tokens

            return list(await asyncio.gather(*(one(prompt) for prompt in prompts())))

    for prompt, (text, num_tokens) in zip(prompts(), asyncio.run(ask()), strict=True):
        assert_same_text(smollm2_path, tokenizer, prompt, text, num_tokens)
    remote = product.metric("antiphon_time_to_first_token_seconds_count", path="remote")
    assert remote > remote_before, "nothing crossed the two pools"
    assert product.metric("antiphon_time_to_first_token_seconds_count", path="fallback") == 0


def assert_same_text(
    folder: Path, tokenizer: Tokenizer, prompt: str, text: str, num_tokens: int
) -> None:
    expected = oracle(folder, tuple(tokenizer.encode(prompt)))
    if tokenizer.decode(expected) == text:
        assert num_tokens == len(expected)
        return
    # Only a near-tie of fp32 may differ, which is judged on tokens.
    assert_equal_tokens(folder, tokenizer.encode(prompt), tokenizer.encode(text))


def test_a_request_id_finds_where_its_time_went(product: Product, client: openai.OpenAI) -> None:
    prompt = "Once there was a queue in which every letter waited for the one before it. " * 6
    response = client.completions.with_raw_response.create(
        model=DEFAULT_MODEL, prompt=prompt, max_tokens=3, extra_headers={"X-Request-Id": "find-me"}
    )
    # Serve's proxy returns it: once is enough.
    assert response.headers.get_list("x-request-id") == ["find-me"]
    refused = httpx.post(f"{product.url}/v1/completions", json={}, trust_env=False)
    assert len(refused.headers.get_list("x-request-id")) == 1
    command = [Path(sys.executable).parent / "antiphon", "trace", "find-me", "--url", product.url]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "request find-me: length, " in answer.stdout
    assert re.search(r"^  prefill +[0-9,.]+ +[0-9.]+ %  +#+$", answer.stdout, re.MULTILINE)
    (prefill,) = (worker["replica_id"] for worker in product.workers("prefill"))
    assert f"  prefill at {prefill}: queue " in answer.stdout


def test_chat_with_usage_stop_and_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [DEFAULT_MODEL]
    answer = client.chat.completions.create(
        model=DEFAULT_MODEL,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_tokens=40,
        stop=["Paris"],
    )
    assert answer.choices[0].finish_reason == "stop"
    assert "Paris" not in (answer.choices[0].message.content or "")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize("after_tokens", [0, 3])
def test_a_client_that_leaves_frees_both_pools_within_a_second(
    product: Product, client: openai.OpenAI, after_tokens: int
) -> None:
    wait_for(lambda: is_idle(product), 20)
    prompt = f"{after_tokens} {LONG_PROMPT * (8 if after_tokens == 0 else 1)}"
    if after_tokens:
        stream = client.completions.create(
            model=DEFAULT_MODEL, prompt=prompt, max_tokens=2000, stream=True, temperature=0
        )
        for _ in range(after_tokens):
            next(stream)
        assert not is_idle(product)
        stream.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=1.0).completions.create(
                model=DEFAULT_MODEL, prompt=prompt, max_tokens=2000, temperature=0
            )
    assert wait_for(lambda: is_idle(product), 20) < 1.0


def test_killed_prefill_worker_costs_no_answer_and_comes_back(
    product: Product, client: openai.OpenAI
) -> None:
    expected = complete(client, f"Kill. {LONG_PROMPT}")
    (victim,) = product.workers("prefill")
    os.kill(victim["pid"], signal.SIGKILL)
    # The prompt differs in its first token, so that nothing of it is cached.
    assert complete(client, f"Dead. {LONG_PROMPT}")
    assert complete(client, f"Kill. {LONG_PROMPT}") == expected

    def is_back() -> bool:
        workers = product.workers("prefill")
        return bool(workers) and workers[0]["incarnation"] != victim["incarnation"]

    wait_for(is_back, 60)
    name = "antiphon_time_to_first_token_seconds_count"
    before = product.metric(name, path="remote")
    assert complete(client, f"Back. {LONG_PROMPT}")
    assert product.metric(name, path="remote") == before + 1
