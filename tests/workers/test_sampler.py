from collections import Counter
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from antiphon.messages import SamplingParams
from antiphon.workers import sampler
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


MIXED = [
    SamplingParams(1, temperature=0),
    SamplingParams(1),
    SamplingParams(1, temperature=0.3),
    SamplingParams(1, top_p=0.6),
    SamplingParams(1, top_p=0.999, temperature=4.0),  # wider than the candidates
    SamplingParams(1, top_p=0.9, temperature=1.7),
    SamplingParams(1, top_k=40),
    SamplingParams(1, top_k=40, top_p=0.5),
]


def rows_of_mixed(num_rows: int, vocab_size: int) -> tuple[torch.Tensor, list[SamplingParams]]:
    """Logits and parameters, each row with a seed of its own."""
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(num_rows, vocab_size, generator=generator)
    params = [replace(MIXED[row % len(MIXED)], seed=row) for row in range(num_rows)]
    return logits, params


def draw_by_definition(logits: torch.Tensor, params: SamplingParams, u: float) -> int:
    """One row, as the module says it, in ops on vectors."""
    if params.temperature == 0:
        return int(logits.argmax())
    scores, token_ids = logits / params.temperature, torch.arange(len(logits))
    if params.top_k:
        scores, token_ids = scores.topk(params.top_k)
    probs = scores.softmax(0)
    if params.top_p < 1:
        if not params.top_k:
            probs, token_ids = probs.sort(descending=True)
        keep = max(1, int((probs.cumsum(0) - probs < params.top_p).sum()))
        probs, token_ids = probs[:keep], token_ids[:keep]
    cumulative = probs.double().cumsum(0)
    index = int(torch.searchsorted(cumulative, u * cumulative[-1], right=True))
    return int(token_ids[min(index, len(probs) - 1)])


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows that are truncated alike are drawn at once."""
    monkeypatch.setattr(sampler, "_pieces", lambda alike, _: alike.items())


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("vocab_size", [50, 3000, 49_152])
def test_rows_are_drawn_together_as_each_alone(
    vocab_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: what is drawn from is compared, too."""
    drawn_from: list[bytes] = []
    search = torch.searchsorted

    def note(cumulative: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        drawn_from.extend(row.numpy().tobytes() for row in cumulative)
        return search(cumulative, *args, **options)

    logits, params = rows_of_mixed(24, vocab_size)
    defined = [
        draw_by_definition(row, one, uniform(one.seed, 9))
        for row, one in zip(logits, params, strict=True)
    ]
    monkeypatch.setattr(torch, "searchsorted", note)
    assert sample(logits, params, [9] * 24) == defined
    together, drawn_from = sorted(drawn_from), []
    for row, one, token in zip(logits, params, defined, strict=True):
        assert sample(row[None], [one], [9]) == [token]
    assert sorted(drawn_from) == together


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_device_is_waited_for_as_often_however_many_rows_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_waits = 0

    def counted(owner: Any, name: str) -> None:
        method = getattr(owner, name)

        def count(*args: Any, **options: Any) -> Any:
            nonlocal num_waits
            num_waits += 1
            return method(*args, **options)

        monkeypatch.setattr(owner, name, count)

    for name in ("tolist", "item", "nonzero", "__int__", "__float__", "__bool__", "__index__"):
        counted(torch.Tensor, name)
    counted(torch, "tensor")  # copies to the device
    waits = []
    for num_rows in (8, 64):
        logits, params = rows_of_mixed(num_rows, 3000)
        num_waits = 0
        sample(logits, params, range(num_rows))
        waits.append(num_waits)
    assert waits[0] == waits[1] <= 8


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
