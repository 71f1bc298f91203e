"""Tests that every long call tells one hook how far it is, and that users may replace the hook."""

import collections
import io as streams
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

import sparsejax as sj
from experiments.loop.progress import Progress
from experiments.sweep.board import Board
from sparsejax import checkpoints, cli, progress

PARAMS = {name: {'kernel': np.ones((4, 8), np.float32)} for name in ('up', 'down')}
DRAWN = {name: np.random.default_rng(i).standard_normal((4, 4)).astype(np.float32) for i, name in enumerate('ab')}


def stored(tmp_path):
  sj.io.save(tmp_path / 'model.safetensors', PARAMS)
  return tmp_path / 'model.safetensors'


def pruned(tmp_path):
  sj.prune(lambda params, x: x @ params['a'] @ params['b'], DRAWN, [jnp.eye(4)], sj.recipes.wanda(0.5))


def measured(tmp_path):
  sj.sensitivities.zeroth_order(lambda params, batch: sum(w.sum() for w in params.values()), DRAWN, [0],
                                jax.random.key(0), where=sj.trees.named('*'))


def trained(tmp_path):
  with Progress(1, 2, rich.console.Console(file=streams.StringIO())) as board:
    board.start('SR-STE', 0)
    board.advance(2, {'loss': 0.5})


def swept(tmp_path):
  arm = types.SimpleNamespace(place='dense', axes=collections.defaultdict(str))
  Board([arm], 1, 'loss', rich.console.Console(file=streams.StringIO())).say('a cell was refused')


def both(verb):
  return [f'{verb} 1/2 down/kernel', f'{verb} 2/2 up/kernel']


def searched(tmp_path):
  apply = lambda params, x: x @ params['a'] @ params['b']
  found = sj.structured.groups(apply, DRAWN, jnp.eye(4))
  stages = [sj.structured.Stage(('a:1',), 1, 0.5)]
  sj.structured.search(found, DRAWN, lambda params: jnp.sum(apply(params, jnp.eye(4)) ** 2), stages)


CALLS = {
    'pack': (lambda tmp_path: sj.formats.pack(PARAMS, 'bitmask'), both('pack')),
    'save': (stored, both('write')),
    'load': (lambda tmp_path: sj.io.load(stored(tmp_path)), both('read')),
    'check': (lambda tmp_path: checkpoints.reported(checkpoints.picked(str(stored(tmp_path))), None), both('check')),
    'prune': (pruned, ['1 matrices, 1 batches', '1/1 a: 0.5000 zero']),
    'sensitivities': (measured, ['sensitivities, batch 1: 1/2 a', 'sensitivities, batch 1: 2/2 b']),
    'search': (searched, ['search: 75.0% of the cost is left, 50.0% is asked', 'search: 50.0%']),
    'training': (trained, ['SR-STE 2/2  loss 0.500']),
    'sweep': (swept, ['a cell was refused']),
}


@pytest.mark.parametrize('name', CALLS)
def test_a_long_call_tells_the_hook_and_nothing_without_one(name, tmp_path, capsys, standard_promotion):
  call, expected = CALLS[name]
  lines, others = [], []
  with progress.listening(others.append), progress.listening(lines.append):
    call(tmp_path)
  told = [next((line for line in lines if line.startswith(start)), None) for start in expected]
  assert None not in told and told == sorted(told, key=lines.index) and others == []
  heard = len(lines)
  call(tmp_path)
  assert len(lines) == heard and capsys.readouterr() == ('', '')


def test_the_own_hook_of_a_call_goes_before_that_of_the_context():
  own, others = [], []
  with progress.listening(others.append):
    sj.prune(lambda params, x: x @ params['a'] @ params['b'], DRAWN, [jnp.eye(4)], sj.recipes.wanda(0.5),
             progress=own.append)
  assert len(own) == 2 and others == []


def test_by_default_lines_go_to_the_standard_error_at_a_slow_pace(monkeypatch, capsys):
  clock = [0.0]
  monkeypatch.setattr(progress.time, 'monotonic', lambda: clock[0])
  with progress.listening():
    for clock[0] in range(13):
      progress.tell(f'at {clock[0]}')
  progress.tell('after the context')
  assert capsys.readouterr() == ('', 'at 5\nat 10\n')


def test_the_commands_tell_a_slow_check_and_a_slow_pack(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(progress, 'paced', lambda hook: hook)
  sj.io.save(tmp_path / 'zeros.safetensors', {'layer': {'kernel': np.zeros((4, 8), np.float32)}})
  assert cli.main(['check', str(tmp_path / 'zeros.safetensors'), '--pattern', '2:4']) == 0
  assert cli.main(['pack', str(tmp_path / 'zeros.safetensors'), str(tmp_path / 'o'), '--pattern', '2:4']) == 0
  assert capsys.readouterr().err == 'check 1/1 layer/kernel\nwrite 1/1 layer/kernel\n'


def test_a_hook_that_is_no_function_is_refused():
  with pytest.raises(ValueError, match='^progress.listening: `hook` must be a function of a line of text, not 5'):
    with progress.listening(5):
      pass
