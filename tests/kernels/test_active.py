"""Tests that `active_matmul` multiplies inputs that are not skipped, and does not read the weights of the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from products import TOKENS, WAYS, close, inputs, normal, value_and_gradients

from kernels_pallas import bytes_read
from kernels_pallas.active import active_matmul, active_outputs


@pytest.mark.sampled
@inputs
@pytest.mark.parametrize('way', WAYS)
def test_active_products_are_those_of_what_is_not_skipped(tokens, dtype, way):
  x, w = normal((*TOKENS[tokens], 96), dtype), normal((96, 40), dtype, seed=1)
  mask = np.arange(96) % 48 < 20
  run = lambda x, w: active_matmul(x, w, threshold=0.5, mask=jnp.asarray(mask), block=8, implementation=way)
  kept = np.where((np.abs(np.asarray(x, np.float32)) >= 0.5) & mask, np.asarray(x, np.float64), 0)
  y, (dx, dw) = value_and_gradients(run, jnp.ones((*TOKENS[tokens], 40), dtype), x, w)
  assert y.shape == (*TOKENS[tokens], 40) and y.dtype == x.dtype
  close(y, kept @ np.asarray(w, np.float64), 96, dtype)
  close(dx, np.where(kept != 0, np.asarray(w, np.float64).sum(1), 0), 40, dtype)
  close(dw, np.broadcast_to(kept.reshape(-1, 96).sum(0)[:, None], w.shape), 96, dtype)


@pytest.mark.parametrize('capacity', [0, 1, 3, 6, None])
def test_blocks_that_are_not_active_are_not_read_unless_there_are_too_many(capacity):
  """Weights of the 3 blocks that are not active are NaN. A NaN in x is below no threshold."""
  x = normal((2, 96)).at[:, 32:80].set(0).at[0, 5].set(0.25)
  w = normal((96, 8), seed=1)
  poisoned = w.at[32:80].set(jnp.nan)
  run = lambda x, w, **options: active_matmul(x, w, block=16, capacity=capacity, implementation='xla', **options)
  y = run(x, poisoned)
  if capacity in (0, 1):
    assert np.isnan(y).all()
  else:
    close(y, np.asarray(x, np.float64) @ np.asarray(w, np.float64), 96)
  assert np.isfinite(jax.jit(jax.grad(lambda x: run(x, poisoned).sum()))(x)).all() == (capacity not in (0, 1))
  close(run(x, w, threshold=0.3), np.where(np.abs(x) < 0.3, 0, x).astype('f8') @ np.asarray(w, np.float64), 96)
  close(run(x, w, threshold=jnp.where(jnp.arange(96) < 16, 9.0, 0)), np.where(np.arange(96) < 16, 0, x) @ w, 96)
  assert np.isnan(run(x.at[1, 0].set(jnp.nan), w, threshold=0.3)).any(1).tolist() == [False, True]
  close(jax.jit(jax.vmap(lambda x: run(x, w)))(x), x @ w, 96)


@pytest.mark.parametrize('tokens, outputs, way, why', [
    (1, 2**15, 'xla', 'reads the active blocks'), (1, 64, 'dense', 'lies in the cache'),
    (17, 2**15, 'dense', '17 tokens')])
def test_active_products_pay_for_few_tokens_and_large_weights(tokens, outputs, way, why):
  choice = active_matmul(jnp.ones((tokens, 128)), jnp.zeros((128, outputs)), explain=True)['cpu']
  assert choice.implementation == way and why in choice.reason


@pytest.mark.parametrize('way', ['xla', 'dense', None])
def test_outputs_that_no_token_needs_are_zero_and_not_read(way):
  x, w, places = normal((2, 3, 24)), normal((48, 24), seed=1), np.arange(48)
  mask = jnp.asarray(np.broadcast_to((places % 32 < [[4], [9], [2]]) & (places < 32), (2, 3, 48)))
  lost = w.at[32:].set(jnp.nan) if way == 'xla' else w
  run = lambda x, w: active_outputs(x, w, mask, implementation=way)
  y, (dx, dw) = value_and_gradients(run, jnp.ones((2, 3, 48)), x, w)
  close(run(x, lost), y, 24)
  close(y, np.where(mask, np.asarray(x, np.float64) @ np.asarray(w, np.float64).T, 0), 24)
  close(dx, np.asarray(mask, np.float64) @ np.asarray(w, np.float64), 48)
  close(dw, np.einsum('abn,abk->nk', np.asarray(mask, np.float64), np.asarray(x, np.float64)), 6)


HALF, ONES = jnp.ones((4, 16)), jnp.ones((16, 8))
REFUSED = {
    'active: shapes': (lambda: active_matmul(HALF, HALF), r'\(4, 16\) and w of shape \(4, 16\) must be \[..., K\]'),
    'active: block': (lambda: active_matmul(HALF, ONES, block=6), 'block 6 must be a whole number that divides K = 16'),
    'active: mask': (lambda: active_matmul(HALF, ONES, mask=jnp.ones((4,), bool)), r'mask of shape \(4,\).*\(16,\)'),
    'active: capacity': (lambda: active_matmul(HALF, ONES, capacity=0.5), 'capacity 0.5 must be a number of blocks'),
    'active: threshold': (lambda: active_matmul(HALF, ONES, threshold=jnp.ones(3)), r'shape \(3,\) must be a'),
    'outputs: block': (lambda: active_outputs(HALF, HALF, jnp.ones((4, 4), bool), block=0), 'block 0 must be'),
    'outputs: dtype': (lambda: active_outputs(HALF.astype(int), HALF, jnp.ones((4, 4), bool)), 'x has dtype int32'),
    'bytes: weight': (lambda: bytes_read(HALF, ONES), 'bytes_read: the weight must be a formats.ActiveArray'),
    'active: dtype': (lambda: active_matmul(HALF.astype(int), ONES), 'x has dtype int32'),
    'active: elsewhere': (lambda: active_matmul(HALF, ONES, implementation='mosaic_tpu'), 'it is for tpu.*can; None'),
    'outputs: shapes': (lambda: active_outputs(HALF, ONES, HALF > 0), r'must be \[..., K\], \[N, K\] and bool'),
    'outputs: capacity': (lambda: active_outputs(HALF, HALF, jnp.ones((4, 4), bool), capacity=0.5),
                          'active_outputs: capacity 0.5 must be a number of blocks'),
    'outputs: elsewhere': (lambda: active_outputs(HALF, HALF, jnp.ones((4, 4), bool), implementation='mosaic_gpu'),
                           'active_outputs: .*it is for cuda.*can; None'),
    'active: name': (lambda: active_matmul(HALF, ONES, implementation='mosaic'), 'active_matmul: unknown impl'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_refusals_say_why_and_what_can(case):
  call, message = REFUSED[case]
  with pytest.raises(ValueError, match=f'(?s){message}'):
    call()
