"""Tests the failures that users of other pruning libraries have reported, by the number of the public issue."""

import importlib
import inspect
import re

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import sparsejax as sj
from sparsejax import calibration, scores
from sparsejax.post_training import Recipe, repairs

# Where each reported failure is tested: names of tests, of this file or of the module that is named.
CASES = {
    'llm-compressor #142, EvoPress #6: too few samples': 'test_repairs.test_a_hessian_without_a_factor_is_damped',
    'SparseLLM #20: NaN in the Hessian': 'test_refusals.test_is_refused',
    'llm-compressor PR 1578: the identity for a factor': 'test_refusals.test_is_refused',
    'keras #23532: dead features': 'test_repairs.test_dead_inputs_are_pruned_first',
    'llm-compressor PR 2826: experts without tokens': 'test_pruning.test_an_expert_without_tokens',
    'llm-compressor PR 2877: all tokens to all experts': 'test_pruning.test_an_expert_without_tokens',
    'transformers #16283: tied tables': 'test_pruning.test_a_tied_embedding_stays_dense',
    'llm-compressor PR 157: all layers estimated alike': 'test_cases.test_the_memory_is_that_of_the_largest_layer',
    'nncf #1930: a sort of all weights': 'test_cases.test_the_global_allocation_sorts_nothing',
    'sparseml #2281, #2323: zeros lost in rounding': 'test_cases.test_zeros_keep_every_bit_through_every_path',
    'sparseml #2222: revived zeros': 'test_refusals.test_weights_that_are_pruned_already_stay_so',
    'sparseml #678, #589: ties at a threshold': 'test_cases.test_equal_scores_leave_the_count_exact',
    'sparseml #1974: padding in the statistics': 'test_refusals.test_garbage_in_the_padding_changes_nothing',
    'wanda #48, #51, #67: arguments that are None': 'test_pruning.test_arguments_of_all_kinds',
    'keras #23512: statistics that were never collected': 'test_pruning.test_nothing_that_was_given_is_changed',
    'onnxsim #901: merged projections': 'test_pruning.test_every_kind_of_product',
    'gemma #480: axes from a name': 'test_refusals.test_is_refused',
    'llm-compressor #91: ignored layers': 'test_refusals.test_what_is_not_picked_is_the_same_object',
    'llm-compressor PR 2748: a swallowed batch': 'test_pruning.test_arguments_of_all_kinds',
    'MoE-Quant #9: a shared Hessian that changes': 'test_pruning.test_statistics_are_shared',
    'mlx-lm #1880: an index inside of a group': 'test_repairs.test_counts_are_exact',
    'llm-compressor #1241: a file that lacks a tensor': 'test_cases.test_a_packed_file_of_a_pruned_model',
    'sparsegpt #12, #43: the square of the diagonal': 'test_repairs.test_sparsegpt_is_the_authors',
    'llm-compressor #679, #876: masks guessed from zeros': 'test_refusals.test_weights_that_are_pruned_already_stay_so',
}


def test_every_reported_failure_has_a_test():
  assert len(CASES) == 24
  for place in CASES.values():
    module, name = place.split('.')
    tests = importlib.import_module(f'tests.post_training.{module}')
    assert any(found.startswith(name) for found, _ in inspect.getmembers(tests, inspect.isfunction)), place


def drawn(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


ALL = sj.trees.named('*')
GRAM = Recipe(sj.NM(2, 4), score=scores.wanda, statistic=calibration.gram)


def test_the_memory_is_that_of_the_largest_layer():
  """Adds small layers to a large one: only their results are added. The refusal tells the number before all work."""
  def need(*sizes):
    params = {str(i): jnp.ones(shape) for i, shape in enumerate(zip(sizes, sizes[1:]))}

    def chain(p, x):
      for i in range(len(p)):
        x = x @ p[str(i)]
      return x

    with pytest.raises(ValueError, match='bytes are needed') as refused:
      sj.prune(chain, params, [drawn(0, 6, sizes[0])], GRAM, where=ALL, memory_limit=1)
    return int(re.search(r'about ([\d,]+) bytes', str(refused.value))[1].replace(',', ''))

  large = need(8, 64, 8)
  assert need(8, 64, 8, 8) - large == need(8, 8, 64, 8) - large == 64 * 5  # weights and masks of a small layer
  assert large > 64 * 64 * 4 * 2  # the Gram matrix of the large layer and its factor


def test_the_global_allocation_sorts_nothing(monkeypatch):
  def sort(*args, **kwargs):
    raise AssertionError('sorted')

  recipe = Recipe(sj.Unstructured(0.5), allocation=sj.allocation.global_())
  params = {'a': drawn(0, 8, 12), 'b': drawn(1, 12, 8)}
  for place, name in ((lax, 'sort'), (lax, 'top_k'), (jnp, 'sort'), (jnp, 'argsort')):
    monkeypatch.setattr(place, name, sort)
  result = sj.prune(lambda p, x: x @ p['a'] @ p['b'], params, [drawn(2, 4, 8)], recipe, where=ALL)
  assert sum(int(mask.sum()) for mask in result.masks.values()) == 96


@pytest.mark.parametrize('repair', [None, repairs.columns(8)], ids=['score', 'columns'])
def test_equal_scores_leave_the_count_exact(repair):
  w, x = jnp.sign(drawn(3, 20, 6)), jnp.tile(jnp.eye(20), (2, 1))
  recipe = Recipe(sj.Unstructured(0.6), score=None if repair else scores.wanda, statistic=calibration.gram,
                  repairs=(repair,) if repair else ())
  result = sj.prune(lambda p, x: x @ p['w'], {'w': w}, [x], recipe, where=ALL)
  assert int(result.masks['w'].sum()) == 48


FOUR_BITS = repairs.rounding(repairs.Grid(4))
PATHS = {
    'rounded in the sweep': lambda p: sj.recipes.sparsegpt(pattern=p, quantize=repairs.Grid(4)),
    'one by one, then rounded': lambda p: sj.recipes.obc(pattern=p, bits=4),
    'fitted, then rounded': lambda p: sj.recipes.wanda(pattern=p).then(repairs.least_squares(), FOUR_BITS),
    'rounded twice': lambda p: sj.recipes.sparsegpt(pattern=p, quantize=repairs.Grid(4)).then(FOUR_BITS),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('pattern', [sj.NM(2, 4), sj.Unstructured(0.5)], ids=str)
@pytest.mark.parametrize('path', PATHS)
def test_zeros_keep_every_bit_through_every_path(path, pattern, dtype):
  """Prunes and rounds, packs and unpacks, prunes once more: a pruned weight is +0.0 after each step."""
  recipe = PATHS[path](pattern)
  if path.startswith('fitted'):
    recipe = Recipe(recipe.pattern, None, recipe.score, calibration.gram, recipe.repairs)
  apply, x = lambda p, x: x @ p['w'].astype(jnp.float32), drawn(5, 48, 16)
  prune = lambda params, recipe: sj.prune(apply, params, [x], recipe, where=ALL)
  first = prune({'w': drawn(4, 16, 12).astype(dtype)}, recipe)
  away = ~np.asarray(first.masks['w'])
  form = sj.NM(2, 4) if isinstance(pattern, sj.NM) else sj.formats.TABLE['bitmask'].default_pattern
  axes = sj.contractions(apply, first.params, x)
  packed = sj.formats.unpack(sj.formats.pack(first.params, form, where=ALL, axes=axes))
  again = prune(first.params, sj.recipes.magnitude(0.75))
  for params in (first.params, packed, again.params):
    assert params['w'].dtype == dtype and away.sum() == 96
    assert not np.asarray(params['w']).view(np.uint16 if dtype == jnp.bfloat16 else np.uint32)[away].any()
  np.testing.assert_array_equal(packed['w'], first.params['w'])
  assert not np.any(np.asarray(again.masks['w']) & away) and int(again.masks['w'].sum()) == 48


def test_a_packed_file_of_a_pruned_model_has_every_tensor(tmp_path):
  """Prunes a tree of all kinds: a fused projection, experts, bfloat16, a tied table, vectors, a number."""
  params = {'table': drawn(0, 12, 8), 'qkv': {'kernel': drawn(1, 8, 3, 2, 4), 'bias': drawn(2, 3, 2, 4)},
            'layers': [drawn(3, 8, 8).astype(jnp.bfloat16)], 'experts': drawn(4, 2, 8, 8), 'steps': jnp.int32(7)}

  def apply(p, ids):
    x = p['table'][ids]
    q, k, v = jnp.einsum('btd,dshe->sbthe', x, p['qkv']['kernel']) + p['qkv']['bias'][:, None, None]
    x = (q * k + v).reshape(x.shape) @ p['layers'][0].astype(jnp.float32)
    return jnp.einsum('ebk,eko->ebo', x, p['experts']) @ p['table'].T

  ids = jnp.arange(10).reshape(2, 5)
  result = sj.prune(apply, params, [ids], Recipe(sj.NM(2, 4), score=scores.wanda, statistic=calibration.moments))
  changed = {path for path, mask in zip(*sj.trees.flatten(result.masks)[:2]) if mask is not True}
  assert changed == {'qkv/kernel', 'layers/0', 'experts'}
  packed = sj.formats.pack(result.params, sj.NM(2, 4), where=sj.trees.named(*changed),
                           axes=sj.contractions(apply, params, ids))
  sj.io.save(tmp_path / 'model.safetensors', packed)
  again = sj.formats.unpack(sj.io.load(tmp_path / 'model.safetensors'))
  (paths, before, _), (found, after, _) = map(sj.trees.flatten, (result.params, again))
  assert paths == found
  for path, one, other in zip(paths, before, after):
    assert np.asarray(one).dtype == np.asarray(other).dtype, path
    np.testing.assert_array_equal(one, other)
