"""Tests that each family of tests has a budget of CPU time, that `make test` enforces it, and that children count."""

import pathlib
import subprocess
import sys

import minutes

BURN = 'import time\nend = time.process_time() + 0.05\nwhile time.process_time() < end: pass'


def test_budgets_are_of_families_and_fit_into_the_time_of_the_suite():
  folders = {path.parent.name for path in pathlib.Path(__file__).parents[1].glob('*/test_*.py')}
  new = folders - {*minutes.BUDGETS}
  assert folders >= {*minutes.BUDGETS}
  assert sum(minutes.BUDGETS.values()) + len(new) * minutes.NEW <= minutes.WHOLE


def test_a_family_over_its_budget_is_named_once_a_busy_machine_cannot_be_the_reason():
  spent = {family: minutes.ROOM * budget for family, budget in minutes.BUDGETS.items()}
  assert minutes.exceeded({**spent, 'new': minutes.ROOM * minutes.NEW}) == []
  words, new = minutes.exceeded({**spent, 'words': spent['words'] + 0.1, 'new': minutes.ROOM * minutes.NEW + 0.1})
  assert words.startswith('words: ') and f'budget of {minutes.BUDGETS["words"]}' in words and new.startswith('new: ')


def test_cpu_seconds_are_those_of_the_process_and_its_children():
  meter = minutes.Meter()
  exec(BURN)
  assert 0.05 <= meter.lap() < 5
  subprocess.run([sys.executable, '-S', '-c', BURN], check=True)
  assert meter.lap() >= 0.05
