"""No batch makes the compiler run again: what Triton would compile is noted, and nothing is."""

from collections import Counter
from itertools import product
from typing import Any

import compiler
import pytest
import torch
from launches import BLOCK_SIZE, CPU, KV_HEADS, PLAIN, Q_HEADS, make_kv, make_wire
from targets import TARGETS
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from antiphon.kernels.kernel_set import AttentionShape
from antiphon.kernels.triton_kernels import TritonKernels
from antiphon.kernels.tuning import tuning_for

pytestmark = pytest.mark.compiler
PROMPT_TOKENS = 3


@pytest.fixture
def variants(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """Kernels that launches ask for, by name and by what is compiled in."""
    asked: set[tuple[str, str]] = set()

    def note(*, key: str, fn: Any, **_: Any) -> bool:
        asked.add((fn.name.strip("_").removesuffix("_kernel"), key))
        return True  # it is not compiled

    monkeypatch.setattr(JITFunction, "run", JITFunction.run)  # put back as it is now
    monkeypatch.setattr(driver, "_active", driver._active)
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", note)
    compiler.use_target(TARGETS["sm_90"])
    return asked


@pytest.fixture
def kernels() -> TritonKernels:
    chosen = TritonKernels(tuning_for("sm_90", "colocated"), 132)
    bf16 = torch.bfloat16
    chosen.prepare(AttentionShape(KV_HEADS, Q_HEADS // KV_HEADS, 128, bf16, bf16))
    return chosen


def test_any_mix_of_streams_and_prompts_runs_the_same_kernels(
    variants: set[tuple[str, str]], kernels: TritonKernels
) -> None:
    kv = make_kv(torch.bfloat16, 128)
    for num_decode, width, has_prompt in product((0, 1, 2, 16), (1, 2, 16), (False, True)):
        counts = [1] * num_decode + [PROMPT_TOKENS] * has_prompt
        if not counts:
            continue
        starts = [width * BLOCK_SIZE - count for count in counts]
        batch = kernels.make_batch([[0] * width] * len(counts), starts, counts, BLOCK_SIZE, CPU)
        query = torch.empty(sum(counts), Q_HEADS, 128, dtype=torch.bfloat16)
        kernels.paged_attention(query, kv, batch, PLAIN)
    assert Counter(name for name, _ in variants) == {
        "prefill_attention": 1,
        "decode_attention": 1,
        "shared_prefix_attention": 1,
        "merge_parts": 1,
    }


def test_segments_of_any_length_run_the_same_kernels(
    variants: set[tuple[str, str]], kernels: TritonKernels
) -> None:
    layers = [make_kv(torch.bfloat16, 128)] * 2
    for num_tokens in (1, 2, 16, 17):
        slots = torch.empty(num_tokens, dtype=torch.int64)
        wire = make_wire(torch.bfloat16, num_tokens, len(layers))
        kernels.gather_kv(layers, slots, wire)
        kernels.scatter_kv(layers, slots, wire)
    assert Counter(name for name, _ in variants) == {"copy_kv": 2}
