"""Tests that a run is shown and continued under its own config alone, and that no error leaves a process behind."""

import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading

import jax
import pytest
from ml_collections import ConfigDict

from experiments import configs, train
from experiments.loop import checkpoints, exits, origins, outcomes, records
from sparsejax import io

pytestmark = pytest.mark.usefixtures('standard_promotion')

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = """
from experiments.configs import default

def get_config():
  config = default.get_config()
  config.steps, config.batch_size, config.mesh = 4, 8, {'data': 1}
  config.model = {'name': 'mlp', 'widths': (8, 8)}
  config.recipes = {'only': {'name': 'asp', 'pattern': '2:4'}}
  config.measure_every = config.validate_every = config.checkpoint_every = 2
  return config
"""
BEFORE, AFTER = 'optimizer.learning_rate=1e-3', 'optimizer.learning_rate=0.5'


@pytest.fixture(scope='module')
def finished(folder):
  """Returns the workdir of a run of four steps, trained once."""
  (folder / 'config.py').write_text(CONFIG)
  with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
    assert call(folder, folder / 'finished') == 0
  return folder / 'finished'


@pytest.fixture
def unfinished(finished, tmp_path):
  """Returns a copy of the run at step 2, in a directory whose name libraries take for a pattern."""
  copy = shutil.copytree(finished, tmp_path / 'a[1]*\\b')
  shutil.rmtree(copy / 'only/checkpoints/4')
  (copy / 'only' / outcomes.FILE).unlink()
  return copy


def call(folder, workdir, *changes):
  """Returns the exit status of the command."""
  given = ['--config', folder / 'config.py', '--workdir', workdir, '--data_dir', folder / 'data']
  return train.main([*map(str, given), *(part for change in changes for part in ('--set', change))])


def files(workdir):
  """Returns the bytes of every file by its path."""
  return {path: path.read_bytes() for path in workdir.rglob('*') if path.is_file()}


def flat(section, prefix=''):
  for key, value in section.items():
    if isinstance(value, dict) and value:
      yield from flat(value, f'{prefix}{key}.')
    else:
      yield prefix + key


@pytest.mark.parametrize('place', ['finished', 'unfinished'])
def test_a_change_of_each_key_is_refused_or_is_no_other_run(folder, place, request):
  directory = request.getfixturevalue(place) / 'only'
  config = configs.load(folder / 'config.py')
  others = {'tickets': {'rounds': 2}, 'models': {'only': {'widths': (4,)}}, 'optimizers': {'only': {'clip': 5}}}
  wanted = lambda changed: configs.of_run(changed, 'only')
  assert origins.is_finished(directory, wanted(config), 4, meant=False) == (place == 'finished')
  refused = set()
  for key in flat(configs.plain(config)):
    changed = configs.plain(config)
    *sections, last = key.split('.')
    functools.reduce(dict.__getitem__, sections, changed)[last] = others.get(key, 'other')
    changed = ConfigDict(changed)
    for meant in (False, True):
      try:
        origins.is_finished(directory, wanted(changed), 4, meant)
      except ValueError as error:
        shown = key.removeprefix('recipes.only.').removesuffix('models').removesuffix('s')
        assert shown in str(error) and 'another --workdir' in str(error) and str(directory) in str(error)
        assert ('resume_changed=True' in str(error)) == (place == 'unfinished' and key not in ('seeds', 'tickets'))
        refused.add(key)
      else:
        assert meant and place == 'unfinished' or key.startswith(configs.FREE), key
  assert len(refused) > 15 and not [key for key in refused if key.startswith(configs.FREE)]


def test_results_are_never_shown_or_rewritten_under_another_config(folder, finished, capsys):
  before = files(finished)
  for changes in ([AFTER], [AFTER, 'resume_changed=True'], ['recipes.only.pattern=1:4'], ['steps=8'], ['steps=2']):
    assert call(folder, finished, *changes) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and re.search(r'only holds step 4 of another config \(.+: .+ -> .+\)', err), err
  assert files(finished) == before


def test_a_run_goes_on_with_another_config_where_that_is_meant_and_says_so_for_ever(folder, unfinished, capsys):
  before = files(unfinished)
  assert call(folder, unfinished, AFTER) == 2
  assert 'learning_rate: 0.001 -> 0.5' in capsys.readouterr().err and files(unfinished) == before
  assert call(folder, unfinished, 'recipes.only.pattern=1:4', 'resume_changed=True') == 2
  err = capsys.readouterr().err
  assert err.count('\n') == 1 and 'the state was made by' in err and '1:4' in err, err
  assert call(folder, unfinished, AFTER, 'resume_changed=True') == 0
  note = 'only: went on from step 2 with another config: optimizer.learning_rate: 0.001 -> 0.5.'
  assert note in ' '.join(capsys.readouterr().out.split())
  assert f'- {note}' in (unfinished / 'results.md').read_text()
  for path in (unfinished / 'config.json', unfinished / 'only' / outcomes.FILE):
    assert '0.5' in path.read_text() and '0.001' not in path.read_text().split('"changes"')[0]
  assert json.loads((unfinished / 'config.json').read_text())['resume_changed'] is True
  assert call(folder, unfinished, AFTER) == 0  # It is the run of this config now,
  assert note in ' '.join(capsys.readouterr().out.split())
  assert call(folder, unfinished, BEFORE) == 2  # and no longer that of the other.


@pytest.mark.parametrize('error', [PermissionError(13, 'Permission denied'), OSError(30, 'Read-only file system')])
def test_a_finished_run_in_a_read_only_directory_is_shown(folder, finished, error, monkeypatch, capsys):
  def refuse(path, mode='r', *rest, **options):
    if set(mode) & set('wax+') and finished in pathlib.Path(path).parents:
      raise error
    return opened(path, mode, *rest, **options)

  def no(*_, **__):
    raise error

  before, opened = files(finished), pathlib.Path.open  # Permissions do not bind the superuser.
  monkeypatch.setattr(pathlib.Path, 'open', refuse)
  for name in ('touch', 'mkdir', 'replace', 'unlink', 'rename'):
    monkeypatch.setattr(pathlib.Path, name, no if name != 'mkdir' else lambda path, **options: path.exists() or no())
  assert call(folder, finished) == 0
  out, err = capsys.readouterr()
  assert '50.00%' in out and 'read-only' in out and not err
  assert files(finished) == before


# What stands in the place of a file or a folder: half of them before the run is traced. All: `--cells all`.
PLACES = {'only': 'file', 'only/checkpoints': 'file', 'only/outcome.json': 'folder', 'only/metrics.jsonl': 'folder',
          'config.json': 'folder', 'only/packed.safetensors': 'folder', 'only/report.txt': 'folder', '.': 'file',
          'results.json': 'folder', 'results.png': 'folder', 'only/dense.safetensors': 'folder'}


def pytest_generate_tests(metafunc):
  if 'place_of' in metafunc.fixturenames:
    every = metafunc.config.getoption('--cells') == 'all'
    metafunc.parametrize('place_of', list(PLACES)[:None if every else 4])


def test_an_error_in_a_working_directory_is_a_line_and_leaves_no_thread(folder, unfinished, place_of, capsys):
  path = unfinished / place_of
  shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
  path.write_text('') if PLACES[place_of] == 'file' else path.mkdir()
  assert call(folder, unfinished) == 2
  err = capsys.readouterr().err
  assert err.startswith('error: ') and err.count('\n') == 1 and path.name in err, err
  assert not [thread for thread in threading.enumerate() if 'Signaling' in type(thread).__name__]


@pytest.mark.parametrize('ends', ['return 3', 'raise ValueError("seen")'])
def test_a_thread_that_waits_without_end_does_not_keep_the_process(ends):
  code = f'''
import threading
from experiments.loop import exits

def main():
  threading.Thread(target=threading.Event().wait).start()
  {ends}

exits.PATIENCE = 0.1
exits.leave(main)
'''
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, timeout=60, capture_output=True, text=True)
  assert done.returncode == (3 if ends == 'return 3' else 1)
  assert ('seen' in done.stderr) == (ends != 'return 3')


def test_all_commands_leave_so(tmp_path):
  for name in ('train', 'tickets', 'claims'):
    assert (ROOT / 'experiments' / f'{name}.py').read_text().endswith("  exits.leave(main)\n")
  assert exits.PATIENCE < 60


# Damage.


def emptied(place):
  place.write_text('')


def cut(place):
  place.write_bytes(place.read_bytes()[:-9])


def null(place):
  place.write_text('null')


def another(place):
  place.write_text(place.read_text().replace('"seeds": [0]', '"seeds": [1]').replace('"seeds":[0]', '"seeds":[1]'))


def gone(place):
  shutil.rmtree(place.parent)


@pytest.mark.parametrize('damage', [emptied, cut, null, another, gone])
def test_a_damaged_meta_falls_back_to_the_checkpoint_before(finished, tmp_path, damage):
  copy = shutil.copytree(finished / 'only', tmp_path / 'only')
  meta = copy / 'checkpoints/4/meta/metadata'
  text = meta.read_text()
  damage(meta)
  assert not meta.exists() or meta.read_text() != text
  step, record = checkpoints.newest(copy / 'checkpoints')
  assert step == 2 and record['config']['recipe'] == {'name': 'asp', 'pattern': '2:4'}


def test_files_of_a_run_that_are_damaged_are_named(tmp_path):
  for text in ('', '{', '3', '[' * 100_000):
    (tmp_path / outcomes.FILE).write_text(text)
    with pytest.raises(ValueError, match=r'outcome\.json is damaged.*Remove the file'):
      outcomes.read(tmp_path)
  whole = b'{"step": 1}\n{"step": 2}\n'
  for line in (b'{"step"', b'3', b'{}', b'\xff\xfe', b'{"step": "x"}'):
    (tmp_path / records.FILE).write_bytes(whole + line)
    assert [record['step'] for record in records.read(tmp_path)] == [1, 2]


HOSTILE = ['a[1]', 'a*', 'a?b', '**', 'back\\slash', "it's", 'new\nline', 'a{b,c}', '%20', '$HOME', 'x' * 240]


def test_checkpoints_in_directories_of_any_name(finished, tmp_path):
  """Moves a checkpoint there. `unfinished` above is saved and resumed under such a name."""
  for name in HOSTILE:
    copy = shutil.copytree(finished / 'only', tmp_path / name)
    assert checkpoints.newest(copy / 'checkpoints')[0] == 4, name
    assert io.read(copy / 'checkpoints', 'params').keys() == io.read(finished / 'only/checkpoints', 'params').keys()
    shutil.rmtree(copy)
  assert not os.listdir(tmp_path)
