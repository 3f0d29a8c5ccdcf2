"""The real model through two pools: 32 varied prompts, 8 at a time, against generate()."""

import asyncio
from pathlib import Path

import pytest
from pools import Client, assert_idle, peer_of, start
from real_model import MAX_TOKENS, assert_equal_tokens, load, prompts

from antiphon.config import EngineConfig
from antiphon.messages import Role
from antiphon.workers.tokenizer import Tokenizer


@pytest.mark.e2e  # for its minute and a half, not for Ray
def test_matches_generate_at_concurrency_8(smollm2_path: Path) -> None:
    tokenizer = Tokenizer(smollm2_path)
    token_ids = [tokenizer.encode(text) for text in prompts()]
    assert len(token_ids) == 32
    asyncio.run(asyncio.wait_for(scenario(smollm2_path, token_ids, tokenizer.eos_token_ids), 280))


async def scenario(folder: Path, token_ids: list[list[int]], eos: tuple[int, ...]) -> None:
    # Two models: the oracle's attention is switched by nobody.
    model = load.__wrapped__(folder)
    engine = EngineConfig(max_batch_tokens=128)
    prefill = await start(Role.PREFILL, model, engine=engine, num_blocks=64)
    decode = await start(Role.DECODE, model, engine=engine, num_blocks=96)
    client = await Client.connect(decode)
    slots = asyncio.Semaphore(8)

    async def one(prompt: list[int]) -> list[int]:
        async with slots:
            request_id = client.submit(prompt, MAX_TOKENS, peer_of(prefill), eos)
            return (await client.finish(request_id))[0]

    answers = await asyncio.gather(*(one(prompt) for prompt in token_ids))
    assert set(client.paths.values()) <= {"remote", "local"}, "a hand-off failed"
    assert "remote" in client.paths.values()
    await assert_idle(prefill, decode)
    for closing in (client.session, prefill, decode):
        await closing.close()
    for prompt, answer in zip(token_ids, answers, strict=True):
        assert_equal_tokens(folder, prompt, answer)
