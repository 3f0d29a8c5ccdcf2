import pytest

from antiphon.messages import SamplingParams
from antiphon.workers.request_limits import RequestLimits

LIMITS = RequestLimits(max_context_tokens=10, vocab_size=100)


def test_what_fits_exactly_is_taken() -> None:
    assert LIMITS.explain_prompt([0, 99] * 5) is None
    sampling = SamplingParams(max_tokens=4, temperature=0, top_p=0, seed=-(2**63))
    assert LIMITS.explain_generation([0] * 6, sampling) is None


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [([1] * 11, "11 prompt tokens exceed"), ([100], "vocabulary of 100"), ([-1], "vocabulary")],
)
def test_a_prompt_that_would_break_a_step_is_explained(prompt: list[int], problem: str) -> None:
    assert problem in (LIMITS.explain_prompt(prompt) or "")


@pytest.mark.parametrize(
    ("sampling", "problem"),
    [
        (SamplingParams(0), "max_tokens >= 1"),
        (SamplingParams(10), "exceed this worker's context of 10"),
        (SamplingParams(1, temperature=-0.1), "temperature"),
        (SamplingParams(1, temperature=float("nan")), "temperature"),
        (SamplingParams(1, temperature=float("inf")), "temperature"),
        (SamplingParams(1, top_p=1.1), "top_p"),
        (SamplingParams(1, top_p=float("nan")), "top_p"),
        (SamplingParams(1, seed=2**63), "seed"),
    ],
)
def test_sampling_that_would_break_a_step_is_explained(
    sampling: SamplingParams, problem: str
) -> None:
    assert problem in (LIMITS.explain_generation([1], sampling) or "")
