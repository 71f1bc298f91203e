"""Tests that `sparsify` gives any model thresholds, that its report is true, and that bad input is refused by name."""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kernels_pallas
from sparsejax import activation, formats, io
from sparsejax.allocation import erk
from sparsejax.programs import hlo

D, F, T = 8, 16, 12


@pytest.fixture(autouse=True)
def ordinary(standard_promotion):
  """Returns nothing; allows JAX's ordinary promotion, which models outside of this library need."""


def drawn(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


BATCHES = [drawn(i, T, D) for i in range(3)]


def weights(*lead):
  return {'gate': drawn(7, *lead, D, F) / 3, 'up': drawn(8, *lead, D, F) / 3, 'down': drawn(9, *lead, F, D) / 3}


def glu(w, x, act=jax.nn.silu):
  return x + (act(x @ w['gate']) * (x @ w['up'])) @ w['down']


def plain(params, x):
  return glu(params, x)


def scanned(params, x):
  return jax.lax.scan(lambda h, w: (glu(w, h), None), x, params)[0]


class Linen(nn.Module):

  @nn.compact
  def __call__(self, x):
    dense = functools.partial(nn.Dense, use_bias=False)
    return x + dense(D, name='down')(nn.silu(dense(F, name='gate')(x)) * dense(F, name='up')(x))


def linen():
  w = weights()
  return Linen().apply, {'params': {name: {'kernel': w[name]} for name in w}}


def of_nnx():
  class Model(nnx.Module):

    def __init__(self):
      for name, each in weights().items():
        setattr(self, name, nnx.Linear(*each.shape, use_bias=False, rngs=nnx.Rngs(0)))
        getattr(self, name).kernel[...] = each

    def __call__(self, x):
      return x + self.down(nnx.silu(self.gate(x)) * self.up(x))

  graph, state = nnx.split(Model())
  return lambda state, x: nnx.merge(graph, state)(x), state


def equinox():
  model = {name: eqx.nn.Linear(D if name != 'down' else F, F if name != 'down' else D, use_bias=False,
                               key=jax.random.key(0)) for name in ('gate', 'up', 'down')}
  w = weights()
  model = {name: eqx.tree_at(lambda m: m.weight, model[name], w[name].T) for name in model}
  arrays, static = eqx.partition(model, eqx.is_array)

  def apply(arrays, x):
    m = eqx.combine(arrays, static)
    one = lambda x: x + m['down'](jax.nn.silu(m['gate'](x)) * m['up'](x))
    return jax.vmap(one)(x)

  return apply, arrays


MODELS = {'plain': lambda: (plain, weights()), 'scan': lambda: (scanned, weights(2)), 'linen': linen, 'nnx': of_nnx,
          'equinox': equinox}


def expected(report, rule, x):
  """Returns the output of the layer `plain`, computed in NumPy with the thresholds of `rule` on its inputs."""
  w = {name: np.asarray(each) for name, each in weights().items()}
  limits = {row: np.asarray(leaf.threshold) for row, leaf in report.items()}
  skip = lambda name, x: np.where(np.abs(x) < limits[name], 0, x)
  gate, up = skip('gate', x) @ w['gate'], skip('up', x) @ w['up']
  return x + skip('down', gate / (1 + np.exp(-gate)) * up) @ w['down']


@pytest.mark.parametrize('name', MODELS)
def test_the_model_in_any_container_skips_inputs_as_asked(name):
  """All models are the same layer, so that each must give what the layer in NumPy gives; a scan is two of them."""
  apply, params = MODELS[name]()
  small = activation.sparsify(apply, params, BATCHES, activation.wina(0.4), where=lambda path, leaf: True)
  x = BATCHES[-1]
  y = kernels_pallas.packed(small.apply)(small.params, x)
  moved = np.linalg.norm(y - apply(params, x)) / np.linalg.norm(apply(params, x))
  assert small.apply is apply and f'the results move by {moved:.3g} ' in str(small.report)
  assert len(small.report.rows) == 6 if name == 'scan' else 3
  assert all(abs(row.achieved - row.asked) < 0.16 and row.rows == T for row in small.report.rows)
  if name != 'scan':
    leaves = jax.tree.leaves(small.params, is_leaf=formats.is_packed)
    by_name = {leaf_name: leaf for leaf_name in ('gate', 'up', 'down') for leaf in leaves
               if np.array_equal(np.asarray(leaf.values), weights()[leaf_name])}
    np.testing.assert_allclose(y, expected(by_name, None, np.asarray(x)), atol=1e-5)


def test_calibration_data_skip_what_was_asked_and_greedy_gives_the_same_mean():
  for allocation in (None, activation.greedy(0.1)):
    small = activation.sparsify(plain, weights(), BATCHES[:1], activation.teal(0.5), allocation=allocation,
                                where=lambda path, leaf: True)
    assert 'as there is no other' in str(small.report) and small.report.asked == pytest.approx(0.5)
    rows = {row.path: row for row in small.report.rows}
    assert all(abs(row.achieved - row.asked) < 0.03 for path, row in rows.items() if path != 'down')
  assert rows['down'].asked > rows['gate'].asked  # activations after the gate are heavy-tailed


def test_greedy_spares_the_product_that_moves_the_results():
  """Both products of one input have equal errors, and the results have a hundredth of the second."""
  small = activation.sparsify(lambda w, x: x @ w['gate'] + 0.01 * (x @ w['up']), {'gate': weights()['gate'], 'up':
                              weights()['gate']}, BATCHES, activation.wina(0.4), allocation=activation.greedy(0.1),
                              where=lambda path, leaf: True)
  gate, up = (row.asked for row in small.report.rows)
  assert up > gate + 0.5 and small.report.asked == pytest.approx(0.4)


@pytest.mark.parametrize('rule', [activation.cats(0.5), activation.chess(0.5), activation.top_k(6)],
                         ids=['cats', 'chess', 'top_k'])
def test_neurons_of_a_scan_are_switched_off_in_every_implementation_on_disk_and_in_derivatives(rule, tmp_path):
  params, x = weights(2), BATCHES[-1]
  small = activation.sparsify(scanned, params, BATCHES, rule)
  assert [leaf.outputs for leaf in (small.params['up'], small.params['down'])] == [True, False]
  assert not formats.is_packed(small.params['gate'])
  wanted = small.apply(params, x)
  assert not np.allclose(wanted, scanned(params, x), atol=1e-3)
  io.save(tmp_path / 'f', small.params)
  run = jax.jit(kernels_pallas.packed(small.apply))
  np.testing.assert_allclose(run(io.load(tmp_path / 'f'), x), wanted, atol=1e-5)
  uses = kernels_pallas.packed(small.apply, explain=True)(small.params, x)
  assert {use.path: use.op for use in uses} == {'up': 'active_outputs', 'down': 'threshold_matmul'}
  achieved = [row.achieved for row in small.report.rows]
  assert achieved == [0.625] * 2 if isinstance(rule, activation.TopNeurons) else all(0.3 < a < 0.7 for a in achieved)
  slope = jax.grad(lambda v: jnp.sum(run(formats.with_values(small.params, v), x)))(formats.values(small.params))
  dense = jax.grad(lambda p: jnp.sum(small.apply(p, x)))(params)
  np.testing.assert_allclose(slope['up'], dense['up'].swapaxes(1, 2), atol=1e-4)
  np.testing.assert_allclose(slope['gate'], dense['gate'], atol=1e-4)


@pytest.mark.parametrize('rule', [activation.teal(0.5), activation.wina(0.5), activation.cats(0.5),
                                  activation.chess(0.5)], ids=lambda rule: rule.name)
def test_zeros_are_skipped_whatever_the_threshold(rule):
  """Three quarters of the neurons are off for every token, so that the quantile is zero, or the number after it."""
  w = weights() | {'gate': jnp.where(jnp.arange(F) < F // 4, 1.0, -1.0) * jnp.ones((D, 1))}
  apply = functools.partial(glu, act=jax.nn.relu)
  x = jnp.abs(BATCHES[0])
  row = {row.path: row for row in activation.sparsify(apply, w, [x], rule, where=lambda path, leaf: path == 'down'
                                                      ).report.rows}['down']
  assert row.achieved >= 0.75


def test_the_sparsity_of_activations_is_the_share_of_zeros_of_tokens_that_count():
  params, act = weights(2), jax.nn.relu
  apply = lambda w, x: jax.lax.scan(lambda h, w: (glu(w, h, act), None), x, w)[0]
  valid, first = jnp.arange(T) < 5, jax.tree.map(lambda a: a[0], params)
  second = [jax.tree.map(lambda a: a[1], params), glu(first, BATCHES[0], act)]
  found = activation.sparsity(apply, params, BATCHES[:1], valid=[valid])
  wanted = [np.mean(np.asarray(x[:5] @ w['gate']) <= 0) for w, x in ((first, BATCHES[0]), second)]
  np.testing.assert_allclose(found['down'], wanted, atol=1e-6)
  assert list(found) == ['down'] and 0.3 < found['down'].min()


def test_dropout_may_follow_an_activation():
  def dropped(w, x, key):
    h = jax.nn.relu(x @ w['gate'])
    return jnp.where(jax.random.bernoulli(key, 0.5, h.shape), h / 0.5, 0.0) @ w['down']

  key = jax.random.key(0)
  y = activation.ruled(dropped, activation.top_k(np.int64(1)))(weights(), BATCHES[0], key)
  h = jnp.where(jax.random.bernoulli(key, 0.5, (T, F)), jax.nn.relu(BATCHES[0] @ weights()['gate']) * 2, 0.0)
  np.testing.assert_allclose(y, jnp.where(h == h.max(1, keepdims=True), h, 0) @ weights()['down'], atol=1e-5)


def in_one(w, x):
  gate, up = jnp.split(x @ w['up'], 2, -1)
  return x + (jax.nn.relu(gate) * up) @ w['down']


@pytest.mark.parametrize('name', ['apart', 'in one'])
def test_a_token_reads_the_gate_once_and_of_up_and_down_what_its_neurons_need(name):
  """The text of the compiled program tells; what is not needed is NaN. Rounds of the loops read 128 rows each."""
  f = 512
  gate = jnp.where(jnp.arange(f) < 128, 1.0, -1.0) * jnp.ones((D, 1))
  w = {'gate': gate, 'up': drawn(1, D, f), 'down': drawn(2, f, D)}
  apply, x = functools.partial(glu, act=jax.nn.relu), jnp.ones((1, D))
  if name == 'in one':
    apply, w = in_one, {'up': jnp.concatenate([gate, w['up']], 1), 'down': w['down']}
  small = activation.sparsify(apply, w, [x], activation.top_k(128))
  first = w['up'].shape[1] - f + 128
  lost = dict(small.params, up=formats.ActiveArray.of(w['up'].at[:, first:].set(jnp.nan), outputs=True),
              down=formats.ActiveArray.of(w['down'].at[128:].set(jnp.nan)))
  run = jax.jit(kernels_pallas.packed(small.apply, implementation='xla'), keep_unused=True)
  np.testing.assert_allclose(run(lost, x), apply(w, x), rtol=1e-4)
  with pytest.raises(ValueError, match="active_outputs: implementation 'mosaic_tpu' cannot run this"):
    kernels_pallas.packed(small.apply, implementation='mosaic_tpu')(lost, x)
  text, leaves = run.lower(lost, x).compile().as_text(), jax.tree.leaves(lost)
  rows = {}
  for path, leaf in lost.items():
    array = leaf.values if formats.is_packed(leaf) else leaf
    found = hlo.reads(text, next(i for i, each in enumerate(leaves) if each is array))
    loops = [read.bytes // (4 * D) for read in found if read.times is None]
    assert all(read.by == 'dot' and read.branch == (path != 'gate') for read in found if read.times), 'a copy is made'
    rows[path] = loops
  assert rows == {'up': [128] * (2 if name == 'in one' else 1), 'down': [128], **({} if name == 'in one' else {
      'gate': []})}  # rows of a round: 4 rounds for the gate in one, and 1 for the neurons that are on


def test_the_report_has_the_bytes_that_the_compiled_product_reads():
  params = weights()
  small = activation.sparsify(plain, params, BATCHES[:1], activation.wina(0.4), where=lambda path, leaf: path == 'gate',
                              reads=functools.partial(kernels_pallas.bytes_read, implementation='dense'))
  row, = small.report.rows
  assert row.read == 1.0 and 'left dense: up (left out by `where`)' in small.report.notes


@pytest.mark.parametrize('name', ['wina', 'chess', 'r_sparse', 'ppl'])
def test_in_sequence_each_weight_is_calibrated_on_what_it_will_be_given(name):
  """With one batch, `achieved` is counted on the calibration data with all products sparse, and is what was asked.

  Thresholds that were found on dense products skip more or less behind other sparse products.
  """
  loss = lambda y, x: jnp.mean(jnp.square(y - scanned(weights(2), x)))
  rule = activation.ppl(3.0, loss, 0.2) if name == 'ppl' else getattr(activation, name)(0.5)
  small, dense = (activation.sparsify(scanned, weights(2), BATCHES[:1], rule, sequential=kind)
                  for kind in ('weight', 'dense'))
  assert 'all products before sparse' in str(small.report) and 'all products dense' in str(dense.report)
  if name == 'chess':  # its thresholds are in `apply`
    assert not np.array_equal(*(each.apply(weights(2), BATCHES[0]) for each in (small, dense)))
  else:  # layer 1 lies behind products that are sparse already
    assert not np.array_equal(*(each.params['down'].threshold[1] for each in (small, dense)))
  if name != 'ppl':
    off = lambda report: max(abs(row.achieved - row.asked) for row in report.rows)
    assert off(small.report) < 0.03 and (name == 'chess' or off(dense.report) > 0.05)


def test_a_weight_that_is_used_twice_is_calibrated_on_both_uses_before_the_first_is_sparse():
  twice = lambda w, x: jnp.tanh(jnp.tanh(x @ w) @ w)
  w, x = drawn(1, D, D), BATCHES[0]
  small = activation.sparsify(twice, w, [x], activation.teal(0.5), where=True, sequential='weight')
  both = np.abs(np.concatenate([x, np.tanh(x @ w)]))
  limit, = np.unique(np.asarray(small.params.threshold))
  assert np.mean(both < limit) == pytest.approx(0.5, abs=0.02)


def test_perplexity_rises_as_much_as_is_allowed():
  loss = lambda y, x: jnp.mean(jnp.square(y - plain(weights(), x)))
  bounds = [activation.sparsify(plain, weights(), BATCHES[:2], activation.ppl(percent, loss, 0.05)).report.achieved
            for percent in (0.05, 3.0)]
  assert 0 < bounds[0] < bounds[1] < 1


def test_padding_counts_neither_for_thresholds_nor_in_the_report():
  valid = [jnp.arange(T) < 5] * 3
  padded = [batch.at[5:].set(100.0) for batch in BATCHES]
  own = lambda batches, **more: activation.sparsify(plain, weights(), batches, activation.teal(0.5), **more)
  small, short = own(padded, valid=valid), own([batch[:5] for batch in BATCHES])
  for a, b in zip(jax.tree.leaves(small.params), jax.tree.leaves(short.params)):
    np.testing.assert_allclose(a, b, rtol=1e-5)
  assert [row.rows for row in small.report.rows] == [5, 5, 5]


def refused(batches=None, rule=None, apply=plain, params=None, **more):
  return activation.sparsify(apply, weights() if params is None else params, BATCHES if batches is None else batches,
                             activation.teal(0.5) if rule is None else rule, **more)


REFUSED = {
    'sequence': (lambda: refused(sequential='dens'), "Did you mean 'dense'"),
    'top_k in sequence': (lambda: refused(rule=activation.top_k(4), sequential='weight'), 'finds no thresholds'),
    'no batch': (lambda: refused([]), 'there are no batches'),
    'an array as batches': (lambda: refused(BATCHES[0]), r'`batches` must be .* as in the list \[x\]; an array is one'),
    'batches without rows': (lambda: refused([BATCHES[0][:0]]), "no row of the 1 batches reaches a product of 'gate'"),
    'integers': (lambda: refused(params={'a': jnp.ones((D, D), int)}, apply=lambda p, x: x @ p['a'].astype('float32')),
                 'multiplies no matrix of floats'),
    'a loss of text': (lambda: refused(rule=activation.ppl(5, lambda y, x: 'low')), "the loss of ppl returned 'low'"),
    'parameters that stay packed': (lambda: plain(refused().params, BATCHES[0]),
                                    r'ActiveArray of shape \(8, 16\) is packed; run kernels_pallas.packed'),
    'padding only': (lambda: refused(valid=[jnp.zeros(T, bool)] * 3), '`valid` leaves no row'),
    'padding in one part': (lambda: refused(valid=[jnp.arange(T) < 0, jnp.arange(T) < 0, jnp.arange(T) < 5]),
                            'no row in the first 2 batches'),
    'NaN': (lambda: refused([BATCHES[0].at[0, 0].set(jnp.nan)]), 'the input of gate holds NaN.* in batch 0'),
    'NaN weight': (lambda: refused(params=weights() | {'up': jnp.full((D, F), jnp.nan)}), "'up'.*it holds NaN"),
    'zero': (lambda: refused(rule=activation.cats(0.5), apply=functools.partial(glu, act=jax.nn.sigmoid)),
             'the activation of gate -> down is 0.5 at zero, not 0'),
    'no layer': (lambda: refused(rule=activation.cats(0.5), apply=lambda p, x: x @ p['gate']), 'has no gated layer'),
    'no rule': (lambda: refused(rule='wina'), '`rule` must be a rule, as in activation.wina'),
    'packed': (lambda: refused(params=weights() | {'up': formats.ActiveArray.of(weights()['up'])}),
               'up is packed already'),
    'rank': (lambda: refused(rule=activation.r_sparse(0.5), allocation=activation.greedy()), 'not those of r_sparse'),
    'many neurons': (lambda: refused(rule=activation.top_k(F + 1)),
                     r"sparsify: parameter 'down' of shape \(16, 8\): top_k\(17\) keeps more than its 16 neurons"),
    'many neurons in training': (lambda: activation.ruled(plain, activation.top_k(F + 1))(weights(), BATCHES[0]),
                                 r"ruled: parameter 'down' of shape \(16, 8\).*give at most 16"),
    'a high rank': (lambda: refused(rule=activation.r_sparse(0.5, rank=D + 1)),
                    r"parameters 'gate' of shape \(8, 16\), 'up'.*`rank` 9, above .* give at most 8"),
    'an allocation of weights': (lambda: refused(allocation=erk), 'as in activation.greedy'),
    'a loss of each token': (lambda: refused(rule=activation.ppl(5, lambda y, x: y)),
                             r'the loss of ppl returned an array of shape \(.*must return one number'),
    'traced': (lambda: jax.eval_shape(lambda x: refused([x]).params, BATCHES[0]),
               'is traced, .* Call activation.sparsify outside of jit'),
    'where': (lambda: refused(where=lambda path, leaf: path == 'b', params=weights() | {'b': jnp.ones((2, 2))}),
              "'b'.*no product of the program has inputs to skip"),
    'another model': (lambda: activation.ruled(plain, activation.cats(0.5), {'down': np.zeros(F + 1)})(
        weights(), BATCHES[0]), r'thresholds of down must be \[16\], and are \[17\]'),
    'absent': (lambda: activation.ruled(plain, activation.cats(0.5), {'other': np.zeros(F)})(weights(), BATCHES[0]),
               'and are absent'),
    'no thresholds': (lambda: activation.ruled(plain, activation.cats(0.5)), 'cats needs `thresholds`'),
    'inputs': (lambda: activation.ruled(plain, activation.wina(0.5), {}), 'must be one for neurons'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_bad_input_is_refused_with_the_reason(name):
  call, message = REFUSED[name]
  with pytest.raises(ValueError, match=f'(?s){message}'):
    call()
