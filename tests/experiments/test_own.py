"""Models, data, losses and writers of a user's own are trained as they are, or refused in a line that names the run."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import configs
from experiments.configs import default
from experiments.loop import records, runs

pytestmark = pytest.mark.usefixtures('standard_promotion')

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((40, 6)).astype(np.float32), RNG.integers(0, 3, 40)
WORDS, TAGS = RNG.integers(0, 8, (40, 5)), RNG.integers(0, 3, (40, 5))
DENSE, TAGGER = nn.Dense(3), nn.Sequential([nn.Embed(8, 4), nn.Dense(3)])


def both(*pair):
  return {'train': pair, 'test': pair}


def made(model=DENSE, data=None, **values):
  """Returns a config made as a user makes one: from the default config, whose values are replaced."""
  config = default.get_config()
  config.model, config.data, config.batch_size = model, data or both(X, Y), 8
  for key, value in values.items():
    config[key] = value
  return configs.complete(config)


def test_a_label_for_each_token_has_the_weight_of_its_example():
  setup = runs.prepare(made(TAGGER, both(WORDS, TAGS)))
  last = list(runs.split(setup, 'test'))[-1]
  weight, outputs = np.array([1, 1, 0, 0, 0, 0, 0, 0], np.float32), np.zeros((8, 5, 3), np.float32)
  right = (last['labels'] == 0)[:2].mean()
  assert setup.task.score(outputs, last['labels'], weight) == pytest.approx(right)


FUNCTIONS = {'init': lambda key: {'w': jnp.ones((6, 3))}, 'whole': lambda key: {'w': jnp.ones((6, 3), int)}}
REFUSED = {
    'labels below zero': (lambda: made(data=both(X, Y - 1)), ['smallest label is -1', 'config.loss']),
    'a model of two classes': (lambda: made(nn.Dense(2)), ["run 'dense'", 'returns [8, 2]', 'need [8, 3]']),
    'a model without a parameter': (
        lambda: made((FUNCTIONS['whole'], lambda p, x: x @ p['w'])), ["run 'dense'", 'no floating parameter']),
    'a model that multiplies nothing': (
        lambda: made((FUNCTIONS['init'], lambda p, x: x[:, :3] + p['w'][0])),
        ["run 'dense'", 'multiplies no parameter']),
    'objects': (lambda: made(data=both(np.array([object()] * 40), Y)), ["holds object[40]", 'real numbers']),
    'complex numbers': (lambda: made(data=both(X + 1j, Y)), ['holds complex64[40, 6]', 'real numbers']),
    'ragged rows': (lambda: made(data=both([[1.0]] * 39 + [[1.0, 2.0]], Y)), ['rows of different shapes', 'pad']),
    'large numbers': (lambda: made(data=both(X, Y + 2**40)), ['1099511627776', '32 bits']),
    'a generator': (lambda: made(data={'train': (x for x in X), 'test': (X, Y)}), ["'train' is a generator"]),
    'too many steps': (lambda: made(steps=10**18), ['steps=1000000000000000000', 'to 2147483647']),
    'a loss without a gradient': (
        lambda: made(loss=lambda outputs, labels: outputs.argmax(-1) == labels), ["run 'dense'", 'loss returns bool']),
    'a loss that cannot be': (
        lambda: made(loss=lambda outputs, labels: outputs.nothing), ["run 'dense'", 'AttributeError', 'nothing']),
}


@pytest.mark.parametrize('what', REFUSED)
def test_what_cannot_be_trained_is_refused_before_the_first_step(what, tmp_path):
  make, says = REFUSED[what]
  with pytest.raises(ValueError) as refusal:
    runs.build(runs.prepare(make()), {'dense': tmp_path})
  for part in says:
    assert part in str(refusal.value), refusal.value


def test_a_writer_that_fails_is_named(tmp_path):
  with records.Records(tmp_path, 0, (lambda numbers: None,)) as record:
    with pytest.raises(ValueError, match='a function of writers failed with TypeError'):
      record.write(1, {'loss': 0.5})
