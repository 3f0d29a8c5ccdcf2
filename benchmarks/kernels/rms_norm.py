"""RMSNorm, alone and with the residual, on a GPU against torch.

python benchmarks/kernels/rms_norm.py
"""

import torch
from timing import print_environment, report, require_gpu

from antiphon.kernels import reference
from antiphon.kernels.rms_norm import add_rms_norm, rms_norm


def main() -> None:
    """Time hidden states of 4,096 for a decode step and a prompt."""
    device = require_gpu()
    peak = print_environment()
    weight = torch.randn(4096, dtype=torch.bfloat16, device=device)
    for tokens in (32, 4096):
        x, residual = (
            torch.randn(tokens, 4096, dtype=torch.bfloat16, device=device) for _ in range(2)
        )
        functions = {
            "antiphon": lambda x=x: rms_norm(x, weight, 1e-5),
            "torch": lambda x=x: reference.rms_norm(x, weight, 1e-5),
        }
        report(f"{tokens} tokens", functions, num_bytes=2 * x.nbytes, peak=peak)
        functions = {
            "antiphon": lambda x=x, r=residual: add_rms_norm(x, r, weight, 1e-5),
            "torch": lambda x=x, r=residual: reference.add_rms_norm(x, r, weight, 1e-5),
        }
        report(f"{tokens} tokens, added", functions, num_bytes=4 * x.nbytes, peak=peak)


if __name__ == "__main__":
    main()
