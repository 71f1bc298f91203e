"""`make bench` writes a section for each benchmark and leaves alone what it did not measure."""

from benchmarks import __main__ as benchmarks
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
