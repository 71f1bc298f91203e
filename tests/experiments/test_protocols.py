"""Runs the last run of each protocol for a few steps, reads finished seeds again, and refuses unknown keys."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pictures
import pytest
from films import package

from experiments import claims, configs, protocols
from experiments.data import madelon, movielens
from experiments.loop.stopping import StopRequest
from experiments.models import perceptron
from experiments.protocols import consensus, features, gaters, liked, searched, served
from sparsejax import metrics, trees
from sparsejax.structured import architecture

pytestmark = pytest.mark.usefixtures('standard_promotion')
JOBS = {'edges_digits': 'TEDDY-80', 'unlearning_digits': 'l1', 'transfer_digits': 'ticket-prompt',
        'posterior_digits': 'SSVI', 'clusters_digits': 'Turbo-VBI-runs', 'experts_digits': 'rectified',
        'zero_start_digits': 'ZerO-90', 'midpoints_digits': 'independent', 'recommended_films': 'DSL',
        'comet_films': 'COMET-search', 'features_digits': 'QuickSelection',
        'consensus_digits': 'consensus', 'estimators_digits': 'REINFORCE', 'nested_bits_digits': '3-by-load',
        'dass_digits': 'DASS'}
SMALLER = {'recommended_films': {'k': 5}, 'comet_films': {'experts': 4}, 'dass_digits': {'cells': 1, 'tuned': 2},
           'features_digits': {'trees': 2}}  # and a width of 8
DATA = {'train': pictures.drawn(132, 0), 'test': pictures.drawn(110, 1)}


def job(stem, run, **protocol):
  config = configs.load(claims.CONFIGS / f'{stem}.py', ['steps=6', 'seeds=(0,)', 'batch_size=8'])
  config = configs.merged(config, {} if stem.endswith('films') else {'data': DATA}).unlock()
  smaller = {'every': 2, 'sparsity': 0.5}
  config.recipes = {run: {key: smaller.get(key, value) for key, value in configs.plain(config)['recipes'][run].items()}}
  config.protocol = {**(configs.plain(config)['protocol']), 'width': 8, **SMALLER.get(stem, {}), **protocol}
  return config


def trained(config, workdir):
  with StopRequest() as request:
    return protocols.finished(config, workdir, request)


@pytest.mark.sampled(2)
@pytest.mark.parametrize('name', JOBS)
def test_a_run_gives_a_score_for_each_seed_and_is_read_again(name, tmp_path, monkeypatch):
  package(tmp_path / 'package', monkeypatch, drawn=100)
  run = JOBS[name]
  found = trained(job(name, run), tmp_path)[run]
  assert 0 <= found['test']['accuracy'][0] <= 1 and 0 <= found['quality'][0] <= 1 and found['seeds'] == [0]
  labels = {'transfer_digits': lambda y: y[y >= 5], 'edges_digits': lambda y: np.concatenate([y, DATA['train'][1]])}
  counts = np.bincount(labels.get(name, lambda y: y)(DATA['test'][1]))
  counts = np.maximum(counts - 5, 0) if name == 'edges_digits' else counts  # five of each class are known
  expected = counts.max() / counts.sum()
  if name.endswith('films'):  # the constant list of what is liked most, and the area under the diagonal
    pairs = [movielens.liked()[split][0] for split in ('train', 'test')]
    seen, truth = (movielens.table(each, movielens.counts(*pairs)) for each in pairs)
    told, liked_most = truth.any(1), np.broadcast_to(1.0 * seen.sum(0), seen.shape)
    expected = 0.5 if name == 'comet_films' else metrics.recall_at(*(
        jnp.asarray(each[told]) for each in (liked_most, seen, truth)), 5)
  assert found['labels']['chance'] == pytest.approx(float(expected))
  file = tmp_path / run / 'seed_0.json'
  record = json.loads(file.read_text())
  file.write_text(json.dumps({**record, 'found': {**record['found'], 'score': 0.125}}))
  other = job(name, run)
  other.optimizer.learning_rate = 0.5
  for left in ('outcome.json', None):  # Neither an outcome nor a seed of another config is taken.
    with pytest.raises(ValueError, match='optimizer.learning_rate: .* -> 0.5'):
      trained(other, tmp_path)
    if left:
      (tmp_path / run / left).unlink()
  assert trained(job(name, run), tmp_path)[run]['test']['accuracy'] == [0.125]


def test_unknown_names_and_keys_are_refused(tmp_path):
  with pytest.raises(ValueError, match='protocol is None'):
    trained(configs.load(claims.CONFIGS / 'freeze_mlp_mnist.py'), tmp_path)
  for wrong, why in (({'name': 'edgs'}, "unknown protocol 'edgs'"), ({'widht': 3}, "unknown key of edges: 'widht'"),
                     ({'runs': {'a': {'oder': 1}}}, "'oder'")):
    with pytest.raises(ValueError, match=why):
      trained(job('edges_digits', 'TEDDY-80', **wrong), tmp_path)
  for wrong, why in (({'features': 65}, 'features=65 of .* have 64'),
                     ({'runs': {'all': {'chosen': 'best'}}}, "unknown chosen 'best'")):
    with pytest.raises(ValueError, match=f'protocols.features: .*{why}'):
      trained(job('features_digits', 'all', **wrong), tmp_path)
  with pytest.raises(ValueError, match="unknown gate 'smoth'. Did you mean 'smooth'"):
    trained(job('estimators_digits', 'smooth', runs={'smooth': {'gate': 'smoth'}}), tmp_path)


def test_slots_for_the_fullest_expert_are_as_good_as_all():
  sizes = liked.SIZES | {'experts': 4, 'width': 3, 'hidden': 5, 'gamma': 0.1}
  batch = jnp.arange(12), jnp.arange(12)[::-1], jnp.ones(12)
  shift = jnp.eye(4)[jnp.array([2, 0, 3, 1])]
  for gate in ('comet', 'top_k', 'hashed'):
    model = liked.Mixture(gate, sizes)
    params = model.start(jax.random.key(0), (12, 12))
    params['gate']['kernel'] *= 1000  # Trees are sure.
    weights = model.gated(params, batch, None, 0)[0] @ shift
    slots = int((weights != 0).sum(0).max())
    assert slots < 12 and weights.shape == (12, 4)
    np.testing.assert_allclose(model.logits(params, batch, shift, slots=slots), model.logits(params, batch, shift),
                               atol=1e-6)


def test_skipped_blocks_are_those_of_the_closed_gates_and_the_rest_is_the_whole_layer():
  sizes, x = gaters.SIZES | {'blocks': 6, 'width': 3}, jax.random.normal(jax.random.key(1), (12, 64))
  params, gate = gaters._start(jax.random.key(0), gaters.RUN, sizes), gaters._gate('noisy_rectifier', 0.1)
  params['gater']['out']['bias'] += 2  # From a tenth to half of the gates.
  weights = gate(gaters._gated(params, x), jax.random.key(2), 0).weights
  logits, opened, dropped = gaters.skipping(params, x, gate, jax.random.key(2), 12)
  assert 0.2 < opened < 0.8 and dropped == 0
  np.testing.assert_allclose(logits, gaters._forward(params, x, weights), atol=1e-5)
  assert gaters.skipping(params, x, gate, jax.random.key(2), 2)[2] == sum(max(0, n - 2) for n in (weights != 0).sum(0))


@pytest.mark.parametrize('loads, mean, by_load, bits', [
    ([9, 0, 9, 9], 3, False, [3, 0, 3, 3]), ([9, 0, 9, 9], 3, True, [3, 0, 3, 3]),
    ([64, 16, 4, 1], 4, True, [6, 5, 3, 2]), ([1000, 1, 1], 3, True, [6, 2, 1]), ([1, 0], 8, True, [8, 0])])
def test_planes_go_to_the_experts_of_the_largest_error(loads, mean, by_load, bits):
  assert served.given_bits(np.array(loads), mean, by_load).tolist() == bits


def test_useful_features_of_madelon_come_first_and_need_each_other():
  train, test = map(madelon.drawn().get, ('train', 'test'))
  right = lambda columns: features._judged(train, test, np.asarray(columns), 30, 0)
  assert right(range(20)) > 0.7 and max(right([i]) for i in range(5)) < 0.65 and right(range(20, 40)) < 0.6


def test_a_network_without_the_units_that_no_input_opens_is_the_gated_one():
  net, x = perceptron.start(0, 6), jax.random.normal(jax.random.key(1), (5, 64))
  sure = jnp.array([5.0, -5, 5, -5, 5, 5])  # the same for each input
  modules = {name: {'kernel': jnp.zeros((size, 6)), 'bias': sure} for name, size in (('layer_0', 64), ('layer_1', 6))}
  logits, opened = consensus.gated_forward(net, x, modules)
  small = consensus._removed(net, [jnp.mean(each, 0) for each in opened], x)
  assert small.params['layer_0']['kernel'].shape == (64, 4) and small.params['layer_2']['kernel'].shape == (4, 10)
  np.testing.assert_allclose(small.apply(small.params, x), logits, atol=1e-5)
  np.testing.assert_array_equal(consensus.gated_forward(net, x, {})[0], perceptron.forward(net, x))
  closed = consensus._removed(net, [jnp.zeros(6), jnp.arange(6) / 100], x)
  assert closed.params['layer_1']['kernel'].shape == (1, 1), 'each layer keeps a unit'


def test_a_search_learns_by_halves_and_leaves_the_sharpest_operations():
  params, key = searched.network_start(jax.random.key(0), width=4, cells=2), jax.random.key(1)
  x, y = jax.random.uniform(key, (6, 64)), jnp.arange(6)
  loss = lambda params, batch: searched._cross_entropy(searched.network, params, batch, key, 0)
  asked = architecture.bilevel(loss, params, (x[:3], y[:3]), (x[3:], y[3:]), trees.named('alpha'))
  found = jax.grad(lambda params: searched._halves(params, (x, y), key, 0))(params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, asked)
  chosen = {'cell_0': 'narrow', 'cell_1': 'maximum'}
  for cell, name in chosen.items():
    params[cell]['alpha'] = 1e3 * jax.nn.one_hot([*searched.OPERATIONS].index(name), 4)
  left = searched._only(params, chosen)
  assert [*left['cell_0']] == ['narrow'] and left['cell_1'] == {}
  np.testing.assert_allclose(searched.network(left, x, chosen), searched.network(params, x), rtol=1e-5, atol=1e-5)
