from collections import Counter

import pytest
import torch

from antiphon.messages import SamplingParams
from antiphon.workers.sampler import sample, uniform

LOGITS = torch.tensor([0.1, 2.0, 1.0, -1.0, 1.5])


def draw(params: SamplingParams, position: int, logits: torch.Tensor = LOGITS) -> int:
    return sample(logits[None], [params], [position])[0]


def test_greedy_takes_the_largest() -> None:
    assert draw(SamplingParams(1, temperature=0), 0) == 1


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(1),
        SamplingParams(1, temperature=0.5),
        SamplingParams(1, top_k=3),
        SamplingParams(1, top_p=0.7),
        SamplingParams(1, top_k=4, top_p=0.8, temperature=1.3),
    ],
    ids=str,
)
def test_frequencies_follow_the_truncated_distribution(params: SamplingParams) -> None:
    num_draws = 3_000
    rows = LOGITS.expand(num_draws, -1)
    counts = Counter(sample(rows, [params] * num_draws, range(num_draws)))
    expected = expected_probs(params)
    for token, prob in enumerate(expected):
        assert counts[token] / num_draws == pytest.approx(prob, abs=0.04)
        assert prob > 0 or counts[token] == 0, "a truncated token was drawn"


def expected_probs(params: SamplingParams) -> list[float]:
    """Straight from the definitions: temperature, top-k, then the smallest set reaching top-p."""
    probs = (LOGITS / params.temperature).softmax(0).tolist()
    order = sorted(range(len(probs)), key=lambda i: -probs[i])
    if params.top_k:
        order = order[: params.top_k]
    total = sum(probs[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if mass >= params.top_p:
            break
        kept.append(i)
        mass += probs[i] / total
    return [probs[i] / sum(probs[k] for k in kept) if i in kept else 0.0 for i in range(len(probs))]


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    params = [SamplingParams(1, seed=seed) for seed in range(8)]
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    together = sample(logits, params, [5] * 8)
    alone = [draw(p, 5, row) for p, row in zip(params, logits, strict=True)]
    assert together == alone
    assert sample(logits, params, [6] * 8) != together


def test_nucleus_wider_than_the_candidates_is_complete() -> None:
    logits = torch.zeros(5000)
    tokens = {draw(SamplingParams(1, top_p=0.99, seed=s), 0, logits) for s in range(400)}
    assert max(tokens) > 2000


def test_uniform_is_uniform_and_pinned() -> None:
    values = [uniform(seed, position) for seed in range(50) for position in range(50)]
    assert min(values) >= 0
    assert max(values) < 1
    assert sum(values) / len(values) == pytest.approx(0.5, abs=0.02)
    assert uniform(1, 2) == 0.6434025071674214  # a change would change every seeded output


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-38, 1e-6])
@pytest.mark.parametrize("more", [{}, {"top_p": 0.9}, {"top_k": 3, "top_p": 1e-9}])
def test_the_lowest_temperatures_are_greedy(temperature: float, more: dict[str, float]) -> None:
    params = SamplingParams(1, temperature=temperature, **more)
    for scale in (1.0, 1e4):
        assert {draw(params, position, LOGITS * scale) for position in range(20)} == {1}


def test_a_masked_token_is_never_drawn() -> None:
    logits = torch.tensor([0.0, float("-inf"), 0.0, float("-inf")])
    drawn = {draw(SamplingParams(1, temperature=2.0, top_p=0.99), i, logits) for i in range(200)}
    assert drawn == {0, 2}
