"""Tests a law over the functions of arrays: an array of another rank is refused by name, before JAX sees it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from products import normal

from sparsejax import activation, attention, packing, tokens
from sparsejax.attention import decode

X, Q = normal((2, 4, 3)), normal((2, 4, 2, 3))
PREDICTOR = {'query': normal((3, 2)), 'key': normal((3, 2)), 'pool': normal((4, 2)), 'basis': normal((4, 2)),
             'least': jnp.float32(0.1), 'floor': jnp.float32(0.1)}
RULE = decode.quest(2, 2)
CACHE = decode.empty_cache(RULE, 2, 8, 2, 3)
PAIR, LISTS = (X[0], X[1]), attention.of_mask(np.ones((2, 2, 2), bool))
SQUARE, USED, SEEN = jnp.full((2, 1, 4, 4), 0.25), jnp.ones((2, 4), bool), jnp.ones((2, 2), bool)

# Calls that are right; each argument that is an array of these shapes is replaced in turn.
CALLS = [
    (attention.pool, dict(x=Q, block=2)), (attention.page_scores, dict(q=Q, k=Q, block=2)),
    (attention.kernel_features, dict(x=Q, projections=normal((5, 3)))),
    (attention.scatter, dict(q=Q, k=Q, v=Q, index=LISTS, projections=normal((5, 3)), block=2)),
    (attention.kronecker, dict(q=X[0], keys=PAIR, pairs=PAIR)),
    (attention.kronecker_by_powers, dict(q=X[0], keys=PAIR, pairs=PAIR, degree=1)),
    (attention.two_pass_softmax, dict(x=X)), (attention.shift, dict(x=normal((4, 4, 8)), parts=4)),
    (attention.of_mask, dict(mask=SEEN)),
    (attention.predicted_scores, dict(q=Q, k=Q, predictor=PREDICTOR)),
    (tokens.kept_places, dict(scores=X[..., 0], mask=USED, n=2)), (tokens.page_rank, dict(attention=SQUARE)),
    (tokens.combined, dict(importance=SQUARE[..., 0])), (tokens.dissimilar, dict(keys=X, importance=X[..., 0])),
    (tokens.shared_neurons, dict(h=X, query=0)), (tokens.above_elbow, dict(counts=X[..., 0])),
    (tokens.routed_scores, dict(router=tokens.router_of(jax.random.key(0), 3), factors=X)),
    (tokens.factors_of, dict(attention=SQUARE, share=0.5)),
    (packing.blocks, dict(segments=np.zeros((2, 4), int), block=2)), (packing.unpadded, dict(function=abs, mask=USED,
                                                                                            most=8)),
    (decode.extended, dict(rule=RULE, cache=CACHE, k=Q, v=Q)), (decode.heavy_channels, dict(k=Q, r=2, q=Q)),
    (decode.listed, dict(rule=RULE, cache=decode.extended(RULE, CACHE, Q, Q), q=Q[:, 0])),
    (activation.relu_router, dict(x=X, w=normal((3, 5)), scale=jnp.ones(5))),
    (activation.used, dict(raw=X)), (activation.chunk_loss, dict(p=X, length=2)),
    (activation.locality_loss, dict(raw=X)), (activation.chunk_sparsity, dict(used=X > 0))]
# A function of one axis takes the others as they come.
ANY = {'kernel_features.x', 'two_pass_softmax.x', 'heavy_channels.k', 'page_rank.attention', 'combined.importance',
       'shift.x', 'of_mask.mask', 'relu_router.x', 'used.raw',
       'chunk_loss.p', 'locality_loss.raw', 'chunk_sparsity.used'}


@pytest.mark.parametrize('function, given', CALLS, ids=[function.__name__ for function, _ in CALLS])
def test_an_array_of_another_rank_is_refused_by_name(function, given, standard_promotion):
  jax.block_until_ready(function(**given))
  for name, array in given.items():
    for shape in ((), (2,) * 6) if hasattr(array, 'shape') and array.shape else ():
      if shape and f'{function.__name__}.{name}' in ANY:
        continue
      with pytest.raises(ValueError, match=r'^(attention|tokens|packing|decode|activation)\.'):
        function(**given | {name: np.ones(shape, array.dtype)})
