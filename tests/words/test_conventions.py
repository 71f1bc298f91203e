"""Tests over real layers in every container that conventions say what the program says, or that they do not know.

Each case is a program with the paths whose axes the conventions know. Every other parameter is unknown to them, and no
parameter has other axes by convention than by its program. Parameters that a program looks up, adds or scales by stay
dense.
"""

import functools
import typing

import equinox
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import core, nnx
from flax import linen as nn

import sparsejax
from sparsejax import NM, Block, Channel, Unstructured, allocation, conventions, recipes, states, trees
from sparsejax.types import Axes

KEY, SGD = jax.random.key(0), optax.sgd(0.1)
F32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
TOKENS = jax.ShapeDtypeStruct((2, 5), jnp.int32)


class Named(nn.Module):
  """A `Named` is a model of Linen that holds one layer under its usual name."""

  layer: typing.Callable[[], nn.Module]
  carry: bool = False

  @nn.compact
  def __call__(self, x):
    layer = self.layer()
    return layer(layer.initialize_carry(KEY, x.shape), x)[1] if self.carry else layer(x)


def linen(layer, x, frozen=False, **options):
  model = Named(layer, **options)
  params = jax.eval_shape(model.init, KEY, x)
  return model.apply, core.freeze(params) if frozen else params, x


def of_nnx(layer, x, state=True):
  model = nnx.eval_shape(lambda: layer(nnx.Rngs(0)))
  graph, params = nnx.split(model)
  return lambda params, x: nnx.merge(graph, params)(x), params, x


def of_equinox(layer, x, call=lambda model, x: model(x)):
  return call, equinox.filter_eval_shape(layer, KEY), x


def stacked(layer, count=3):
  """Returns `count` layers of Equinox in one module, each leaf with an axis in front."""
  return lambda key: equinox.filter_vmap(layer)(jax.random.split(key, count))


class Mine(equinox.Module):
  """A `Mine` is a user's own module, with weights in the layout of Equinox and with others."""

  weight: jax.Array
  kernel: jax.Array
  table: equinox.nn.Embedding
  scale: jax.Array

  def __init__(self, key):
    self.weight, self.kernel = jnp.ones((4, 8)), jnp.ones((6, 4))
    self.table, self.scale = equinox.nn.Embedding(11, 8, key=key), jnp.ones((5, 6))

  def __call__(self, tokens):
    return (jax.vmap(jax.vmap(self.table))(tokens) @ self.weight.T) @ self.kernel.T * self.scale


class Pair(typing.NamedTuple):
  """A `Pair` is a layer in a NamedTuple, whose `weight` may be in any layout."""

  weight: typing.Any
  bias: typing.Any


class Normed(equinox.Module):
  """A `Normed` is a block whose norms and tables have names that say nothing."""

  a: equinox.nn.LayerNorm
  b: equinox.nn.Linear
  c: equinox.nn.RMSNorm

  def __init__(self, key):
    self.a, self.b, self.c = equinox.nn.LayerNorm(8), equinox.nn.Linear(8, 8, key=key), equinox.nn.RMSNorm(8)

  def __call__(self, x):
    return self.c(self.b(self.a(x)))


def layers_of(model, x):
  return jax.lax.scan(lambda x, layer: (layer(x), None), x, model)[0]


def conv2d(numbers, **options):
  return lambda w, x: jax.lax.conv_general_dilated(x, w, (1, 1), 'SAME', dimension_numbers=numbers, **options)


TORCH, HAIKU = conv2d(('NCHW', 'OIHW', 'NCHW')), conv2d(('NHWC', 'HWIO', 'NHWC'))
LINEAR = lambda p, x: x @ p['weight'].T + p.get('bias', 0)
IMAGE, MAPS, X = F32(2, 6, 6, 4), F32(4, 6, 6), F32(2, 8)


def flat(tree, join='.'):
  """Returns a dict of joined names, as `safetensors.numpy.load_file` gives."""
  return {path.replace('/', join): leaf for path, leaf in zip(*trees.flatten(tree)[:2])}


class Scanned(nn.Module):
  """A `Scanned` is a stack of layers of Linen in one scan."""

  layer: typing.Callable[[], nn.Module]

  @nn.compact
  def __call__(self, x):
    body = lambda layer, x, _: (layer(x), None)
    return nn.scan(body, variable_axes={'params': 0}, split_rngs={'params': True}, length=3)(self.layer(), x, None)[0]


# Each case holds the program, and the paths (or their tails) that the conventions know.
CASES = {
    'linen dense': (lambda: linen(lambda: nn.Dense(4), X), ['Dense_0/kernel']),
    'linen frozen': (lambda: linen(lambda: nn.Dense(4), X, frozen=True), ['Dense_0/kernel']),
    'linen conv': (lambda: linen(lambda: nn.Conv(8, (3, 3)), IMAGE), ['Conv_0/kernel']),
    'linen conv without a bias': (lambda: linen(lambda: nn.Conv(8, (3, 3), use_bias=False), IMAGE), ['Conv_0/kernel']),
    'linen depthwise': (lambda: linen(lambda: nn.Conv(4, (3, 3), feature_group_count=4), IMAGE), ['Conv_0/kernel']),
    'linen conv in space': (lambda: linen(lambda: nn.Conv(3, (2, 2, 2)), F32(2, 4, 4, 4, 2)), ['Conv_0/kernel']),
    'linen conv on a line': (lambda: linen(lambda: nn.Conv(3, (2,)), F32(2, 4, 8)), []),
    'linen conv by place': (lambda: linen(lambda: nn.ConvLocal(3, (2, 2), use_bias=False), IMAGE), []),
    'linen transposed': (lambda: linen(lambda: nn.ConvTranspose(8, (3, 3)), IMAGE), []),
    'linen transposed kernel': (lambda: linen(lambda: nn.ConvTranspose(8, (3, 3), transpose_kernel=True), IMAGE), []),
    'linen transposed kernel by another name': (
        lambda: linen(lambda: nn.ConvTranspose(8, (3, 3), transpose_kernel=True, name='conv_up'), IMAGE), []),
    'linen attention': (lambda: linen(lambda: nn.MultiHeadDotProductAttention(2), F32(2, 5, 8)), []),
    'linen fused': (lambda: linen(lambda: nn.DenseGeneral((3, 2, 4)), X), []),
    'linen einsum': (lambda: linen(lambda: nn.Einsum((4, 8), 'bi,oi->bo', use_bias=False), X), []),
    'linen lstm': (lambda: linen(lambda: nn.OptimizedLSTMCell(4), X, carry=True), ['kernel']),
    'linen scan': (lambda: (lambda m: (m.apply, jax.eval_shape(m.init, KEY, X), X))(Scanned(lambda: nn.Dense(8))), []),
    'linen scan of convs': (lambda: (lambda m: (m.apply, jax.eval_shape(m.init, KEY, IMAGE), IMAGE))(
        Scanned(lambda: nn.Conv(4, (3, 3), use_bias=False))), []),
    'linen embedding': (lambda: linen(lambda: nn.Embed(11, 8), TOKENS), []),
    'nnx linear': (lambda: of_nnx(lambda rngs: nnx.List([nnx.Linear(8, 4, rngs=rngs)])[0], X), ['kernel']),
    'nnx attention': (lambda: of_nnx(lambda rngs: nnx.MultiHeadAttention(
        2, 8, decode=False, rngs=rngs), F32(2, 5, 8)), []),
    'nnx conv': (lambda: of_nnx(lambda rngs: nnx.Conv(4, 8, (3, 3), rngs=rngs), IMAGE), []),  # no layer has a name
    'equinox linear': (lambda: of_equinox(lambda key: equinox.nn.Linear(8, 4, key=key), F32(8)), ['weight']),
    'equinox mlp': (lambda: of_equinox(lambda key: equinox.nn.MLP(8, 4, 6, 2, key=key), F32(8)), ['weight']),
    'equinox conv': (lambda: of_equinox(lambda key: equinox.nn.Conv2d(4, 3, 3, key=key), MAPS), ['weight']),
    'equinox conv on a line': (lambda: of_equinox(lambda key: equinox.nn.Conv1d(4, 3, 3, key=key), F32(4, 6)),
                               ['weight']),
    'equinox grouped conv': (lambda: of_equinox(lambda key: equinox.nn.Conv2d(4, 6, 3, groups=2, key=key), MAPS),
                             ['weight']),
    'equinox transposed': (lambda: of_equinox(lambda key: equinox.nn.ConvTranspose2d(4, 3, 3, key=key), MAPS), []),
    'equinox attention': (lambda: of_equinox(lambda key: equinox.nn.MultiheadAttention(2, 8, key=key), F32(5, 8),
                                             lambda model, x: model(x, x, x)), ['weight']),
    'equinox lstm': (lambda: of_equinox(lambda key: equinox.nn.LSTMCell(8, 4, key=key), F32(8),
                                        lambda model, x: model(x, (jnp.ones(4), jnp.ones(4)))), []),
    'equinox gru': (lambda: of_equinox(lambda key: equinox.nn.GRUCell(8, 4, key=key), F32(8),
                                       lambda model, x: model(x, jnp.ones(4))), []),
    'equinox stack': (lambda: of_equinox(stacked(lambda key: equinox.nn.Linear(8, 8, key=key)), F32(8), layers_of), []),
    'equinox stack of convs': (lambda: of_equinox(
        stacked(lambda key: equinox.nn.Conv2d(4, 4, 3, padding=1, use_bias=False, key=key)), MAPS, layers_of), []),
    'equinox stack of convs on a line': (lambda: of_equinox(
        stacked(lambda key: equinox.nn.Conv1d(4, 4, 3, padding=1, use_bias=False, key=key)), F32(4, 6), layers_of), []),
    'equinox stack of blocks': (lambda: of_equinox(stacked(Normed), F32(8), layers_of), []),
    'equinox module of a user': (lambda: of_equinox(Mine, TOKENS), ['weight']),
    'haiku': (lambda: (lambda p, x: x @ p['mlp/~/linear_0']['w'] + p['mlp/~/linear_0']['b'],
                       {'mlp/~/linear_0': {'w': F32(8, 4), 'b': F32(4)}}, X), ['w']),
    'haiku conv': (lambda: (lambda p, x: HAIKU(p['net/conv2_d']['w'], x), {'net/conv2_d': {'w': F32(3, 3, 4, 8)}},
                            IMAGE), ['w']),
    'haiku transposed': (lambda: (lambda p, x: jax.lax.conv_transpose(
        x, p['conv2_d_transpose']['w'], (1, 1), 'SAME', transpose_kernel=True,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC')), {'conv2_d_transpose': {'w': F32(3, 3, 8, 4)}}, IMAGE), []),
    'torch linear': (lambda: (lambda p, x: LINEAR(p['fc'], x), {'fc': {'weight': F32(4, 8), 'bias': F32(4)}}, X),
                     ['weight']),
    'torch flat': (lambda: (lambda p, x: x @ p['layers.0.q_proj.weight'].T,
                            flat({'layers': {'0': {'q_proj': {'weight': F32(4, 8)}}}}), X), ['q_proj.weight']),
    'torch conv': (lambda: (lambda p, x: TORCH(p['features.0.weight'], x) + p['features.0.bias'][:, None, None],
                            {'features.0.weight': F32(3, 4, 2, 2), 'features.0.bias': F32(3)}, F32(2, 4, 6, 6)),
                   ['features.0.weight']),
    'torch transposed': (lambda: (lambda p, x: conv2d(('NCHW', 'IOHW', 'NCHW'))(p['up']['weight'], x),
                                  {'up': {'weight': F32(4, 3, 2, 2)}}, F32(2, 4, 6, 6)), []),
    'torch transposed with a bias': (lambda: (
        lambda p, x: conv2d(('NCHW', 'IOHW', 'NCHW'))(p['0']['weight'], x) + p['0']['bias'][:, None, None],
        {'0': {'weight': F32(4, 3, 2, 2), 'bias': F32(3)}}, F32(2, 4, 6, 6)), []),
    'torch gpt-2': (lambda: (lambda p, x: x @ p['h.0.mlp.c_fc.weight'] + p['h.0.mlp.c_fc.bias'],
                             {'h.0.mlp.c_fc.weight': F32(8, 4), 'h.0.mlp.c_fc.bias': F32(4)}, X), []),
    'flax gpt-2': (lambda: (lambda p, x: x @ p['c_proj']['kernel'].T, {'c_proj': {'kernel': F32(8, 8)}}, X), []),
    'torch lstm': (lambda: (lambda p, x: x @ p['weight_ih_l0'].T, {'weight_ih_l0': F32(16, 8), 'bias_ih_l0': F32(16)},
                            X), []),
    'torch attention': (lambda: (lambda p, x: x @ p['attn']['in_proj_weight'].T, {
        'attn': {'in_proj_weight': F32(24, 8)}}, X), []),
    'torch stack': (lambda: (lambda p, x: jnp.einsum('li,loi->lo', x, p['fc']['weight']) + p['fc']['bias'],
                             {'fc': {'weight': F32(2, 4, 8), 'bias': F32(2, 4)}}, X), []),
    'a dict that is no torch': (lambda: (lambda p, x: x @ p['weight'] + p['bias'], {
        'weight': F32(8, 4), 'bias': F32(4)}, X), []),
    'plain': (lambda: (lambda p, x: x @ p['w'] + p['b'], {'w': F32(8, 4), 'b': F32(4)}, X), ['w']),
    'plain lists': (lambda: (lambda p, x: x @ p[0][0] + p[0][1], [(F32(8, 4), F32(4))], X), []),
    'named tuples': (lambda: (lambda p, x: x @ p.weight + p.bias, Pair(F32(8, 8), F32(8)), X), []),
    'one array': (lambda: (lambda w, x: x @ w, F32(8, 4), X), []),
}


@functools.cache
def read(case):
  """Returns the parameters of a case, and the contractions of its program."""
  apply, params, x = CASES[case][0]()
  return params, sparsejax.contractions(apply, params, x)


@pytest.mark.parametrize('case', CASES)
def test_a_convention_says_what_the_program_says_or_nothing(case, standard_promotion):
  (params, found), known = read(case), CASES[case][1]
  axes = trees.axes_by_path('f', None, params)
  for path in found:
    expected = any(path.endswith(tail) for tail in known)
    assert (axes[path].source == 'convention') == expected, path
    if expected:
      wide = lambda axes, shape: [tuple(a for a in group if shape[a] > 1) for group in axes[:4]]
      assert wide(axes[path], found.shapes[path]) == wide(found[path], found.shapes[path]), path
  sparse = trees.over(trees.matrices, params)
  picked = [path for path, leaf in zip(*trees.flatten(params)[:2]) if sparse(path, leaf)]
  assert {*picked} <= {*found}, 'what is not contracted stays dense'


@pytest.mark.parametrize('case', CASES)
def test_with_a_program_the_sparse_leaves_are_those_that_it_contracts(case, standard_promotion):
  params, found = read(case)
  where = trees.default_where(found)
  picked = [path for path, leaf in zip(*trees.flatten(params)[:2]) if where(path, leaf)]
  assert {*picked} == {path for path in found if path not in found.lookups}


# Refusals: of patterns, flows and rules that lie along axes, all leaves at once.

UNKNOWN = {'a': {'weight_ih': jnp.ones((16, 8))}, 'b': {'qkv': jnp.ones((8, 3, 8))}, 'c': {'kernel': jnp.ones((8, 8))}}
GIVEN = {'a/weight_ih': Axes((1,), (0,)), 'qkv': Axes((0,), (1, 2))}
ALONG_AXES = {
    'n_m': lambda **options: recipes.ste(SGD, NM(2, 4), **options),
    'stages': lambda **options: recipes.sdgf_stepwise(SGD, NM(2, 4), total_steps=9, **options),
    'block': lambda **options: recipes.static_sparse(SGD, 0.5, pattern=Block((4, 4)), key=KEY, **options),
    'channel': lambda **options: recipes.static_sparse(SGD, 0.5, pattern=Channel(), key=KEY, **options),
    'a dict': lambda **options: recipes.ste(SGD, {'c/*': Unstructured(0.5), '**': NM(2, 4)}, **options),
    'soft thresholds by row': lambda **options: recipes.st3(SGD, 0.5, total_steps=9, **options),
    'the edge of chaos': lambda **options: recipes.robust_at_init(
        SGD, 0.5, loss=lambda params: sum(jnp.sum(w) for w in jax.tree.leaves(params)), allow_empty=True, **options),
}


@pytest.mark.parametrize('make', ALONG_AXES.values(), ids=ALONG_AXES)
def test_what_lies_along_axes_refuses_unknown_axes_of_all_leaves_at_once(make):
  with pytest.raises(ValueError) as refusal:
    make().init(UNKNOWN)
  text = str(refusal.value)
  for part in ("'a/weight_ih' of shape (16, 8)", "'b/qkv' of shape (8, 3, 8)", 'axes=sj.contractions(apply, params, x)',
               'sj.types.Axes(contracted=(0,), output=(1,))', "where=sj.trees.all_but('a/weight_ih', 'b/qkv')"):
    assert part in text
  assert 'c/kernel' not in text
  leaves = make(axes=GIVEN).init(UNKNOWN).plan.leaves
  assert [(leaf.axes.contracted, leaf.axes.source) for leaf in leaves] == [
      ((1,), 'given'), ((0,), 'given'), ((0,), 'convention')]
  state = make(where=trees.all_but('a/weight_ih', 'b/qkv')).init(UNKNOWN)
  assert [leaf.path for leaf in state.plan.leaves] == ['c/kernel']


def test_without_axes_a_leaf_is_one_matrix_without_layers():
  params = {'w0': jax.random.normal(KEY, (3, 8, 8)), 'w1': jax.random.normal(KEY, (8, 4))}
  tx = recipes.magnitude_at_init(SGD, 0.75)
  state = tx.init(params)
  assert {leaf.axes.source for leaf in state.plan.leaves} == {'unknown'}
  masks = sparsejax.masks(params, state)
  assert int(masks['w0'].sum()) + int(masks['w1'].sum()) == 56
  sparsejax.check(sparsejax.project(params, state), state)
  assert str(sparsejax.report(params, state)).count('- (unknown)') == 2
  shares = allocation.erk(params, 0.9)
  densities = [1 - shares[path] for path in params]
  assert densities[0] / densities[1] == pytest.approx((3 + 8 + 8) / (3 * 8 * 8) * (8 * 4) / (8 + 4))
  turned = recipes.bdwp(SGD, NM(2, 4), axes={'w1': Axes((0,), (1,))}, where=trees.named('w1')).init(params)
  (leaf,) = turned.plan.leaves
  with pytest.raises(ValueError, match="bdwp_backward: parameter 'w1' .*nor container says"):
    unknown = leaf.__class__(leaf.path, leaf.shape, Axes((), (0, 1), source='unknown'), leaf.pattern, leaf.asked)
    plan = turned.plan.__class__((unknown,), turned.plan.flow)
    states.bdwp_backward(params, turned._replace(plan=plan))


def test_a_pattern_of_ones_own_reads_the_source():
  class Mine(Unstructured):
    def validate(self, shape, axes):
      return f'{shape} has unknown axes.' if axes.source == 'unknown' else None

  with pytest.raises(ValueError, match=r"'a/weight_ih' of shape \(16, 8\): \(16, 8\) has unknown axes."):
    recipes.magnitude_at_init(SGD, 0.5, pattern=Mine()).init(UNKNOWN)


# Reports and checks say from where the axes are, and compare them with a program's.


def test_check_compares_the_axes_of_a_state_with_those_of_the_program():
  apply = lambda p, x: p['head']['kernel'].T @ (p['fc']['kernel'] @ x)  # `fc` is stored as [out, in]
  params, x = {'fc': {'kernel': jax.random.normal(KEY, (8, 8))}, 'head': {'kernel': jnp.ones((8, 4))}}, jnp.ones((8, 1))
  axes = sparsejax.contractions(apply, params, x)
  state = recipes.ste(SGD, NM(2, 4)).init(params)
  point = sparsejax.project(params, state)
  assert [row.axes.source for row in sparsejax.check(point, state).rows] == ['convention', 'convention']
  with pytest.raises(ValueError, match=r"check: 1 of 2 .*\n.*fc/kernel \(8, 8\): its masks were made along contracted "
                                       r"\(0,\), output \(1,\) \(convention\), and the program has contracted \(1,\)"):
    sparsejax.check(point, state, axes=axes)
  with pytest.raises(ValueError, match='fc/kernel .*groups keep more than 2 of 4'):
    sparsejax.check(point, NM(2, 4), axes=axes)
  state = recipes.ste(SGD, NM(2, 4), axes=axes).init(params)
  point = sparsejax.project(params, state)
  for second in (state, '2:4', NM(2, 4), {'**': NM(2, 4)}):
    found = sparsejax.check(point, second, axes=axes)
    assert [row.axes.source for row in found.rows] == ['traced', 'traced'] and '1 (traced)' in str(found)
  assert sparsejax.check(point, pattern=NM(2, 4), axes=axes).rows == found.rows
  with pytest.raises(ValueError, match='two patterns were asked'):
    sparsejax.check(point, NM(2, 4), pattern=NM(2, 4))


def test_check_names_what_the_program_does_not_contract_or_contracts_in_two_ways():
  params = {'table': jnp.ones((8, 8)), 'both': jnp.ones((8, 8)), 'w': jnp.ones((8, 8))}
  apply = lambda p, tokens: p['table'][tokens] @ p['both'] @ p['both'].T @ p['w']
  axes = sparsejax.contractions(apply, params, jnp.zeros(2, jnp.int32))
  state = recipes.magnitude_at_init(SGD, 0.5, allocation=allocation.uniform, where=trees.named('both', 'table', 'w'),
                                    axes={path: Axes((0,), (1,)) for path in params}).init(params)
  rows = {row.path: row.problem for row in sparsejax.report(sparsejax.project(params, state), state, axes=axes).rows}
  assert 'contracts it nowhere (gather' in rows['table'] and 'one mask cannot follow both' in rows['both']
  assert not rows['w']


def test_a_report_lists_what_may_be_a_lookup_table():
  names = ('foo', 'q_proj', 'lm_head', 'gate', 'wte', 'layers.0.fc1', 'x.1')
  params = {f'{name}.weight': jnp.ones((8, 4)) for name in names}
  assert trees.undecided(params) == ['foo.weight', 'x.1.weight']
  report = sparsejax.report(params)
  assert 'wte.weight' not in [row.path for row in report.rows]
  assert "which may be lookup tables: 'foo.weight', 'x.1.weight'" in str(report)
  state = recipes.ste(SGD).init(params)
  assert "which may be lookup tables: 'foo.weight', 'x.1.weight'" in str(sparsejax.report(params, state))


def test_an_exclusion_looks_at_the_whole_tree_as_the_default_does():
  """Tests that tables and stacked norms in fields whose names say nothing stay dense under `all_but`, too."""
  _, params, _ = CASES['equinox stack of blocks'][0]()
  assert trees.select('f', trees.all_but('b/bias'), params) == [False, False, True, False, False, False]
  assert trees.select('f', trees.all_but('a/*', where=trees.all_but('c/*')), params).count(True) == 1
  _, params, _ = CASES['equinox module of a user'][0]()
  paths = trees.flatten(params)[0]
  assert [path for path, pick in zip(paths, trees.select('f', trees.matrices, params)) if pick] == ['weight', 'kernel']


@pytest.mark.parametrize('container', [dict, core.freeze, lambda tree: list(tree.values())])
def test_vectors_in_disguise_stay_dense(container):
  """Tests vectors of any number of axes: probes, class tokens, scales; a parent's name decides nothing."""
  draw = lambda *shape: jax.random.normal(KEY, shape)
  params = container({'MAPHead_0': {'probe': draw(1, 1, 64)}, 'policy': {'log_std': draw(1, 8), 'tokens': draw(4, 8)},
                      'NormedMLP_0': {'Dense_0': {'kernel': draw(16, 16), 'bias': draw(16)}}})
  tx = recipes.rigl(SGD, 0.9, total_steps=9, key=KEY, allocation=allocation.uniform)
  point = sparsejax.project(params, tx.init(params))
  zeros = [path for path, w in zip(*trees.flatten(point)[:2]) if (w == 0).any()]
  assert [path.split('/', 1)[1] for path in zeros] == ['Dense_0/kernel']


def test_a_query_is_a_set_of_vectors_unless_a_key_or_a_value_is_beside_it():
  square = jnp.zeros((8, 8))
  params = {'attention': dict.fromkeys(('key', 'query', 'value'), square), 'decoder': {'query': square, 'mlp': square}}
  assert trees.select('f', trees.matrices, params) == [True, True, True, True, False]


def test_a_bias_beside_tells_a_layer_from_a_lookup_table():
  table, bias = jnp.zeros((8, 4)), jnp.zeros(8)
  params = {'time_embed': {'weight': table, 'bias': bias}, 'tok_embed': {'weight': table}, 'wte': {'kernel': table}}
  assert trees.select('f', trees.matrices, params) == [False, True, False, True]


def test_a_convention_from_outside_is_one_line(monkeypatch):
  mine = conventions.Convention(('mix',), (2,), lambda place: place.layer == 'mixer', 'out in')
  monkeypatch.setattr(conventions, 'TABLE', [*conventions.TABLE, mine])
  assert trees.conventional_axes('mixer/mix', (4, 8)) == Axes((1,), (0,))
  assert trees.conventional_axes('other/mix', (4, 8)).source == 'unknown'
