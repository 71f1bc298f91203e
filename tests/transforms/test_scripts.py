"""Runs training scripts of three kinds, each made sparse by the changed line that `docs/interoperability.md` shows.

The scripts know nothing of this library, and are written as public scripts are: a classifier of images in Flax Linen
(TrainState, Grain, TensorBoard), a language model in Flax NNX (Orbax, `inject_hyperparams`), and Equinox.
"""

import difflib
import importlib.util
import pathlib
import re

import equinox as eqx
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import sparsejax as sj

pytestmark = pytest.mark.usefixtures('standard_promotion')
DOCS = pathlib.Path(__file__).parents[2] / 'docs'
PAGE = (DOCS / 'interoperability.md').read_text()
CHANGES = {name: (old.strip(), new.strip()) for name, old, new in re.findall(
    r'`docs/scripts/(\w+)\.py`.*?```diff\n-(.*?)\n\+(.*?)\n```', PAGE, re.DOTALL)}


@pytest.fixture
def run(tmp_path):
  """Returns a function that runs `main` of a script of docs/scripts with the change of the page."""
  def made_sparse(name, *arguments, **options):
    dense, (old, new) = (DOCS / 'scripts' / f'{name}.py').read_text(), CHANGES[name]
    assert dense.count(f'  {old}\n') == 1 and 'sparsejax' not in dense
    sparse = dense.replace(old, new)
    changed = [line for line in difflib.ndiff(dense.splitlines(), sparse.splitlines()) if line[0] in '+-']
    assert [line[0] for line in changed] == ['-', '+']
    path = tmp_path / f'{name}.py'
    path.write_text(sparse)
    spec = importlib.util.spec_from_file_location(f'{name}_sparse', path)
    module = importlib.util.module_from_spec(spec)
    module.sj = sj  # `import sparsejax as sj`
    spec.loader.exec_module(module)
    return module, module.main(*arguments, **options)

  return made_sparse


def test_every_script_of_the_page_has_its_change():
  assert sorted(CHANGES) == sorted(path.stem for path in (DOCS / 'scripts').glob('*.py')) and len(CHANGES) == 3


def test_images_in_linen_with_train_state_grain_and_tensorboard(run, tmp_path):
  _, (params, state) = run('linen_images', str(tmp_path / 'board'), steps=20, batch_size=8)
  report = sj.check(params, state)
  assert {row.path.split('/')[0] for row in report.rows} == {'Conv_0', 'Conv_1', 'Dense_0', 'Dense_1'}
  assert report.achieved == pytest.approx(0.8, abs=0.01)
  written, = (tmp_path / 'board').glob('events*')
  assert written.read_bytes().count(b'loss') == 20


def test_language_in_nnx_with_hyperparameters_and_orbax(run, tmp_path, capsys):
  module, (model, optimizer) = run(
      'nnx_language', tmp_path, steps=4, batch_size=2, length=8, width=16, heads=2, depth=1)
  params = nnx.state(model, nnx.Param)
  assert {row.path.split('/')[0] for row in sj.check(params, optimizer.opt_state).rows} == {'blocks', 'head'}
  assert 'rate 0.0010' in capsys.readouterr().out
  assert module.rate_of(optimizer) < 6e-4
  with ocp.StandardCheckpointer() as checkpointer:
    state = nnx.state((model, optimizer))
    restored = checkpointer.restore(tmp_path / 'checkpoint', jax.tree.map(ocp.utils.to_shape_dtype_struct, state))
  jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_sequences_in_equinox(run):
  _, (model, state) = run('equinox_sequences', steps=10, batch_size=8, width=8)
  report = sj.check(eqx.filter(model, eqx.is_inexact_array), state)
  assert {row.path for row in report.rows} == {'cell/weight_ih', 'cell/weight_hh'}  # the head is one row
  assert report.achieved == pytest.approx(0.8, abs=0.01)
