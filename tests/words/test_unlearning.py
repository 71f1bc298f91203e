"""Unlearning: parts of the data, the authors' recursions against loops, and zeros that stay under every step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import unlearning

W = {'a': jnp.asarray([[0.5, 0.0, -1.0], [0.0, 2.0, 0.3]])}
X = jnp.asarray([[1.0, -0.5], [0.2, 0.7], [-1.0, 0.4]])
Y = jnp.asarray([0, 2, 1])


def logits(params, x):
  return x @ params['a']


def loss(params, example):
  x, y = example
  return -jax.nn.log_softmax(x @ params['a'])[y]


def test_parts_are_all_examples_once():
  kept, gone = unlearning.parted(6, [4, 1])
  assert kept.tolist() == [0, 2, 3, 5] and gone.tolist() == [1, 4]


@pytest.mark.parametrize('forget, why', [
    (range(4), 'all 4 examples are to be forgotten'), ([], 'it has none'), ([1, 1], 'different numbers'),
    ([4], 'from 0 to 3'), ([-1], 'from 0 to 3'), ([0.5], 'different numbers')])
def test_what_cannot_be_forgotten_is_refused(forget, why):
  with pytest.raises(ValueError, match=f'unlearning.parted: .*{why}'):
    unlearning.parted(4, forget)


def test_the_fisher_information_is_the_authors_sum_over_classes():
  found = unlearning.fisher(logits, W, [X, X[:2]])
  wanted = np.zeros((2, 3))
  for x in (X, X[:2]):
    mean = jax.nn.softmax(logits(W, x)).mean(0)
    for y in range(3):
      g = jax.grad(lambda p, x=x, y=y: -jnp.mean(jax.nn.log_softmax(logits(p, x))[:, y]))(W)['a']
      wanted += np.asarray(mean[y] * g**2) / 2
  np.testing.assert_allclose(found['a'], wanted, rtol=1e-5)
  for none in ([], [X[:0]]):
    with pytest.raises(ValueError, match='unlearning.fisher: no batches'):
      unlearning.fisher(logits, W, none)
  with pytest.raises(ValueError, match=r'as in the list \[x\]; an array is one batch'):
    unlearning.fisher(logits, W, X)


def test_noise_has_the_variance_of_the_rule_and_leaves_zeros():
  params = {'a': jnp.ones((200, 100)).at[:100].set(0)}
  moved = unlearning.noised(params, {'a': jnp.full((200, 100), 0.5)}, jax.random.key(0), 0.02)['a']
  assert not moved[:100].any() and float(jnp.std(moved[100:])) == pytest.approx(0.2, rel=0.05)
  capped = unlearning.noised(params, {'a': jnp.zeros((200, 100))}, jax.random.key(0), 0.02, 2.0)['a']
  assert float(jnp.std(capped[100:])) == pytest.approx(0.2, rel=0.05)
  with pytest.raises(ValueError, match="noised: parameter 'a' of shape .*`information` has shape .1, 100."):
    unlearning.noised(params, {'a': jnp.ones((1, 100))}, jax.random.key(0), 0.02)


def test_woodfisher_is_the_recursion_over_the_kept_weights():
  mask = np.asarray(W['a'] != 0)
  grads = [np.asarray(jax.grad(loss)(W, (x, y))['a']) * mask for x, y in zip(X, Y)]
  direction = {'a': jnp.asarray([[1.0, 5.0, 2.0], [-3.0, 1.0, 0.5]])}
  k, o = np.asarray(direction['a']) * mask, grads[0]
  for g in grads:
    along, own = (k * g).sum() / (2 + (o * g).sum()), (o * g).sum() / (2 + (o * g).sum())
    k, o = k - along * o, o - own * o
  found = jax.jit(lambda v: unlearning.woodfisher(loss, W, (X, Y), v, 2.0))(direction)['a']
  np.testing.assert_allclose(found, k, rtol=1e-5)
  assert not found[~mask].any()
  with pytest.raises(ValueError, match='there are no examples'):
    unlearning.woodfisher(loss, W, (X[:0], Y[:0]), direction)


def test_entropy_and_membership_and_gap():
  """[run]: the formula of Song and Mittal."""
  found = unlearning.modified_entropy(jnp.asarray([[.7, .2, .1], [.1, .1, .8]]), jnp.asarray([0, 1]))
  np.testing.assert_allclose(found, [.162167, 3.370413], atol=1e-5)
  inside, outside = jnp.asarray([.9, .8, .95, .4]), jnp.asarray([.5, .3, .6])
  assert float(unlearning.membership(inside, outside, jnp.asarray([.79, .7, .81, .99]))) == 0.5
  assert unlearning.gap({'RA': 90, 'UA': 10}, {'RA': 92.0, 'UA': 16.0}) == 4
  with pytest.raises(ValueError, match='give the same metrics'):
    unlearning.gap({'RA': 90}, {'UA': 10})
  with pytest.raises(ValueError, match='give integers from 0 to 1'):
    unlearning.modified_entropy(jnp.full((2, 2), 0.5), jnp.asarray([0, 2]))
  with pytest.raises(ValueError, match='at least one of each'):
    unlearning.membership(inside, outside, jnp.zeros(0))
