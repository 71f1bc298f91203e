"""Which leaves are picked, and what is refused: globs that match nothing, and all bad leaves at once, with a remedy."""

import jax
import jax.numpy as jnp
import optax
import pytest

import sparsejax as sj
from sparsejax import states, trees

SHAPES = {'conv_stem': {'kernel': (3, 3, 3, 16)}, 'conv_depthwise': {'kernel': (3, 3, 1, 16)},
          'conv_point': {'kernel': (1, 1, 16, 16)}, 'fc': {'kernel': (24, 8), 'bias': (8,)}, 'kernel': (7, 4),
          'tables': {'kernel': (8, 8)}}
CONVOLUTIONS = jax.tree.map(lambda shape: jnp.ones(shape), SHAPES, is_leaf=lambda x: isinstance(x, tuple))
BAD = {'conv_stem/kernel', 'conv_depthwise/kernel', 'kernel'}
WHERES = {
    'default': None, 'globs': trees.named('kernel'), 'exclusions': trees.all_but('tables/*'),
    'both': trees.all_but('tables/*', where=trees.all_but('conv_stem/*', where=trees.named('kernel'))),
    'a function': lambda path, leaf: leaf.ndim > 1, 'exclusions of a function': trees.all_but(
        'tables/*', where=lambda path, leaf: leaf.ndim > 1),
    'a prefix': {key: key != 'tables' for key in SHAPES} | {'fc': {'kernel': True, 'bias': False}},
}


@pytest.mark.parametrize('what', WHERES)
@pytest.mark.parametrize('pattern, reasons', [(sj.NM(2, 4), 3), (sj.Block((8, 4), 0.5), 3)])
def test_one_refusal_names_all_leaves_and_ends_in_a_line_that_works(what, pattern, reasons):
  where = WHERES[what]
  picked = {path for path, pick in zip(trees.flatten(CONVOLUTIONS)[0], trees.select(
      'f', trees.matrices if where is None else where, CONVOLUTIONS)) if pick}
  with pytest.raises(ValueError) as refusal:
    sj.recipes.ste(optax.sgd(0.1), pattern, where=where).init(CONVOLUTIONS)
  text = str(refusal.value)
  *_, line = text.splitlines()
  for path in BAD & picked:
    assert text.count(f'{path!r} of shape') == 1
  assert line.startswith('where=sj.trees.') and text.count('2:4 needs') <= reasons
  pasted = eval(line.removeprefix('where='), {'sj': sj})
  state = sj.recipes.ste(optax.sgd(0.1), pattern, where=pasted).init(CONVOLUTIONS)
  assert {leaf.path for leaf in states.find(state)[0].plan.leaves} == picked - BAD


def test_dtypes_and_ranks_are_refused_for_all_leaves_at_once():
  params = {'a': jnp.ones((8, 4), jnp.float8_e4m3fn), 'w': jnp.ones((8, 4)), 'c': jnp.ones((8, 2), jnp.float8_e4m3fn)}
  with pytest.raises(ValueError, match=r"parameters 'a' of shape \(8, 4\), 'c' of shape \(8, 2\): .*\n.*\n"
                                       r"where=sj.trees.all_but\('a', 'c'\)$"):
    sj.recipes.ste(optax.sgd(0.1)).init(params)
  with pytest.raises(ValueError, match=r"'a' of shape .*, 'b' of shape .*int8 is not floating"):
    trees.select('f', lambda path, leaf: True, {'a': jnp.ones(3, jnp.int8), 'b': jnp.ones(4, jnp.int8)})


@pytest.mark.parametrize('where, hint', [
    (trees.all_but('lO/kernel'), "names 'lO/kernel', which matches no parameter.*Did you mean .*'l0/kernel'"),
    (trees.named('l0/kernel', 'l2/kernel'), "names 'l2/kernel', .*Did you mean 'l./kernel' or"),
    (trees.all_but('l1/*', where=trees.named('l0/kernel', 'l1/kernle')), "names 'l1/kernle'"),
    (trees.all_but('l0/kernel', where=trees.all_but('haed')), "names 'haed', .*Did you mean 'head'"),
    (trees.all_but('/kernel'), "names '/kernel'"),
    (trees.named('l2/kernel'), "picks no parameter. Paths look like 'head', 'l0/kernel'.*Did you mean 'l")])
def test_a_glob_that_matches_nothing_is_refused_in_exclusions_as_in_inclusions(where, hint):
  params = {'l0': {'kernel': jnp.ones((4, 4))}, 'l1': {'kernel': jnp.ones((4, 4))}, 'head': jnp.ones((4, 4))}
  with pytest.raises(ValueError, match=f'f: `where` {hint}'):
    trees.select('f', where, params)


def test_a_masked_leaf_has_a_path_and_an_absolute_glob_matches_whole_paths():
  params = {'a': {'kernel': jnp.ones((4, 4))}, 'kernel': jnp.ones((4, 4)), 'head': trees.DENSE, 'none': None}
  assert trees.select('f', trees.all_but('head', '/kernel', 'none'), params) == [True, False]
  assert trees.matches('/a/b', 'a/b') and not trees.matches('/b', 'a/b') and trees.matches('/**/b', 'a/c/b')


def test_a_leaf_of_size_zero_is_never_picked():
  params = {'a': jnp.ones((4, 4)), 'b': jnp.ones((0, 4))}
  assert trees.select('f', lambda path, leaf: True, params) == [True, False]
  with pytest.raises(ValueError, match='picks no parameter'):
    trees.select('f', trees.named('b'), params)
