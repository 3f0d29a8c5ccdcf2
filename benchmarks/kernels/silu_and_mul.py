"""The gate of an MLP on a GPU against torch.

python benchmarks/kernels/silu_and_mul.py
"""

import torch
from timing import print_environment, report, require_gpu

from antiphon.kernels import reference
from antiphon.kernels.silu_and_mul import silu_and_mul


def main() -> None:
    """Time an intermediate size of 14,336 for a decode step and a prompt."""
    device = require_gpu()
    peak = print_environment()
    for tokens in (32, 4096):
        x = torch.randn(tokens, 2 * 14336, dtype=torch.bfloat16, device=device)
        functions = {
            "antiphon": lambda x=x: silu_and_mul(x),
            "torch": lambda x=x: reference.silu_and_mul(x),
        }
        report(f"{tokens} tokens", functions, num_bytes=1.5 * x.nbytes, peak=peak)


if __name__ == "__main__":
    main()
