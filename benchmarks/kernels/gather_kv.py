"""Cache to wire on a GPU against torch's index_select, layer by layer.

python benchmarks/kernels/gather_kv.py
"""

from wire_timing import time_copies

from antiphon.kernels import reference
from antiphon.kernels.gather_kv import gather_kv

if __name__ == "__main__":
    time_copies(gather_kv, reference.gather_kv)
