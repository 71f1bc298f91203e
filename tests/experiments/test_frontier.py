"""Runs the frontiers of tiny models, whose finished cells are not run again, and checks the model of costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import frontier
from experiments.data.text import Reaching
from experiments.frontier import activating, engine
from experiments.frontier.costs import Request
from experiments.frontier.rules import RULES
from experiments.loop import outcomes
from experiments.models import encoders
from experiments.pruning import decoder, encoder

pytestmark = pytest.mark.usefixtures('standard_promotion')
TINY = {**decoder.CONFIG, 'batch_size': 8, 'model': {'name': 'lm', 'width': 16, 'depth': 1, 'heads': 2},
        'validate_every': 1}


def test_costs_are_those_of_kinetics():
  """The published constants; the corner of lists that are longer than the prompt is subtracted."""
  request = Request(1e9, 32, 8, 128, 1024, 4096)
  tera = lambda *values: [value / 1e12 for value in values]
  np.testing.assert_allclose(tera(request.compute(), request.memory()), [8.39816, 28.99103], atol=1e-5)
  np.testing.assert_allclose(tera(request.compute(512), request.memory(512)), [8.22636, 4.83184], atol=1e-5)
  np.testing.assert_allclose(tera(request.compute(512, 16), request.memory(512, 16)), [8.23280, 5.73781], atol=1e-5)
  exact = sum(min(2048, 1024 + t) for t in range(4096))
  assert exact == 7863808 and request.pairs(2048) == 7864320 and request.pairs(8192) == request.pairs()


def test_the_frontier_of_a_tiny_decoder(tmp_path, monkeypatch):
  sizes = engine.FrontierSizes(windows=2, length=32, needles=2, haystack=32, needle=8)
  run = lambda rules: frontier.run('decoder', tmp_path, rules=rules, sparsities=[0.5], steps=1, sizes=sizes,
                                   config=TINY)
  dense, quest = run(['quest'])
  assert (dense['cell'], quest['cell']) == ('dense/0', 'quest/0.5')
  assert dense['achieved'] == 0 and quest['achieved'] == .25
  assert quest['bytes'] < dense['bytes'] and quest['flops'] < dense['flops']
  assert len(quest['scores']['nats']) == len(quest['scores']['needle']) == 2
  assert quest['scores']['nats'] != dense['scores']['nats']
  assert (tmp_path / 'frontier.png').read_bytes()[:4] == b'\x89PNG'
  page = (tmp_path / 'frontier.md').read_text()
  for name, head in (('nats', 'nats a byte'), ('needle', 'needle')):  # The two examples of both rules are paired.
    more = np.subtract(quest['scores'][name], dense['scores'][name])
    half = 12.7062047 * more.std(ddof=1) / 2 ** 0.5
    assert f'| {head} over dense |' in page and f'| {more.mean():+.4f} ± {half:.4f} |' in page
  monkeypatch.setattr(engine, 'bench', None)
  assert run(['quest']) == [dense, quest]


def test_a_decoder_trains_on_windows_that_reach(tmp_path, monkeypatch):
  """Each stage has longer windows, and starts where the one before ended."""
  seen, run = [], decoder.training.run

  def recorded(config, place, request):
    data = config.data.splits.value['train']
    outcome = run(config, place, request)
    if seen:
      start = config.model.make.value[0](jax.random.key(0))
      jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[0]), start, seen[-1][-1])
    seen.append((place.name, config.batch_size, len(data[0]['labels']), outcomes.tested_parameters(outcome['dense'])))
    return outcome

  monkeypatch.setattr(decoder.training, 'run', recorded)
  sizes = engine.FrontierSizes(windows=2, length=64, needles=2, haystack=128, needle=16, reach=1024)
  line, = frontier.run('decoder', tmp_path, rules=[], steps=1, sizes=sizes, config=TINY)
  assert np.isfinite(line['scores']['needle']).all() and line['config']['reach'] == 1024
  assert [each[:3] for each in seen] == [('training_1', 8, 128), ('training_4', 2, 512), ('training_8', 1, 1024)]
  assert 'smear' in seen[0][3]['block_0']['attention']


def test_lines_of_activation_rules_of_a_tiny_encoder(monkeypatch):
  """A rule for inputs and one for neurons have true lines, and a token never reads more than there is."""
  tiny = encoders.MiniLM(None, vocabulary=50, width=16, depth=1, heads=2, positions=16)
  shapes = jax.eval_shape(tiny.init, jax.random.key(0), jnp.ones((1, 8), jnp.int32))['params']
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32) / 4, shapes)
  tokens = jnp.asarray(rng.integers(1, 50, (8, 8)))

  def scored(embed, params):
    return {'cosine': np.full(4, jax.eval_shape(embed, params, tokens, tokens > 0).shape[1])}

  monkeypatch.setattr(encoders, 'load_pretrained', lambda: params)
  judge = encoder.Judge(scored, {'inputs': np.asarray(tokens), 'labels': np.arange(8) % 2}, None)
  monkeypatch.setattr(encoder, 'judge', lambda data_dir, seed: judge)
  for name, size in (('BATCHES', 2), ('BATCH', 4)):
    monkeypatch.setattr(activating, name, size)
  bench = engine.bench('activation', None, None, None, 0, 0, engine.FrontierSizes())
  lines = {rule: bench.line(rule, 0.5) for rule in ('dense', 'wina in sequence', 'top_k')}
  assert all(line['scores'] == {'cosine': [16.0] * 4} for line in lines.values())
  assert all(abs(line['achieved'] - 0.5) < 0.2 for rule, line in lines.items() if rule != 'dense')
  whole = 4 * (4 * 16 * 16 + 2 * 16 * 64)
  assert lines['dense']['bytes'] == whole and 0 < lines['wina in sequence']['bytes'] <= whole
  assert lines['top_k']['achieved'] == 0.5 and whole - 4 * 16 * 64 <= lines['top_k']['bytes'] <= whole


def test_the_command_can_name_each_rule():
  given = {table: frontier._parsed([table, '--workdir', '', '--rules', ','.join(rules)])
           for table, rules in RULES.items()}
  sizes = {name: str(number) for number, name in enumerate(engine.FrontierSizes._fields, 3)}
  given_sizes = frontier._parsed(['decoder', '--workdir', '', *(f'--{name}={n}' for name, n in sizes.items())])
  assert [getattr(given_sizes, name) for name in sizes] == [3, 4, 5, 6, 7, 8]
  assert {table: each.rules for table, each in given.items()} == {table: list(each) for table, each in RULES.items()}


REFUSED = {
    'a table': (lambda folder: frontier.run('encoders', folder), "Did you mean 'encoder'"),
    'a rule': (lambda folder: frontier.run('decoder', folder, rules=['qest']), "Did you mean 'quest'"),
    'no window': (lambda folder: frontier.run('decoder', folder, sizes=engine.FrontierSizes(windows=0)),
                  '.windows. must be at least 1'),
    'a short haystack': (lambda folder: frontier.run('decoder', folder, sizes=engine.FrontierSizes(haystack=96)),
                         'have room for both needles'),
    'a short reach': (lambda folder: frontier.run('decoder', folder, sizes=engine.FrontierSizes(reach=64)),
                      'windows of 128 bytes .* a reach .64. that is not shorter'),
    'a sparsity': (lambda folder: frontier.run('decoder', folder, sparsities=[1.0]), 'from 0 to below 1, not 1.0'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_refusals_say_what_is_valid(case, tmp_path):
  call, message = REFUSED[case]
  with pytest.raises(ValueError, match=message):
    call(tmp_path)


def test_windows_that_reach_leave_one_part_out_and_repeat_a_passage():
  content = bytes(np.random.default_rng(0).integers(0, 256, 4000, np.uint8))  # no passage comes twice by chance
  length, reach, passage = 64, 500, 8
  windows = Reaching(content, length, reach, seed=3, passage=passage)
  places, copies, jumps = {content[i:i + 4]: i for i in range(len(content) - 3)}, 0, []
  for row in range(len(windows)):
    (tokens, positions), labels = windows[row]['inputs'].T, windows[row]['labels']
    np.testing.assert_array_equal(tokens[1:], labels[:-1])
    jump = np.diff(positions) - 1
    assert positions[0] == 0 and positions[-1] < reach and (jump >= 0).all() and (jump > 0).sum() <= 1
    assert not jump.any() or length // 4 - 1 <= jump.argmax() <= length - length // 4
    jumps.append(jump.max())
    found = np.array([places.get(bytes(tokens[i:i + 4].astype(np.uint8)), -1) for i in range(length - 3)])
    moved = found - positions[:-3] != found[0] - positions[0]
    copies += moved[found >= 0].any()  # bytes that stand elsewhere than their positions say
  assert min(jumps) < 20 and max(jumps) > reach - length - 20
  assert copies == len(windows)
  np.testing.assert_array_equal(windows[5]['inputs'], Reaching(content, length, reach, 3, passage)[5]['inputs'])
  with pytest.raises(IndexError):
    windows[len(windows)]
