"""A decode step whose requests share a prefix, on a GPU, against one that reads it for each.

python benchmarks/kernels/shared_prefix_attention.py
"""

import torch
from scenes import make_scene, without_sharing
from timing import print_environment, report, require_gpu


def main() -> None:
    """Time 32 requests with common prefixes of several lengths and 128 tokens of their own."""
    device = require_gpu()
    print_environment()
    for shared in (512, 2048, 8192):
        requests = [(shared + 127, 1)] * 32
        scene = make_scene(requests, torch.bfloat16, device, "decode", shared_tokens=shared)
        functions = {"shared": scene.attend, "each alone": without_sharing(scene).attend}
        report(f"prefix {shared}, 32 requests", functions, num_bytes=scene.num_kv_bytes)


if __name__ == "__main__":
    main()
