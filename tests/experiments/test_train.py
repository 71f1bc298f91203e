"""Tests the command `train` at toy size: the main job from end to end, its refusals, and resuming."""

import csv
import json
import os
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax
from experiments import configs, models, train
from experiments.loop import outcomes, records, runs, tasks
from sparsejax import formats, io, recipes

pytestmark = pytest.mark.usefixtures('standard_promotion')

DEMO = pathlib.Path(__file__).parents[2] / 'experiments/configs/n_m/demo_vit_digits.py'
TOY = ('mesh.data=1', 'steps=8', 'seeds=(0, 7)', 'batch_size=8', 'model.width=32', 'model.depth=1', 'model.heads=2',
       'model.patch=4', 'measure_every=2', 'validate_every=4', 'checkpoint_every=2',
       'recipes.MdGf.decay.half_life=1', 'optimizers={}')
MLP = "model={'name': 'mlp', 'widths': (32, 32)}"  # compiles soonest, where a test is about the job


def call(folder, workdir, *changes, config=DEMO, toy=TOY):
  """Returns the exit status of the command."""
  overrides = [f'data.data_dir={folder / "data"}', *toy, *changes]
  return train.main(['--config', str(config), '--workdir', str(workdir), *(x for o in overrides for x in ('--set', o))])


@pytest.fixture(scope='module')
def demo(folder):
  """Returns the workdir of the whole main job, run once."""
  with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
    assert call(folder, os.path.relpath(folder / 'demo')) == 0  # Users give relative paths.
  return folder / 'demo'


@pytest.fixture
def unfinished(demo, tmp_path):
  """Returns a copy of the job in which SR-STE has come to step 6 of 8."""
  shutil.copytree(demo, tmp_path / 'copy')
  (tmp_path / 'copy/SR-STE' / outcomes.FILE).unlink()
  shutil.rmtree(tmp_path / 'copy/SR-STE/checkpoints/8')
  return tmp_path / 'copy'


def bits(checkpoint):
  return [np.asarray(leaf).tobytes() for item in ('params', 'opt_state')
          for leaf in jax.tree.leaves(io.read(checkpoint, item))]


# The main job.


def test_main_job_leaves_everything_that_it_promises(demo):
  results = json.loads((demo / 'results.json').read_text())
  names = [row['run'] for row in results['rows']]
  assert names == ['dense', 'SR-STE', 'MdGf']  # as written, not as sorted
  of_seeds = [(row['run'], row['seed']) for row in csv.DictReader((demo / 'results.csv').open())]
  assert of_seeds == [(name, seed) for name in names for seed in ('0', '7')]
  assert all(f'| {name} |' in (demo / 'results.md').read_text() for name in names)
  assert (demo / 'results.png').read_bytes()[:4] == b'\x89PNG'
  dense, sr_ste, mdgf = results['rows']
  assert dense['asked'] is None and dense['training_flops'] == pytest.approx(1, abs=1e-3)
  for row in (sr_ste, mdgf):
    assert row['asked'] == row['achieved'] == 0.96875
    assert row['inference_flops'] < row['training_flops'] < 1
  assert mdgf['training_flops'] > sr_ste['training_flops']  # a fading mask is dense
  environment = results['outcomes'][0]['environment']
  assert environment['platform'] == 'cpu' and environment['jax'] == jax.__version__ and environment['cpus'] > 0


@pytest.mark.parametrize('run', ['dense', 'SR-STE', 'MdGf'])
def test_metrics_of_a_run(demo, run):
  lines = list(records.read(demo / run))
  assert [line['step'] for line in lines] == [2, 4, 6, 8]
  assert [line['step'] for line in lines if 'valid_accuracy' in line] == [4, 8]
  sparse = run != 'dense'
  for line in lines:
    assert all(len(line[key]) == 2 for key in (
        'loss', 'accuracy', 'sparsity', 'flips', 'left', 'noise_kept', 'noise_pruned'))
    assert 0 < line['learning_rate'] <= 3e-2
    assert (line['noise_pruned'][0] is not None) == sparse  # JSON has no NaN
  assert (lines[-1]['sparsity'][0] == pytest.approx(0.96875)) == sparse
  first, *_, last = [line['left'][0] for line in lines]
  assert last == (0 if sparse else None)  # A mask of no pruned weight has no such ratio.
  fades = run == 'MdGf'
  assert not sparse or (0 < first < 1 if fades else first == 0)
  assert any((demo / run).glob('events.out.tfevents.*'))


@pytest.mark.parametrize('run', ['SR-STE', 'MdGf'])
def test_packed_file_is_small_and_sparse_and_predicts_the_same_bits(demo, run):
  held = io.read(demo / run / 'checkpoints/8', 'params')
  packed = io.load(demo / run / 'packed.safetensors')
  kernels = lambda tree: [tree['block_0']['mlp'][name]['kernel'] for name in ('fc1', 'fc2')]
  assert formats.nbytes(kernels(packed)) < 0.2 * formats.nbytes(kernels(held))
  dense, small = (demo / run / f'{name}.safetensors' for name in ('dense', 'packed'))
  saved = formats.nbytes(kernels(held)) - formats.nbytes(kernels(packed))
  assert dense.stat().st_size - small.stat().st_size > 0.5 * saved
  unpacked = formats.unpack(packed)
  seeds = {'mlp/*/kernel': sparsejax.types.Axes((1,), (2,), layer=(0,))}
  assert formats.axes_of(kernels(packed)[0])[:4] == seeds['mlp/*/kernel'][:4]
  sparsejax.check(unpacked, pattern=sparsejax.NM(1, 32), where=sparsejax.trees.named('mlp/*/kernel'), axes=seeds)
  model = models.make('vit', 10, patch=4, width=32, depth=1, heads=2)
  images = jax.random.normal(jax.random.key(0), (5, 8, 8, 1))
  logits = lambda params: jax.vmap(lambda p: model.apply({'params': p}, images))(jax.tree.map(jnp.asarray, params))
  assert np.asarray(logits(held)).tobytes() == np.asarray(logits(unpacked)).tobytes()


def test_all_runs_start_from_the_same_weights_and_each_seed_has_its_own_order(folder):
  config = configs.load(DEMO, [f'data.data_dir={folder / "data"}', *TOY])
  setup = runs.prepare(config)
  starts = [run.start() for run in runs.build(setup, {name: folder for name in configs.runs(config)}).values()]
  dense, *others = [(start.params['patch_embed'], start.params['head']) for start in starts]
  for other in others:
    jax.tree.map(np.testing.assert_array_equal, dense, other)
  assert (starts[1].params['block_0']['mlp']['fc1']['kernel'] == 0).mean() == 0.96875  # sparse before the first step
  first, second = runs.batch(setup, 5)['inputs']
  assert not np.array_equal(first, second)
  np.testing.assert_array_equal(second, setup.data[1].train[5]['inputs'])


ONE = {'sparsity': 0.5, 'where': ['fc1/kernel']}
# Each recipe, and the value that it chooses the mask by: the second seed's batches, its weights alone, its key.
SCORED = {
    'snip': ({'name': 'snip', **ONE}, lambda apply, inputs, labels: {
        'loss': lambda p: tasks.cross_entropy(apply(p, inputs), labels)}),
    'synflow': ({'name': 'synflow', 'rounds': 2, **ONE}, lambda apply, inputs, labels: {
        'outputs': lambda p: apply(p, jnp.ones_like(inputs[:1]))}),
    'random': ({'name': 'random_pruning', **ONE}, lambda apply, inputs, labels: {
        'key': jax.random.fold_in(jax.random.key(7), 1)}),
}


def test_each_seed_is_scored_by_its_own_weights_batches_and_key(folder):
  recipe = {name: recipe for name, (recipe, _) in SCORED.items()}
  toy = (*TOY[:4], *TOY[-3:], MLP)
  config = configs.load(DEMO, [f'data.data_dir={folder / "data"}', *toy, f'recipes={recipe}'])
  setup = runs.prepare(config)
  model, = {id(model): model for model in setup.models.values()}.values()  # traced once
  first = [setup.data[1].train[step] for step in range(13)]  # 104 labels, ten a class, in batches of eight
  inputs, labels = (np.concatenate([batch[key] for batch in first]) for key in ('inputs', 'labels'))
  params = jax.tree.map(lambda leaf: leaf[1], model.initial())
  built = runs.build(setup, dict.fromkeys(SCORED, folder))
  for name, (recipe, given) in SCORED.items():
    pruned = built[name].start().params['fc1']['kernel'] == 0
    assert pruned.sum((1, 2)).tolist() == [pruned[0].size / 2] * 2 and not np.array_equal(*pruned)
    tx = recipes.from_config(optax.sgd(0.1), recipe, total_steps=8, signals={
        'axes': model.contractions, **given(model.apply, inputs, labels)})
    by_hand = sparsejax.project(params, jax.jit(tx.init)(params))['fc1']['kernel'] == 0
    assert (by_hand == pruned[1]).mean() > 0.99, name  # `vmap` adds in another order.


def test_every_run_has_its_own_model_and_its_own_sparse_leaves(folder):
  sparse = {'name': 'asp', 'pattern': '1:4', 'where': ['mlp/*/kernel']}
  config = configs.load(DEMO, [
      f'data.data_dir={folder / "data"}', *TOY, "models={'wide': {'width': 64}, 'deep': {'depth': 2}}",
      f"recipes={{'wide': {sparse}, 'dense': {{'name': 'dense'}}, 'deep': {sparse}}}"])
  built = runs.build(runs.prepare(config), dict.fromkeys(configs.runs(config), folder))
  shapes = lambda run: [
      leaf['mlp']['fc1']['kernel'].shape for name, leaf in run.state.params.items() if name.startswith('block_')]
  assert {name: shapes(run) for name, run in built.items()} == {
      'wide': [(2, 64, 256)], 'dense': [(2, 32, 128)], 'deep': [(2, 32, 128)] * 2}
  block = lambda i: [f'block_{i}/mlp/{matrix}/kernel' for matrix in ('fc1', 'fc2')]
  assert {name: run.sparse for name, run in built.items()} == {  # dense: where the others prune and it has a leaf
      'wide': block(0), 'dense': block(0), 'deep': block(0) + block(1)}


def test_super_resolution_in_its_own_metrics_and_bit_for_bit_after_a_kill(folder, tmp_path, capsys):
  toy = (*TOY[:4], *TOY[-3:])
  changes = ['data.task=super_resolution', "model={'name': 'sr', 'width': 4, 'depth': 1}",
             "recipes={'only': {'name': 'asp', 'pattern': '1:2', 'where': ['block_0_conv1/kernel']}}"]
  assert call(folder, tmp_path, *changes, toy=toy) == 0
  assert 'psnr dB' in (tmp_path / 'results.md').read_text() and 'dB  sparse' in capsys.readouterr().out
  lines, whole = (tmp_path / 'only' / records.FILE).read_bytes(), bits(tmp_path / 'only/checkpoints/8')
  assert {'psnr', 'valid_psnr', 'valid_loss'} <= json.loads(lines.splitlines()[-1]).keys() and b'accuracy' not in lines
  row, = json.loads((tmp_path / 'results.json').read_text())['rows']
  assert 5 < row['psnr'] < 40 and row['loss'] < 0.5
  shutil.rmtree(tmp_path / 'only/checkpoints/8')
  (tmp_path / 'only' / outcomes.FILE).unlink()
  assert call(folder, tmp_path, *changes, toy=toy) == 0
  assert 'resumed at step 6' in capsys.readouterr().out
  assert bits(tmp_path / 'only/checkpoints/8') == whole and (tmp_path / 'only' / records.FILE).read_bytes() == lines


def test_a_finished_job_prints_its_results_again(folder, demo, monkeypatch, capsys):
  monkeypatch.setattr(runs, 'prepare', None)  # Nothing is left to prepare for.
  before = (demo / 'results.json').read_bytes()
  assert call(folder, demo) == 0
  out = capsys.readouterr().out
  assert 'MdGf' in out and '96.88%' in out and 'results.png' in out
  assert out.count('Shown: ') == 3 and 'Shown: MdGf against SR-STE: ' in out
  assert out.rstrip().splitlines()[-1].startswith('Try next: ')
  assert (demo / 'results.json').read_bytes() == before


def test_dense_alone(folder, tmp_path):
  changes = ["recipes={'only': {'name': 'dense'}}", 'seeds=(0,)', MLP]
  assert call(folder, tmp_path, *changes, toy=(*TOY[:2], *TOY[3:4], *TOY[-3:])) == 0
  row, = json.loads((tmp_path / 'results.json').read_text())['rows']
  assert row['asked'] is None and row['accuracy_ci95'] is None and (tmp_path / 'results.png').exists()


def test_other_predictions_of_the_packed_file_are_refused(folder, unfinished, monkeypatch, capsys):
  unpack = formats.unpack
  monkeypatch.setattr(formats, 'unpack', lambda tree: jax.tree.map(lambda x: np.nextafter(x, 9), unpack(tree)))
  assert call(folder, unfinished) == 2
  assert 'SR-STE: the predictions of' in capsys.readouterr().err


# Resuming.


def test_a_damaged_checkpoint_is_said_and_the_one_before_taken(folder, demo, unfinished, capsys):
  shutil.copytree(demo / 'SR-STE/checkpoints/8', unfinished / 'SR-STE/checkpoints/8')
  for file in (unfinished / 'SR-STE/checkpoints/8/params').rglob('d/*'):
    file.write_bytes(file.read_bytes()[:-100])
  assert call(folder, unfinished) == 0
  out = capsys.readouterr().out
  assert 'checkpoint of step 8' in out and 'is damaged' in out and 'SR-STE: resumed at step 6' in out
  assert bits(unfinished / 'SR-STE/checkpoints/8') == bits(demo / 'SR-STE/checkpoints/8')
  assert (unfinished / 'SR-STE/damaged/8').is_dir()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(folder, unfinished, capsys):
  before = bits(unfinished / 'SR-STE/checkpoints/6')
  recipe = configs.plain(configs.load(DEMO))['recipes']['SR-STE']  # The others are finished, and cannot change.
  assert call(folder, unfinished, f'recipes={dict([("SR-STE", recipe)])}',
              'optimizer.learning_rate=1e38', 'resume_changed=True') == 2
  captured = capsys.readouterr()
  assert 'SR-STE: went on from step 6 with another config: optimizer.learning_rate: 0.03 -> 1e+38.' in captured.out
  assert re.match('error: SR-STE: loss or parameters of seed [07] are not finite at step [78];', captured.err)
  assert captured.err.count('\n') == 1 and 'of step 6, is kept' in captured.err
  assert [path.name for path in (unfinished / 'SR-STE/checkpoints').iterdir()] == ['6']
  assert bits(unfinished / 'SR-STE/checkpoints/6') == before


def test_a_full_disk_stops_and_keeps_the_last_good_checkpoint(folder, unfinished, monkeypatch, capsys):
  before = bits(unfinished / 'SR-STE/checkpoints/6')
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
  assert call(folder, unfinished) == 2
  err = capsys.readouterr().err
  assert err.count('\n') == 1 and 'no room for the checkpoint of step 8' in err and '1,000 are free' in err
  assert bits(unfinished / 'SR-STE/checkpoints/6') == before


def test_training_goes_on_with_another_number_of_devices(folder, tmp_path, capsys):
  recipe = "recipes={'only': {'name': 'sr_ste', 'pattern': '1:4', 'where': ['fc*/kernel']}}"
  for devices, steps, shard in ((4, 2, 'fully'), (2, 4, 'replicated')):
    assert call(folder, tmp_path, MLP, recipe, f'mesh.data={devices}', f'steps={steps}', f'shard={shard}',
                'resume_changed=True') == 0
    assert steps == 2 or f'only: resumed at step {steps - 2}.' in capsys.readouterr().out
  lines = list(records.read(tmp_path / 'only'))
  assert [line['step'] for line in lines] == [2, 4] and lines[-1]['sparsity'] == pytest.approx([0.75, 0.75])


# Refusals in one line, status 2.


@pytest.mark.parametrize('where', ['localhost', 'localhost:1234', 'localhost:1234,2,2', 'localhost,0,2', ':1,0,2'])
def test_coordinates_that_make_no_sense(tmp_path, where, capsys):
  assert train.main(['--config', str(DEMO), '--workdir', str(tmp_path), '--distributed', where]) == 2
  err = capsys.readouterr().err
  assert err.count('\n') == 1 and repr(where) in err and 'localhost:1234,1,2' in err


@pytest.mark.parametrize(('change', 'words'), [
    ('optimzer.lr=1', ["'optimzer'", "'optimizer'"]),
    ('optimizer.lr=1', ["'optimizer.lr'", 'optimizer.learning_rate']),
    ('batchsize=8', ["'batchsize'", "'batch_size'"]),
    ('data.nam=digits', ["'data.nam'", "'data.name'"]),
    ('data.name=digit', ["'digit'", "'digits'"]),
    ('model.depht=2', ["'depht'", "'depth'"]),
    ('model.name=vitt', ["'vitt'", "'vit'"]),
    ('optimizer.name=adamW', ["'adamW'", "'adamw'"]),
    ('optimizer.options.b_2=0.9', ["'b_2'", "'b2'"]),
    ('optimizer.decay=cosin', ["'cosin'", "'cosine'"]),
    ('recipes.SR-STE.patern=1:8', ["'patern'", "'pattern'"]),
    ('recipes.SR-STE.pattern=1:7', ["'block_0/mlp/fc1/kernel'", '1:7', 'pad']),
    ("recipes.SR-STE.where=['mpl/*']", ['mlp/fc1/kernel']),
    ('recipes.SR-STE.name=srste', ["'srste'", "'sr_ste'"]),
    ("recipes={'a/b': {'name': 'dense'}}", ["'a/b'", 'directory']),
    ("models={'SR-STT': {'width': 8}}", ["'SR-STT'", "'SR-STE'"]),
    ("models={'SR-STE': 8}", ['models.SR-STE', 'section', '8']),
    ("models={'SR-STE': {'widht': 8}}", ["'widht'", "'width'"]),
    ('steps=many', ['steps=many', 'number']),
    ('steps=0', ['steps=0', 'from 1 to']),
    ('steps=' + '(' * 300, ['steps=((', 'number']),
    ('resume_changed=1', ['resume_changed=1', 'bool']),
    ('seeds=3', ['seeds=3', 'tuple']),
    ('optimizer.learning_rate=-1.0', ['config: optimizer: `learning_rate` must be', 'at least 0', '-1.0']),
    ('noise=(3,)', ['noise=(3,)', 'globs']),
    ('writers=(3,)', ['writers=(3,)', 'functions']),
    ('seeds=(1, 1)', ['seeds', 'different']),
    ('seeds=(1, -1)', ['seeds', 'whole numbers']),
    ('mesh.data=3', ['batch_size=8', '3 devices', 'multiple of 3, such as 9', 'mesh.data']),
    ('mesh.data=0', ['mesh.data=0', 'from 1 to the 8', '-1']),
    ('mesh.dta=1', ["'mesh.dta'", "'mesh.data'"]),
    ('shard=fuly', ["'fuly'", "'fully'"]),
    ('steps', ['key=value']),
])
def test_a_change_that_makes_no_sense(folder, tmp_path, change, words, capsys):
  assert call(folder, tmp_path, change) == 2
  err = capsys.readouterr().err
  assert err.count('\n') == 1 and all(word in err for word in words), err


@pytest.mark.parametrize(('text', 'words'), [
    (None, ['no file', 'experiments/configs']),
    ('get_confg = dict', ['get_config']),
    ('from experiments.configs import default\ndef get_config():\n  return {**default.get_config(), "sede": (1,)}',
     ["'sede'", "'seeds'"]),
    ('def get_config():\n  return (', ['config.py, line 2: SyntaxError', 'never closed']),
    ('\nimport nothing_of_this_name', ['config.py, line 2: ModuleNotFoundError', 'nothing_of_this_name']),
    ('def get_config():\n  steps = 1\n  return {}["a" * steps]', ["config.py, line 3: KeyError: 'a'"]),
    ('import json\n\nget_config = lambda: json.loads("{")', ['config.py, line 3: JSONDecodeError']),
    ('def get_config(size):\n  return {}', ['config.py, line 1: TypeError', 'size']),
    ('raise SystemExit(3)', ['config.py, line 1: SystemExit: 3']),
    ('get_config = lambda: 3', ['config.py', 'returns 3', 'ConfigDict']),
    ('# \0', ['config.py, line 1: ', 'null bytes']),
])
def test_a_config_file_that_is_none(folder, tmp_path, text, words, capsys):
  path = tmp_path / 'config.py'
  if text is not None:
    path.write_text(text)
  assert call(folder, tmp_path / 'run', config=path, toy=()) == 2
  err = capsys.readouterr().err
  assert err.count('\n') == 1 and all(word in err for word in words), err


def test_what_a_config_file_leaves_out_is_as_in_the_default(tmp_path):
  path = tmp_path / 'config.py'
  path.write_text('def get_config():\n  return {"steps": 7, "data": {"name": "mnist"}, "optimizer": {"clip": None}}')
  config, known = configs.load(path), configs.default.get_config()
  assert config.steps == 7 and config.optimizer.clip is None and config.data.name == 'mnist'
  assert config.optimizer.decay == known.optimizer.decay and config.seeds == known.seeds
  assert config.is_locked


def test_a_workdir_that_cannot_be_written(folder, tmp_path, capsys):
  (tmp_path / 'file').write_text('')  # A file as the parent refuses the superuser too, whom permissions do not.
  assert call(folder, tmp_path / 'file' / 'run') == 2
  err = capsys.readouterr().err
  assert err.count('\n') == 1 and str(tmp_path / 'file') in err
