"""Multiplies by packed weights: each op is one function, with an XLA reference and Pallas kernels for GPUs and TPUs.

`packed(apply)` runs a model on packed parameters through these ops. `prepared(params, tokens=1)` puts each packed
parameter into the form that runs fastest on this device. `sparse_attention(apply, builder)` runs a model with sparse
attention.

    y = block_sparse_matmul(x, packed_weight)                                        # x times one packed weight
    print(block_sparse_matmul(x, packed_weight, explain=True))                       # what each platform would run
    logits = packed(model.apply)({'params': packed_params}, x)                       # a whole model
"""

from kernels_pallas.active import active_matmul
from kernels_pallas.around import scaled_matmul, wrapped_matmul
from kernels_pallas.attending import once, sparse_attention
from kernels_pallas.attention import block_sparse_attention
from kernels_pallas.block_sparse import block_sparse_matmul, sampled_matmul
from kernels_pallas.decoding import decoder
from kernels_pallas.ell import ell_matmul
from kernels_pallas.gathered import gathered_attention
from kernels_pallas.models import packed
from kernels_pallas.n_m import nm_matmul
from kernels_pallas.preparing import prepared
from kernels_pallas.sparse24 import sparse24_matmul
from kernels_pallas.unstructured import unstructured_matmul

__all__ = [
    'active_matmul', 'block_sparse_attention', 'block_sparse_matmul', 'decoder', 'ell_matmul', 'gathered_attention',
    'nm_matmul', 'once', 'packed', 'prepared', 'sampled_matmul', 'scaled_matmul', 'sparse24_matmul',
    'sparse_attention', 'unstructured_matmul', 'wrapped_matmul',
]
