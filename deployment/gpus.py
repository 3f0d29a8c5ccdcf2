"""Data sheets of the GPUs that ``antiphon plan`` knows.

Memory is the data sheet's in units of 10^9 bytes; bandwidth and rates are peaks. 16-bit rates are
dense, with tensor cores (data sheets that state them with sparsity are halved); 32-bit rates are
those without tensor cores, because float32 stays float32 here.

    A100-80  NVIDIA A100 Tensor Core GPU data sheet, SXM 80 GB
    H100     NVIDIA H100 Tensor Core GPU data sheet, SXM
    H200     NVIDIA H200 Tensor Core GPU data sheet, SXM
    B200     NVIDIA HGX B200 data sheet, an eighth of the board
    MI300X   AMD Instinct MI300X data sheet
    L40S     NVIDIA L40S data sheet
"""

from dataclasses import dataclass

from antiphon.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Gpu:
    """One product.

    Attributes:
        name: For the command line.
        source: Whose data sheet, and which form.
        architecture: As in the table of tuned kernels; a worker refuses one that is not there.
        memory_bytes: Of the device.
        bytes_per_second: Peak of its memory.
        flops_16_bit: Peak in bfloat16 and float16.
        flops_32_bit: Peak in float32.
    """

    name: str
    source: str
    architecture: str
    memory_bytes: float
    bytes_per_second: float
    flops_16_bit: float
    flops_32_bit: float

    @property
    def is_served(self) -> bool:
        """Whether workers of this version run on it."""
        return self.architecture in TUNED


TUNED = frozenset({"sm_80", "sm_90", "sm_100", "gfx942"})
_TABLE = (
    Gpu("A100-80", "NVIDIA A100 SXM 80 GB", "sm_80", 80e9, 2.039e12, 312e12, 19.5e12),
    Gpu("H100", "NVIDIA H100 SXM", "sm_90", 80e9, 3.35e12, 989e12, 67e12),
    Gpu("H200", "NVIDIA H200 SXM", "sm_90", 141e9, 4.8e12, 989e12, 67e12),
    Gpu("B200", "NVIDIA HGX B200", "sm_100", 180e9, 8.0e12, 2250e12, 75e12),
    Gpu("MI300X", "AMD Instinct MI300X", "gfx942", 192e9, 5.3e12, 1307e12, 163.4e12),
    Gpu("L40S", "NVIDIA L40S", "sm_89", 48e9, 0.864e12, 362e12, 91.6e12),
)
GPUS = {gpu.name: gpu for gpu in _TABLE}


def find_gpu(name: str) -> Gpu:
    """Look up a GPU, whatever the case of its name.

    Raises:
        ConfigError: Names those that are known.
    """
    for gpu in _TABLE:
        if gpu.name.lower() == name.lower():
            return gpu
    raise ConfigError(f"--gpu: got {name!r}; known are {', '.join(GPUS)}")
