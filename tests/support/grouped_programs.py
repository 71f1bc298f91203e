"""Holds tiny programs with the right groups written down: no unit may be missing, and none invented.

A program is a function without arguments. It returns the shapes of the parameters, the function, the inputs, and the
groups. A group is its number of units, and for each axis a function from a unit to its positions.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn import relu, sigmoid, silu, softmax

PROGRAMS, REFUSED = [], []


def program(make):
  PROGRAMS.append(make)
  return make


def ints(shape, seed):
  """Small integers: their sums are exact in float32."""
  return jnp.asarray(np.random.default_rng(seed).integers(-2, 3, shape), jnp.float32)


def params_of(shapes):
  return {name: ints(shape, i) for i, (name, shape) in enumerate(shapes.items())}


# Positions of a unit.


def same(*names):
  return {name: lambda i: [i] for name in names}


def run(n, at=0):
  """The unit is `n` neighbours."""
  return lambda i: [at + n * i + j for j in range(n)]


def comb(n, step, at=0):
  """The unit is `n` positions that are `step` apart."""
  return lambda i: [at + i + step * j for j in range(n)]


def at(start):
  return lambda i: [start + i]


def both(*parts):
  return lambda i: [position for part in parts for position in part(i)]


# Layers.


def conv(x, w, groups=1, padding='SAME', **options):
  return lax.conv_general_dilated(x, w, (1, 1), padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
                                  feature_group_count=groups, **options)


def rms_norm(x, scale):
  return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def attention(q, k, v):
  """Attends over `[batch, tokens, heads, width]`."""
  return jnp.einsum('bhqk,bkhd->bqhd', softmax(jnp.einsum('bqhd,bkhd->bhqk', q, k) / 2), v)


def parted(x, n):
  return x.reshape(*x.shape[:-1], n, -1)


def merged(x):
  return x.reshape(*x.shape[:-2], -1)


# Multilayer perceptrons and streams.


@program
def perceptron():
  apply = lambda p, x: relu(x @ p['a'] + p['b']) @ p['c']
  return {'a': (4, 6), 'b': (6,), 'c': (6, 3)}, apply, [(2, 4)], [(6, same('a:1', 'b:0', 'c:0'))]


@program
def gated_perceptron():
  apply = lambda p, x: x + (silu(x @ p['g']) * (x @ p['u'])) @ p['d']
  return {'g': (4, 6), 'u': (4, 6), 'd': (6, 4)}, apply, [(2, 4)], [(6, same('g:1', 'u:1', 'd:0'))]


@program
def sigmoid_is_not_zero_at_zero():
  """The rows of the consumer are zero too, so that any finite value of the activation is exact."""
  return {'a': (4, 6), 'c': (6, 3)}, lambda p, x: sigmoid(x @ p['a']) @ p['c'], [(2, 4)], [(6, same('a:1', 'c:0'))]


@program
def residual_stream():
  def apply(p, tokens):
    x = p['e'][tokens] + p['pos']
    for n in '12':
      x = x + relu(rms_norm(x, p['s' + n]) @ p['a' + n]) @ p['c' + n]
    return rms_norm(x, p['s']) @ p['h']

  shapes = {'e': (7, 4), 'pos': (5, 4), 's1': (4,), 's2': (4,), 's': (4,), 'a1': (4, 6), 'c1': (6, 4), 'a2': (4, 6),
            'c2': (6, 4), 'h': (4, 3)}
  stream = same('e:1', 'pos:1', 's1:0', 's2:0', 's:0', 'a1:0', 'a2:0', 'c1:1', 'c2:1', 'h:0')
  return shapes, apply, [np.arange(10).reshape(2, 5) % 7], [
    (4, stream), (6, same('a1:1', 'c1:0')), (6, same('a2:1', 'c2:0'))]


@program
def tied_embedding():
  """One leaf has two uses: its width is cut once, and the vocabulary stays."""
  def apply(p, tokens):
    x = p['e'][tokens]
    return (x + relu(x @ p['a']) @ p['c']) @ p['e'].T

  return {'e': (7, 4), 'a': (4, 6), 'c': (6, 4)}, apply, [np.arange(6) % 7], [
    (4, same('e:1', 'a:0', 'c:1')), (6, same('a:1', 'c:0'))]


@program
def two_pass_variance():
  """The stream is refused, since `(x - mean)^2` is not zero where x is; what is inside of the block is not."""
  def apply(p, x):
    x = x @ p['i']
    y = x - jnp.mean(x, -1, keepdims=True)
    y = y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-6) * p['s']
    return relu(y @ p['a']) @ p['c']

  return {'i': (3, 4), 's': (4,), 'a': (4, 6), 'c': (6, 2)}, apply, [(2, 3)], [(6, same('a:1', 'c:0'))]


@program
def fast_variance():
  def apply(p, x):
    x = x @ p['i']
    mean = jnp.mean(x, -1, keepdims=True)
    variance = jnp.mean(x * x, -1, keepdims=True) - mean * mean
    return ((x - mean) * (lax.rsqrt(variance + 1e-6) * p['s']) + p['b']) @ p['c']

  return {'i': (3, 4), 's': (4,), 'b': (4,), 'c': (4, 2)}, apply, [(2, 3)], [(4, same('i:1', 's:0', 'b:0', 'c:0'))]


@program
def called_twice():
  """A recurrent use ties the two axes of one leaf."""
  apply = lambda p, x: relu(relu(x @ p['i'] @ p['w']) @ p['w']) @ p['c']
  return {'i': (3, 5), 'w': (5, 5), 'c': (5, 2)}, apply, [(2, 3)], [(5, same('i:1', 'w:0', 'w:1', 'c:0'))]


@program
def half_times_half():
  """A gate without an activation: unit j goes with unit j of the other half."""
  def apply(p, x):
    a, b = jnp.split(x @ p['a'], 2, -1)
    return (a * b) @ p['c']

  return {'a': (4, 6), 'c': (3, 2)}, apply, [(2, 4)], [(3, {'a:1': both(at(0), at(3)), 'c:0': at(0)})]


@program
def broadcast_gate():
  """`[batch, 1]` times `[batch, 6]` couples nothing."""
  apply = lambda p, x: (relu(x @ p['m']) * relu(x @ p['a'])) @ p['c']
  return {'m': (4, 1), 'a': (4, 6), 'c': (6, 3)}, apply, [(2, 4)], [(6, same('a:1', 'c:0'))]


@program
def softmax_over_channels():
  return {'a': (4, 6), 'c': (6, 3)}, lambda p, x: softmax(x @ p['a']) @ p['c'], [(2, 4)], []


@program
def weight_norm_without_epsilon():
  """A column of zeros is divided by its norm, which is 0."""
  apply = lambda p, x: relu(x @ (p['a'] / jnp.sqrt(jnp.sum(p['a'] ** 2, 0)))) @ p['c']
  return {'a': (4, 6), 'c': (6, 3)}, apply, [(2, 4)], []


@program
def depends_on_the_width():
  """The result holds the removed axis itself."""
  return {'a': (4, 6), 'c': (6, 3)}, lambda p, x: (x @ p['a'], relu(x @ p['a']) @ p['c']), [(2, 4)], []


@program
def rule_of_its_own():
  """An activation with a derivative rule is read like any other function."""
  @jax.custom_jvp
  def clipped(x):
    return jnp.clip(x, 0, 1)

  clipped.defjvps(lambda t, y, x: t * (x > 0))
  return {'a': (4, 6), 'c': (6, 3)}, lambda p, x: clipped(x @ p['a']) @ p['c'], [(2, 4)], [(6, same('a:1', 'c:0'))]


# Attention.


@program
def fused_projection():
  """Queries, keys and values in one kernel have three groups: heads, the width of queries, the width of values."""
  apply = lambda p, x: merged(attention(*(parted(t, 4) for t in jnp.split(x @ p['w'], 3, -1)))) @ p['o']
  return {'w': (8, 36), 'o': (12, 8)}, apply, [(2, 5, 8)], [
    (4, {'w:1': both(run(3), run(3, 12), run(3, 24)), 'o:0': run(3)}),
    (3, {'w:1': both(comb(4, 3), comb(4, 3, 12))}), (3, {'w:1': comb(4, 3, 24), 'o:0': comb(4, 3)})]


@program
def stacked_projection():
  """A reshape to (3, heads, width) whose parts are picked, with norms: queries, keys and values share one width."""
  def apply(p, x):
    t = (x @ p['w']).reshape(2, 5, 3, 4, 3)
    return merged(attention(rms_norm(t[:, :, 0], p['s']), rms_norm(t[:, :, 1], p['s']), t[:, :, 2])) @ p['o']

  return {'w': (8, 36), 's': (3,), 'o': (12, 8)}, apply, [(2, 5, 8)], [
    (4, {'w:1': both(run(3), run(3, 12), run(3, 24)), 'o:0': run(3)}),
    (3, {'w:1': comb(12, 3), 's:0': at(0), 'o:0': comb(4, 3)})]


@program
def grouped_queries():
  """Two heads of keys serve three heads of queries each, of width 4."""
  def apply(p, x):
    k, v = (jnp.repeat(parted(x @ p[n], 2), 3, 2) for n in 'kv')
    return merged(attention(parted(x @ p['q'], 6), k, v)) @ p['o']

  return {'q': (8, 24), 'k': (8, 8), 'v': (8, 8), 'o': (24, 8)}, apply, [(2, 5, 8)], [
    (2, {'q:1': run(12), 'k:1': run(4), 'v:1': run(4), 'o:0': run(12)}),
    (3, dict.fromkeys(('q:1', 'o:0'), both(run(4), run(4, 12)))),
    (4, {'q:1': comb(6, 4), 'k:1': comb(2, 4)}), (4, {'v:1': comb(2, 4), 'o:0': comb(6, 4)})]


@program
def one_head_of_keys():
  def apply(p, x):
    k, v = (jnp.repeat(parted(x @ p[n], 1), 4, 2) for n in 'kv')
    return merged(attention(parted(x @ p['q'], 4), k, v)) @ p['o']

  return {'q': (8, 12), 'k': (8, 3), 'v': (8, 3), 'o': (12, 8)}, apply, [(2, 5, 8)], [
    (4, {'q:1': run(3), 'o:0': run(3)}), (3, {'q:1': comb(4, 3), 'k:1': at(0)}), (3, {'v:1': at(0), 'o:0': comb(4, 3)})]


@program
def sliced_positions():
  """A table of positions that is longer than the input has one width, whatever is sliced off its rows."""
  apply = lambda p, x: relu(x @ p['a'] + p['pos'][:, 1:6]) @ p['c']
  return {'a': (4, 6), 'pos': (1, 9, 6), 'c': (6, 3)}, apply, [(2, 5, 4)], [(6, same('a:1', 'pos:2', 'c:0'))]


@program
def lowered_by_scan():
  """A stack of three layers has one width of the stream, and one of the hidden layer."""
  def apply(p, x):
    layer = lambda x, q: (x + relu(x @ q['a']) @ q['c'], None)
    return lax.scan(layer, x @ p['i'], {'a': p['a'], 'c': p['c']})[0] @ p['o']

  return {'i': (2, 4), 'a': (3, 4, 6), 'c': (3, 6, 4), 'o': (4, 2)}, apply, [(5, 2)], [
    (4, same('i:1', 'a:1', 'c:2', 'o:0')), (6, same('a:2', 'c:1'))]


@program
def recurrent():
  """The state of a recurrent layer begins with zeros, which have no unit of their own."""
  def apply(p, x):
    step = lambda h, x: (jnp.tanh(x @ p['i'] + h @ p['w']), None)
    return lax.scan(step, jnp.zeros((2, 5)), x)[0] @ p['c']

  return {'i': (3, 5), 'w': (5, 5), 'c': (5, 2)}, apply, [(4, 2, 3)], [(5, same('i:1', 'w:0', 'w:1', 'c:0'))]


@program
def constants():
  """Constants that a function closes over have no axis of their own: what is left of them is taken at each use."""
  scales, start = ints((6,), 5), ints((2, 5), 6)

  def apply(p, x):
    step = lambda h, x: (jnp.tanh(relu(x @ p['a'] * scales) @ p['i'] + h @ p['w']), None)
    return lax.scan(step, start, x)[0] @ p['c']

  return {'a': (3, 6), 'i': (6, 5), 'w': (5, 5), 'c': (5, 2)}, apply, [(4, 2, 3)], [
    (6, same('a:1', 'i:0')), (5, same('i:1', 'w:0', 'w:1', 'c:0'))]


@program
def branches():
  """Both branches of a `cond` give one value."""
  def apply(p, x):
    return lax.cond(x[0, 0] > 0, lambda h: h * p['s'], lambda h: h + p['t'], relu(x @ p['a'])) @ p['c']

  return {'a': (4, 6), 's': (6,), 't': (6,), 'c': (6, 3)}, apply, [(2, 4)], [(6, same('a:1', 's:0', 't:0', 'c:0'))]


# Convolutions, reshapes and concatenations.


@program
def flattened():
  """In NHWC, channel i owns every fourth row of the matrix behind."""
  apply = lambda p, x: relu(conv(x, p['k'], padding='VALID')).reshape(2, -1) @ p['c']
  return {'k': (3, 3, 1, 4), 'c': (16, 3)}, apply, [(2, 4, 4, 1)], [(4, {'k:3': at(0), 'c:0': comb(4, 4)})]


@program
def permuted_and_flattened():
  """As PyTorch flattens, channels first: channel i owns four neighbours."""
  apply = lambda p, x: jnp.moveaxis(relu(conv(x, p['k'], padding='VALID')), -1, 1).reshape(2, -1) @ p['c']
  return {'k': (3, 3, 1, 4), 'c': (16, 3)}, apply, [(2, 4, 4, 1)], [(4, {'k:3': at(0), 'c:0': run(4)})]


@program
def generator():
  """A matrix is viewed as an image, and convolved with an enlarged stride."""
  apply = lambda p, x: conv(relu(x @ p['a']).reshape(2, 2, 2, 3), p['k'], padding=((1, 1), (1, 1)), lhs_dilation=(2, 2))
  return {'a': (4, 12), 'k': (2, 2, 3, 1)}, apply, [(2, 4)], [(3, {'a:1': comb(4, 3), 'k:2': at(0)})]


@program
def separable():
  """A depthwise convolution loses groups; a convolution with one output is not depthwise."""
  apply = lambda p, x: conv(relu(conv(relu(conv(x, p['a'])), p['d'], 6)), p['o'])
  return {'a': (1, 1, 3, 6), 'd': (3, 3, 1, 6), 'o': (1, 1, 6, 1)}, apply, [(2, 4, 4, 3)], [
    (6, same('a:3', 'd:3', 'o:2'))]


@program
def grouped_convolution():
  """Two groups of 4 inputs and 3 outputs: a whole group may go, or one input or output of every group."""
  apply = lambda p, x: jnp.mean(conv(relu(conv(x, p['a'])), p['g'], 2), (1, 2)) @ p['c']
  return {'a': (1, 1, 3, 8), 'g': (3, 3, 4, 6), 'c': (6, 2)}, apply, [(2, 4, 4, 3)], [
    (2, {'a:3': run(4), 'g:3': run(3), 'c:0': run(3)}), (4, {'a:3': comb(2, 4), 'g:2': at(0)}),
    (3, {'g:3': comb(2, 3), 'c:0': comb(2, 3)})]


@program
def group_norm():
  """Two groups of three channels: a group of the norm, or one channel of both."""
  def apply(p, x):
    x = (x @ p['a']).reshape(2, 2, 3)
    mean = jnp.mean(x, -1, keepdims=True)
    x = (x - mean) * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) - mean * mean + 1e-6)
    return relu(x.reshape(2, 6) * p['s'] + p['b']) @ p['c']

  names = 'a:1', 's:0', 'b:0', 'c:0'
  return {'a': (4, 6), 's': (6,), 'b': (6,), 'c': (6, 3)}, apply, [(2, 4)], [
    (2, dict.fromkeys(names, run(3))), (3, dict.fromkeys(names, comb(2, 3)))]


@program
def dense_block():
  """A concatenation has two groups, each with its own rows of the consumer."""
  def apply(p, x):
    h = relu(x @ p['a'])
    return jnp.concatenate([h, relu(h @ p['b'])], -1) @ p['c']

  return {'a': (4, 3), 'b': (3, 5), 'c': (8, 2)}, apply, [(2, 4)], [
    (3, same('a:1', 'b:0', 'c:0')), (5, {'b:1': at(0), 'c:0': at(3)})]


@program
def nested_concatenations():
  def apply(p, x):
    a, b, c = (x @ p[n] for n in 'abc')
    return jnp.concatenate([jnp.concatenate([a, b], -1), jnp.concatenate([c, a], -1)], -1) @ p['o']

  return {'a': (4, 2), 'b': (4, 3), 'c': (4, 2), 'o': (9, 2)}, apply, [(2, 4)], [
    (2, {'a:1': at(0), 'o:0': both(at(0), at(7))}), (3, {'b:1': at(0), 'o:0': at(2)}),
    (2, {'c:1': at(0), 'o:0': at(5)})]


@program
def tiled():
  """A copy of all channels may go, or a channel of all copies."""
  apply = lambda p, x: jnp.tile(jnp.tanh(x @ p['a']), (1, 3)) @ p['c']
  return {'a': (4, 2), 'c': (6, 3)}, apply, [(2, 4)], [(3, {'c:0': run(2)}), (2, {'a:1': at(0), 'c:0': comb(3, 2)})]


@program
def split_and_joined():
  """A split, a bottleneck on the second half, and a concatenation of three."""
  def apply(p, x):
    y, z = jnp.split(relu(conv(x, p['i'])), 2, -1)
    return conv(jnp.concatenate([y, z, z + relu(conv(relu(conv(z, p['m'])), p['n']))], -1), p['o'])

  return {'i': (1, 1, 3, 8), 'm': (3, 3, 4, 5), 'n': (3, 3, 5, 4), 'o': (1, 1, 12, 2)}, apply, [(2, 4, 4, 3)], [
    (4, {'i:3': at(0), 'o:2': at(0)}), (5, same('m:3', 'n:2')),
    (4, {'i:3': at(4), 'm:2': at(0), 'n:3': at(0), 'o:2': both(at(4), at(8))})]


@program
def merged_patches():
  """Four strided slices of an image are joined along the channels."""
  def apply(p, x):
    x = x @ p['a']
    corners = [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    return jnp.concatenate(corners, -1) @ p['c']

  return {'a': (3, 4), 'c': (16, 2)}, apply, [(2, 4, 4, 3)], [(4, {'a:1': at(0), 'c:0': comb(4, 4)})]


@program
def squeeze_and_excite():
  def apply(p, x):
    h = relu(conv(x, p['a']))
    gate = sigmoid(relu(jnp.mean(h, (1, 2)) @ p['d']) @ p['u'])
    return conv(h * gate[:, None, None], p['o'])

  return {'a': (1, 1, 3, 6), 'd': (6, 2), 'u': (2, 6), 'o': (1, 1, 6, 2)}, apply, [(2, 4, 4, 3)], [
    (6, same('a:3', 'd:0', 'u:1', 'o:2')), (2, same('d:1', 'u:0'))]


@program
def shuffled_pixels():
  """An output channel owns one filter for each pixel of its square."""
  def apply(p, x):
    h = conv(x, p['a']).reshape(2, 4, 4, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5)
    return conv(h.reshape(2, 8, 8, 3), p['o'])

  return {'a': (1, 1, 2, 12), 'o': (3, 3, 3, 2)}, apply, [(2, 4, 4, 2)], [(3, {'a:3': comb(4, 3), 'o:2': at(0)})]


@program
def reshaped_into_rows():
  """The major part of six columns becomes rows; the minor part may go."""
  apply = lambda p, x: (relu(x @ p['a']).reshape(4, 3) @ p['c']).reshape(2, 4)
  return {'a': (4, 6), 'c': (3, 2)}, apply, [(2, 4)], [(3, {'a:1': comb(2, 3), 'c:0': at(0)})]


@program
def padded_images():
  """Zeros around an image leave zero channels zero; a maximum over windows does, too."""
  def apply(p, x):
    x = jnp.pad(relu(conv(x, p['a'])), ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), 'VALID')
    return jnp.max(x, (1, 2)) @ p['c']

  return {'a': (1, 1, 3, 4), 'c': (4, 2)}, apply, [(2, 4, 4, 3)], [(4, same('a:3', 'c:0'))]
