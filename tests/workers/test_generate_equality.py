"""Greedy output equals transformers' generate(), token for token, however the engine gets there."""

import random
import threading
from functools import cache
from typing import Any

import pytest
import torch
from engine_harness import WAIT_SECONDS, EngineHarness, EngineShape, check_idle
from tiny_models import FAMILIES, REFUSED, VOCAB_SIZE, oracle, tiny_model

from antiphon.errors import UnsupportedModelError
from antiphon.kernels.torch_kernels import TorchKernels
from antiphon.messages import SamplingParams
from antiphon.workers.paged_model import PagedModel
from antiphon.workers.request import Request
from antiphon.workers.scheduler import Scheduler

MAX_TOKENS = 10
SHAPES = {
    "roomy": EngineShape(),
    "chunks of 5, scattered": EngineShape(block_size=4, max_batch_tokens=5, scatter=True),
    "one token at a time": EngineShape(block_size=1, num_blocks=400, max_batch_tokens=1),
    "preempted": EngineShape(block_size=4, num_blocks=16, max_batch_tokens=16),
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
    with EngineHarness(PagedModel(model, TorchKernels()), shape) as harness:
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
        PagedModel(tiny_model(family), TorchKernels())


def test_state_that_a_family_does_not_tell_of_shows_in_its_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("falcon_h1")
    monkeypatch.setattr(type(model), "_is_stateful", False)
    with pytest.raises(UnsupportedModelError, match=r"'falcon_h1' .* in two steps"):
        PagedModel(model, TorchKernels())


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("phimoe", {"sliding_window": None}),
        ("phimoe", {"sliding_window": 512}),  # as long as the context
        ("qwen2_moe", {"use_sliding_window": False}),
    ],
)
def test_a_window_that_hides_nothing_is_no_reason_to_refuse(
    family: str, changes: dict[str, Any]
) -> None:
    assert PagedModel(tiny_model(family, **changes), TorchKernels()).max_context_tokens == 512


def test_a_step_that_nobody_waits_for_ends_between_layers() -> None:
    """And what it left half computed is never taken for a cached prefix."""
    model, tokens = expected("llama")
    started, may_go_on = threading.Event(), threading.Event()
    num_layers: list[int] = []
    paged = PagedModel(model, TorchKernels())
    with EngineHarness(paged, EngineShape()) as harness:

        def hold(module: torch.nn.Module, inputs: object) -> None:
            num_layers.append(1)
            if len(num_layers) == 1:
                started.set()
                assert may_go_on.wait(WAIT_SECONDS)

        hooks = [layer.register_forward_pre_hook(hold) for layer in model.model.layers]
        sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=0)
        harness.engine.add(Request("left", prompts()["long"], sampling))
        assert started.wait(WAIT_SECONDS)
        harness.engine.abort("left")
        may_go_on.set()
        harness.on_engine(check_idle)
        assert len(num_layers) == 1, "the other layers were computed for nobody"
        for hook in hooks:
            hook.remove()
        assert harness.generate({"long": prompts()["long"]}, MAX_TOKENS) == {"long": tokens["long"]}
        assert harness.engine.stats.step_failures == 0
