"""Hashes that chain, and are the same everywhere."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from antiphon.block_hash import hash_blocks

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)
BLOCK_SIZES = st.integers(1, 9)


@given(TOKENS, BLOCK_SIZES)
def test_only_full_blocks_have_hashes(tokens, block_size):
    hashes = hash_blocks(tokens, block_size)
    assert len(hashes) == len(tokens) // block_size
    assert all(len(block_hash) == 16 for block_hash in hashes)


@given(TOKENS, TOKENS, BLOCK_SIZES)
def test_equal_hashes_are_equal_prefixes(left, right, block_size):
    pairs = zip(hash_blocks(left, block_size), hash_blocks(right, block_size), strict=False)
    for index, (one, other) in enumerate(pairs, start=1):
        end = index * block_size
        assert (one == other) == (left[:end] == right[:end])


@given(TOKENS, BLOCK_SIZES, st.integers(0, 8))
def test_a_chain_goes_on_from_its_last_hash(tokens, block_size, num_blocks):
    hashes = hash_blocks(tokens, block_size)
    cut = min(num_blocks, len(hashes))
    parent = hashes[cut - 1] if cut else b""
    assert hashes[:cut] + hash_blocks(tokens[cut * block_size :], block_size, parent) == hashes


@given(st.lists(st.integers(0, 9), min_size=8, max_size=20))
def test_a_changed_token_changes_its_block_and_all_after_it(tokens):
    before = hash_blocks(tokens, 4)
    changed = [*tokens[:5], tokens[5] + 1, *tokens[6:]]
    after = hash_blocks(changed, 4)
    assert after[0] == before[0]
    assert not set(after[1:]) & set(before[1:])


def test_block_size_and_salt_separate_chains():
    tokens = list(range(8))
    assert not set(hash_blocks(tokens, 4)) & set(hash_blocks(tokens, 2))
    assert not set(hash_blocks(tokens, 4, b"a")) & set(hash_blocks(tokens, 4, b"b"))


def test_hashes_are_the_same_in_every_process_and_release():
    # Prefill, decode and ingress compare them; a change makes every cached prefix a miss.
    first, second = hash_blocks([1, 2, 3, 4], 2)
    assert (first.hex(), second.hex()) == (
        "2cc5e4d47c5f3c5fbe635a5a5b7bb392",
        "66ca1890a7b0edaee5b40586c64fbba2",
    )


@pytest.mark.parametrize("token", [-1, 2**32])
def test_what_is_no_token_id_is_refused(token):
    with pytest.raises(OverflowError):
        hash_blocks([token], 1)
