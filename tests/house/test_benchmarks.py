"""`python -m benchmarks` writes, reads and draws sections, and measures on a GPU; each test checks one command."""

import csv
import dataclasses
import json
import pathlib
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import gpu, gpu_cases, results, timing
from benchmarks.timing import Measurement
from kernels_pallas import block_sparse_matmul
from kernels_pallas.sparse24 import sparse24_matmul
from sparsejax import advice

ROOT = pathlib.Path(benchmarks.__file__).parents[1]
KEPT = ROOT / 'benchmarks' / 'results.md'


def claim(measured, at_least=True):
  return Measurement('times faster', measured, (0.5 * measured, 2 * measured), 2.0, at_least, 3)


def test_a_section_is_replaced_in_its_place_and_the_rest_stays(tmp_path):
  out = tmp_path / 'results.md'
  write = lambda name, *claims: results.write(out, name, claims, 'here, commit abc')
  write('kernels', claim(3.0), claim(1.0))
  write('memory', claim(5.0, at_least=False))
  out.write_text(out.read_text() + '\n## By hand\n\nwords\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n')
  write('kernels', claim(4.0))
  write('selection', claim(7.0))
  text = out.read_text()
  assert text.startswith(results.TITLE) and text.endswith('\n') and '\n\n\n' not in text
  heads = ['## kernels', '## memory', '## By hand', '## selection']
  assert [line for line in text.splitlines() if line.startswith('## ')] == heads
  rows = [line.split(' | ')[1:5] for line in text.splitlines() if line.startswith('| times')]
  assert rows == [['4', '2 to 8', 'at least 2', 'yes'], ['5', '2.5 to 10', 'at most 2', 'NO'],
                  ['7', '3.5 to 14', 'at least 2', 'yes']]
  assert 'words\n' in text
  assert results.read(text) == {
      name: results.Section('here, commit abc', '10 to 90 %', (one,)) for name, one in (
          ('kernels', claim(4.0)), ('memory', claim(5.0, at_least=False)), ('selection', claim(7.0)))}


def test_the_kept_results_are_read_without_loss_and_drawn(tmp_path, capsys):
  """Every section of claims is written back as it was, so that a picture shows what the file says. Few are drawn."""
  text = KEPT.read_text()
  sections = results.read(text)
  assert list(sections) == [*benchmarks.SUITES, 'kernels-h200']
  out = tmp_path / 'results.md'
  out.write_text(text)
  for name, section in sections.items():
    results.write(out, name, section.claims, section.hardware, section.spread)
  assert out.read_text() == text
  few = [*sections][::6]
  for name in few:
    results.write(tmp_path / 'few.md', name, sections[name].claims, sections[name].hardware, sections[name].spread)
  assert benchmarks.main(['draw', '--file', str(tmp_path / 'few.md'), '--folder', str(tmp_path / 'pictures')]) == 0
  pictures = {path.stem: path.read_bytes() for path in (tmp_path / 'pictures').iterdir()}
  assert {*pictures} == {*few} and len(few) > 1 and all(png[:4] == b'\x89PNG' for png in pictures.values())
  assert benchmarks.main(['draw', 'kernel', '--file', str(out)]) == 2
  assert 'no claims of kernel; it has group_selection' in capsys.readouterr().err


def test_pictures_are_drawn_not_kept():
  listed = subprocess.run(['git', 'ls-files', 'benchmarks', 'docs/pictures'], capture_output=True, text=True, cwd=ROOT,
                          check=False).stdout.split()
  assert not [name for name in listed if name.endswith('.png')]


def test_measuring_writes_the_sections_that_are_named(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr('benchmarks.memory.run', lambda rounds: iter([claim(3.0)._replace(rounds=rounds)]))
  out = tmp_path / 'results.md'
  assert benchmarks.main(['memory', '--rounds', '4', '--out', str(out)]) == 0
  section = results.read(out.read_text())['memory']
  assert section.claims == (claim(3.0)._replace(rounds=4),) and section.hardware == timing.hardware()
  monkeypatch.setattr('benchmarks.memory.run', lambda rounds: iter([claim(1.0)]))
  assert benchmarks.main(['measure', 'memory', '--out', str(out)]) == 1
  assert re.search('times faster +1 +0.5 to 2 +at least 2 +NO +3', capsys.readouterr().out)
  elsewhere = ['--out', str(tmp_path / 'no' / 'a.md')]
  for wrong, message in ((['memroy'], "Did you mean 'memory'"), (elsewhere, 'no folder'),
                         (['draw', '--file', str(tmp_path / 'no.md')], 'no such file')):
    with pytest.raises(SystemExit):
      benchmarks.main(wrong)
    assert message in capsys.readouterr().err


def test_the_csv_of_a_gpu_becomes_a_section(tmp_path, capsys):
  row = {'kernel': '2:4', 'shape': '8 x 8 x 8', 'sparsity': '50%', 'sparse_us': '2.5', 'dense_us': '5', 'speedup': '2',
         'least': '1.5', 'most': '2.5', 'ideal': '2', 'bar': '1.2', 'failure': '', 'rounds': '8', 'device': 'a GPU',
         'driver': '1', 'jax': '2', 'commit': 'abc'}
  with open(tmp_path / 'kernels-gpu.csv', 'w', newline='') as file:
    lines = csv.DictWriter(file, row)
    lines.writeheader()
    lines.writerows([row, {**row, 'kernel': 'attention', 'failure': 'no such instruction'}])
  out = tmp_path / 'results.md'
  assert benchmarks.main(['record', str(tmp_path / 'kernels-gpu.csv'), '--out', str(out)]) == 1
  assert '| 2:4, 8 x 8 x 8, 50 % zero: 2 us, dense 5, ideal 2 | 2 | 1.5 to 2.5 |' in (text := out.read_text())
  assert '\n## kernels-gpu\n\na GPU, driver 1, jax 2, bfloat16, commit abc: times faster than dense.' in text
  assert 'attention' not in text and '| what | median | least to most | bar |' in text
  assert 'not measured: attention, 8 x 8 x 8, 50%: no such instruction' in capsys.readouterr().err


def test_the_kept_csv_of_the_h200_is_its_section():
  section, failures = results.of_gpu(ROOT / 'benchmarks' / 'kernels-h200.csv')
  assert not failures
  kept = results.read(KEPT.read_text())['kernels-h200']
  shown = lambda section: (section.hardware, section.spread, *map(results.cells, section.claims))
  assert shown(section) == shown(kept)


# Measuring on a GPU.


def test_without_a_gpu_the_command_says_so_in_a_sentence(capsys, tmp_path):
  assert benchmarks.main(['gpu', '--out', str(tmp_path / 'kernels.csv'), '--table', str(tmp_path / 'gpu.json')]) == 2
  assert re.fullmatch('[^.]+no GPU, so nothing was measured[.]\n', capsys.readouterr().out)
  assert not list(tmp_path.iterdir())


def test_the_former_command_says_where_it_went():
  done = subprocess.run([sys.executable, '-m', 'kernels_pallas.bench', '--out', 'kernels.csv'], capture_output=True,
                        text=True, cwd=ROOT, check=False)
  assert done.returncode == 1 and 'python -m benchmarks gpu' in done.stderr


def test_measuring_on_a_gpu_needs_no_more_than_the_library():
  """A machine with a GPU need not have what `experiments` needs."""
  code = ('import sys, benchmarks.__main__, benchmarks.gpu\n'
          'outside = {name.split(".")[0] for name in sys.modules}\n'
          'print(sorted(outside & {"flax", "experiments", "matplotlib", "rich"}))')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, check=False)
  assert done.stdout.strip() == '[]', done.stderr


@pytest.fixture
def timed(monkeypatch):
  """Replaces the timing of the GPU: every call takes a millisecond."""
  monkeypatch.setattr(gpu, '_milliseconds', lambda f, args: f(*args) is None or 1.0)


def test_a_kernel_that_fails_is_a_row_with_its_error_and_the_rest_is_measured(timed, monkeypatch, tmp_path):
  dot, x = gpu_cases.dot, jnp.ones((8, 8), jnp.float32)
  good = gpu_cases.GpuCase(dot, (x, x), dot, (x, x), lambda: dot(x, x), 1.0, 0.0)
  def fails():
    raise RuntimeError('no such\ninstruction')
  made = {'good': lambda: good, 'wrong': lambda: good._replace(expected=lambda: 2 * x), 'raises': fails}
  monkeypatch.setattr(gpu, 'cases', lambda: ((name, '8', 0.5, make) for name, make in made.items()))
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert gpu.main(str(tmp_path / 'kernels.csv'), None) == 0
  with open(tmp_path / 'kernels.csv', newline='') as file:
    rows = {row['kernel']: row for row in csv.DictReader(file)}
  assert tuple(rows['good']) == gpu.FIELDS and rows['good']['commit'] == timing.environment()['commit']
  assert not rows['good']['failure'] and rows['good']['holds'] == 'yes'
  assert 'relative error' in rows['wrong']['failure']
  assert rows['raises']['failure'] == 'RuntimeError: no such instruction'
  section, failures = results.of_gpu(tmp_path / 'kernels.csv')
  assert len(section.claims) == 1 and len(failures) == 2
  late = list(gpu.rows(time.perf_counter() - gpu.SECONDS - 1))
  assert [row['failure'] for row in late] == ['left out: 450 seconds had passed'] * 3


@pytest.mark.parametrize('make', [gpu_cases._few_inputs, gpu_cases._few_outputs])
def test_cases_of_active_products_compare_what_is_equal(make):
  case = make(2, 64, 0.5)
  assert gpu._error(case.expected(), case.dense(*case.others)) < 0.01 and case.ideal == 2


def test_the_table_of_a_gpu_is_what_advise_reads(timed, monkeypatch, tmp_path, capsys):
  some = (block_sparse_matmul, (64, 64)), (sparse24_matmul, (4, 1))
  monkeypatch.setattr(gpu, 'entries', lambda: (gpu_cases.Entry(op, 8, 128, 64, block, 0.5) for op, block in some))
  (tmp_path / 'gpu.json').write_text(json.dumps(list(gpu.table(time.perf_counter()))))
  measured = advice.read_table('gpu', tmp_path)
  assert [(row.op, row.implementation, row.ratio_forward, row.ratio_train) for row in measured] == [
      ('block_sparse_matmul', 'mosaic_gpu', 1.0, 1.0), ('sparse24_matmul', 'mosaic_gpu', 1.0, 1.0)]
  def doubled(x, w, **options):
    values = 2 * w.values - jax.lax.stop_gradient(w.values)
    return block_sparse_matmul(x, dataclasses.replace(w, values=values), **options)
  monkeypatch.setattr(gpu, 'entries', lambda: iter([gpu_cases.Entry(doubled, 8, 128, 64, (64, 64), 0.5)]))
  assert not list(gpu.table(time.perf_counter()))
  assert 'doubled [8, 128, 64] (64, 64) 0.5: ValueError: relative error 1' in capsys.readouterr().err
