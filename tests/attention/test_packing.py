"""Tests that packed texts have the loss and the gradients of padded texts, and that functions of tokens see no padding.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from products import close, largest, normal

from kernels_pallas import block_sparse_attention
from sparsejax import packing
from sparsejax.attention import of_mask
from sparsejax.attention.edits import ScoreEdit

LENGTHS = [3, 1, 2]


def test_places_of_one_row_are_cumulative_lengths():
  """Places restart for each of the lengths 3, 1 and 2, and ten causal pairs remain of 21."""
  packs = packing.first_fit(LENGTHS, 6)
  assert packs.begin.tolist() == [0, 5, 3] and packs.row.tolist() == [0, 0, 0]
  assert packs.segments.tolist() == [[0, 0, 0, 2, 2, 1]] and packs.positions.tolist() == [[0, 1, 2, 0, 1, 0]]
  assert packs.first.tolist() == [[True, False, False, True, False, True]] and packs.share == 6 / 9
  pairs = (packs.segments[0][:, None] == packs.segments[0][None]) & np.tri(6, dtype=bool)
  assert pairs.sum() == 10 and np.tri(6).sum() == 21
  padded = np.asarray([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]], bool)
  assert np.flatnonzero(padded).tolist() == [0, 1, 2, 4, 8, 9]


@pytest.mark.parametrize('capacity', [4, 6, 9])
def test_packing_and_padding_are_inverse(capacity):
  packs, x = packing.first_fit(LENGTHS, capacity), normal((3, 4, 2))
  inside = jnp.arange(4)[None] < jnp.asarray(LENGTHS)[:, None]
  packed = packs.packed(x)
  np.testing.assert_array_equal(packs.padded(packed, 4), jnp.where(inside[..., None], x, 0))
  assert packed.shape == (len(packs.segments), capacity, 2) and not packed[~packs.valid].any()
  close(packs.mean(packed[..., 0]), jnp.sum(jnp.where(inside, x[..., 0], 0)) / 6, 6)


@pytest.mark.sampled(2)
@pytest.mark.parametrize('way', ['xla', 'dense'])
@pytest.mark.parametrize('causal', [False, True])
def test_loss_and_gradients_are_those_of_the_padded_texts(causal, way):
  packs, block = packing.first_fit([5, 9, 3, 4], 12), 4
  x, w = normal((4, 9, 2, 8)), normal((3, 8, 8), seed=1)
  inside = jnp.arange(9)[None] < jnp.asarray(packs.lengths)[:, None]
  lists = of_mask(packing.blocks(packs.segments, block, causal).any(0).repeat(2, 0))

  def attended(attend, x, w):
    q, k, v = (x @ one for one in w)
    return jnp.sum(attend(q, k, v) ** 2, (-1, -2))

  def padded(w):
    mask = inside[:, None, None] & (jnp.tri(9, dtype=bool)[None, None] if causal else True)
    losses = attended(lambda *qkv: jax.nn.dot_product_attention(*qkv, mask=mask), x, w)
    return jnp.sum(jnp.where(inside, losses, 0)) / 21

  def together(w):
    ids = jnp.asarray(packs.segments)
    run = lambda *qkv: block_sparse_attention(*qkv, *map(jnp.asarray, lists[:2]), block_q=block, block_k=block,
                                              causal=causal, segments=(ids, ids), implementation=way)
    return packs.mean(attended(run, packs.packed(x), w))

  (wanted, wanted_gradient), (found, gradient) = (jax.jit(jax.value_and_grad(f))(w) for f in (padded, together))
  close(found, wanted, 64)
  close(gradient, wanted_gradient, 64)


def test_segments_make_nothing_of_queries_times_keys():
  q, ids = normal((1, 64, 1, 4)), jnp.zeros((1, 64), jnp.int32)
  lists = jnp.zeros((1, 8, 1), jnp.int32)
  run = lambda q: block_sparse_attention(q, q, q, lists, block_q=8, block_k=8, segments=ids, implementation='xla').sum()
  assert largest(jax.make_jaxpr(jax.grad(run))(q).jaxpr) < 64 * 64


def test_a_function_of_tokens_sees_valid_tokens_alone():
  mask, x, seen = np.asarray([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]], bool), normal((3, 4, 2)), []

  def double(tokens):
    seen.append(tokens.shape)
    return 2 * tokens

  hidden = jnp.where(mask[..., None], x, jnp.nan)
  np.testing.assert_array_equal(packing.unpadded(double, mask, 6)(hidden), jnp.where(mask[..., None], 2 * x, 0))
  assert seen == [(6, 2)]
  traced = jax.jit(lambda mask, x: packing.unpadded(double, mask, 4)(x))(mask, hidden)
  assert np.isnan(traced[2]).tolist() == [[True] * 2, [True] * 2, [False] * 2, [False] * 2]
  np.testing.assert_array_equal(traced[0], jnp.where(mask[0][:, None], 2 * x[0], 0))


Q, IDS = jnp.ones((1, 8, 1, 4)), jnp.zeros((1, 8), jnp.int32)
REFUSED = {
    'a long text': (lambda: packing.first_fit([3, 9], 8), 'a text of 9 tokens does not fit into rows of 8; give a'),
    'no text': (lambda: packing.first_fit([], 8), '`lengths` must be whole numbers'),
    'an empty text': (lambda: packing.first_fit([3, 0], 8), 'at least 1'),
    'other texts': (lambda: packing.first_fit([3], 8).packed(jnp.ones((2, 3))), r'which need \[1, 3, ...\]'),
    'many tokens': (lambda: packing.unpadded(abs, np.ones((2, 3), bool), 4), '6 tokens are valid, and `most` is 4'),
    'numbers': (lambda: packing.unpadded(abs, np.ones((2, 3)), 4), r'must be bool\[B, T\]'),
    'another mask': (lambda: packing.unpadded(abs, np.ones((2, 3), bool), 6)(Q), r'does not fit the mask, \(2, 3\)'),
    'segments': (lambda: block_sparse_attention(Q, Q, Q, jnp.zeros((1, 1, 1), jnp.int32), segments=IDS[:, :3]),
                 r'segments of shapes .* must be int\[batch, Tq\] and int\[batch, Tk\], int\[1, 8\]'),
}


def test_platforms_say_who_computes_segments():
  """Kernels compute segments, unless heads differ in them; blocks of another size are refused for their size."""
  q, blocks = jnp.ones((1, 256, 2, 64), jnp.bfloat16), jnp.zeros((2, 2, 1), jnp.int32)
  chosen = lambda **more: block_sparse_attention(q, q, q, blocks, explain=True, **more)
  segments = jnp.zeros((1, 256), jnp.int32)
  assert {chosen(segments=segments)[name].implementation for name in ('cuda', 'tpu')} == {'mosaic_gpu', 'mosaic_tpu'}
  of_heads = ScoreEdit('mask', jnp.ones((1, 2, 1, 256), bool))
  for choice in map(chosen(segments=segments, edits=[of_heads]).get, ('cuda', 'tpu')):
    assert "it has no 'mask', 'segments' of scores; XLA computes them, and lists without" in choice.reason
  small = block_sparse_attention(Q, Q, Q, jnp.zeros((1, 1, 1), jnp.int32), segments=IDS, explain=True)
  assert all('8 keys do not divide into blocks of 128' in small[name].reason for name in ('cuda', 'tpu'))


@pytest.mark.parametrize('case', REFUSED)
def test_refusals_say_what_to_give(case):
  call, message = REFUSED[case]
  with pytest.raises(ValueError, match=message):
    call()
