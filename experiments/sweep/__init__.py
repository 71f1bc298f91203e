r"""A sweep runs a grid of recipe x pattern x model x data x learning rate x seed on the loop of `experiments.train`.

    python -m experiments.sweep --config my.py --workdir runs/mine [--set key=value] [--set sweep.cpu_hours=2]

`my.py` has `get_config()`, as for `experiments.train`, and `get_sweep()`, which returns the axes; see `grids.AXES` and
`grids.OPTIONS`. In Python or a notebook:

    from experiments import sweep
    config = {'steps': 500, 'model': CNN(8), 'data': {'train': (x, y), 'test': (u, v)}, 'recipes': {
        'dense': {'name': 'dense'}, 'SR-STE': {'name': 'sr_ste', 'where': ['Conv_1/kernel']}}}
    findings = sweep.run(config, 'runs/mine', {'pattern': ['1:2', '1:4'], 'seed': range(5)})
    findings.comparisons()    # by cell: difference to the baseline, interval, adjusted p-value, verdict

Finished cells are kept as JSON lines and skipped. A cell that is killed goes on from its checkpoint, so at most the
steps since the checkpoint are lost. A cell that a recipe refuses, or that diverges, is a row with the reason.
"""

import ast
import contextlib
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from experiments import configs
from experiments.loop import commands, hosts, training
from experiments.loop.shared import Shared
from experiments.loop.stopping import StopRequest
from experiments.sweep import engine, grids
from experiments.sweep.board import Board
from experiments.sweep.ledger import locked
from experiments.tables import pages
from experiments.tables import sweeps as tables
from experiments.tables.sweeps import Findings

PREFIX = 'sweep.'  # of a change on the command line that concerns the grid


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command with `arguments`, by default those of the process. Returns the exit status."""
  return commands.main(arguments, 'sweep', lambda given, workdir, request: run(given[0], workdir, given[1],
                                                                               request=request), load)


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> tuple[ConfigDict, dict[str, Any]]:
  """Returns the config of the Python file at `path` and the grid of its `get_sweep()`, after `overrides`.

  `sweep.KEY=VALUE` changes the grid. A file without `get_sweep` has the grid of its recipes alone. Raises `ValueError`
  for what is no config, and for a grid that is no dict.
  """
  of_grid = [override for override in overrides if override.startswith(PREFIX)]
  config = configs.load(path, [override for override in overrides if override not in of_grid])
  given = configs.running(path, getattr(configs.module(path), 'get_sweep', dict))
  if not isinstance(given, Mapping):
    raise ValueError(f'sweep: get_sweep() of {str(path)!r} returns {given!r}, not a dict.')
  return config, {**given, **dict(map(_override, of_grid))}


def _override(text: str) -> tuple[str, Any]:
  key, equals, value = text.removeprefix(PREFIX).partition('=')
  try:
    return key, ast.literal_eval(value)
  except (ValueError, SyntaxError):
    raise ValueError(f'sweep: cannot read {text!r}; write {PREFIX}key=value with a Python literal, such as '
                     f'{PREFIX}cpu_hours=2.') from None


def run(config: ConfigDict | Mapping[str, Any] | str | os.PathLike[str], workdir: str | os.PathLike[str],
        grid: Mapping[str, Any] | None = None, *, request: StopRequest | None = None) -> Findings:
  """Runs what is not finished of a sweep, writes and prints its report, and returns the findings.

  `config` is a config, a dict of its keys, or the path of a config file, whose grid is used if `grid` is `None`. The
  files go to `workdir`. Raises `ValueError` for an unknown axis, and where another sweep runs in `workdir`. Raises
  `training.Stopped` where Ctrl-C or SIGTERM stopped the sweep. The same call then goes on.
  """
  if isinstance(config, str | os.PathLike):
    config, of_file = load(config)
    grid = of_file if grid is None else grid
  with contextlib.nullcontext(request) if request else StopRequest() as stop:
    findings = found(configs.complete(config), pathlib.Path(workdir), grid or {}, stop)
  pages.show(tables.page(findings, pathlib.Path(workdir)), pathlib.Path(workdir), training.console())
  return findings


def found(config: ConfigDict, workdir: pathlib.Path, grid: Mapping[str, Any], request: StopRequest) -> Findings:
  """Runs what is not finished of a sweep, as `run` does, and returns the findings without a report."""
  if not hosts.alone():
    raise ValueError('sweep: runs in one process only; leave --distributed out.')
  grid = grids.read(grid, config)
  arms = grids.arms(config, grid)
  for arm in arms:
    grids.metric(arm.config, grid['metric'])
  with locked(workdir) as ledger, _shared_programs(workdir):
    began = time.monotonic()
    with Board(arms, engine.planned(arms, grid), grid['metric'], training.console()) as board:
      job = engine.Job(grid, workdir, ledger, board, request, Shared())
      lines = list({line['cell']: line for line in engine.lines(job, arms)}.values())
    ran = time.monotonic() - began
  return Findings(lines, grid['metric'], grid['baseline'], ran / board.ran - 1 if board.ran else None)


@contextlib.contextmanager
def _shared_programs(workdir: pathlib.Path) -> Iterator[None]:
  """Keeps compiled programs in `workdir/programs`, unless the user keeps them elsewhere.

  Learning rates and seeds are arguments of the programs, so cells that differ only in these numbers share a program,
  also after a kill.
  """
  settings = {'jax_compilation_cache_dir': str(workdir / 'programs'), 'jax_persistent_cache_min_compile_time_secs': 0.0}
  before = {name: getattr(jax.config, name) for name in settings}
  if before['jax_compilation_cache_dir'] is not None:
    yield
    return
  _configure(settings)
  try:
    yield
  finally:
    _configure(before)


def _configure(settings: Mapping[str, Any]) -> None:
  for name, value in settings.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()  # JAX reads the folder once.
