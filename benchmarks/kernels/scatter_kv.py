"""Wire to cache on a GPU against torch's index_copy, layer by layer.

python benchmarks/kernels/scatter_kv.py
"""

from wire_timing import time_copies

from antiphon.kernels import reference
from antiphon.kernels.scatter_kv import scatter_kv

if __name__ == "__main__":
    time_copies(scatter_kv, reference.scatter_kv)
