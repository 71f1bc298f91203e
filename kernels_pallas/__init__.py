"""Products with packed weights: for each op one function, an XLA reference, and Pallas kernels for GPUs and TPUs.

`packed(apply)` runs a model on packed parameters by these.
"""

from kernels_pallas.block_sparse import block_sparse_matmul, sampled_matmul
from kernels_pallas.nn import packed

__all__ = ['block_sparse_matmul', 'packed', 'sampled_matmul']
