import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.deployment.text_stream import StopStrings, TextStream


class Characters:
    """One token per code point; holds back ``held`` until the next push, as UTF-8 pieces do."""

    def __init__(self, held: str = "") -> None:
        self._held = held
        self._kept = ""

    def push(self, token_ids):
        text = self._kept + "".join(map(chr, token_ids))
        cut = len(text) - 1 if self._held and text.endswith(self._held) else len(text)
        self._kept = text[cut:]
        return text[:cut]

    def flush(self):
        kept, self._kept = self._kept, ""
        return kept


def tokens(text):
    return [ord(char) for char in text]


def cut_by_search(text, stops):
    """The definition: the earliest end, there the longest stop string."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)], True
    return text, False


def chunked(text, cuts):
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(bounds)]


few_letters = st.text("abc", max_size=30)


@settings(deadline=None)
@given(
    few_letters,
    st.lists(st.text("abc", min_size=1, max_size=6), min_size=1, max_size=4),
    st.lists(st.integers(0, 30), max_size=10),
)
def test_any_chunking_gives_what_a_search_in_the_whole_text_gives(text, stops, cuts):
    holder = StopStrings(stops)
    shown = ""
    seen = ""
    for chunk in chunked(text, cuts):
        seen += chunk
        shown += holder.push(chunk)
        assert cut_by_search(seen, stops)[0].startswith(shown)
        if not holder.is_hit:  # and it holds back no more than it must
            held = seen[len(shown) :]
            assert held == "" or any(stop.startswith(held) for stop in stops)
    shown += holder.flush()
    assert (shown, holder.is_hit) == cut_by_search(text, stops)
    assert not any(stop in shown for stop in stops)


@settings(deadline=None)
@given(
    few_letters.filter(bool),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=4),
    st.lists(st.integers(0, 30), max_size=10),
)
def test_a_stream_counts_tokens_up_to_the_one_that_completes_a_stop(text, stops, cuts):
    stream = TextStream(Characters(), stops, eos_token_ids=())
    chunks = chunked(text, cuts)
    shown = "".join(
        stream.push(tokens(chunk), "length" if i == len(chunks) - 1 else None)
        for i, chunk in enumerate(chunks)
    )
    expected, is_hit = cut_by_search(text, stops)
    assert shown == expected
    assert stream.finish_reason == ("stop" if is_hit else "length")
    ends = [end for end in range(len(text) + 1) if cut_by_search(text[:end], stops)[1]]
    assert stream.num_tokens == (ends[0] if ends else len(text))


def test_text_that_cannot_become_a_stop_is_not_held():
    holder = StopStrings(["END"])
    assert holder.push("the E") == "the "
    assert holder.push("N") == ""
    assert holder.push("TRY") == "ENTRY"


def test_nothing_is_held_without_stop_strings():
    stream = TextStream(Characters(), [], eos_token_ids=())
    assert stream.push(tokens("E"), None) == "E"


def test_what_was_held_comes_out_at_the_end():
    stream = TextStream(Characters(), ["END"], eos_token_ids=())
    assert stream.push(tokens("EN"), None) == ""
    assert stream.push(tokens("x")[:0], "length") == "EN"
    assert stream.finish_reason == "length"


def test_the_end_of_sequence_token_is_counted_but_never_shown():
    stream = TextStream(Characters(), [], eos_token_ids=(ord("$"),))
    assert stream.push(tokens("a$b$"), "stop") == "a$b"
    assert stream.num_tokens == 4


def test_a_stop_string_in_what_the_detokenizer_held_back_counts():
    stream = TextStream(Characters(held="d"), ["end"], eos_token_ids=())
    assert stream.push(tokens("the end"), "length") == "the "
    assert stream.finish_reason == "stop"


def test_nothing_comes_after_a_stop():
    stream = TextStream(Characters(), ["b"], eos_token_ids=())
    assert stream.push(tokens("abc"), None) == "a"
    assert stream.push(tokens("d"), "length") == ""
    assert (stream.finish_reason, stream.num_tokens) == ("stop", 2)


@pytest.mark.timeout(20)
def test_long_repetitive_stop_strings_cost_linear_time():
    holder = StopStrings(["a" * 50_000 + "b"])
    text = "a" * 49_999 + "c"
    assert "".join(holder.push(text[i : i + 4]) for i in range(0, len(text), 4)) == text
