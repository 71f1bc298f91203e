"""Multiplies by packed weights: each op is one function, with an XLA reference and Pallas kernels for GPUs and TPUs.

`packed(apply)` runs a model on packed parameters through these ops. `prepared(params, tokens=1)` puts each packed
parameter into the form that runs fastest on this device.

    y = block_sparse_matmul(x, packed_weight)                                        # x times one packed weight
    print(block_sparse_matmul(x, packed_weight, explain=True))                       # what each platform would run
    logits = packed(model.apply)({'params': packed_params}, x)                       # a whole model
"""

from kernels_pallas.active import active_matmul, active_outputs
from kernels_pallas.around import bytes_read, scaled_matmul, threshold_matmul, wrapped_matmul
from kernels_pallas.attention import block_sparse_attention
from kernels_pallas.block_sparse import block_sparse_matmul, sampled_matmul
from kernels_pallas.ell import ell_matmul
from kernels_pallas.models import packed
from kernels_pallas.n_m import nm_matmul
from kernels_pallas.preparing import prepared
from kernels_pallas.sparse24 import sparse24_matmul
from kernels_pallas.unstructured import unstructured_matmul

__all__ = [
    'active_matmul', 'active_outputs', 'block_sparse_attention', 'block_sparse_matmul', 'bytes_read', 'ell_matmul',
    'nm_matmul', 'packed', 'prepared', 'sampled_matmul', 'scaled_matmul', 'sparse24_matmul', 'threshold_matmul',
    'unstructured_matmul', 'wrapped_matmul',
]
