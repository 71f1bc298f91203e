"""Tests that -0.0, which `w * mask` leaves behind, is a zero wherever zeros are counted, and that it is kept if asked.

The law over the table of formats: a signed matrix packs to the bytes of the same matrix with 0.0 in the place of -0.0.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from raw import bits, positive

import sparsejax as sj
from sparsejax import cli, formats, io, metrics, patterns
from sparsejax.formats import arrays, zeros
from sparsejax.types import Axes

MATRIX = Axes((0,), (1,))
SHAPE = (16, 8)
ASKED = {'nm': sj.NM(2, 4), 'block_sparse': sj.Block((4, 4), 0.5), 'csc': sj.Unstructured(0.75),
         'ell': sj.Unstructured(0.75),
         'bitmask': sj.Unstructured(0.75), 'relative_index': sj.Unstructured(0.9), 'sparse24': sj.NM(2, 4)}
DTYPES = ('float32', 'bfloat16', 'float16', 'float8_e4m3fn', 'float8_e4m3fnuz')


def masked(pattern, dtype='float32'):
  """Returns weights times a float mask, which has zeros of both signs, and the same weights with zeros of one."""
  w = np.random.default_rng(0).standard_normal(SHAPE).astype(dtype)
  w.reshape(-1).view(f'u{w.dtype.itemsize}')[:2] = 1, 3  # subnormals, which are no zeros
  mask = pattern(jnp.abs(jnp.asarray(w, jnp.float32)), None, MATRIX)
  signed = (w.astype('float32') * np.asarray(mask, 'float32')).astype(dtype)
  signed.reshape(-1)[:2] = w.reshape(-1)[:2] * np.asarray(mask).reshape(-1)[:2]
  return signed, positive(signed)


def test_every_format_is_tried():
  assert set(ASKED) == set(formats.TABLE)


@pytest.mark.parametrize('dtype', DTYPES)
def test_minus_zero_is_found_by_the_bits_of_the_dtype(dtype):
  """Tests that the dtypes without a -0.0, which have NaN in its place, keep these bits."""
  w = np.arange(256, dtype=np.uint8).astype(f'u{np.dtype(dtype).itemsize}') << 8 * (np.dtype(dtype).itemsize - 1)
  w = w.view(dtype)
  assert bits(jax.jit(zeros.without_signed_zeros)(jnp.asarray(w))) == bits(positive(w))
  assert arrays.stored_entries(w).tolist() == [b != 0 for b in bits(positive(w))]
  if jnp.finfo(dtype).bits > 8:
    assert jax.grad(lambda w: zeros.without_signed_zeros(w).sum())(jnp.asarray([-0.0, 1], dtype)).tolist() == [1, 1]


@pytest.mark.parametrize('kind, dtype', [(kind, DTYPES[i % 3]) for i, kind in enumerate(ASKED)] + [
    ('nm', 'float8_e4m3fn'), ('csc', 'float8_e4m3fnuz')])
def test_a_signed_zero_packs_like_a_zero(kind, dtype, tmp_path):
  """Tests NumPy and JAX arrays and leaves of files, and that `signed_zeros` gives back every bit."""
  signed, plain = masked(ASKED[kind], dtype)
  assert (bits(signed) != bits(plain)) == bool(zeros.minus_zero(signed.dtype))
  io.save(tmp_path / 'dense', {'w': signed})
  pack = lambda w, **keep: formats.TABLE[kind].from_pattern(w, ASKED[kind], MATRIX, **keep)
  expected = pack(plain)
  _, blocks = formats.TABLE[kind].in_blocks(io.stored(tmp_path / 'dense')['w'], ASKED[kind], MATRIX)
  assert [bits(part) for part in next(blocks).values()] == [bits(part) for part in expected.in_files().values()]
  for packed in (pack(signed), pack(jnp.asarray(signed))):
    assert packed.problem() is None and jax.tree.structure(packed) == jax.tree.structure(expected)
    assert [bits(part) for part in jax.tree.leaves(packed)] == [bits(part) for part in jax.tree.leaves(expected)]
  assert bits(expected.to_dense()) == bits(plain)


@pytest.mark.parametrize('kind', ASKED)
def test_the_sign_is_kept_if_asked(kind, tmp_path):
  w = np.where(np.arange(SHAPE[0])[:, None] % 8 == 0, np.float32(-0.0), np.float32(0.0)) * np.ones(SHAPE, 'float32')
  w[0, 0] = 1
  pack = lambda w, **keep: formats.TABLE[kind].from_pattern(w, ASKED[kind], MATRIX, **keep)
  assert bits(pack(w, signed_zeros=True).to_dense()) == bits(w) != bits(positive(w))
  assert bits(pack(w).to_dense()) == bits(positive(w))
  io.save(tmp_path / 'dense', {'kernel': w})
  name = kind if formats.TABLE[kind].default_pattern is not None else {'nm': '2:4', 'block_sparse': '4x4'}[kind]
  for flags, expected in (([], positive(w)), (['--signed-zeros'], w)):
    argv = ['pack', str(tmp_path / 'dense'), str(tmp_path / 'small'), '--pattern', name, '--force', *flags]
    assert cli.main(argv) == 0
    assert bits(formats.unpack(io.load(tmp_path / 'small'))['kernel']) == bits(expected)


@pytest.mark.parametrize('pattern', [sj.NM(2, 4), sj.Block((4, 4), 0.5), sj.Unstructured(0.75), sj.Channel(0.5)],
                         ids=str)
def test_whatever_counts_zeros_counts_both_signs(pattern, tmp_path, capsys):
  signed, plain = ({'kernel': w} for w in masked(pattern))
  unasked = patterns.parse(str(pattern).partition(' ')[0])  # takes the sparsity that it finds
  counts = [lambda tree: str(sj.report(tree)), lambda tree: str(sj.report(tree, pattern)),
            lambda tree: str(sj.check(tree, pattern)), lambda tree: str(sj.advise(tree, unasked)),
            lambda tree: {path: float(share) for path, share in metrics.density(tree).items()}]
  counts += [lambda tree: formats.nbytes(formats.pack(tree, unasked))] * (not isinstance(pattern, sj.Channel))
  for count in counts:
    assert count(signed) == count(plain) == count(jax.tree.map(jnp.asarray, signed))
  printed = []
  for name, tree in (('signed', signed), ('plain', plain)):
    io.save(tmp_path / name, tree)
    assert cli.main(['report', str(tmp_path / name)]) == cli.main(
        ['check', str(tmp_path / name), '--pattern', str(pattern)]) == 0
    printed.append(capsys.readouterr().out)
  assert printed[0] == printed[1]
