"""Edges: the score of the paper on a small graph, exact and nested masks, messages against a dense matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import graphs

ENDS = jnp.asarray([0, 0, 0, 1, 3]), jnp.asarray([1, 2, 3, 2, 4])


def drawn(nodes=9, seed=0):
  rng = np.random.default_rng(seed)
  pairs = [(i, j) for i in range(nodes) for j in range(i + 1, nodes) if rng.random() < 0.5]
  return jnp.asarray(np.array(pairs).T, jnp.int32)


def test_numbers_of_the_formula():
  """[run]: NumPy of the authors' rule."""
  scores = graphs.degree_score(*ENDS, 5)
  np.testing.assert_allclose(scores, [.075687, .075687, .092946, .103114, .278839], atol=1e-6)
  assert graphs.kept_edges(scores, 0.4).tolist() == [False, False, True, True, True]
  assert graphs.kept_edges(scores, 0.2).tolist() == [True, False, True, True, True]  # of ties the lower index stays


def test_a_turned_edge_and_other_names_of_nodes_change_nothing():
  senders, receivers = drawn()
  scores, order = graphs.degree_score(senders, receivers, 9), np.random.default_rng(1).permutation(9)
  np.testing.assert_allclose(graphs.degree_score(receivers, senders, 9), scores, rtol=1e-6)
  named = jnp.asarray(order, jnp.int32)
  np.testing.assert_allclose(graphs.degree_score(named[senders], named[receivers], 9), scores, rtol=1e-6)


def test_masks_of_levels_are_nested_and_exact():
  scores = graphs.degree_score(*drawn(), 9)
  masks = [np.asarray(graphs.kept_edges(scores, 1 - 0.8**level)) for level in range(6)]
  assert [int(mask.sum()) for mask in masks] == [len(scores) - round((1 - 0.8**i) * len(scores)) for i in range(6)]
  assert all((later <= sooner).all() for sooner, later in zip(masks, masks[1:]))


def test_messages_are_the_product_with_the_normalised_matrix_and_a_pruned_edge_is_a_dropped_one():
  senders, receivers = drawn()
  mask = graphs.kept_edges(graphs.degree_score(senders, receivers, 9), 0.5)
  x = jnp.asarray(np.random.default_rng(2).normal(size=(9, 2, 3)), jnp.float32)
  dense = np.eye(9)
  for s, r in np.stack([senders, receivers], 1)[np.asarray(mask)]:
    dense[s, r] = dense[r, s] = 1
  root = dense.sum(0) ** -0.5
  wanted = np.einsum('ij,jkl->ikl', root[:, None] * dense * root, x)
  found = jax.jit(lambda x: graphs.propagate(x, senders, receivers, graphs.normalised(senders, receivers, 9, mask)))(x)
  np.testing.assert_allclose(found, wanted, atol=1e-5)
  fewer = senders[mask], receivers[mask]
  np.testing.assert_allclose(graphs.propagate(x, *fewer, graphs.normalised(*fewer, 9)), wanted, atol=1e-5)


@pytest.mark.parametrize('ends, nodes, why', [
    (([], []), 3, 'the graph has no edges'), (([0, 1], [1]), 3, r'shapes \(2,\) and \(1,\)'),
    (([0.5], [1.0]), 3, 'dtype float32'), (([0], [3]), 3, 'ends run from 0 to 3, and the graph has the nodes 0 to 2'),
    (([0, 2], [1, 2]), 3, 'edge 1 is a self-loop'), (([0, 1, 1], [1, 0, 2]), 3, '1 edges stand more than once')])
def test_other_graphs_are_refused(ends, nodes, why):
  arrays = [jnp.asarray(each, jnp.int32 if all(isinstance(i, int) for i in each) else jnp.float32) for each in ends]
  with pytest.raises(ValueError, match=f'graphs.degree_score: .*{why}'):
    graphs.degree_score(*arrays, nodes)
  with pytest.raises(ValueError, match='graphs.normalised: '):
    graphs.normalised(*arrays, nodes)


def test_a_mask_of_another_size_is_refused():
  with pytest.raises(ValueError, match='graphs.normalised: `mask` has shape .* 5 edges'):
    graphs.normalised(*ENDS, 5, jnp.ones(4, bool))
  with pytest.raises(ValueError, match='graphs.kept_edges: scores of shape'):
    graphs.kept_edges(jnp.ones((2, 2)), 0.5)
  with pytest.raises(ValueError, match='with at least one edge'):
    graphs.kept_edges(jnp.ones(0), 0.5)
  with pytest.raises(ValueError, match='graphs.propagate: .*for these edges and nodes'):
    graphs.propagate(jnp.ones((6, 2)), *ENDS, graphs.normalised(*ENDS, 5))
