"""The CPU's decode attention over shared prefixes against definitions in float64."""

from dataclasses import replace

import pytest
import torch
from attention_case import AttentionCase, all_features

from antiphon.kernels import reference
from antiphon.kernels.attention_batch import AttentionFeatures, make_attention_batch

PLAIN = AttentionFeatures(0.125)
# By rising length: nine that share 528 tokens, enough to be worth it, and one that does not.
REQUESTS = [(start, 1) for start in (528, 529, 543, 544, 545, 560, 600, 601, 620, 650)]


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize(
    "features", ["plain", "sinks and soft cap", "windows are read alone"], ids=str
)
def test_equals_the_definition(features: str, cache_dtype: torch.dtype) -> None:
    everything = all_features(4, torch.device("cpu"), window=300)
    chosen = {
        "plain": PLAIN,
        "sinks and soft cap": replace(everything, sliding_window=None, chunk=None),
        "windows are read alone": everything,
    }[features]
    case = AttentionCase(REQUESTS, shared=528, num_alone=1, cache_dtype=cache_dtype)
    starts = [start for start, _ in REQUESTS]
    batch = make_attention_batch(case.tables, starts, [1] * 10, case.block_size, case.device)
    (prefix,) = batch.shared_prefixes
    assert (prefix.members, prefix.num_tokens) == (tuple(range(9)), 528)
    actual = reference.decode_attention(case.query(0, 10), case.kv, batch, chosen)
    error = (actual.double() - case.expected(chosen, 0, 10)).abs().max()
    assert float(error) <= case.bound()


def test_the_prefix_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What every member reads for itself begins behind what they share."""
    case = AttentionCase(REQUESTS, shared=528)
    starts = [start for start, _ in REQUESTS]
    batch = make_attention_batch(case.tables, starts, [1] * 10, case.block_size, case.device)
    read: list[tuple[int, int]] = []
    reader = reference.ContextReader
    original = reader.read

    def counted(self: reference.ContextReader, index: int, start: int, end: int) -> object:
        read.append((start, end))
        return original(self, index, start, end)

    monkeypatch.setattr(reader, "read", counted)
    reference.decode_attention(case.query(0, 10), case.kv, batch, PLAIN)
    own = [(528, start + 1) for start, _ in REQUESTS]
    assert sorted(read) == [(0, 528), *own]


def test_little_is_not_shared() -> None:
    """Three requests that save reading 1,056 tokens."""
    case = AttentionCase(REQUESTS[:3], shared=528)
    starts = [start for start, _ in REQUESTS[:3]]
    batch = make_attention_batch(case.tables, starts, [1] * 3, case.block_size, case.device)
    assert not batch.shared_prefixes
