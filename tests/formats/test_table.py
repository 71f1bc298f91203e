"""Tests the table of formats: a format from outside is one line, and each format says what is true of its arrays."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsejax as sj
from sparsejax import cli, formats, io, patterns

# A pattern and a format from outside, through public names only.


@dataclasses.dataclass(frozen=True)
class Diagonal:
  """A `Diagonal` keeps the diagonal of a square matrix."""

  sparsity = None
  static = True
  group = (1, 1)

  def __str__(self):
    return 'diagonal'

  def validate(self, shape, axes):
    return None if len(shape) == 2 and shape[0] == shape[1] else 'a diagonal is that of a square matrix'

  def __call__(self, scores, count=None, axes=None):
    return jnp.eye(len(scores), dtype=bool)

  def violation(self, w, axes, sparsity=None):
    return '' if bool(jnp.all(jnp.where(self(w), 0, w) == 0)) else 'weights beside the diagonal are kept'

  def pooled(self, scores, axes):
    return sj.types.Pooled(scores, (), lambda mask: mask)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DiagonalArray(formats.PackedArray):
  """A `DiagonalArray` stores the diagonal of a square matrix."""

  kind = 'diagonal'
  default_pattern = Diagonal()

  values: jax.Array
  shape: tuple[int, ...] = dataclasses.field(metadata={'static': True})

  @classmethod
  def from_pattern(cls, w, pattern, axes, check=True):
    if check and (problem := pattern.violation(w, axes)):
      raise formats.Misfit('DiagonalArray', w.shape, problem)
    return cls(jnp.diagonal(w), tuple(w.shape))

  def to_dense(self):
    return jnp.diag(self.values)

  def problem(self):
    return None if self.values.shape == self.shape[:1] else 'its diagonal has another length'


def tree():
  return {'mlp': {'kernel': jnp.diag(jnp.arange(1.0, 9.0)), 'bias': jnp.ones(8)}}


def same(a, b):
  return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(
      jax.tree.map(lambda x, y: np.array_equal(x, y), a, b))


@pytest.fixture
def added(monkeypatch):
  monkeypatch.setitem(formats.TABLE, 'diagonal', DiagonalArray)


@pytest.mark.parametrize('asked', ['diagonal', Diagonal(), {'**': Diagonal()}])
def test_a_format_from_outside_is_one_line_for_pack_files_and_advice(added, asked, tmp_path):
  packed = formats.pack(tree(), asked)
  assert packed['mlp']['kernel'].values.tolist() == list(range(1, 9)) and same(formats.unpack(packed), tree())
  io.save(tmp_path / 'f', packed)
  assert same(io.load(tmp_path / 'f'), packed) and same(formats.unpack(io.read(tmp_path / 'f')), tree())
  row, = sj.advise(tree(), Diagonal()).rows
  assert (row.bytes_packed, row.pattern, row.forward) == (32, 'diagonal', None)


def test_the_command_line_takes_a_format_from_outside_by_its_name(added, tmp_path, capsys):
  io.save(tmp_path / 'dense', tree())
  assert cli.main(['pack', str(tmp_path / 'dense'), str(tmp_path / 'packed'), '--pattern', 'diagonal']) == 0
  assert isinstance(io.load(tmp_path / 'packed')['mlp']['kernel'], DiagonalArray)
  assert cli.main(['check', str(tmp_path / 'packed'), '--pattern', 'diagonal']) == 0
  capsys.readouterr()


def test_a_pattern_from_outside_is_packed_by_its_spelling(added, monkeypatch):
  monkeypatch.setitem(patterns.TABLE, 'diagonal', patterns.Spelling('diag', Diagonal, ('diag',)))
  assert isinstance(formats.pack(tree(), 'diag')['mlp']['kernel'], DiagonalArray)
  with pytest.raises(ValueError, match="unknown pattern 'diagonals'.*'diagonal'.*Valid: .*diag, diagonal"):
    formats.pack(tree(), 'diagonals')


def test_its_own_refusals_name_the_parameter(added):
  with pytest.raises(ValueError, match=r"pack: parameter 'w' of shape \(2, 2\): weights beside the diagonal"):
    formats.pack({'w': jnp.ones((2, 2))}, 'diagonal')


def test_without_the_line_it_is_unknown(monkeypatch, tmp_path):
  with pytest.raises(ValueError, match="unknown pattern 'diagonal'.*bitmask"):
    formats.pack(tree(), 'diagonal')
  with pytest.raises(ValueError, match='no format of formats.TABLE fits diagonal'):
    sj.advise(tree(), Diagonal())
  monkeypatch.setitem(formats.TABLE, 'diagonal', DiagonalArray)
  io.save(tmp_path / 'f', formats.pack(tree(), 'diagonal'))
  monkeypatch.undo()
  with pytest.raises(ValueError, match="unknown kind, 'diagonal': none of nm, .* in formats.TABLE"):
    io.load(tmp_path / 'f')


# Every format says facts about itself.


PATTERNS = {'nm': sj.NM(2, 4), 'block_sparse': sj.Block((4, 8), 0.5), 'bitmask': sj.Unstructured(0.75),
            'relative_index': sj.Unstructured(0.75), 'csc': sj.Unstructured(0.75), 'sparse24': sj.NM(2, 4),
            'ell': sj.Unstructured(0.75)}


def packed(kind, shape=(3, 16, 24)):
  """Returns a packed stack of pruned matrices without empty block rows or columns, the dense stack, and the axes."""
  axes = sj.types.Axes((1,), (2,), layer=(0,))
  _, k, n = np.indices(shape)
  scores = jnp.asarray(np.random.default_rng(0).random(shape) + 10 * ((k // 4 + n // 8) % 2), jnp.float32)
  pattern = PATTERNS[kind]
  w = jnp.where(pattern(scores, None, axes), scores, 0)
  return formats.TABLE[kind].from_pattern(w, pattern, axes), w, axes


def test_every_format_is_tried():
  assert set(PATTERNS) == set(formats.TABLE)
  assert all(formats.TABLE[kind] in formats.fitting(pattern) for kind, pattern in PATTERNS.items())


@pytest.mark.parametrize('kind', PATTERNS)
def test_the_bytes_that_are_expected_are_those_that_are_taken(kind):
  array, w, axes = packed(kind)
  expected = formats.TABLE[kind].expected_nbytes(w.shape, w.dtype, PATTERNS[kind], axes, float(jnp.mean(w == 0)))
  if kind == 'relative_index':
    assert array.nbytes <= expected <= array.nbytes + w.size // 255
  elif kind == 'ell':  # expects columns of equally many nonzeros
    assert expected <= array.nbytes
  else:
    assert array.nbytes == expected


@pytest.mark.parametrize('kind', PATTERNS)
def test_axes_and_leading_axes_mean_the_same_in_every_format(kind):
  """Tests that `axes` are contracted, and that each index of the `leading` axes is a packed array of its own."""
  array, w, _ = packed(kind)
  assert array.ndim == len(array.shape) and bool(array.axes) == array.takes_axes
  if not array.takes_axes:
    assert array.leading == 0
    return
  assert array.axes == (-2,) and array.leading == 1
  layer = jax.tree.map(lambda a: a[1], array)
  assert layer.shape == w.shape[1:] and layer.leading == 0 and np.array_equal(layer.to_dense(), w[1])
  x = jnp.asarray(np.random.default_rng(1).standard_normal((5, 16)), jnp.float32)
  np.testing.assert_allclose(formats.matmul(x, layer), x @ w[1], rtol=1e-5)


def test_a_format_without_axes_packs_leaves_that_no_program_contracts():
  other = {'other/kernel': sj.types.Axes((0,), (1,), source='traced')}
  assert same(formats.unpack(formats.pack(tree(), 'bitmask', axes=other)), tree())
  with pytest.raises(ValueError, match="'mlp/kernel'.* not in `axes`"):
    formats.pack(tree(), 'csc', axes=other)


def test_vectors_bind_their_output_axes():
  w = jnp.zeros((4, 8, 6))
  assert formats.NMArray.from_dense(w, 2, 4, 1).leading == 1
  assert formats.NMArray.from_dense(w, 2, 4, 1, width=2).leading == 0
  assert formats.NMArray.from_dense(w, 2, 4, sj.types.Axes((1,), (2,), layer=(0,)), width=2).leading == 1


@pytest.mark.parametrize('pattern, kinds', [
    (sj.NM(2, 4), ['nm', 'sparse24']), (sj.NM(1, 4), ['nm', 'sparse24']), (sj.NM(3, 4), ['nm']),
    (sj.NM(2, 4, width=4), ['nm']), (sj.Block((4, 4)), ['block_sparse']), (sj.Channel(), []),
    (sj.Unstructured(), ['csc', 'bitmask', 'relative_index', 'ell'])])
def test_the_formats_of_a_pattern_and_the_preferred_one(pattern, kinds):
  assert [each.kind for each in formats.fitting(pattern)] == kinds


@pytest.mark.parametrize('module, name', [('formats', 'ANYWHERE'), ('formats', 'of_kind'), ('advice', 'Row'),
                                          ('planning', 'Row')])
def test_a_name_that_moved_warns_for_one_release(module, name):
  module = importlib.import_module(f'sparsejax.{module}')
  with pytest.warns(DeprecationWarning, match='next release'):
    assert getattr(module, name)
  with pytest.raises(AttributeError, match=f'no attribute .no{name}'):
    getattr(module, f'no{name}')
