"""Tests the output, the files, the exit status and the one-line errors of the command `sparsejax`."""

import importlib.metadata
import os
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec

import sparsejax as sj
from sparsejax import checkpoints, cli, formats, io, planning, spellings


def sparse(*shape, dtype='float32', axis=-2):
  """Returns weights that are 2:4 along `axis`: the third and fourth of every four are zero."""
  w = np.moveaxis(np.random.default_rng(0).standard_normal(shape).astype(dtype), axis, 0).copy()
  w[2::4] = w[3::4] = 0
  return np.ascontiguousarray(np.moveaxis(w, 0, axis))


def params():
  return {'mlp': {'up': {'kernel': sparse(8, 16, dtype='bfloat16'), 'bias': np.ones(16, 'float32')},
                  'down': {'kernel': sparse(16, 8)}},
          'embed': {'table': np.ones((4, 8), 'float32')}}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
  """Runs the command in an empty folder: `status, out, err`."""
  monkeypatch.chdir(tmp_path)

  def command(*argv):
    status = cli.main(list(argv))
    return status, *capsys.readouterr()

  command.output = capsys.readouterr
  return command


@pytest.fixture
def ckpt(run):
  """Returns a function that writes a dense file of a tree and returns its name."""

  def written(tree=None):
    io.save('ckpt.safetensors', params() if tree is None else tree, metadata={'step': '7'})
    return 'ckpt.safetensors'

  return written


def crowded():
  tree = params()
  tree['mlp']['down']['kernel'][6, 3] = 1
  return tree


def same(a, b):
  return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(
      lambda x, y: (x.shape, x.dtype, np.asarray(x).tobytes()) == (y.shape, y.dtype, np.asarray(y).tobytes()), a, b))


def test_report_is_a_table(run, ckpt):
  status, out, err = run('report', ckpt(), '--pattern', '2:4')
  assert (status, err) == (0, '')
  assert out == f'{sj.report(params(), pattern=sj.NM(2, 4))}\n'
  assert re.search(r'mlp/up/kernel +8 x 16 +2:4', out) and 'embed' not in out
  assert re.search('kernel .* (2:4|4:8)', run('report', 'ckpt.safetensors')[1])  # without --pattern


@pytest.mark.parametrize('arguments, status, lines', [
    (['--pattern', '2:4'], 1, [r'^mlp/down/kernel 16x8: 1 of 32 groups keep more than 2 of 4, the first, .*keeps 3$']),
    (['--pattern', '2:4', '--except', 'down/*'], 0, ['^ok: 1 parameters keep 2:4$']),
    (['--pattern', '2:4', '--where', 'up/kernel'], 0, ['^ok: 1 parameters keep 2:4$']),
    (['--pattern', '2:4', '--pattern', 'down/*=3:4'], 0, ['^ok: 2 parameters']),
    (['--pattern', '1:4'], 1, ['^mlp/down/kernel', '^mlp/up/kernel']),
    (['--pattern', '2:4', '--axis', 'up/kernel=1'], 1, ['^mlp/down/kernel', '^mlp/up/kernel 8x16: .* groups']),
    (['--pattern', '2:5'], 1, ['^mlp/down/kernel .* 5 divides', '^mlp/up/kernel .* 5 divides']),
    (['--pattern', 'bitmask'], 0, ['^ok']),
])
def test_check_names_each_violating_layer_in_a_line(run, ckpt, arguments, status, lines):
  found, out, err = run('check', ckpt(crowded()), *arguments)
  assert (found, err) == (status, '')
  assert len(out.splitlines()) == len(lines)
  for line, expected in zip(out.splitlines(), lines):
    assert re.search(expected, line)


@pytest.mark.parametrize('pattern, kind, ratio', [
    ('2:4', formats.NMArray, '0.5625'), ('bitmask', formats.BitmaskArray, '0.5417'),
    ('relative_index', formats.RelativeIndexArray, '0.6667')])
def test_pack_and_unpack_give_back_every_bit(run, ckpt, pattern, kind, ratio):
  status, out, err = run('pack', ckpt(), 'packed.safetensors', '--pattern', pattern)
  assert (status, err) == (0, '')
  packed = io.load('packed.safetensors')
  assert isinstance(packed['mlp']['up']['kernel'], kind) and isinstance(packed['embed']['table'], np.ndarray)
  after = packed['mlp']['up']['kernel'].nbytes + packed['mlp']['down']['kernel'].nbytes
  assert f'2 packed parameters: {8 * 16 * 2 + 16 * 8 * 4} -> {after} bytes ({ratio})' in out
  size, whole = formats.nbytes(params()), os.path.getsize('packed.safetensors')
  assert f'all of packed.safetensors: {size:,} -> {whole:,} bytes ({whole / size:.4f})' in out
  assert run('check', 'packed.safetensors', '--pattern', pattern)[0] == 0
  assert run('unpack', 'packed.safetensors', 'dense.safetensors')[0] == 0
  assert same(io.load('dense.safetensors'), params())
  assert (open('dense.safetensors', 'rb').read() == open('ckpt.safetensors', 'rb').read()
          and io.metadata('packed.safetensors') == {'step': '7'})


def test_pack_takes_axes_patterns_and_64_bits(run, ckpt):
  """Tests an axis that differs from the convention, a pattern for some parameters, and leaves of 64 bits."""
  tree = {'a': {'kernel': sparse(3, 8, dtype='float64', axis=1)}, 'b': {'kernel': sparse(8, 3, dtype='float64')}}
  assert run('pack', ckpt(tree), 'out', '--pattern', '2:4')[0] == 2
  arguments = ['--pattern', '2:4', '--pattern', 'b/*=4:8', '--axis', 'a/kernel=1']
  assert run('pack', 'ckpt.safetensors', 'out', *arguments)[0] == 0
  packed = io.load('out')
  assert (packed['a']['kernel'].m, packed['a']['kernel'].axes) == (4, (-1,)) and packed['b']['kernel'].m == 8
  assert run('unpack', 'out', 'dense')[0] == 0 and same(io.load('dense'), tree)


def test_orbax_and_foreign_files_are_checkpoints_too(run, tmp_path):
  state = {'params': jax.tree.map(jnp.asarray, params()), 'opt_state': [jnp.ones(2)]}
  with ocp.CheckpointManager(tmp_path / 'run') as manager:
    manager.save(3, args=ocp.args.Composite(state=ocp.args.StandardSave(state)))
  assert run('check', 'run', '--pattern', '2:4')[:2] == (0, 'ok: 2 parameters keep 2:4\n')
  assert run('pack', 'run', 'out', '--pattern', '2:4')[0] == 0
  assert same(formats.unpack(io.load('out')), params() | {'mlp': jax.tree.map(jnp.asarray, params()['mlp'])})
  safetensors.numpy.save_file({'model.fc.weight': sparse(3, 8, axis=1)}, 'torch.safetensors')
  assert run('check', 'torch.safetensors', '--pattern', '2:4') == (0, 'ok: 1 parameters keep 2:4\n', '')


def gpt2():
  """Returns parameters by the names and layouts of GPT-2's torch file: `Conv1D` stores `[in, out]`."""
  return {'h.0.attn.c_attn.weight': sparse(8, 24), 'h.0.attn.c_attn.bias': np.ones(24, 'float32'),
          'h.0.mlp.c_fc.weight': sparse(8, 32), 'wte.weight': np.ones((16, 8), 'float32')}


@pytest.mark.parametrize('command', ['check F --pattern 2:4', 'pack F out --pattern 2:4', 'pack F out --pattern csc',
                                     'report F --pattern 4x4'])
def test_axes_that_nothing_tells_are_asked_for_with_the_option_to_paste(run, command):
  safetensors.numpy.save_file(gpt2(), 'F')
  status, out, err = run(*command.split())
  options = '--axis c_attn/weight=0 --axis c_fc/weight=0'
  assert (status, out) == (2, '') and options in err and '--except c_attn/weight c_fc/weight' in err
  assert run(*command.split(), *options.split())[0] == 0


def test_a_packed_file_says_its_axes_and_who_said_so(run):
  safetensors.numpy.save_file(gpt2(), 'F')
  options = ['--axis', '*/weight=0']
  assert run('pack', 'F', 'packed', '--pattern', '2:4', *options)[0] == 0
  assert re.search(r'c_attn/weight +8 x 24 +2:4 +0 \(given\)', run('report', 'packed')[1])
  assert run('check', 'packed', '--pattern', '2:4')[:2] == (0, 'ok: 2 parameters keep 2:4\n')
  assert run('pack', 'packed', 'again', '--pattern', '2:4')[0] == 0
  assert open('again', 'rb').read() == open('packed', 'rb').read()


def test_what_is_packed_is_checked_whatever_its_name(run):
  axes = dict.fromkeys('ab', sj.types.Axes((0,), (1,)))
  io.save('F', sj.formats.pack({'a': sparse(8, 4), 'b': sparse(8, 4)}, sj.NM(2, 4), where=lambda *_: True, axes=axes))
  assert run('check', 'F', '--pattern', '2:4')[:2] == (0, 'ok: 2 parameters keep 2:4\n')
  status, out, _ = run('check', 'F', '--pattern', '1:4')
  assert status == 1 and [line.split()[0] for line in out.splitlines()] == ['a', 'b']


@pytest.mark.parametrize('pattern, kind', [
    ('4x8 0.5', 'block_sparse'), ('unstructured 0.9', 'csc'), ('unstructured', 'csc'), ('csc', 'csc'),
    ('sparse24', 'sparse24'), ('channel 0.5', 'no format stores channel 0.5'), ('2:4 0.5', 'leave 0.5 out')])
def test_pack_takes_every_form_of_a_pattern_that_advise_takes(run, ckpt, pattern, kind):
  w = np.zeros((64, 16), 'float32')
  w[::16, 8:] = 1
  status, out, err = run('pack', ckpt({'a': {'kernel': w}}), 'out', '--pattern', pattern)
  if kind in formats.TABLE:
    assert status == 0 and io.load('out')['a']['kernel'].kind == kind
    assert run('advise', 'ckpt.safetensors', '--pattern', pattern)[0] == 0
  else:
    assert status == 2 and kind in err


def test_what_an_optimizer_keeps_is_left_out_and_listed(run, ckpt, tmp_path):
  kernel = sparse(8, 8)
  tree = {'model': {'fc': {'kernel': kernel}}, 'opt_state': {'mu': {'fc': {'kernel': np.ones((8, 8), 'float32')}}},
          'ema': {'fc': {'kernel': np.ones((8, 8), 'float32')}}}
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'orbax', jax.tree.map(jnp.asarray, tree))
  for name in (ckpt(tree), 'orbax'):
    status, out, _ = run('check', name, '--pattern', '2:4')
    assert status == 0 and out.startswith('ok: 1 parameters')
    assert "left out, as an optimizer keeps them beside the parameters: 'ema/fc/kernel', 'opt_state/mu/fc" in out
    assert len(re.findall('^[a-z_/]+/kernel ', run('report', name)[1], re.MULTILINE)) == 1
    assert run('check', name, '--pattern', '2:4', '--where', 'mu/fc/kernel')[0] == 1
  assert run('pack', 'ckpt.safetensors', 'out', '--pattern', '2:4')[0] == 0
  assert same(formats.unpack(io.load('out')), tree)


def test_a_sharded_folder_is_a_checkpoint_too(run):
  os.mkdir('sharded')
  for i in (1, 2):
    safetensors.numpy.save_file({f'layers.{i}.weight': sparse(4, 8, axis=1)}, f'sharded/{i}.safetensors')
  open('sharded/model.safetensors.index.json', 'w').write(
    '{"weight_map": {"layers.1.weight": "1.safetensors", "layers.2.weight": "2.safetensors"}}')
  assert run('check', 'sharded', '--pattern', '2:4') == (0, 'ok: 2 parameters keep 2:4\n', '')
  assert 'layers/2/weight' in run('report', 'sharded')[1]
  assert run('pack', 'sharded', 'out', '--pattern', '2:4')[0] == 0
  assert same(formats.unpack(io.load('out')), io.read('sharded'))
  os.remove('sharded/2.safetensors')
  assert "'2.safetensors', which are missing" in run('pack', 'sharded', 'out', '--pattern', '2:4', '--force')[2]


def test_the_version_is_that_of_the_package(run):
  assert run('--version')[:2] == (0, f'sparsejax {importlib.metadata.version("sparsejax")}\n')


@pytest.mark.parametrize('axis, dtype', [(0, 'float32'), (1, 'bfloat16')])
def test_blocks_of_a_parameter_decide_as_the_whole_parameter_does(run, monkeypatch, axis, dtype):
  """Reads a few rows at a time, and compares with the library on whole arrays: reports, refusals and packed files."""
  monkeypatch.setattr(io.Stored, 'in_multiples', lambda leaf, multiple: leaf.blocks(multiple))
  name = ('kernel', 'weight')[axis]
  w = sparse(96, 96, dtype=dtype, axis=axis)
  crowded = w.copy()
  crowded[6, 5] = crowded[50, 50] = 1
  for each in (w, crowded):
    io.save('F', {'fc': {name: each}})
    for pattern in (None, sj.NM(2, 4), sj.NM(2, 5), sj.Unstructured()):
      whole = sj.report({'fc': {name: each}}, pattern=pattern)
      assert str(checkpoints.reported(checkpoints.picked('F'), pattern)) == str(whole)
    for pattern in ('2:4', 'bitmask'):
      status, _, err = run('pack', 'F', 'out', '--force', '--pattern', pattern)
      try:
        io.save('expected', formats.pack({'fc': {name: each}}, pattern))
      except ValueError as refusal:
        assert (status, err) == (2, f'sparsejax: {refusal}\n')
        assert set(os.listdir()) <= {'F', 'out', 'expected'}  # The refusal of a late block leaves no part of a file.
      else:
        assert same(io.load('out'), io.load('expected'))


def altered():
  io.save('bad', params())
  with open('bad', 'r+b') as file:
    file.seek(-1, os.SEEK_END)
    file.write(b'\x55')


@pytest.mark.parametrize('arguments, message', [
    ('', 'COMMAND'), ('prunes', "'prunes'.*'report'"), ('check CKPT', '--pattern'), ('report', 'CKPT'),
    ('report CKPT --colour', '--colour'), ('report nowhere', 'nowhere does not exist'),
    ('report empty', 'no complete Orbax'), ('report bad', "bad: tensor '.*' was altered"),
    ('unpack nowhere out', 'nowhere: No such file'),
    ('unpack foreign out', 'foreign was not written by'), ('report text', 'text: it is not a whole safetensors file'),
    ('check CKPT --pattern 2/4', "'2/4'"), ('check CKPT --pattern 5:4', '5:4'),
    ('check CKPT --pattern 2:4 --pattern 1:4', 'two'),
    ('check CKPT --pattern 2:4 --where no/such', "picks no parameter.*'mlp/down/kernel'"),
    ('check CKPT --pattern 2:4 --where down/kernel --where no/such', "names 'no/such'"),
    ('check CKPT --pattern 2:4 --where no/such --where down/kernel', "names 'no/such'"),
    ('prune out --model hf:empty --data text.npy', 'text.npy: No such'),
    ('check CKPT --pattern down/*=2:4', "says nothing about 'mlp/up/kernel'"),
    ('check CKPT --pattern 2:4 --axis no/such=1', "'no/such'.*Valid: mlp/down/kernel"),
    ('check CKPT --pattern 2:4 --axis up/kernel=2', r"'mlp/up/kernel' of shape \(8, 16\).*0 to 1"),
    ('check CKPT --pattern 2:4 --axis 1', '--axis 1: write GLOB=AXIS, as in "--axis mlp/down/kernel=0"'),
    ('report CKPT --item ema', "'ema'.*Valid: embed, mlp"),
    ('pack CKPT out --pattern 1:4', r"'mlp/down/kernel' of shape \(16, 8\): .* more than 1"),
    ('pack CKPT CKPT --pattern 2:4', 'there already; --force'), ('unpack CKPT empty --force', 'is a folder'),
    ('pack CKPT circle --pattern 2:4', 'circle: Too many levels of symbolic links'),
    ('pack CKPT no/folder/out --pattern 2:4', 'no/folder/out: there is no folder .*no/folder; make it'),
])
def test_every_error_is_one_line_and_status_2(run, ckpt, arguments, message):
  os.mkdir('empty')
  os.symlink('circle', 'circle')
  altered()
  safetensors.numpy.save_file({'w': np.ones(2, 'float32')}, 'foreign')
  open('text', 'w').write('no tensors here\n' * 9)
  file = ckpt()
  before = open(file, 'rb').read()
  status, out, err = run(*arguments.replace('CKPT', file).split())
  assert (status, out) == (2, '')
  assert err.startswith('sparsejax: ') and err.count('\n') == 1 and re.search(message, err)
  assert not os.path.exists('out') and open(file, 'rb').read() == before and os.listdir('empty') == []


def test_a_name_of_two_lines_makes_no_second_line(run):
  status, out, err = run('report', 'no\nwhere')
  assert (status, out, err.count('\n')) == (2, '', 1)
  assert err.startswith('sparsejax: io.read: no where does not exist')


def test_force_replaces(run, ckpt):
  file = ckpt()
  assert run('pack', file, file, '--pattern', '2:4', '--force')[0] == 0
  assert run('unpack', file, file, '--force')[0] == 0 and same(io.load(file), params())


def test_help_is_help(run):
  status, out, _ = run('--help')
  assert status == 0 and all(word in out for word in ('report', 'check', 'pack', 'unpack', 'plan', 'advise'))


PROGRAM = '''
import jax, size  # a module beside this one
from jax.sharding import NamedSharding, PartitionSpec as P

def program(mesh, rows=16, wrong=''):
  if wrong == 'result':
    return 1
  if wrong == 'error':
    return 1 / 0
  x = jax.ShapeDtypeStruct((rows, size.WIDTH), 'float32', sharding=NamedSharding(mesh, P(mesh.axis_names)))

  def step(x):
    return x - x.sum(0)

  return step, (x,)
'''


@pytest.fixture
def program(run):
  open('program.py', 'w').write(PROGRAM)
  open('size.py', 'w').write('WIDTH = 4')
  open('empty.py', 'w').write('x = 1')
  open('broken.py', 'w').write('x =')
  return 'program.py'


def test_plan_is_for_more_devices_than_are_here(run, program, monkeypatch):
  monkeypatch.setenv('JAX_NUM_CPU_DEVICES', '2')
  status, out, err = run('plan', program, '--devices', '16', '--mesh', 'data=4,model=4', '--set', 'rows=32')
  assert (status, err) == (0, '')
  assert re.search(r'^x +32 +512$', out, re.MULTILINE)  # float32[2, 4] of [32, 4]
  assert re.search(r'^all-reduce +f32\[4\] +16 +1 +30 +30$', out, re.MULTILINE)  # 2 x 15/16 x 16 bytes


@pytest.mark.parametrize('arguments, message', [
    ('plan', 'PROGRAM.py'), ('plan P', '--devices'), ('plan P --devices 0', "'0' is not a whole number, at least 1"),
    ('plan P --devices 8 --mesh data', 'data=8,fsdp=32'), ('plan P --devices 8 --mesh a=0', 'data=8,fsdp=32'),
    ('plan P --devices 4 --mesh a=2,a=2', 'one name'), ('plan P --devices 8 --set rows', 'NAME=VALUE'),
])
def test_what_plan_is_given_is_checked_first(run, program, arguments, message):
  status, out, err = run(*arguments.replace('P', program).split())
  assert (status, out) == (2, '')
  assert err.startswith('sparsejax: ') and err.count('\n') == 1 and re.search(message, err)


@pytest.mark.parametrize('arguments, message', [
    ('nowhere.py', 'nowhere.py: No such file'), ('empty.py', 'empty.py has no function program'),
    ('broken.py', 'broken.py, line 1: SyntaxError'), ('program.py --mesh a=2,b=2', 'a=2 x b=2 has 4 .* 8 were asked'),
    ('program.py --set row=8', "unknown option .*'row'. Did you mean 'rows'"),
    ('program.py --set rows=12', r"'x' of shape \(12, 4\): .*'data': 8.* does not divide it"),
    ('program.py --set wrong=result', r'must return \(step, arguments\)'),
    ('program.py --set wrong=error', '^sparsejax: program.py, line 9: ZeroDivisionError: division by zero$'),
])
def test_what_is_wrong_with_a_program_is_one_line(run, program, monkeypatch, arguments, message):
  """Runs in this process, which has eight devices, the function that the process of `plan` runs."""
  monkeypatch.syspath_prepend('.')
  name, *rest = arguments.split()
  asked = {'path': name, 'devices': 8}
  if rest[:1] == ['--mesh']:
    asked['mesh'] = spellings.mesh(rest[1])
  asked['options'] = dict(map(spellings.option, rest[1::2] if rest[:1] == ['--set'] else []))
  status, out, err = planning._main(asked), *run.output()
  assert (status, out) == (2, '')
  assert err.startswith('sparsejax: ') and err.count('\n') == 1 and re.search(message, err.strip())


@pytest.mark.parametrize('name, message', [('broken.py', 'broken.py, line 1: SyntaxError'), ('killed.py', 'status -9')])
def test_plan_hands_on_what_its_process_says(run, program, name, message):
  open('killed.py', 'w').write('import os, signal\nos.kill(os.getpid(), signal.SIGKILL)')
  status, out, err = run('plan', name, '--devices', '2')
  assert (status, out) == (2, '')
  assert err.startswith('sparsejax: ') and err.count('\n') == 1 and re.search(message, err)


# A process of its own runs the command as a user does, with one device and without a configuration of JAX.


def process(folder, shell):
  env = {key: value for key, value in os.environ.items() if key not in ('XLA_FLAGS', 'JAX_PLATFORMS')}
  done = subprocess.run(['bash', '-c', shell.replace('sparsejax', f'{sys.executable} -m sparsejax.cli')],
                        cwd=folder, env=env, capture_output=True, text=True, check=False)
  return done.returncode, done.stdout, done.stderr


def test_a_checkpoint_of_eight_devices_is_read_on_one(tmp_path):
  kernel = jax.device_put(sparse(16, 8), NamedSharding(jax.make_mesh((8,), ('x',)), PartitionSpec('x')))
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'ckpt', {'params': {'kernel': kernel}, 'opt_state': {'mu': kernel}})
  assert process(tmp_path, 'sparsejax check ckpt --pattern 2:4') == (0, 'ok: 1 parameters keep 2:4\n', '')


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path):
  """Limits the length of a file, in place of a full disk: the write fails in the middle."""
  io.save(tmp_path / 'ckpt', {'kernel': sparse(256, 64)})
  (tmp_path / 'out').write_text('precious')
  status, out, err = process(tmp_path, 'ulimit -f 8; sparsejax pack ckpt out --pattern 2:4 --force')
  assert (status, out) == (2, '') and err.startswith('sparsejax: io.save: cannot write out: File too large')
  assert err.count('\n') == 1
  assert (tmp_path / 'out').read_text() == 'precious' and sorted(os.listdir(tmp_path)) == ['ckpt', 'out']


def test_control_characters_of_names_never_reach_the_terminal(run):
  safetensors.numpy.save_file({'\x1b[31m/a\nb/kernel': sparse(8, 4)}, 'strange')
  for arguments in ('report', 'check --pattern 1:4', 'pack out --pattern 1:4'):
    command, *rest = arguments.split()
    _, out, err = run(command, 'strange', *rest)
    assert '\x1b' not in out + err and '\\x1b[31m/a\\nb/kernel' in out + err


@pytest.mark.parametrize('glob', ['*a' * 20 + 'b', '**a' * 20 + 'b', '**/*a' * 20 + 'b', '*' * 60 + 'b'])
def test_a_glob_of_many_stars_takes_no_time(run, glob):
  io.save('long', {'a' * 150: {'a' * 90: sparse(8, 4)}})
  start = time.process_time()
  assert 'picks no parameter' in run('report', 'long', '--where', glob)[2]
  assert time.process_time() - start < 5  # Exponential time would be hours.


def test_a_terminated_command_leaves_no_part_of_a_file(tmp_path):
  """Ends a process that packs for ever, once it has begun to write."""
  # A signal that comes just before a sleep begins is heard when the sleep has ended, so that sleeps are short.
  program = ('import time; from sparsejax import cli, io, checkpoints\n'
             'checkpoints.packed = lambda *_, **__: {"w": io.Stored((4, 4), __import__("numpy").dtype("float32"), '
             'lambda: [time.sleep(0.05) for _ in range(12000)])}\nraise SystemExit(cli.main())')
  io.save(tmp_path / 'in', {'kernel': sparse(8, 4)})
  process = subprocess.Popen([sys.executable, '-c', program, 'pack', 'in', 'out', '--pattern', '2:4'], cwd=tmp_path)
  while len(os.listdir(tmp_path)) < 2:
    assert process.poll() is None
    time.sleep(0.05)
  process.terminate()
  assert process.wait(60) == 128 + signal.SIGTERM and os.listdir(tmp_path) == ['in']
