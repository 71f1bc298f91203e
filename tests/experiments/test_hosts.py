"""Checks that several processes train as one: killed, stopped and resumed, they end in the same bits."""

import functools
import json
import shutil
import signal

import jax
import jobs
import numpy as np
import pytest

from experiments import configs
from experiments.loop import checkpoints, evaluate, hosts, runs
from sparsejax import io

RUN, STEPS = 'MdGf', 16
CONFIG = jobs.config(RUN, STEPS, shard='fully', validate_every=8)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return jobs.folder(tmp_path_factory.mktemp('hosts'), CONFIG)


def started(folder, workdir, count, *arguments, others=None):
  """Starts `count` jobs that train in `workdir` as one. `others` maps the number of a job to arguments of its own."""
  port, same = jobs.port(), ('--config', folder / 'config.py', '--workdir', folder / workdir,
                             '--data_dir', folder / 'data', *arguments)
  return jobs.together(*(
      jobs.Job(folder / f'{workdir}-{i}', *same, *(others or {}).get(i, ()), '--distributed',
               f'localhost:{port},{i},{count}', cache=folder / 'cache') for i in range(count)))


def lines(folder, workdir):
  path = folder / workdir / RUN / 'metrics.jsonl'
  return path.read_text().count('\n') if path.exists() else 0


def trained_on(folder, most):
  return lines(folder, 'killed') >= most


def writing(folder, most):
  """Returns whether a checkpoint is being written beside one that is whole."""
  names = [path.name for path in (folder / 'killed' / RUN / 'checkpoints').glob('*')]
  return trained_on(folder, most) and any(map(str.isdigit, names)) and any('.orbax-checkpoint-tmp' in n for n in names)


def bits(folder, workdir, step=STEPS):
  place = folder / workdir / RUN / 'checkpoints' / str(step)
  return {item: [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(io.read(place, item))]
          for item in ('params', 'opt_state')}


@pytest.fixture(scope='module')
def undisturbed(folder):
  """Returns status, output and errors of two processes that trained to the end as one."""
  with started(folder, 'alone', 2) as both:
    return [job.wait() for job in both]


def test_only_the_first_process_speaks(folder, undisturbed):
  (code, out, err), other = undisturbed
  assert (code, err) == (0, '') and other == (0, '', '')
  assert f'{RUN} {STEPS}/{STEPS}' in out and '75.00%' in out and out.count('results.png') == 1


def test_two_processes_train_and_test_as_one_does(folder, undisturbed, standard_promotion):
  """Compares losses and scores up to the order in which floating-point numbers are added."""
  arguments = [f'data.data_dir={folder / "data"}', 'mesh.data=1']
  setup = runs.prepare(configs.load(folder / 'config.py', arguments))
  run = runs.build(setup, {RUN: folder / 'alone' / RUN})[RUN]
  _, loss, _ = run.step.compile()(run.start(), runs.batch(setup, 0), np.int32(0), run.peak)
  first, *_ = (folder / 'alone' / RUN / 'metrics.jsonl').read_text().splitlines()
  np.testing.assert_allclose(json.loads(first)['loss'], loss, rtol=1e-5)
  with checkpoints.open_(run.directory / 'checkpoints') as saved:
    _, state, _ = checkpoints.restore(saved, run.state, pytest.fail)
  outcome = json.loads((run.directory / 'outcome.json').read_text())
  for key, value in evaluate.scores(setup.task, run.model.predict, state.params, runs.split(setup, 'test')).items():
    np.testing.assert_allclose(outcome['test'][key], value, rtol=1e-5)


@pytest.fixture(scope='module')
def stopped(folder, pytestconfig):
  """Returns the workdir of two processes, one of which was killed, and which were stopped after they had resumed."""
  kills = ((1, trained_on), (0, writing)) if pytestconfig.getoption('--cells') == 'all' else ((0, writing),)
  for victim, moment in kills:
    with started(folder, 'killed', 2) as both:
      # The file still has the lines after the last checkpoint of the killed run, until training resumes.
      jobs.until(functools.partial(moment, folder, lines(folder, 'killed') + 3), *both)
      both[victim].signal(signal.SIGKILL)
      code, _, err = both[1 - victim].wait()
      assert both[victim].wait()[0] == -signal.SIGKILL
      assert code == hosts.LOST and err.count('\n') == 1 and err.startswith(f'error: process {1 - victim} stops')
      assert 'another process is gone' in err and 'give every process its command again' in err
  with started(folder, 'killed', 2) as both:
    jobs.until(functools.partial(trained_on, folder, lines(folder, 'killed') + 2), *both)
    both[1].signal(signal.SIGTERM)  # Process 1 does not print.
    (code, out, err), other = [job.wait() for job in both]
    assert (code, err) == (128 + signal.SIGTERM, '') and other == (code, '', ''), (out, err, other)
    assert 'Stopped by SIGTERM' in out and 'resumed at step' in out
    assert len(list((folder / 'killed' / RUN / 'checkpoints').glob('*.orbax-checkpoint-tmp*'))) == 0
  return folder / 'killed'


@pytest.fixture(params=['two', 'four'])
def several(request, folder, stopped):
  """Returns a workdir in which several processes trained and none trains any more."""
  if request.param == 'two':
    return shutil.copytree(stopped, folder / 'copy')
  with started(folder, 'four', 4, '--set', 'steps=4') as many:
    assert [job.wait()[::2] for job in many] == [(0, '')] * 4
  return folder / 'four'


@pytest.mark.sampled(1)
def test_a_single_process_resumes_what_several_trained(folder, several):
  last = max(int(path.name) for path in (several / RUN / 'checkpoints').iterdir())
  alone = ('--config', folder / 'config.py', '--workdir', several, '--data_dir', folder / 'data',
           '--set', f'steps={last + 2}', '--set', 'resume_changed=True')
  with jobs.together(jobs.Job(folder / 'one', *alone, cache=folder / 'cache')) as (one,):
    code, out, err = one.wait()
  assert (code, err) == (0, '') and f'resumed at step {last}' in out


def test_killed_and_stopped_and_resumed_it_ends_in_the_same_bits(folder, undisturbed, stopped):
  with started(folder, 'killed', 2) as both:
    assert [job.wait()[0] for job in both] == [0, 0]
  assert bits(folder, 'killed') == bits(folder, 'alone')


@pytest.mark.parametrize(('arguments', 'others', 'words'), [
    (['--set', 'batch_size=7'], {}, ['batch_size=7', '2 devices', 'such as 8']),
    ([], {1: ['--set', 'optimizer.learning_rate=0.1']}, ['process 1', 'optimizer.learning_rate: 0.001 -> 0.1']),
])
def test_refused_in_one_line_by_all(folder, arguments, others, words):
  with started(folder, f'refused-{len(others)}', 2, *arguments, others=others) as both:
    ended = [job.wait() for job in both]
  assert [code for code, _, _ in ended] == [2, 2]
  err = ''.join(err for _, _, err in ended)
  assert err.startswith('error: ') and err.count('\n') == 1 and all(word in err for word in words), ended
