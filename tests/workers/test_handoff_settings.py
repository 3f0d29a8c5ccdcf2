"""Settings of caches, wire and pieces reach the workers that are started with them."""

import asyncio
import random
from collections.abc import Coroutine
from typing import Any

import pytest
import torch
from pools import Client, assert_idle, peer_of, start
from tiny_models import VOCAB_SIZE, tiny_model
from two_pools import CHUNK_TOKENS, close, pair

from antiphon.config import EngineConfig, HandoffConfig
from antiphon.messages import Role

PROMPT = random.Random(3).choices(range(3, VOCAB_SIZE), k=3 * CHUNK_TOKENS + 1)
NUM_HANDED_OVER = len(PROMPT) - 1
MAX_TOKENS = 12
FLOAT32 = 4  # bytes of the tiny models' own dtype


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


async def through_two(model: Any, engine: dict[str, Any], handoff: HandoffConfig) -> Any:
    """(tokens, segments, received bytes, prefill's card, decode's card)"""
    prefill, decode, client = await pair(model, handoff=handoff, **engine)
    request_id = client.submit(PROMPT, MAX_TOKENS, peer_of(prefill))
    (tokens,) = await client.finish(request_id)
    assert client.paths[request_id] == "remote"
    counters = decode.generate.receiver.counters()
    await assert_idle(prefill, decode)
    await close(client.session, prefill, decode)
    return tokens, counters.segments, counters.received_bytes, prefill.card, decode.card


async def through_one(model: Any, engine: dict[str, Any]) -> list[int]:
    worker = await start(Role.COLOCATED, model, engine=EngineConfig(**engine))
    client = await Client.connect(worker)
    (tokens,) = await client.finish(client.submit(PROMPT, MAX_TOKENS))
    await close(client.session, worker)
    return tokens


@pytest.mark.parametrize(
    ("cache", "wire", "cache_bytes", "wire_bytes"),
    [
        ("auto", "auto", 4, 4),
        ("bfloat16", "auto", 2, 4),
        ("bfloat16", "bfloat16", 2, 2),
        ("auto", "bfloat16", 4, 2),
    ],
)
def test_dtypes_of_cache_and_wire(cache: str, wire: str, cache_bytes: int, wire_bytes: int) -> None:
    model = tiny_model("llama")

    async def scenario() -> None:
        engine, handoff = {"kv_cache_dtype": cache}, HandoffConfig(wire_dtype=wire)  # type: ignore[arg-type]
        tokens, _, received_bytes, *cards = await through_two(model, engine, handoff)
        per_token = cards[0].kv_bytes_per_token // cache_bytes
        for card in cards:
            assert card.kv_bytes_per_token == per_token * cache_bytes
            assert card.wire_bytes_per_token == per_token * wire_bytes
        assert received_bytes == NUM_HANDED_OVER * per_token * wire_bytes
        assert per_token == elements_per_token(model)
        if wire_bytes >= cache_bytes:  # then the wire loses nothing
            assert tokens == await through_one(model, engine)

    run(scenario())


def elements_per_token(model: Any) -> int:
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * head_dim)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_a_quantised_wire_carries_a_byte_and_scales(dtype: str) -> None:
    model = tiny_model("llama")

    async def scenario() -> None:
        handoff = HandoffConfig(wire_dtype=dtype)  # type: ignore[arg-type]
        _, _, received_bytes, prefill, decode = await through_two(model, {}, handoff)
        config = model.config
        num_scales = 2 * config.num_hidden_layers * config.num_key_value_heads
        per_token = elements_per_token(model) + num_scales * torch.float32.itemsize
        assert prefill.wire_bytes_per_token == decode.wire_bytes_per_token == per_token
        assert received_bytes == NUM_HANDED_OVER * per_token

    run(scenario())


@pytest.mark.parametrize(("piece_bytes", "num_segments"), [(2 << 20, 1), (0, 3)])
def test_piece_bytes(piece_bytes: int, num_segments: int) -> None:
    model = tiny_model("llama")

    async def scenario() -> None:
        handoff = HandoffConfig(piece_bytes=piece_bytes)  # type: ignore[arg-type]
        _, segments, received_bytes, _, decode = await through_two(model, {}, handoff)
        assert received_bytes == NUM_HANDED_OVER * decode.wire_bytes_per_token
        # With no lower bound, chunks merge where the link is slower than the engine.
        assert segments == 1 if num_segments == 1 else 1 <= segments <= num_segments

    run(scenario())
