"""Gives every test eight CPU devices, and makes JAX strict, so that a silent promotion is an error in the tests."""

import collections
import gc
import importlib.metadata
import os
import pathlib

# Most of the time of a test is compilation, which takes half as long without XLA's optimizations. The tests also pass
# with the optimizations that users have: XLA_FLAGS=--xla_force_host_platform_device_count=8 make test.
os.environ.setdefault('XLA_FLAGS', ' '.join([
    '--xla_force_host_platform_device_count=8', '--xla_backend_optimization_level=0',
    '--xla_cpu_parallel_codegen_split_count=1',  # Splitting a small program for several threads costs a sixth more.
    # Later versions of XLA end a process that has this flag.
    *['--xla_cpu_use_fusion_emitters=false'] * importlib.metadata.version('jaxlib').startswith('0.10.')]))
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import minutes
import pytest
import sampling

jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')
# Many tests compile the same programs, so all processes share a cache, which the next run reads too.
jax.config.update('jax_compilation_cache_dir', str(pathlib.Path(__file__).parent.parent / '.pytest_cache' / 'xla'))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
# A tenth of the time of tracing and lowering goes into stacks of Python calls, which no test reads.
jax.config.update('jax_traceback_in_locations_limit', 0)

METER = minutes.Meter()


@pytest.fixture
def standard_promotion():
  """Restores JAX's ordinary promotion, for code outside of this library (models, some optimizers)."""
  with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
    yield


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Returns the folder of all jobs of a module."""
  return tmp_path_factory.mktemp('jobs')


def pytest_addoption(parser):
  parser.addoption('--cells', default=None, help='how many cells of the conformance table, or `all` of every test')
  parser.addoption('--table', default=None, help='write the results of the cells to this file')


def pytest_configure(config):
  config.addinivalue_line('markers', 'sampled(most): runs few cells of a product, at most `most`, in which each value '
                          'of each parameter occurs; `--cells all` runs every cell')


@pytest.hookimpl(trylast=True)  # after `-k`, which may ask for a cell that would be left out
def pytest_collection_modifyitems(items, config):
  """Leaves cells of `sampled` tests out. Moves the modules that take minutes to the front, so that none begins last."""
  left = sampling.left_out(items) if config.getoption('--cells') != 'all' else set()
  items[:] = [item for item in items if item not in left]
  config.hook.pytest_deselected(items=[*left])
  items.sort(key=lambda item: item.path.stem not in ('test_crash', 'test_hosts', 'test_train'))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
  """Notes in each report the CPU seconds since the report before."""
  report = yield
  report.cpu_seconds = METER.lap()
  return report


def pytest_collection_finish(session):
  """Keeps the garbage collector from what was imported and collected, which stays to the end."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(20_000, 20, 20)  # Tracing makes many objects that live on: collections take a fortieth of the time.
  METER.lap()


def pytest_terminal_summary(terminalreporter, config):
  """Prints the time of each family and ten docstrings for the reviewer; with `--table`, writes a page of the docs."""
  reports = [report for found in terminalreporter.stats.values() for report in found if hasattr(report, 'cpu_seconds')]
  spent, docstrings, cells = collections.Counter(), [], {}
  for report in reports:
    spent[pathlib.PurePath(report.nodeid.split('::')[0]).parent.name] += report.cpu_seconds / 60
    properties = dict(report.user_properties)
    docstrings += properties.get('docstrings', [])
    if 'cell' in properties:
      cells[tuple(properties['cell'])] = properties.get('verdict', 'failed')
  if docstrings:
    terminalreporter.section('ten docstrings: would a newcomer say what each of these returns?')
    terminalreporter.write_line('\n\n'.join(docstrings))
  terminalreporter.section('process-minutes of each family and its budget (tests/support/minutes.py)')
  for family, took in spent.most_common():
    terminalreporter.write_line(f'{took:6.2f} of {minutes.budget(family):4.1f}  {family}')
  for line in minutes.exceeded(spent) if config.getoption('--cells') != 'all' else ():
    terminalreporter.write_line(f'error: {line}', red=True)
    config.pluginmanager.get_plugin('session').exitstatus = pytest.ExitCode.TESTS_FAILED
  if config.getoption('--table'):
    import conformance_page  # This module imports JAX, which must be configured before.

    conformance_page.write(config.getoption('--table'), cells)
