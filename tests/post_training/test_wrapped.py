"""Tests ARMOR: a step of the core has the numbers of the formulas, and the factors keep their bound."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.patterns import NM
from sparsejax.post_training import wrapped
from sparsejax.types import Axes

W = jnp.float32([[.19, -.52, -.41, -2.44, 1.8, 1.14, -.33, .77], [.28, -.55, .98, -.31, -.33, -.79, .45, -.1]])
SQUARE = jnp.float32([2.1, 1.6, 1, .6, .9, 1.2, 2, 1.8])
LEFT = jnp.float32([[[.8, .2], [.4, .7]]])
RIGHT = jnp.float32([[[.7, -.3, .2, 0], [.2, 1.1, 0, .1], [0, .2, .8, -.1], [0, .4, -.2, .8]],
                    [[.9, .2, 0, .3], [-.4, 1.2, .2, -.3], [0, .2, 1, .2], [.5, .1, -.1, .8]]])


def best_core(w, square):
  kept = NM(2, 4)(jnp.square(w) * square[None], None, Axes((1,), (0,), source='given'))
  return jnp.where(kept, w, 0)


def test_a_step_of_the_core_is_that_of_the_formulas():
  core, eyes = best_core(W, SQUARE), (jnp.eye(2)[None], jnp.broadcast_to(jnp.eye(4), (2, 4, 4)))
  np.testing.assert_allclose(wrapped.loss(W, SQUARE, eyes[0], core, eyes[1]), 0.1442343, atol=1e-6)
  losses = [wrapped.loss(W, SQUARE, LEFT, core, RIGHT)]
  for row, group in ((0, 0), (1, 1), (0, 1), (1, 0)):
    part = slice(4 * group, 4 * group + 4)
    core = core.at[:, part].set(wrapped.refitted(W[:, part], jnp.sqrt(SQUARE[part]), LEFT[0], core[:, part],
                                                 RIGHT[group], row, 0))
    losses.append(wrapped.loss(W, SQUARE, LEFT, core, RIGHT))
    if len(losses) == 2:
      np.testing.assert_allclose(core[0, :4], [0, 0.559851, 0, -2.824718], atol=1e-5)
  np.testing.assert_allclose(losses, [0.5644713, 0.4508721, 0.3592287, 0.2864737, 0.2758913], atol=1e-6)


def test_the_factors_are_never_worse_than_the_best_core_and_keep_its_pattern(standard_promotion):
  rng = np.random.default_rng(0)
  w, square = rng.standard_normal((16, 24)).astype(np.float32), rng.uniform(0.1, 3, 24).astype(np.float32)
  w[3] = 0  # a dead output
  found = wrapped.factorised(w, square, key=jax.random.key(0), block=8, iterations=60, learning_rate=1e-2)
  assert float(found.loss) < 0.7 * float(found.start)
  assert ((np.asarray(found.core).reshape(16, 6, 4) != 0).sum(2) <= 2).all()
  columns = np.linalg.norm(w, axis=0)
  rows = np.linalg.norm(w / columns, axis=1)
  rows[3] = 1
  scaled = lambda each: np.asarray(each) / columns / rows[:, None]
  off = scaled(wrapped.product(found.left, found.core, found.right)) - scaled(w)
  np.testing.assert_allclose(found.loss, (square * off**2).sum() / (square * scaled(w)**2).sum(), rtol=1e-3)
  worse = wrapped.factorised(w, square, key=jax.random.key(0), block=8, iterations=3, learning_rate=10.0)
  assert float(worse.loss) <= float(worse.start) == float(found.start)


@pytest.mark.parametrize('shape, block', [((16, 24), 16), ((24,), 8), ((8, 24), 6)])
def test_blocks_that_do_not_fit_are_refused(shape, block):
  with pytest.raises(ValueError, match='a block that divides both and is a multiple of 4'):
    wrapped.factorised(jnp.ones(shape), jnp.ones(24), key=jax.random.key(0), block=block)
