"""Prompts for the real model, and what transformers' generate() answers."""

import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

MAX_TOKENS = 8
_NEAR_TIE = 1e-3  # logits this close may be ordered either way by fp32 rounding
_TEXTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "1, 2, 3, 4, 5,",
    "12345 + 67890 =",
    "Once upon a time",
    "¿Qué hora es en",
    "日本の首都は",
    "    indented\n\ttabbed\n\n\n",
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "SELECT name FROM users WHERE",
    "🙂🙃 emoji are",
    "To be, or not to be, that is",
]


def prompts() -> list[str]:
    """32 varied prompts of 2 to about 300 tokens; some share long prefixes."""
    rng = random.Random(0)
    words = " ".join(_TEXTS).split()
    made = list(_TEXTS)
    for length in (5, 10, 20, 40, 63, 64, 65, 80, 100, 120, 150, 200):
        made.append(" ".join(rng.choices(words, k=length)))
    shared = made[-1]
    made += [f"{shared} {ending}" for ending in ("and then", "because", "but 7", "\n\nQ:")]
    made += [" ".join(rng.choices(words, k=length)) for length in (8, 30, 55, 90)]
    return made


@cache
def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()


@cache
def oracle(folder: Path, prompt_token_ids: tuple[int, ...]) -> list[int]:
    """Greedy continuation by generate(), up to and including an end-of-sequence token."""
    with torch.inference_mode():
        output = load(folder).generate(
            torch.tensor([prompt_token_ids]),
            attention_mask=torch.ones(1, len(prompt_token_ids), dtype=torch.int64),
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
    return output[0, len(prompt_token_ids) :].tolist()


def assert_equal_tokens(folder: Path, prompt: list[int], actual: list[int]) -> None:
    """Equal token for token; where they part, the two logits must be a near-tie of fp32.

    After a near-tie the continuations differ legitimately; anything else is a failure.
    """
    expected = oracle(folder, tuple(prompt))
    if actual == expected:
        return
    pairs = zip(expected, actual, strict=False)
    index = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    assert index is not None, f"length {len(actual)}, expected {len(expected)}"
    with torch.inference_mode():
        logits = load(folder)(torch.tensor([prompt + expected[:index]])).logits[0, -1]
    gap = float(logits[expected[index]] - logits[actual[index]])
    assert gap < _NEAR_TIE, f"token {index}: logits differ by {gap}; {actual} is not {expected}"
