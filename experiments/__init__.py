"""Measures the library in experiments: training, data, models and configs. `sparsejax` imports nothing of this.

The package is run from a checkout, as `python -m experiments.train`, and is not part of the wheel.
"""

import importlib.util
import sys

NEEDED = ('flax', 'grain', 'matplotlib', 'ml_collections', 'rich', 'scipy', 'tensorboardX')

if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
  remedy = (f"experiments: {', '.join(missing)} cannot be imported. In the checkout, run: pip install -e "
            "'.[experiments]'")
  if sys.argv[:1] == ['-m']:  # A command is being started, and wants no traceback.
    sys.exit(remedy)
  raise ImportError(remedy)
