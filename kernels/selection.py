"""The one place that picks the kernels a worker runs."""

import torch

from antiphon.kernels.kernel_set import KernelSet
from antiphon.kernels.torch_kernels import TorchKernels
from antiphon.kernels.tuning import Role


def select_kernels(device: torch.device, role: Role) -> KernelSet:
    """Choose by device and pool.

    Raises:
        ConfigError: A GPU that no configuration was compiled and checked for.
    """
    if device.type == "cpu":
        return TorchKernels()
    # Triton is absent where there is no GPU to run it (macOS), and costs a second to import.
    from antiphon.kernels.triton_kernels import make_triton_kernels

    return make_triton_kernels(device, role)
