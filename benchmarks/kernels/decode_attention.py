"""Decode attention on a GPU against torch SDPA on contiguous KV and FlashInfer.

python benchmarks/kernels/decode_attention.py
"""

import importlib.util
from collections.abc import Callable

import torch
from scenes import BLOCK_SIZE, HEAD_DIM, KV_HEADS, Q_HEADS, Scene, make_scene
from timing import print_environment, report, require_gpu
from torch.nn.functional import scaled_dot_product_attention

DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


def flashinfer_decode(scene: Scene) -> Callable[[], object]:
    """FlashInfer's planned paged decode on the same cache."""
    import flashinfer

    device = scene.query.device
    workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
    counts = torch.tensor([0] + [len(table) for table in scene.tables])
    blocks = torch.tensor([block for table in scene.tables for block in table])
    last = torch.tensor([(n - 1) % BLOCK_SIZE + 1 for n in scene.seq_lens])
    wrapper.plan(
        counts.cumsum(0).int().to(device),
        blocks.int().to(device),
        last.int().to(device),
        Q_HEADS,
        KV_HEADS,
        HEAD_DIM,
        BLOCK_SIZE,
        q_data_type=scene.query.dtype,
        kv_data_type=scene.kv.keys.dtype,
    )
    return lambda: wrapper.run(scene.query, (scene.kv.keys, scene.kv.values))


def main() -> None:
    """Time batches of 1, 8 and 32 at several contexts."""
    device = require_gpu()
    peak = print_environment()
    for name, dtype in DTYPES.items():
        if name == "fp8" and torch.cuda.get_device_capability() < (8, 9):
            print("fp8: left out, this GPU cannot convert it")
            continue
        for batch in (1, 8, 32):
            for context in (512, 2048, 4096):
                scene = make_scene([(context - 1, 1)] * batch, dtype, device, "decode")
                functions: dict[str, Callable[[], object]] = {"antiphon": scene.attend}
                if name == "bf16":
                    key, value = scene.contiguous()
                    query = scene.query.view(batch, KV_HEADS, -1, HEAD_DIM)
                    functions["sdpa"] = lambda q=query, k=key, v=value: (
                        scaled_dot_product_attention(q, k, v)
                    )
                    if importlib.util.find_spec("flashinfer"):
                        functions["flashinfer"] = flashinfer_decode(scene)
                label = f"{name}, batch {batch}, context {context}"
                report(label, functions, num_bytes=scene.num_kv_bytes, peak=peak)


if __name__ == "__main__":
    main()
