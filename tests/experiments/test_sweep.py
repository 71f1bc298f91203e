"""Tests sweeps at toy size: the cells of a grid, own models and data, what is skipped and resumed, and the report."""

import html.parser
import json
import os
import pathlib
import signal

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import jobs
import numpy as np
import optax
import pytest
from flax import nnx

from experiments import configs, sweep, train
from experiments.loop import records, runs, training
from experiments.sweep import board, engine, grids, ledger
from experiments.tables import paired, sweeps
from sparsejax import recipes, trees

pytestmark = pytest.mark.usefixtures('standard_promotion')

SR_STE, SR, DENSE = {'name': 'sr_ste', 'where': ['fc*/kernel']}, 'SR-STE', {'name': 'dense'}
TOY = {'steps': 4, 'batch_size': 8, 'seeds': (3, 5), 'measure_every': 2, 'validate_every': 2, 'checkpoint_every': 2,
       'mesh': {'data': 1}, 'model': {'name': 'mlp', 'widths': (8, 8)}}
rng = np.random.default_rng(0)
SPLITS = {split: (rng.normal(size=(count, 8)).astype(np.float32), np.arange(count) % 4)
          for split, count in (('train', 24), ('valid', 8), ('test', 12))}


def toy(**changes):
  return {**TOY, 'data': SPLITS, 'recipes': {SR: SR_STE, 'dense': DENSE}, **changes}


@pytest.fixture(scope='module')
def swept(folder):
  """Returns the workdir and the findings of one sweep: tuned, with a recipe that is refused and rates that diverge."""
  with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
    return folder / 'sweep', sweep.run(toy(), folder / 'sweep', GRID)


GRID = {'pattern': ['1:4', '1:3'], 'learning_rate': [1e-2, 1e38], 'tuning': {'seeds': (8, 9)}, 'baseline': 'dense',
        'equal_flops': True}


# The grid.


def test_cells_of_a_grid_are_configs_of_one_run():
  config = configs.complete(toy(recipes={SR: SR_STE, 'st3': {'name': 'st3'}, 'dense': DENSE}))
  grid = grids.read({'pattern': ['1:4', '1:2'], 'task': {'a': {'steps': 9}, 'b': {'model': {'widths': (4, 4)}}},
                     'seed': range(3), 'optimizer': {'dense': {'name': 'sgd'}},
                     'order': [{'task': ['b']}, {'pattern': ['1:2']}]}, config)
  arms = {arm.place: arm.config for arm in grids.arms(config, grid)}
  names = lambda task: [f'{task}/{cell}' for cell in (f'{SR}/1of4', f'{SR}/1of2', 'st3/1of4', 'st3/1of2', 'dense')]
  assert list(arms) == names('b') + [name for name in names('a') if '1of4' not in name] + [
      name for name in names('a') if '1of4' in name]
  assert arms['a/st3/1of4'].recipes.st3.sparsity == 0.75 and arms[f'a/{SR}/1of2'].recipes[SR].pattern == '1:2'
  assert arms['a/dense'].steps == 9 and arms['b/dense'].steps == 4 and arms['b/dense'].model.widths == (4, 4)
  assert arms['b/dense'].model.name == 'mlp'  # a section without a name changes single keys
  assert {tuple(of_arm.seeds) for of_arm in arms.values()} == {(0, 1, 2)}
  assert arms['a/dense'].optimizer.name == 'sgd' and arms[f'a/{SR}/1of2'].optimizer.name == 'adamw'
  own = configs.complete(toy(recipes={'dense': DENSE, 'wide': DENSE}, models={'wide': {'widths': (9, 9)}},
                             optimizers={'wide': {'name': 'sgd'}}))
  dense, wide = grids.arms(own, grids.read({}, own))  # What a config changes for one run holds in a sweep, too.
  assert wide.config.model.widths == (9, 9) != dense.config.model.widths
  assert (dense.config.optimizer.name, wide.config.optimizer.name) == ('adamw', 'sgd')
  untuned = grids.read({'learning_rate': [1e-2, 2e-2]}, config)
  assert [arm.config.optimizer.learning_rate for arm in grids.arms(config, untuned)] == [1e-2, 2e-2] * 3


@pytest.mark.parametrize(('grid', 'words'), [
    ({'paterns': ['1:4']}, ["'paterns'", "'pattern'"]),
    ({'pattern': '1:4'}, ["pattern='1:4'", 'list']),
    ({'pattern': ['1:4', '1:4']}, ['twice']),
    ({'pattern': ['1;4']}, ["'1;4'"]),
    ({'model': {'a/b': {}}}, ["'a/b'", 'directory']),
    ({'data': [1]}, ['data=[1]', 'dict']),
    ({'baseline': 'SRSTE'}, ["'SRSTE'", "'SR-STE'"]),
    ({'optimizer': {'dens': {}}}, ["'dens'", "'dense'"]),
    ({'optimizer': {'dense': {'lr': 1}}}, ["'optimizer.lr'", 'learning_rate']),
    ({'tuning': {}}, ['learning_rate', '1e-3']),
    ({'tuning': {'seed': (1,)}, 'learning_rate': [1e-2]}, ["'seed'", "'seeds'"]),
    ({'tuning': {'seeds': (3,)}, 'learning_rate': [1e-2]}, ['share [3]', 'other seeds']),
    ({'order': [{'recipes': ['dense']}]}, ["'recipes'", "'recipe'"]),
    ({'metric': 'acuracy'}, ["'acuracy'", "'accuracy'"]),
    ({'task': {'a': {'stesp': 3}}}, ["'stesp'", "'steps'"]),
    ({'pack': 0}, ['pack=0', 'at least 1']),
])
def test_a_grid_that_makes_no_sense_is_refused_before_any_run(tmp_path, grid, words):
  with pytest.raises(ValueError) as error:
    sweep.run(toy(), tmp_path / 'sweep', grid)
  assert all(word in str(error.value) for word in words), error.value
  assert not (tmp_path / 'sweep').exists()


SWEEPS = sorted((pathlib.Path(__file__).parents[2] / 'experiments/configs/sweeps').glob('[a-z]*.py'))


@pytest.mark.parametrize('path', SWEEPS, ids=lambda path: path.stem)
def test_every_recipe_of_a_sweep_that_ships_is_made_for_each_pattern(path):
  config, grid = sweep.load(path)
  arms = grids.arms(config, grids.read(grid, config))
  assert len({arm.place for arm in arms}) == len(arms) > 100
  for arm in arms:
    recipe, = configs.plain(arm.config)['recipes'].values()
    recipes.from_config(optax.sgd(0.1), recipe, total_steps=arm.config.steps)
  changed, hours = sweep.load(path, ['sweep.cpu_hours=3', 'data.data_dir=/x'])
  assert hours['cpu_hours'] == 3 and changed.data.data_dir == '/x'
  places = {arm.config.data.name: arm.config.data.data_dir for arm in grids.arms(changed, grids.read(hours, changed))}
  assert places == {'tiny_shakespeare': '/x', 'cifar10': '/x', 'digits': None}
  with pytest.raises(ValueError, match='sweep.cpu_hours=many'):
    sweep.load(path, ['sweep.cpu_hours=many'])


# Running.


def test_every_cell_is_a_line_also_one_that_is_refused_or_diverges(swept):
  lines = {line['cell']: line for line in swept[1].lines}
  assert {cell: line['status'] for cell, line in lines.items()} == {
      f'{SR}/1of4/rate-0.01': 'done', f'{SR}/1of4/rate-1e+38': 'diverged', f'{SR}/1of4': 'done',
      f'{SR}/1of3/rate-0.01': 'refused', f'{SR}/1of3': 'refused',
      'dense/rate-0.01': 'done', 'dense/rate-1e+38': 'diverged', 'dense': 'done', f'{SR}/1of4/flops': 'done'}
  assert "'fc1/kernel' of shape (8, 8): 1:3" in lines[f'{SR}/1of3']['reason']
  assert 'not finite at step' in lines['dense/rate-1e+38']['reason']
  best = lines['dense']['tuning']
  assert best['best'] == 0.01 and best['means'][1] is None and best['seeds'] == [8, 9] and best['edge']
  assert lines['dense']['seeds'] == [3, 5] and len(lines['dense']['scores']['loss']) == 2
  tuned, tested = lines['dense/rate-0.01'], lines['dense']
  assert (tuned['split'], tested['split']) == ('valid', 'test')
  flops = lines[f'{SR}/1of4']['training_flops']
  assert lines[f'{SR}/1of4/flops']['steps'] == round(4 / flops) > 4


def test_tuning_never_reads_the_test_split(tmp_path, monkeypatch):
  read = []
  split = runs.split
  monkeypatch.setattr('experiments.loop.outcomes.split', lambda setup, name: read.append(name) or split(setup, name))
  config = configs.complete(toy(recipes={'dense': DENSE}))
  with training_stop() as stop:
    training.run(config, tmp_path, stop, scored='valid')
  assert set(read) == {'valid'} and list(json.loads((tmp_path / 'dense/outcome.json').read_text())['valid']) == [
      'accuracy', 'loss']


def training_stop():
  return sweep.StopRequest()


def test_a_finished_sweep_runs_nothing_and_a_lost_line_runs_its_cell_alone(swept, monkeypatch):
  workdir, before = swept
  ran = []
  run = training.run
  monkeypatch.setattr(training, 'run', lambda config, place, *rest, **more: ran.append(place.name) or run(
      config, place, *rest, **more))
  again = sweep.run(toy(), workdir, GRID)
  assert ran == [] and [line['cell'] for line in again.lines] == [line['cell'] for line in before.lines]
  assert again.overhead is None
  path = workdir / ledger.FILE
  whole = path.read_text()
  path.write_text(whole[:-20])  # as a kill leaves it
  again = sweep.run(toy(), workdir, GRID)
  assert ran == ['flops'] and [line['scores'] for line in again.lines if line['status'] == 'done'] == [
      line['scores'] for line in before.lines if line['status'] == 'done']
  lines = path.read_text().splitlines()
  path.write_text('\n'.join([lines[0][:-9], *lines[1:], '']))
  with pytest.raises(ValueError, match='line 1 of .*cells.jsonl is damaged'):
    sweep.run(toy(), workdir, GRID)
  path.write_text(whole)


def test_another_config_and_a_second_sweep_are_refused(swept, tmp_path):
  workdir, _ = swept
  with pytest.raises(ValueError, match='cell SR-STE/1of4/rate-0.01 .* another config .steps: 4 -> 6'):
    sweep.run(toy(steps=6), workdir, GRID)
  with ledger.locked(tmp_path):
    with pytest.raises(ValueError, match='another sweep runs in'):
      sweep.run(toy(), tmp_path)


def test_packs_of_seeds_hold_the_numbers_of_all_seeds_and_get_smaller_with_the_memory(swept, tmp_path, monkeypatch):
  whole = next(line for line in swept[1].lines if line['cell'] == 'dense')
  free = training.free_memory
  refused = []
  monkeypatch.setattr(training, 'free_memory', lambda: refused.append(1) or (1 if len(refused) == 1 else free()))
  config = toy(recipes={'dense': DENSE}, optimizer={'learning_rate': 1e-2})
  line, = sweep.run(config, tmp_path, {'keep': True}).lines
  assert sorted(path.name for path in (tmp_path / 'cells/dense').glob('seeds*')) == ['seeds-3-3', 'seeds-5-5']
  np.testing.assert_allclose(line['scores']['loss'], whole['scores']['loss'], rtol=1e-5)
  assert (tmp_path / 'cells/dense/seeds-3-3/dense/checkpoints/4').exists()


def test_no_cell_begins_after_the_hours_and_the_report_says_so(tmp_path):
  findings = sweep.run(toy(recipes={'dense': DENSE}), tmp_path, {'cpu_hours': 0})
  assert [line['status'] for line in findings.lines] == ['dropped']
  assert 'dense: dropped: not begun: the 0 CPU hours' in (tmp_path / 'report.md').read_text()
  assert not (tmp_path / ledger.FILE).exists()  # a later sweep with more hours runs the cell


def test_a_sweep_that_was_killed_goes_on_from_the_checkpoint(tmp_path):
  jobs.folder(tmp_path, jobs.config('only', 2000, mesh={'data': 1}) + '\ndef get_sweep():\n  return {"keep": True}\n')
  place = tmp_path / 'run/cells/only/only/checkpoints'
  arguments = ('--config', tmp_path / 'config.py', '--workdir', tmp_path / 'run', '--data_dir', tmp_path / 'data')
  with jobs.together(jobs.Job(tmp_path / 'job', *arguments, program='sweep')) as (job,):
    jobs.until(lambda: (place / '4').exists(), job)
    job.kill()
  reached = max(int(path.name) for path in place.iterdir() if path.name.isdigit())
  with jobs.together(jobs.Job(tmp_path / 'again', *arguments, program='sweep')) as (job,):
    out = tmp_path / 'again.out'
    jobs.until(lambda: out.exists() and 'resumed' in out.read_text(), job)
    job.signal(signal.SIGINT)
    status, out, err = job.wait()
  assert status == 130 and f'only: resumed at step {reached}.' in out, (out, err)
  assert 'Stopped by Ctrl-C, only is saved. Resume with:' in out and 'experiments.sweep --config' in out


def test_cells_that_differ_in_rate_and_seeds_are_one_program():
  texts = []
  for rate, seeds in ((1e-3, (0, 1)), (1e-2, (4, 7))):
    config = configs.complete(toy(seeds=seeds, optimizer={'learning_rate': rate}, recipes={SR: {
        **SR_STE, 'pattern': '1:4'}}))
    run, = runs.build(runs.prepare(config), {SR: pathlib.Path()}).values()
    texts.append(run.step.as_text())
  assert texts[0] == texts[1]


# Own models, losses and data.


class Net(nnx.Module):
  def __init__(self, key):
    rngs = nnx.Rngs(key)
    self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)])

  def __call__(self, x):
    return self.layers[1](nnx.relu(self.layers[0](x)))


def plain(key):
  first, second = jax.random.split(key)
  return [{'w': 0.3 * jax.random.normal(first, (8, 8))}, {'w': 0.3 * jax.random.normal(second, (8, 4))}]


MODELS = {
    'nnx': (Net, 'layers/0/kernel'),
    'equinox': (lambda key: eqx.nn.MLP(8, 4, 8, 1, key=key), 'layers/0/weight'),
    'linen': (nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(4)]), 'layers_0/kernel'),
    'plain': ((plain, lambda params, x: jax.nn.relu(x @ params[0]['w']) @ params[1]['w']), '0/w'),
}


@pytest.mark.parametrize('kind', MODELS)
def test_own_model_trains_sparse_as_by_hand(kind, tmp_path):
  model, path = MODELS[kind]
  config = configs.complete(toy(model=model, recipes={SR: {'name': 'sr_ste', 'pattern': '1:4', 'where': [path]}}))
  setup = runs.prepare(config)
  run, = runs.build(setup, {SR: tmp_path}).values()
  assert run.sparse == [path]
  start = dict(zip(*trees.flatten(run.start().params)[:2]))
  assert (start[path] == 0).mean() == 0.75 and not np.array_equal(*start[path])  # Each seed draws its own.
  made = model(jax.random.key(5)) if kind in ('nnx', 'equinox') else None
  outputs = run.model.apply(jax.tree.map(lambda leaf: leaf[1], setup.models[SR].initial()), SPLITS['test'][0])
  by_hand = {'nnx': lambda: made(SPLITS['test'][0]), 'equinox': lambda: jax.vmap(made)(SPLITS['test'][0])}.get(kind)
  if by_hand:
    np.testing.assert_allclose(outputs, by_hand(), rtol=1e-4, atol=1e-5)


def test_a_small_cnn_with_own_loss_and_data_in_a_few_lines(tmp_path):
  class CNN(nnx.Module):
    def __init__(self, rngs):
      self.conv = nnx.Conv(4, 8, (3, 3), rngs=rngs)
      self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, images):
      return self.head(nnx.relu(self.conv(images)).mean((1, 2)))

  images = rng.normal(size=(40, 6, 6, 4)).astype(np.float32)
  labels = images[..., 0].mean((1, 2)) > 0
  seen = []
  findings = sweep.run({
      'steps': 3, 'batch_size': 8, 'measure_every': 3, 'mesh': {'data': 1},
      'model': lambda key: CNN(nnx.Rngs(key)),
      'data': {'train': (images[:30], labels[:30]), 'test': (images[30:], labels[30:])},
      'loss': lambda logits, labels: optax.softmax_cross_entropy_with_integer_labels(logits, labels),
      'writers': (lambda run, step, numbers: seen.append((run, step, numbers['loss'])),),
      'recipes': {'dense': {'name': 'dense'}, 'SR-STE': {'name': 'sr_ste', 'where': ['conv/kernel']}},
  }, tmp_path, {'pattern': ['1:4'], 'seed': range(2)})
  comparison, = findings.comparisons().values()
  assert comparison['baseline'] == 'dense' and comparison['verdict'] in paired.VERDICTS
  assert [place[:2] for place in seen] == [('dense', 3), ('SR-STE/1of4', 3)] and np.isfinite(seen[0][2])


OWN = '''
import jax, numpy as np
def get_config():
  draw = np.random.default_rng(0).normal(size=(24, 8)).astype(np.float32)
  apply = lambda params, x: x @ params['w']
  return {'steps': 2, 'batch_size': 8, 'measure_every': 2, 'mesh': {'data': 1}, 'data': lambda: {
      split: (draw, np.arange(24) % 4) for split in ('train', 'test')},
      'model': (lambda key: {'w': jax.random.normal(key, (8, 4))}, apply),
      'recipes': {'SR-STE': {'name': 'sr_ste', 'pattern': '1:4', 'where': ['w']}}}
'''


def test_a_config_with_own_parts_trains_by_the_command_and_is_found_finished(tmp_path, capsys):
  (tmp_path / 'my.py').write_text(OWN)
  arguments = ['--config', str(tmp_path / 'my.py'), '--workdir', str(tmp_path / 'run')]
  assert train.main(arguments) == 0 and train.main(arguments) == 0
  assert capsys.readouterr().out.count('SR-STE 2/2') == 1
  assert json.loads((tmp_path / 'run/SR-STE/outcome.json').read_text())['achieved'] == 0.75


class Normed(nnx.Module):
  def __init__(self, key):
    self.norm = nnx.BatchNorm(8, rngs=nnx.Rngs(key))


@pytest.mark.parametrize(('changes', 'words'), [
    ({'model': 3}, ['3 is no model', 'NNX']),
    ({'model': lambda key: 3}, ['returns int']),
    ({'model': Normed}, ['BatchStat', 'running statistics']),
    ({'model': nn.BatchNorm(use_running_average=True)}, ['batch_stats']),
    ({'model': (plain, lambda params, x: x @ params[0]['v'])}, ["KeyError: 'v'", 'apply']),
    ({'data': lambda: {'train': SPLITS['train']}}, ['"test"']),
    ({'data': {**SPLITS, 'vald': SPLITS['valid']}}, ["'vald'", "'valid'"]),
    ({'data': {**SPLITS, 'test': (SPLITS['test'][0], [1])}}, ['1 and 12 rows', "'test'"]),
    ({'data': {**SPLITS, 'test': [{'x': 1}]}}, ["'test'", "'x'", '"inputs"']),
    ({'data': {**SPLITS, 'train': ([], [])}}, ["'train' is empty"]),
    ({'data': {**SPLITS, 'train': (SPLITS['train'][0], np.ones(24))}}, ['float32[8]', 'config.score']),
    ({'loss': lambda outputs, labels: outputs.mean()}, ['loss returns shape ()', 'one number for each example']),
    ({'loss': 'mse'}, ["loss='mse'", 'function']),
    ({'optimizers': {'dens': {}}}, ["'dens'", "'dense'"]),
    ({'optimizers': {'dense': {'lr': 1}}}, ["'lr'", 'learning_rate']),
    ({'noise': ('nothing/kernel',)}, ['noise', 'picks no parameter', 'fc1/kernel']),
])
def test_own_parts_that_make_no_sense_are_refused(tmp_path, changes, words):
  with pytest.raises(ValueError) as error:
    config = configs.complete(toy(**{'recipes': {'dense': DENSE}, **changes}))
    runs.build(runs.prepare(config), {'dense': tmp_path})
  assert all(word in str(error.value) for word in words), error.value


def test_own_score_and_sources_with_random_access():
  rows = [{'image': np.full((2, 2, 1), i, np.uint8), 'label': np.float32(i)} for i in range(12)]
  config = configs.complete(toy(
      data=lambda: {'train': rows, 'test': rows[:3]}, model=(lambda key: {'w': jnp.ones(4)}, lambda p, x: (
          x.reshape(-1, 4) @ p['w'])), recipes={'dense': DENSE},
      loss=lambda outputs, labels: (outputs - labels)**2, score=lambda outputs, labels: -abs(outputs - labels)))
  setup = runs.prepare(config)
  assert (setup.task_name, setup.task.name) == ('own', 'score')
  batch = setup.data[0].test[0]
  assert batch['inputs'].dtype == np.float32 and batch['inputs'].max() == np.float32(2 / 255)
  assert batch['weight'].sum() == 3
  outputs = np.zeros(8, np.float32)
  assert setup.task.score(outputs, batch['labels'], batch['weight']) == -1  # of 0, 1 and 2
  assert setup.task.loss(outputs, batch['labels'], batch['weight']) == pytest.approx(5 / 3)
  assert len(setup.data[0].valid) == 1


def test_each_run_has_its_own_optimizer():
  config = configs.complete(toy(recipes={'dense': DENSE, 'slow': DENSE}, optimizers={'slow': {
      'name': 'sgd', 'learning_rate': 1e-4}}))
  built = runs.build(runs.prepare(config), dict.fromkeys(['dense', 'slow'], pathlib.Path()))
  moments = lambda run: len(jax.tree.leaves(run.state.opt_state)) > 6
  assert moments(built['dense']) and not moments(built['slow'])
  assert [float(run.peak) for run in built.values()] == pytest.approx([1e-3, 1e-4])
  assert configs.of_run(config, 'slow')['optimizer']['name'] == 'sgd' and 'optimizers' not in configs.of_run(config, SR)


# The report.


class Page(html.parser.HTMLParser):
  """A `Page` collects what an HTML file refers to, and its tags that are not closed."""

  def __init__(self, text):
    super().__init__()
    self.open, self.outside, self.images = [], [], 0
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    self.images += tag == 'img'
    self.outside += [(tag, key, value[:40]) for key, value in attributes
                     if key in ('src', 'href', 'srcset', 'data') and not value.startswith('data:image/png;base64,')]
    if tag not in ('meta', 'img'):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag


def test_the_report_is_complete_and_its_page_needs_nothing_from_outside(swept):
  workdir, findings = swept
  text = (workdir / 'report.html').read_text()
  page = Page(text)
  assert page.open == [] and page.outside == [] and page.images == 3 and 'url(' not in text and '@import' not in text
  for name in ('report.png', 'report-tradeoff.png', 'report-curves.png'):
    assert (workdir / name).read_bytes()[:4] == b'\x89PNG'
  markdown = (workdir / 'report.md').read_text()
  for shown in (text, markdown):
    assert '2 rates (0.01, 1e+38) x 2 seeds of their own x 4 steps = 16 steps. Test was not read.' in shown
    assert 'SR-STE/1of3: refused:' in shown
  rows = (workdir / 'report.csv').read_text().splitlines()
  assert len(rows) == 1 + sum(2 if line['status'] == 'done' else 1 for line in findings.lines)
  data = json.loads((workdir / 'report.json').read_text())
  assert data['comparisons'].keys() == {f'{SR}/1of4', f'{SR}/1of4/flops'} and len(data['lines']) == len(findings.lines)


def test_holm_and_paired_differences():
  # The values by hand are 0.01 x 4, then max(0.04, 0.02 x 3), then 0.03 x 2 and 0.04 x 1, which are not larger.
  np.testing.assert_allclose(paired.holm([0.03, 0.01, float('nan'), 0.04, 0.02]), [0.06, 0.04, np.nan, 0.06, 0.06])
  assert paired.holm([0.9, 0.8]) == [1.0, 1.0] and paired.holm([]) == []
  pair = paired.paired([1.0, 2.0, 4.0], [0.0, 2.0, 2.0])  # differences 1, 0, 2: t = sqrt(3), 2 degrees of freedom
  assert pair.difference == 1 and pair.p == pytest.approx(0.2254, abs=1e-4)
  assert pair.half == pytest.approx(4.303 / 3**0.5, abs=1e-3)
  assert paired.paired([1.0, 1.0], [1.0, 1.0]).p == 1 and paired.paired([2.0, 2.0], [1.0, 1.0]).p == 0
  assert np.isnan(paired.paired([1.0], [0.0]).p)
  verdicts = [paired.verdict(d, p, lower) for d, p, lower in (
      (-1, 0.01, True), (-1, 0.01, False), (-1, 0.05, True), (1, 0.01, True), (1, float('nan'), True))]
  assert verdicts == ['better', 'worse', 'not told apart', 'worse', 'not testable']


def line(recipe, losses, pattern='1:4', phase='test'):
  return {'cell': f'{recipe}/{pattern}', 'phase': phase, 'task': None, 'data': None, 'model': None, 'recipe': recipe,
          'pattern': pattern, 'learning_rate': None, 'status': 'done', 'scores': {'loss': losses}}


def test_verdicts_are_corrected_over_all_comparisons_of_the_page():
  losses, noise = [1.0, 1.1, 1.2, 1.3], [0.01, -0.01, 0.02, 0.0]
  better = [x - 0.1 + e for x, e in zip(losses, noise)]
  lines = [line('base', losses), line('good', better)] + [
      other for i in range(20) for other in (line('base', losses, f'1:{i + 5}'), line('same', [
          x + 5 * e for x, e in zip(losses, noise)], f'1:{i + 5}'))]
  alone = sweeps.Findings(lines[:2], 'loss', 'base', None).comparisons()['good/1:4']
  among = sweeps.Findings(lines, 'loss', 'base', None).comparisons()
  assert alone['verdict'] == 'better' and among['good/1:4']['p'] == alone['p'] == alone['p_holm']
  assert among['good/1:4']['p_holm'] == pytest.approx(21 * alone['p']) and len(among) == 21
  assert among['good/1:4']['difference'] == pytest.approx(-0.095)


def test_the_live_table_shows_every_cell(tmp_path):
  import rich.console
  config = configs.complete(toy())
  grid = grids.read({'pattern': ['1:4', '1:2'], 'learning_rate': [1e-3], 'tuning': {}}, config)
  arms = grids.arms(config, grid)
  console = rich.console.Console(file=(tmp_path / 'out').open('w'), width=100, force_terminal=True)
  shown = board.Board(arms, engine.planned(arms, grid), 'loss', console)
  assert engine.planned(arms, grid) == 6
  shown.begin(arms[0], 'test')
  shown.start(SR, 0)
  shown.advance(2, {'loss': [2.5, 2.7]})
  shown.finished(arms[1].place, {'status': 'refused', 'reason': 'no', 'wall': 1.0, 'cpu': 1.0}, True)
  shown.finished(arms[2].place, {'status': 'done', 'scores': {'loss': [1.0, 2.0]}, 'wall': 1.0, 'cpu': 1.0}, True)
  with console.capture() as capture:
    console.print(shown._table())
  text = capture.get()
  assert all(word in text for word in ('1:4', '1:2', 'any', '50%', 'refused', '1.5000', '2 of 6 cells', 'loss 2.600'))


def test_the_noise_of_the_gradient_is_that_of_the_paper(tmp_path):
  config = configs.complete(toy(steps=2, measure_every=1, noise=('fc1/kernel',), optimizer={'clip': None}, recipes={
      'dense': DENSE}))
  setup = runs.prepare(config)
  run, = runs.build(setup, {'dense': tmp_path}).values()
  state = run.start()
  for number in range(2):
    batch = runs.batch(setup, number)
    params, of_seed = jax.tree.map(lambda leaf: leaf[0], (state.params, batch))
    loss = lambda p, b: setup.task.loss(run.model.apply(p, b['inputs']), b['labels'], None)
    grads = jax.grad(loss)(params, of_seed)['fc1']['kernel']
    state, _, measured = run.compiled()(state, batch, np.int32(number), run.peak)
  np.testing.assert_allclose(measured['noise'][0], np.var(np.abs(grads)), rtol=1e-4)
  np.testing.assert_allclose(measured['noise_received'][0], np.var(np.abs(grads)), rtol=1e-3)
  nu = optax.tree.get(state.opt_state, 'nu')['fc1']['kernel'][0]
  np.testing.assert_allclose(measured['second_moment'][0], np.var(np.asarray(nu)), rtol=1e-4)


def test_lines_that_a_writer_of_json_lines_appends_are_read_again(tmp_path):
  path = tmp_path / 'lines.jsonl'
  for number in (1.5, float('nan')):
    records.append(path, {'x': number})
  path.write_text(path.read_text() + '{"x": 2')
  assert list(records.lines(path)) == [{'x': 1.5}, {'x': None}] and os.path.exists(path)
