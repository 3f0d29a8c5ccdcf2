"""Prefill attention on a GPU against torch SDPA, flex_attention and FlashInfer.

python benchmarks/kernels/prefill_attention.py
"""

import importlib.util
from collections.abc import Callable

import torch
from scenes import HEAD_DIM, KV_HEADS, Q_HEADS, make_scene
from timing import print_environment, report, require_gpu
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention


def main() -> None:
    """Time one prompt of several lengths, bf16."""
    device = require_gpu()
    peak = print_environment()
    flex = torch.compile(flex_attention)
    for tokens in (512, 2048, 4096, 8192):
        scene = make_scene([(0, tokens)], torch.bfloat16, device, "prefill")
        query = scene.query.transpose(0, 1)[None]
        key, value = scene.contiguous()
        mask = create_block_mask(
            lambda b, h, q, k: q >= k, None, None, tokens, tokens, device=device
        )
        functions: dict[str, Callable[[], object]] = {
            "antiphon": scene.attend,
            "sdpa": lambda q=query, k=key, v=value: scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            ),
            "flex": lambda q=query, k=key, v=value, m=mask: flex(
                q, k, v, block_mask=m, enable_gqa=True
            ),
        }
        if importlib.util.find_spec("flashinfer"):
            import flashinfer

            packed = scene.query, key[0].transpose(0, 1), value[0].transpose(0, 1)
            functions["flashinfer"] = lambda p=packed: flashinfer.single_prefill_with_kv_cache(
                *p, causal=True
            )
        flops = 2 * tokens * (tokens + 1) * HEAD_DIM * Q_HEADS
        label = f"{tokens} tokens, {Q_HEADS}/{KV_HEADS} heads of {HEAD_DIM}"
        report(label, functions, num_flops=flops, peak=peak)


if __name__ == "__main__":
    main()
