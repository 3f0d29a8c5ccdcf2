"""Each token goes to whom it was sampled for; only a first one is accounted for."""

import pytest

from antiphon.messages import SamplingParams
from antiphon.workers.batch import Batch, Chunk
from antiphon.workers.request import Request
from antiphon.workers.step_outputs import first_token_timings, step_outputs


def request(name: str, *output: int) -> Request:
    one = Request(name, [1, 2, 3, 4], SamplingParams(max_tokens=2), num_cached_tokens=2)
    one.output_token_ids += output
    one.timeline.submitted_at = 1.0
    return one


def test_tokens_skip_chunks_that_do_not_sample() -> None:
    goes_on, prompt, begins = request("a", 7), request("b"), request("c")
    chunks = (Chunk(goes_on, 4, 1, True), Chunk(prompt, 0, 2, False), Chunk(begins, 0, 4, True))
    batch = Batch(chunks)
    timings = first_token_timings(batch, 2.0, 2.5)
    assert timings.keys() == {"c"}
    assert (timings["c"].prefill_path, timings["c"].total) == ("local", 1.5)
    for one, token_id in ((goes_on, 8), (begins, 9)):
        one.output_token_ids.append(token_id)
    first, second = step_outputs(batch, [8, 9], timings)
    assert (first.request_id, first.token_ids, first.finish_reason) == ("a", [8], "length")
    assert (second.request_id, second.token_ids, second.finish_reason) == ("c", [9], None)
    assert (first.timing, second.timing) == (None, timings["c"])
    assert second.num_cached_tokens == 2


def test_a_token_that_nobody_sampled_is_an_error() -> None:
    batch = Batch((Chunk(request("a"), 0, 2, False),))
    assert step_outputs(batch, [], {}) == []
    with pytest.raises(ValueError, match="zip"):
        step_outputs(batch, [5], {})
