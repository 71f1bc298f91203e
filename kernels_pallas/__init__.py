"""Products with packed weights: for each op one function, an XLA reference, and Pallas kernels for GPUs and TPUs."""

from kernels_pallas.block_sparse import block_sparse_matmul, sampled_matmul

__all__ = ['block_sparse_matmul', 'sampled_matmul']
