"""The engine on Triton kernels and static buffers against generate(): on a GPU or interpreted."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from engine_harness import EngineHarness, EngineShape
from tiny_models import oracle, tiny_model
from torch import Tensor

from antiphon.kernels.selection import select_kernels
from antiphon.kernels.triton_kernels import TritonKernels
from antiphon.kernels.tuning import tuning_for
from antiphon.workers.decode_graphs import cuda_graph_capture, graph_buckets
from antiphon.workers.paged_model import PagedModel

pytestmark = pytest.mark.interpreter
MAX_TOKENS = 5
PREFIX = [7, 9, 4, 8] * 8
PROMPTS = {"short": [5, 6, 7], "one": [PREFIX[0]], "long": [*PREFIX, 3], "alike": [*PREFIX, 5, 6]}


def rerun(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """In the place of a CUDA graph: runs the step on the same static tensors."""
    return step


def kernels_for(device: torch.device) -> TritonKernels:
    if device.type == "cuda":
        chosen = select_kernels(device, "colocated")
        assert isinstance(chosen, TritonKernels)
        return chosen
    # Prefixes are shared from two blocks on, which these prompts have.
    return TritonKernels(replace(tuning_for("sm_90", "colocated"), shared_prefix_min_tokens=32), 2)


@pytest.mark.parametrize(
    ("family", "graphs"),
    [("llama", False), ("llama", True), ("gemma2", True), ("gpt_oss", False)],
)
def test_matches_generate(family: str, graphs: bool, device: torch.device) -> None:
    model = tiny_model(family).to(device)
    expected = {name: oracle(model, prompt, MAX_TOKENS) for name, prompt in PROMPTS.items()}
    paged = PagedModel(model, kernels_for(device))
    with EngineHarness(paged, EngineShape(scatter=True)) as harness:
        if graphs:
            capture = cuda_graph_capture() if device.type == "cuda" else rerun
            harness.runner.capture_graphs((1, 4), capture)
        assert harness.generate(PROMPTS, MAX_TOKENS) == expected
        if graphs:
            assert harness.runner.graphs is not None
            assert harness.runner.graphs.num_replays > 0


def test_buckets_reach_the_largest_batch() -> None:
    assert graph_buckets(1) == (1,)
    assert graph_buckets(8) == (1, 2, 4, 8)
    assert graph_buckets(40) == (1, 2, 4, 8, 16, 32, 40)
