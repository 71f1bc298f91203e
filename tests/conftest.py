"""Eight CPU devices for everybody, and JAX at its strictest, so that a silent promotion is an error here first."""

import collections
import importlib.metadata
import os
import pathlib

# Most of what tests do is to compile, which takes half as long without what makes programs fast. They pass for programs
# as users compile them too: XLA_FLAGS=--xla_force_host_platform_device_count=8 make test.
os.environ.setdefault('XLA_FLAGS', ' '.join([
    '--xla_force_host_platform_device_count=8', '--xla_backend_optimization_level=0',
    # Later versions end a process that gives them this.
    *['--xla_cpu_use_fusion_emitters=false'] * importlib.metadata.version('jaxlib').startswith('0.10.')]))
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import pytest

jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')
# And many compile the same, so that it is kept, for all processes and for the next run.
jax.config.update('jax_compilation_cache_dir', str(pathlib.Path(__file__).parent.parent / '.pytest_cache' / 'xla'))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


@pytest.fixture
def standard_promotion():
  """For code outside this library that needs JAX's ordinary promotion (models, some optimizers)."""
  with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
    yield


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Of all jobs of a module."""
  return tmp_path_factory.mktemp('jobs')


def pytest_addoption(parser):
  parser.addoption('--cells', default='126', help='how many cells of the conformance table to run, or `all`')
  parser.addoption('--table', default=None, help='write what they gave to this file')


def pytest_collection_modifyitems(items):
  """Modules that train in processes of their own come first: they take minutes, and the last one is waited for."""
  items.sort(key=lambda item: item.path.stem not in ('test_crash', 'test_hosts', 'test_train'))


def pytest_terminal_summary(terminalreporter, config):
  """Prints the time of each family and ten docstrings for the reviewer; with `--table`, writes a page of the docs."""
  reports = [report for key in ('passed', 'failed') for report in terminalreporter.stats.get(key, [])]
  seconds, docstrings, cells = collections.Counter(), [], {}
  for report in reports:
    seconds[pathlib.PurePath(report.nodeid.split('::')[0]).parent.name] += report.duration
    properties = dict(report.user_properties)
    docstrings += properties.get('docstrings', [])
    if 'cell' in properties:
      cells[tuple(properties['cell'])] = properties.get('verdict', 'failed')
  if docstrings:
    terminalreporter.section('ten docstrings: would a newcomer say what each of these returns?')
    terminalreporter.write_line('\n\n'.join(docstrings))
  terminalreporter.section('minutes of each family, summed over the processes')
  for family, spent in seconds.most_common():
    terminalreporter.write_line(f'{spent / 60:6.2f}  {family}')
  if config.getoption('--table'):
    import conformance_page  # not before JAX is configured

    conformance_page.write(config.getoption('--table'), cells)
