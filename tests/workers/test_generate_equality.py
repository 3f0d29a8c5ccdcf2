"""Greedy output equals transformers' generate(), token for token, however the engine gets there."""

import random
from functools import cache
from typing import Any

import pytest
from engine_harness import EngineHarness, EngineShape
from tiny_models import FAMILIES, REFUSED, VOCAB_SIZE, oracle, tiny_model

from antiphon.errors import UnsupportedModelError
from antiphon.workers.paged_model import PagedModel
from antiphon.workers.scheduler import Scheduler

MAX_TOKENS = 10
SHAPES = {
    "roomy": EngineShape(),
    "chunks of 5, scattered": EngineShape(block_size=4, max_batch_tokens=5, scatter=True),
    "one token at a time": EngineShape(block_size=1, num_blocks=400, max_batch_tokens=1),
    "preempted": EngineShape(block_size=4, num_blocks=22, max_batch_tokens=16),
}


def prompts(seed: int = 0) -> dict[str, list[int]]:
    """Lengths below, on and above the edges of blocks, windows and chunks; two share a prefix."""
    rng = random.Random(seed)
    lengths = {"one": 1, "short": 3, "edge": 16, "window": 13, "long": 45}
    made = {name: rng.choices(range(3, VOCAB_SIZE), k=n) for name, n in lengths.items()}
    made["shared"] = made["long"][:32] + rng.choices(range(3, VOCAB_SIZE), k=7)
    return made


@cache
def expected(family: str) -> tuple[Any, dict[str, list[int]]]:
    model = tiny_model(family)
    return model, {name: oracle(model, p, MAX_TOKENS) for name, p in prompts().items()}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_family_matches_generate(family: str, shape: EngineShape) -> None:
    model, tokens = expected(family)
    with EngineHarness(PagedModel(model), shape) as harness:
        assert harness.generate(prompts(), MAX_TOKENS) == tokens
        again = {f"{name} again": prompt for name, prompt in prompts().items()}
        repeated = harness.generate(again, MAX_TOKENS)
        assert repeated == {f"{name} again": tokens[name] for name in tokens}
        if shape is SHAPES["roomy"]:
            assert harness.listener.cached["long again"] == 32, "the prefix cache was not used"
        if shape is SHAPES["preempted"]:
            harness.on_engine(_was_preempted)


def _was_preempted(scheduler: Scheduler) -> None:
    assert scheduler.num_preemptions > 0, "this shape is meant to run out of blocks"


@pytest.mark.parametrize("family", REFUSED)
def test_family_without_paged_attention_is_refused_by_name(family: str) -> None:
    with pytest.raises(UnsupportedModelError, match=family):
        PagedModel(tiny_model(family))
