"""Tests globs, predicates, prefix pytrees and conventions over every container; refusals name path and remedy."""

import typing

import equinox
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from sparsejax import errors, globs, trees
from sparsejax.types import Axes

GLOBS = [
    # glob, path, does it match the path or its tail
    ('kernel', 'kernel', True),
    ('kernel', 'Dense_0/kernel', True),
    ('kernel', 'Dense_0/kernel_scale', False),
    ('kernel', 'Dense_0/my_kernel', False),
    ('*kernel', 'Dense_0/my_kernel', True),
    ('mlp/*/kernel', 'params/block_3/mlp/Dense_0/kernel', True),
    ('mlp/*/kernel', 'mlp/Dense_0/kernel', True),
    ('mlp/*/kernel', 'mlp/kernel', False),
    ('mlp/*/kernel', 'mlp/a/b/kernel', False),
    ('mlp/**/kernel', 'mlp/a/b/kernel', True),
    ('mlp/**/kernel', 'mlp/kernel', True),
    ('mlp/**/kernel', 'mlpx/kernel', False),
    ('mlp/**', 'block/mlp/a/b', True),
    ('mlp/**', 'mlp', False),
    ('**', 'anything/at/all', True),
    ('*', 'a/b', True),  # the tail b
    ('a/*', 'a/b', True),
    ('a/*', 'a/b/c', False),
    ('block_?/w', 'block_1/w', True),
    ('block_?/w', 'block_12/w', False),
    ('block_?/w', 'block_/w', False),
    ('?', 'a/b', True),
    ('a?b', 'a/b', False),
    ('layers/0/weight', 'model/layers/0/weight', True),
    ('layers/0/weight', 'model/layers/10/weight', False),
    ('a.b/w', 'a.b/w', True),
    ('a.b/w', 'axb/w', False),  # a dot is a dot, not any character
    ('w[0]', 'w[0]', True),
    ('/mlp/kernel/', 'mlp/kernel', True),
    ('', 'w', False),
]


@pytest.mark.parametrize('glob, path, matched', GLOBS)
def test_globs_match_a_path_or_its_tail(glob, path, matched):
  assert trees.matches(glob, path) == matched
  assert trees.named('no/such', glob)(path, jnp.zeros((2, 2))) == matched


class Layer(typing.NamedTuple):
  weight: object
  bias: object


def test_paths_are_the_keys_joined():
  w = jnp.zeros((2, 2))
  tree = {'blocks': [Layer(w, None), (w, {'a b': w})], 'head': {1: w}}
  names, leaves, treedef = trees.flatten(tree)
  assert names == ['blocks/0/weight', 'blocks/1/0', 'blocks/1/1/a b', 'head/1']
  assert treedef == jax.tree.structure(tree) and all(a is b for a, b in zip(leaves, jax.tree.leaves(tree)))
  assert trees.flatten(w)[0] == ['']


def test_paths_are_alike_in_equinox_and_nnx():
  mlp = equinox.nn.MLP(2, 2, 3, 1, key=jax.random.key(0))
  linear = nnx.state({'mlp': nnx.Linear(2, 3, rngs=nnx.Rngs(0))})
  assert trees.flatten(equinox.filter(mlp, equinox.is_array))[0][:2] == ['layers/0/weight', 'layers/0/bias']
  assert trees.flatten(linear)[0] == ['mlp/bias', 'mlp/kernel']
  assert trees.path_name((jax.tree_util.DictKey('value'),)) == 'value'  # a parameter called so keeps its name
  assert trees.path_name((jax.tree_util.DictKey('a'), jax.tree_util.GetAttrKey('value'))) == 'a'


MATRICES = [
    ('block/mlp/kernel', (4, 4), True),
    ('conv/kernel', (3, 3, 4, 4), True),
    ('w', (4, 4), True),
    ('mlp/bias', (4,), False),
    ('attention/query/bias', (2, 4), False),
    ('out/bias_k', (4, 4), False),
    ('mlp/b', (4, 4), False),
    ('stack/LayerNorm_0/scale', (12, 4), False),
    ('bn/gamma', (2, 4), False),
    ('bn/beta', (2, 4), False),
    ('Embed_0/embedding', (100, 4), False),
    ('pos_embed', (1, 16, 4), False),
    ('cls_token', (1, 1, 4), False),
    ('pos_enc', (16, 4), False),
    ('rmsnorm/weight', (4, 4), False),
    ('ln_1/weight', (4, 4), False),
    ('input_layernorm/weight', (4, 4), False),
    ('NormedMLP_0/Dense_0/kernel', (4, 4), True),  # a parent's name decides nothing
    ('embeddings_encoder/layer/dense/kernel', (4, 4), True),
    ('token_mixer/kernel', (4, 4), True),
    ('MAPHead_0/probe', (1, 1, 64), False),
    ('decoder/queries', (100, 64), False),
    ('query_pos', (32, 64), False),
    ('decoder/query', (1, 8, 64), False),
    ('latent_array', (32, 64), False),
    ('soft_prompt', (8, 64), False),
    ('rel_pos_h', (27, 16), False),
    ('Lambda_re', (64, 32), False),
    ('time_mix_r', (5, 1, 1, 64), False),
    ('mu', (5, 1, 1, 64), False),  # vectors with axes that are there to be broadcast
    ('stack/kernel', (1, 64, 64), True),
    ('experts/wi_0', (1, 64, 128), True),
    ('attention/in_proj_weight', (1, 64, 64), True),
    ('embedding/kernel', (16, 16, 3, 64), True),  # the patches of a vision transformer
    ('time_embed/0/kernel', (64, 256), True),
    ('layer_scale', (1, 64), False),
    ('kernel', (64, 1), True),
    ('kernel', (1, 64), False),
    ('log_std', (2, 8), False),
    ('mixer.A_log', (16, 4), False),
    ('wte/weight', (100, 4), False),
    ('transformer.wpe.weight', (100, 4), False),
    ('tok/weight', (100, 4), False),
    ('model/embed_tokens/weight', (100, 4), False),
    ('pos', (16, 4), False),
    ('relative_position_bias_table', (49, 4), False),
    ('head/w', (4, 4), True),
    ('empty/w', (4, 0), False),
    ('mlp/scaled', (4, 4), True),
    ('mlp/weight_b', (4, 4), True),
    ('scalar', (), False),
]


@pytest.mark.parametrize('path, shape, sparse', MATRICES)
def test_the_default_is_matrices_by_rank_dtype_and_name(path, shape, sparse):
  assert trees.matrices(path, jnp.zeros(shape)) == sparse
  assert trees.matrices(path, jnp.zeros(shape, jnp.bfloat16)) == sparse
  assert not trees.matrices(path, jnp.zeros(shape, jnp.int8))


def test_all_but_takes_away():
  w = jnp.zeros((2, 2))
  where = trees.all_but('patch/kernel', 'head/*')
  assert [where(p, w) for p in ('patch/kernel', 'head/kernel', 'mlp/kernel', 'embed/w')] == [False, False, True, False]
  assert trees.all_but('head/*', where=lambda path, leaf: True)('embed/w', w)


PARAMS = {
    'a': {'kernel': jnp.zeros((4, 4)), 'bias': jnp.zeros((4,))},
    'b': [jnp.zeros((4, 4)), {'kernel': jnp.zeros((4, 4)), 'ids': jnp.zeros((4, 4), jnp.int32)}],
}
# In the order of the leaves: a/bias, a/kernel, b/0, b/1/ids, b/1/kernel.


@pytest.mark.parametrize('where, picked', [
    (trees.matrices, [0, 1, 1, 0, 1]),
    (trees.named('kernel'), [0, 1, 0, 0, 1]),
    (trees.named('b/0'), [0, 0, 1, 0, 0]),
    (lambda path, leaf: leaf.ndim == 1, [1, 0, 0, 0, 0]),
    ({'a': True, 'b': False}, [1, 1, 0, 0, 0]),
    ({'a': {'kernel': True, 'bias': False}, 'b': [True, {'kernel': False, 'ids': False}]}, [0, 1, 1, 0, 0]),
    ({'a': False, 'b': [True, {'kernel': True, 'ids': False}]}, [0, 0, 1, 0, 1]),
])
def test_where_is_a_predicate_or_a_prefix(where, picked):
  assert trees.select('f', where, PARAMS) == [bool(p) for p in picked]


@pytest.mark.parametrize('where', [trees.named('kernle'), lambda path, leaf: False, False, {'a': False, 'b': False}])
def test_where_that_picks_nothing_is_refused_with_the_paths_there_are(where):
  paths = "'a/bias', 'a/kernel', 'b/0', 'b/1/ids', 'b/1/kernel'"
  with pytest.raises(ValueError, match=f'recipe_x: `where` picks no parameter. Paths look like {paths}.*trees.named'):
    trees.select('recipe_x', where, PARAMS)


def test_where_that_picks_integers_is_refused():
  with pytest.raises(ValueError, match=r"f: parameter 'b/1/ids' of shape \(4, 4\): dtype int32 is not floating; leave"):
    trees.select('f', True, PARAMS)


@pytest.mark.parametrize('where', [{'a': True, 'c': True}, {'a': {'kernel': True}, 'b': True}, [True, False]])
def test_where_of_another_structure_is_refused(where):
  with pytest.raises(ValueError, match='f: `where` is a pytree, but no prefix of the parameters; .*trees.named'):
    trees.select('f', where, PARAMS)


@pytest.mark.parametrize('where', ['mlp/*/kernel', {'a': 'kernel', 'b': True}, {'a': 1, 'b': False}])
def test_where_that_is_no_bool_is_refused_and_not_taken_for_true(where):
  says = r'f: `where` holds .* which is no bool; (match paths with trees.named\(|give True or False)'
  with pytest.raises(ValueError, match=says):
    trees.select('f', where, PARAMS)


PATHS = ['block_0/mlp/kernel', 'block_1/mlp/kernel', 'head/kernel']


@pytest.mark.parametrize('value, expected', [
    (0.5, [0.5, 0.5, 0.5]),
    ({'**': 1}, [1, 1, 1]),
    ({'block_1/**': 1, 'mlp/kernel': 2, '**': 3}, [2, 1, 3]),  # the first that matches, not the tightest
    ({'mlp/*': 1, 'head/*': 2, '**': 3}, [1, 1, 2]),  # the rest is empty
    ({'head/kernel': None, 'mlp/*': 'x'}, ['x', 'x', None]),
])
def test_per_leaf_is_one_value_or_the_first_glob_that_matches(value, expected):
  assert trees.per_leaf('f', 'thing', value, PATHS) == expected


@pytest.mark.parametrize('value, message', [
    ({'mlp/*': 1}, r"f: `thing` says nothing about 'head/kernel'; add a last entry '\*\*' for the rest"),
    ({'head/kernle': 1, '**': 2},
     r"f: unknown path in `thing` 'head/kernle'. Did you mean 'head/kernel'.* Valid: block_0/mlp/kernel, "),
    ({}, r"says nothing about 'block_0/mlp/kernel', 'block_1/mlp/kernel', 'head/kernel'"),
    ({'**': 3, 'head/*': 1}, "f: `thing` has 'head/.', and for every such path an earlier entry decides.* move it up"),
])
def test_per_leaf_refuses_gaps_and_typos(value, message):
  with pytest.raises(ValueError, match=message):
    trees.per_leaf('f', 'thing', value, PATHS)


AXES = [
    # path, shape, contracted, output, spatial
    ('Dense_0/kernel', (3, 4), (0,), (1,), ()),
    ('w', (3, 4), (0,), (1,), ()),
    ('mlp/~/linear_0/w', (3, 4), (0,), (1,), ()),  # Haiku's names have slashes
    ('attention/query/kernel', (8, 8), (0,), (1,), ()),
    ('layers/0/weight', (4, 3), (1,), (0,), ()),
    ('model.layers.0.q_proj.weight', (4, 3), (1,), (0,), ()),
    ('conv/weight', (4, 3, 2, 2), (1,), (0,), (2, 3)),
    ('Conv_0/kernel', (3, 3, 4, 8), (2,), (3,), (0, 1)),
    ('DepthwiseConv/kernel', (3, 3, 1, 8), (2,), (3,), (0, 1)),
    ('conv2_d/w', (3, 3, 4, 8), (2,), (3,), (0, 1)),
    ('bias', (4,), (), (0,), ()),
    ('temperature', (), (), (), ()),
]
UNKNOWN = [
    ('blocks/Dense_0/kernel', (6, 3, 4)),  # a stack, or a fused projection
    ('MultiHeadDotProductAttention_0/query/kernel', (8, 2, 4)),
    ('attention/out/kernel', (2, 4, 8)),
    ('Conv_0/kernel', (3, 4, 8)),
    ('stem/kernel', (3, 3, 4, 8)),
    ('ConvNet_0/Dense_0/kernel', (2, 2, 4, 8)),  # a parent's name decides nothing
    ('stack/Conv_0/kernel', (6, 3, 3, 4, 8)),  # in space, or a stack in the plane
    ('ConvTranspose_0/kernel', (3, 3, 4, 8)),
    ('deconv1/weight', (4, 3, 2, 2)),
    ('up.weight', (4, 3, 2, 2)),
    ('ConvLocal_0/kernel', (5, 5, 4, 8)),
    ('Einsum_0/kernel', (4, 8)),
    *((f'h.0.{name}', (4, 8)) for name in ('attn.c_attn.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')),
    ('h/0/mlp/c_fc/kernel', (4, 8)),
    ('lstm/weight_ih_l0', (16, 8)),
    ('gru/weight_hh', (16, 8)),
    ('attn.in_proj_weight', (24, 8)),
    ('layers/weight', (6, 4, 3)),
    ('0/1', (4, 8)),
    ('W', (4, 8)),
]


@pytest.mark.parametrize('path, shape, contracted, output, spatial', AXES)
def test_the_conventions_give_every_axis_one_meaning(path, shape, contracted, output, spatial):
  axes = trees.conventional_axes(path, shape)
  assert axes == Axes(contracted, output, spatial, (), 'convention')
  assert sorted(sum(axes[:4], ())) == list(range(len(shape)))
  assert trees.axes_of('f', None, path, shape) == axes


@pytest.mark.parametrize('path, shape', UNKNOWN)
def test_what_has_a_second_reading_is_unknown(path, shape):
  assert trees.conventional_axes(path, shape) == Axes((), tuple(range(len(shape))), source='unknown')


@pytest.mark.parametrize('kernel, bias, known', [
    ((8, 4), (4,), True), ((8, 4), (1, 4), True), ((8, 4), (8,), False), ((8, 4), (2, 4), False),
    ((3, 3, 4, 8), (8,), True), ((3, 3, 8, 4), (8,), False), ((2, 3, 3, 4, 8), (8,), True),
    ((2, 3, 3, 4, 8), (2, 8), False)])
def test_a_bias_that_has_not_the_outputs_speaks_for_another_layout(kernel, bias, known):
  layer = {'kernel': jnp.zeros(kernel), 'bias': jnp.zeros(bias)}
  for tree in ({'conv1': layer}, {f'net.conv1.{key}': leaf for key, leaf in layer.items()}):
    (axes,) = (a for path, a in trees.axes_by_path('f', None, tree).items() if path.endswith('kernel'))
    assert (axes.source == 'convention') == known


TRACED = {
    'params/mlp/kernel': Axes((0,), (1,), source='traced'),
    'params/out/kernel': Axes((0, 1), (2,), source='traced'),
}


@pytest.mark.parametrize('path', ['params/mlp/kernel', 'mlp/kernel', 'model/params/mlp/kernel'])
def test_traced_axes_are_found_by_the_tail_of_the_path(path):
  assert trees.axes_of('f', TRACED, path, (4, 8)) == TRACED['params/mlp/kernel']


@pytest.mark.parametrize('path, shape, message', [
    ('kernel', (4, 8), r"f: parameter 'kernel' of shape \(4, 8\): its axes are not in `axes`: the path fits "
                       "'params/mlp/kernel', 'params/out/kernel'"),
    ('norm/scale', (4, 8), r"f: parameter 'norm/scale' of shape \(4, 8\).*none of 'params/mlp/kernel'.*Trace a program"
                           '.*leave it out of `where`'),
    ('mlp/kernel', (2, 4, 8), r"'mlp/kernel' of shape \(2, 4, 8\): the traced axes .* of another shape; trace again"),
])
def test_traced_axes_that_do_not_fit_are_refused(path, shape, message):
  with pytest.raises(ValueError, match=message):
    trees.axes_of('f', TRACED, path, shape)


def test_axes_that_a_user_wrote_need_not_name_all_leaves():
  tree = {'fc': {'kernel': jnp.zeros((4, 8))}, 'a': {'qkv': jnp.zeros((3, 4, 8))}, 'b': {'qkv': jnp.zeros((3, 4, 8))}}
  axes = trees.axes_by_path('f', {'*/qkv': Axes((1,), (0, 2))}, tree)
  assert {path: (a.contracted, a.source) for path, a in axes.items()} == {
      'a/qkv': ((1,), 'given'), 'b/qkv': ((1,), 'given'), 'fc/kernel': ((0,), 'convention')}
  with pytest.raises(ValueError, match="f: unknown path in `axes` 'c/qkv'. Did you mean 'b/qkv' or 'a/qkv'"):
    trees.axes_by_path('f', {'c/qkv': Axes((1,), (0, 2))}, tree)
  for wrong in (Axes(1, (0, 2)), Axes((1,), (0,)), Axes((1,), (0, 2, 2)), Axes((-2,), (0, 2)), ((1,), (0, 'out'))):
    with pytest.raises(ValueError, match=r"f: parameter 'a/qkv' of shape \(3, 4, 8\): .* put each axis into one of"):
      trees.axes_by_path('f', {'a/qkv': wrong}, tree)
  assert trees.axes_by_path('f', {'a/qkv': ((1,), (0, 2))}, {'a': {'qkv': trees.DENSE}, 'w': jnp.zeros((2, 2))})


def test_a_path_that_is_there_beats_its_tails():
  axes = {'kernel': Axes((0,), (1,)), 'mlp/kernel': Axes((1,), (0,))}
  assert trees.axes_of('f', axes, 'kernel', (4, 8)) == axes['kernel']
  assert globs.tails('mlp/kernel', axes) == ['mlp/kernel']
  assert globs.tails('a/mlp/kernel', axes) == ['kernel', 'mlp/kernel']


def test_dense_places_cost_nothing():
  tree = {'a': jnp.ones(2), 'b': trees.DENSE}
  assert len(jax.tree.leaves(tree)) == 1 and trees.is_dense(optax.MaskedNode()) and not trees.is_dense(None)


def test_unknown_names_come_with_the_closest_first():
  message = str(errors.unknown('f', 'recipe', 'sr_st', ['mdgf', 'sr_ste', 'ste']))
  assert message == "f: unknown recipe 'sr_st'. Did you mean 'sr_ste' or 'ste'? Valid: mdgf, sr_ste, ste."
  assert str(errors.unknown('f', 'key', 'zzz', [])) == "f: unknown key 'zzz'. Valid: none."
  assert str(errors.at_leaf('f', 'a/b', [2, 3], 'no. Do x.')) == "f: parameter 'a/b' of shape (2, 3): no. Do x."
  assert errors.some('abcd', most=2) == "'a', 'b', and 2 more" and errors.some(['a']) == "'a'"
