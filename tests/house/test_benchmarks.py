"""`make bench` writes a section for each benchmark and leaves alone what it did not measure."""

import csv

from benchmarks import __main__ as benchmarks
from benchmarks import gpu
from benchmarks.timing import Claim


def claim(measured, at_least=True):
  return Claim('times faster', measured, (0.5 * measured, 2 * measured), 2.0, at_least, 3)


def test_a_section_is_replaced_where_it_stands_and_the_rest_stays(tmp_path):
  out = tmp_path / 'results.md'
  benchmarks.write(out, 'kernels', [claim(3.0), claim(1.0)])
  benchmarks.write(out, 'memory', [claim(5.0, at_least=False)])
  out.write_text(out.read_text() + '\n## By hand\n\nwords\n')
  benchmarks.write(out, 'kernels', [claim(4.0)])
  benchmarks.write(out, 'selection', [claim(7.0)])
  text = out.read_text()
  assert text.startswith(benchmarks.TITLE) and text.endswith('\n') and '\n\n\n' not in text
  heads = ['## kernels', '## memory', '## By hand', '## selection']
  assert [line for line in text.splitlines() if line.startswith('## ')] == heads
  rows = [line.split(' | ')[1:5] for line in text.splitlines() if line.startswith('| times')]
  assert rows == [['4', '2 to 8', 'at least 2', 'yes'], ['5', '2.5 to 10', 'at most 2', 'NO'],
                  ['7', '3.5 to 14', 'at least 2', 'yes']]
  assert 'words\n' in text and {path.name for path in tmp_path.glob('*.png')} == {
      f'results-{name}.png' for name in ('kernels', 'memory', 'selection')}


def test_what_a_gpu_gave_is_a_section_of_its_own(tmp_path, capsys):
  row = {'kernel': '2:4', 'shape': '8 x 8 x 8', 'sparsity': '50%', 'sparse_us': '2.5', 'dense_us': '5', 'speedup': '2',
         'least': '1.5', 'most': '2.5', 'ideal': '2', 'bar': '1.2', 'failure': '', 'rounds': '8', 'device': 'a GPU',
         'driver': '1', 'jax': '2', 'commit': 'abc'}
  with open(tmp_path / 'kernels-gpu.csv', 'w', newline='') as file:
    lines = csv.DictWriter(file, row)
    lines.writeheader()
    lines.writerows([row, {**row, 'kernel': 'attention', 'failure': 'no such instruction'}])
  out = tmp_path / 'results.md'
  assert gpu.main([str(tmp_path / 'kernels-gpu.csv'), '--out', str(out)]) == 1
  assert '| 2:4, 8 x 8 x 8, 50 % zero: 2 us, dense 5, ideal 2 | 2 | 1.5 to 2.5 |' in (
      text := out.read_text())
  assert '\n## kernels-gpu\n\na GPU, driver 1, jax 2, bfloat16, commit abc: times faster than dense.' in text
  assert 'attention' not in text and '| what | median | least to most | bar |' in text
  assert 'not measured: attention, 8 x 8 x 8, 50%: no such instruction' in capsys.readouterr().err
  assert (tmp_path / 'results-kernels-gpu.png').exists()
