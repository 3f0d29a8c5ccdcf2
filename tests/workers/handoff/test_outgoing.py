"""When a transfer has something to send, and how much."""

from antiphon.workers.handoff.outgoing import Cut, Outgoing, next_message
from antiphon.workers.handoff.segment import Kind

CUT = Cut(max_tokens=6, min_tokens=10, block_size=4)


def _spans(transfer: Outgoing, cut: Cut = CUT) -> list[tuple[int, int]]:
    spans = []
    while (message := next_message([transfer], cut)) is not None and message.kind is Kind.DATA:
        spans.append(message.span)
    return spans


def test_what_has_come_together_goes_whole_in_segments_that_end_with_blocks():
    transfer = Outgoing("t", 1, 1)
    transfer.num_pushed = 10
    assert _spans(transfer) == []
    transfer.num_pushed = 15
    assert _spans(transfer) == [(1, 4), (4, 8), (8, 12), (12, 15)]


def test_blocks_that_fit_into_no_segment_are_cut_anywhere_rather_than_into_many():
    transfer = Outgoing("t", 0, 40, finished_at=1.0)
    assert _spans(transfer, Cut(15, 1, 16)) == [(0, 15), (15, 30), (30, 40)]


def test_the_next_tokens_wait_until_enough_have_come_together_again():
    transfer = Outgoing("t", 0, 12)
    assert _spans(transfer) == [(0, 4), (4, 8), (8, 12)]
    transfer.num_pushed = 21
    assert _spans(transfer) == []
    transfer.num_pushed = 22
    assert _spans(transfer) == [(12, 16), (16, 22)]


def test_the_end_of_the_prompt_clears_the_rest():
    transfer = Outgoing("t", 0, 3, finished_at=1.0)
    assert _spans(transfer) == [(0, 3)]
    assert transfer.is_ending


def test_what_is_cleared_is_not_sent_after_an_abort():
    transfer = Outgoing("t", 0, 12)
    assert next_message([transfer], CUT) is not None
    transfer.abort_reason = "the client left"
    message = next_message([transfer], CUT)
    assert message is not None
    assert (message.kind, message.span) == (Kind.ABORT, (4, 4))
    assert next_message([transfer], CUT) is None
