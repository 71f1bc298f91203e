"""Reads from names, ranks and containers which axes of a parameter are contracted, and whether it is a matrix.

`TABLE` lists every convention. A parameter that no line of `TABLE` fits, or that a second reading fits too, has unknown
axes: `Axes((), every axis, source='unknown')`. Patterns that lie along axes refuse such a parameter.

    axes(Place(('Dense_0', 'kernel'), (64, 10)))                # Axes((0,), (1,), source='convention')
    axes(Place(('query', 'kernel'), (64, 8, 8)))                # unknown: attention, or a stack of layers
    is_matrix(Place(('norm', 'weight'), (12, 64)))              # False: a stack of norms

A word in the name of a parent decides nothing. The name of the layer itself is the last key above the parameter that is
no number. The layer's name says whether a rank of four or five is a convolution, and whether a `weight` is a lookup
table or a norm.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from sparsejax.types import Axes, PyTree


class Place(NamedTuple):
  """A `Place` says where a parameter is in its tree, and what is beside it.

  `keys`: the keys of the path; a key with dots or slashes counts as several. `shape`: that of the parameter.
  `siblings`: the shapes of the leaves of the same container by their last key. `module`: the names of the classes of
  Equinox that the container is an instance of. `attribute`: whether the container holds the parameter as an attribute.
  `taps`: the number of spatial axes that a convolution of Equinox states.
  """

  keys: tuple[str, ...]
  shape: tuple[int, ...]
  siblings: Mapping[str, tuple[int, ...]] = {}
  module: frozenset[str] = frozenset()
  attribute: bool = False
  taps: int | None = None

  @property
  def name(self) -> str:
    """The parameter's own name, the last key of the path."""
    return self.keys[-1]

  @property
  def layer(self) -> str:
    """The name of the layer that holds the parameter: the last key above it that is no number."""
    return next((key for key in reversed(self.keys[:-1]) if not key.isdigit()), '')

  @property
  def bias(self) -> tuple[int, ...] | None:
    """The shape of the bias beside the parameter, or `None`."""
    return self.siblings.get('bias', self.siblings.get('b'))


def keys_of(path: str) -> tuple[str, ...]:
  """Returns the keys of a path; dots separate keys like slashes, as in `model.layers.0.weight`."""
  return tuple(re.split(r'[/.]', path))


def module_of(container: Any) -> tuple[frozenset[str], int | None]:
  """Returns `Place.module` and `Place.taps` of a container; both are empty for anything but an Equinox module."""
  own = frozenset(each.__name__ for each in type(container).__mro__ if each.__module__.partition('.')[0] == 'equinox')
  return own, getattr(container, 'num_spatial_dims', None) if own else None


def path_name(keys: tuple[Any, ...]) -> str:
  """Returns the path, such as `a/b/0/kernel`, for `keys` of `jax.tree_util`; the last `.value` of NNX is left out."""
  return '/'.join(str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k)))) for k in _own(keys))


def _own(keys: tuple[Any, ...]) -> tuple[Any, ...]:
  """Returns the keys without the last `.value` of NNX."""
  held = len(keys) > 1 and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name in ('value', 'raw_value')
  return keys[:-1] if held else keys


def places(tree: PyTree) -> dict[str, Place]:
  """Maps the path of each leaf of `tree` that has a shape to its `Place`: keys, container and siblings."""
  with_keys, _ = jax.tree_util.tree_flatten_with_path(tree)
  leaves = [(_own(keys), leaf) for keys, leaf in with_keys if hasattr(leaf, 'shape')]
  names = [keys_of(path_name(keys)) for keys, _ in leaves]
  siblings: dict[tuple[str, ...], dict[str, tuple[int, ...]]] = {}
  for name, (_, leaf) in zip(names, leaves):
    siblings.setdefault(name[:-1], {})[name[-1]] = tuple(leaf.shape)
  found = {}
  for name, (keys, leaf) in zip(names, leaves):
    attribute = bool(keys) and isinstance(keys[-1], jax.tree_util.GetAttrKey)
    module, taps = module_of(_container(tree, keys) if attribute else None)
    found[path_name(keys)] = Place(name, tuple(leaf.shape), siblings[name[:-1]], module, attribute, taps)
  return found


def _container(tree: PyTree, keys: tuple[Any, ...]) -> Any:
  """Returns the node of `tree` that holds the leaf at `keys`, or `None` if the keys do not lead there."""
  for key in keys[:-1]:
    try:
      tree = getattr(tree, key.name) if hasattr(key, 'name') else tree[key.idx if hasattr(key, 'idx') else key.key]
    except (AttributeError, IndexError, KeyError, TypeError):
      return None
  return tree


class Convention(NamedTuple):
  """A `Convention` gives the layout of the parameters with one of `names` and of `ranks` to which `fits` applies.

  `layout` names the axes in order: `in` is contracted, `out` is an output, and `*taps` is any number of spatial axes.
  """

  names: tuple[str, ...]
  ranks: tuple[int, ...]
  fits: Callable[[Place], bool]
  layout: str

  def axes(self, rank: int) -> Axes:
    """Returns the axes of a parameter of this rank."""
    words = self.layout.replace('*taps', ' '.join(['taps'] * (rank - 2))).split()
    of = lambda word: tuple(i for i, each in enumerate(words) if each == word)
    return Axes(of('in'), of('out'), of('taps'), source='convention')


def _plain(place: Place) -> bool:
  """Returns whether the container is one of Flax, Haiku or plain JAX."""
  return not place.module


def _convolution(place: Place) -> bool:
  """Returns whether the layer's own name says convolution, outside of Equinox."""
  return _plain(place) and any(map(_CONVOLUTION.fullmatch, _words(place.layer)))


def _stored(place: Place) -> bool:
  """Returns whether the container is a dict, as in files of torch, or an Equinox module that is no known layer."""
  return not place.module & _KNOWN if place.module else not place.attribute


def _linear(place: Place) -> bool:
  return 'Linear' in place.module


def _equinox_convolution(place: Place) -> bool:
  """Returns whether the module is a convolution of Equinox with as many spatial axes as the parameter has."""
  return 'Conv' in place.module and place.taps == len(place.shape) - 2


# Every refusal of a leaf with unknown axes ends in these remedies.
REMEDY = ('Trace the program, axes=sj.contractions(apply, params, x), or say the axes of each such leaf, as in '
          "axes={'path/of/leaf': sj.types.Axes(contracted=(0,), output=(1,))}, or leave it dense.")

_KNOWN = {'Linear', 'Conv', 'ConvTranspose', 'Embedding', 'LayerNorm', 'RMSNorm', 'GroupNorm', 'BatchNorm'}
_NO_MATRICES = {'Embedding', 'LayerNorm', 'RMSNorm', 'GroupNorm', 'BatchNorm'}

# A convention from outside is one line: `conventions.TABLE.append(Convention(('table',), (2,), fits, 'in out'))`.
TABLE = [
    Convention(('kernel', 'w'), (2,), _plain, 'in out'),  # Flax, Haiku, plain JAX
    Convention(('kernel', 'w'), (4, 5), _convolution, '*taps in out'),
    Convention(('weight',), (2,), _linear, 'out in'),  # Equinox
    Convention(('weight',), (3, 4, 5), _equinox_convolution, 'out in *taps'),
    Convention(('weight',), (2,), _stored, 'out in'),  # torch, safetensors, modules of one's own
    Convention(('weight',), (4, 5), _stored, 'out in *taps'),
]

_CONVOLUTION = re.compile(r'[a-z]*conv(s|olution(s|al)?)?(\d\w*)?')
# Layers whose kernels have another layout, or one layout in one library and another one elsewhere.
_OTHERWISE = re.compile(r'[a-z]*transposed?|deconv[a-z]*\d*|einsum|local|bilinear')
_UPWARDS = re.compile(r'up(conv|sampl[a-z]+)?\d*')  # torch stores transposed convolutions as [in, out, *taps]
_TWO_LAYOUTS = {'c_attn', 'c_fc', 'c_proj'}  # GPT-2's are [in, out] as stored by torch, and [out, in] by Flax

# Names of parameters that are no matrices although they may have two axes: biases, scales, statistics, vectors.
_VECTORS = re.compile(
    r'bias\w*|\w+_bias|\w*scales?|\w*offset|gamma|beta|alpha|\w*norm|ln\d*|(running_)?(mean|var)|weight_g|a_log|log_\w+'
    r'|logit_\w+|\w*temperature|probes?|latents?|latent_array|registers?|(\w+_)?(queries|prompts?)|lambda(_re|_im)?|dt'
    r'|init(ial)?_(state|hidden|carry)s?|time_(mix|decay|first|faaaa|maa)\w*')
_TABLES = re.compile(
    r'(\w+_)?(embed|embedder|embeds|embedding|embeddings|emb|embs|wte|wpe|lookup|table|codebooks?)(_\w+)?|(\w+_)?(tok|tokens?)'
    r'|(\w+_)?(pos|position|positions|positional)(_(enc|encoding|encodings|ids|h|w|\d+))*')
_NORMS = re.compile(r'(\w+_)?([a-z]*norm|ln|bn)(_?[a-z]?\d*)')
_MATRICES = re.compile(
    r'[a-z]*(proj|projection|linear|lin|dense|fc|head|mlp|ffn|attn|attention|query|key|value|conv|gate|up|down)\d*'
    r'|[qkvow]\d*|qkv|kv|wq|wk|wv|wo|in|out|to')
_WEIGHTS = re.compile(r'kernel|w\w?\d*|weights?')  # words in the names of parameters that are matrices


@functools.lru_cache(maxsize=4096)
def _snake(key: str) -> str:
  """Returns a key in lower case with underscores between its words: `PatchEmbed_0` becomes `patch_embed_0`."""
  return re.sub(r'(?<=[a-z0-9])(?=[A-Z])', '_', key).lower()


def _words(key: str) -> list[str]:
  return _snake(key).split('_')


def axes(place: Place) -> Axes:
  """Returns the `Axes` that the conventions give to a parameter, with the source `convention` or `unknown`.

  A layer whose name says another layout (`ConvTranspose`, `Einsum`, `c_fc` of GPT-2) is unknown. A
  parameter beside a bias that does not have its outputs is unknown too: a stack of layers, or a transposed kernel. A
  vector contracts nothing.
  """
  rank = len(place.shape)
  if rank < 2:
    return Axes((), tuple(range(rank)), source='convention')
  for each in TABLE:
    if place.name in each.names and rank in each.ranks and each.fits(place):
      found = each.axes(rank)
      if not _second_reading(place, found):
        return found
  return Axes((), tuple(range(rank)), source='unknown')


def _second_reading(place: Place, found: Axes) -> bool:
  """Returns whether something beside the parameter speaks for another layout than `found`."""
  words = _words(place.layer)
  if place.layer in _TWO_LAYOUTS or 'ConvTranspose' in place.module or any(map(_OTHERWISE.fullmatch, words)):
    return True
  if found.spatial and place.name == 'weight' and not place.module and any(map(_UPWARDS.fullmatch, words)):
    return True
  if place.bias is None:  # of rank five: a convolution in space, or a stack of convolutions in the plane
    return len(place.shape) == 5 and not place.module & _KNOWN
  (outputs,) = (place.shape[a] for a in found.output)
  wide = lambda shape: tuple(n for n in shape if n != 1)  # a bias of Equinox's convolutions is `[out, 1, 1]`
  return wide(place.bias) != wide((outputs,))


def is_vector(shape: tuple[int, ...]) -> bool:
  """Returns whether fewer than two axes are longer than one; `[n, 1]` is a matrix with one output, `[1, n]` is not."""
  return sum(n != 1 for n in shape) < 2 and not (len(shape) == 2 and shape[0] != 1)


def is_matrix(place: Place) -> bool:
  """Returns whether a floating parameter is sparse by default.

  Parameters that are no vectors are matrices, except lookup tables, norms, biases, scales and sets of vectors. The
  class of an Equinox module tells them, and the parameter's own name. The name of the layer itself also tells the
  `weight` of a norm, and a lookup table. A lookup table is no `kernel` and has no bias. A bias of the same shape tells
  a norm, as in a stack of norms.
  """
  if is_vector(place.shape) or 0 in place.shape:
    return False
  if place.module & _NO_MATRICES:
    return False
  if place.module & _KNOWN and place.name == 'weight':
    return True
  name, layer = _snake(place.name), _snake(place.layer)
  if place.name in ('b', 'g') or _VECTORS.fullmatch(name) or _TABLES.fullmatch(name) or _is_set(place):
    return False
  if _TABLES.fullmatch(layer) and name != 'kernel' and place.bias is None:
    return False
  return not (name == 'weight' and _NORMS.fullmatch(layer)) and place.bias != place.shape


def _is_set(place: Place) -> bool:
  """Returns whether a parameter is a set of vectors that its name does not call one: `[1, n, d]`, or a lone `query`.

  An axis of length one in front of the vectors is there to be broadcast, unless the name says matrix. A `query` beside
  a `key` or a `value` is a projection.
  """
  words = _words(place.name)
  if len(place.shape) > 2 and 1 in place.shape[:-1]:
    return not any(_WEIGHTS.fullmatch(word) or _MATRICES.fullmatch(word) for word in words) or words == ['query']
  return words == ['query'] and bool(place.siblings) and not {'key', 'value', 'k', 'v'} & place.siblings.keys()


def is_undecided(place: Place) -> bool:
  """Returns whether a matrix may be a lookup table too: a `weight` without a bias, whose layer's name says nothing."""
  known = place.module & _KNOWN or place.bias or any(map(_MATRICES.fullmatch, _words(place.layer)))
  return place.name == 'weight' and len(place.shape) == 2 and not known and is_matrix(place)

