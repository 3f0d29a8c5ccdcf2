"""The CPU's decode attention over shared prefixes against definitions in float64."""

from dataclasses import replace

import pytest
import torch
from attention_case import AttentionCase, all_features

from antiphon.kernels import reference
from antiphon.kernels.attention_batch import AttentionFeatures, make_attention_batch

PLAIN = AttentionFeatures(0.125)
# By rising length: two that share 528 tokens, one of them with a block more, and two others.
REQUESTS = [(529, 1), (560, 1), (600, 1), (650, 1)]


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
    case = AttentionCase(REQUESTS, shared=528, num_alone=2, cache_dtype=cache_dtype)
    starts = [start for start, _ in REQUESTS]
    batch = make_attention_batch(case.tables, starts, [1] * 4, case.block_size, case.device)
    (prefix,) = batch.shared_prefixes
    assert (prefix.members, prefix.num_tokens) == ((0, 1), 528)
    actual = reference.decode_attention(case.query(0, 4), case.kv, batch, chosen)
    error = (actual.double() - case.expected(chosen, 0, 4)).abs().max()
    assert float(error) <= case.bound()


def test_the_prefix_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What every member reads for itself begins behind what they share."""
    case = AttentionCase(REQUESTS, shared=528)
    starts = [start for start, _ in REQUESTS]
    batch = make_attention_batch(case.tables, starts, [1] * 4, case.block_size, case.device)
    read: list[tuple[int, int]] = []
    reader = reference.ContextReader
    original = reader.read

    def counted(self: reference.ContextReader, index: int, start: int, end: int) -> object:
        read.append((start, end))
        return original(self, index, start, end)

    monkeypatch.setattr(reader, "read", counted)
    reference.decode_attention(case.query(0, 4), case.kv, batch, PLAIN)
    assert sorted(read) == [(0, 528), (528, 530), (528, 561), (528, 601), (528, 651)]
