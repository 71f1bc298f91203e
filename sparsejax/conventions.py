"""Says what names, ranks and containers tell about a parameter: the axes that are contracted, and whether it is a matrix.

`TABLE` lists every convention. A parameter that no line of `TABLE` fits, or that a second reading fits too, has unknown
axes: `Axes((), every axis, source='unknown')`. Patterns that lie along axes refuse such a parameter.

    axes(Place(('Dense_0', 'kernel'), (64, 10)))                # Axes((0,), (1,), source='convention')
    axes(Place(('query', 'kernel'), (64, 8, 8)))                # unknown: attention, or a stack of layers
    is_matrix(Place(('norm', 'weight'), (12, 64)))              # False: a stack of norms

A word in the name of a parent decides nothing. The name of the layer itself, the last key above the parameter that is
no number, says whether a rank of four or five is a convolution, and whether a `weight` is a lookup table or a norm.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sparsejax.types import Axes


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
    r'|logit_\w+|\w*temperature|probes?|latents?|registers?')
_TABLES = re.compile(
    r'(\w+_)?(embed|embedder|embeds|embedding|embeddings|emb|embs|wte|wpe|lookup|table)(_\w+)?|(\w+_)?(tok|tokens?)'
    r'|(pos|position|positions|positional)(_(enc|encoding|encodings|ids|\d+))*')
_NORMS = re.compile(r'(\w+_)?([a-z]*norm|ln|bn)(_?[a-z]?\d*)')
_MATRICES = re.compile(
    r'[a-z]*(proj|projection|linear|lin|dense|fc|head|mlp|ffn|attn|attention|query|key|value|conv|gate|up|down)\d*'
    r'|[qkvow]\d*|qkv|kv|wq|wk|wv|wo|in|out|to')


@functools.lru_cache(maxsize=4096)
def _snake(key: str) -> str:
  """Returns a key in lower case with underscores between its words: `PatchEmbed_0` becomes `patch_embed_0`."""
  return re.sub(r'(?<=[a-z0-9])(?=[A-Z])', '_', key).lower()


def _words(key: str) -> list[str]:
  return _snake(key).split('_')


def axes(place: Place) -> Axes:
  """Returns the `Axes` that the conventions give to a parameter, with the source `convention` or `unknown`.

  A layer whose name says another layout (`ConvTranspose`, `Einsum`, `c_fc` of GPT-2) is unknown. So is a parameter
  beside a bias that does not have its outputs: a stack of layers, or a transposed kernel.
  """
  rank = len(place.shape)
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


def is_matrix(place: Place) -> bool:
  """Returns whether a floating parameter is sparse by default.

  Parameters with two axes and more that are longer than one are matrices, except lookup tables, norms, biases, scales
  and vectors. These are known by the class of an Equinox module, by the parameter's own name, for lookup tables and for
  the `weight` of a norm also by the name of the layer itself, and by a bias of the same shape, as a stack of norms has.
  """
  if sum(n != 1 for n in place.shape) < 2 or 0 in place.shape:
    return False
  if place.module & _NO_MATRICES:
    return False
  if place.module & _KNOWN and place.name == 'weight':
    return True
  name, layer = _snake(place.name), _snake(place.layer)
  if place.name in ('b', 'g') or _VECTORS.fullmatch(name) or _TABLES.fullmatch(name) or _TABLES.fullmatch(layer):
    return False
  return not (name == 'weight' and _NORMS.fullmatch(layer)) and place.bias != place.shape


def is_undecided(place: Place) -> bool:
  """Returns whether a matrix may as well be a lookup table: a `weight` without a bias under a name that says nothing."""
  known = place.module & _KNOWN or place.bias or any(map(_MATRICES.fullmatch, _words(place.layer)))
  return place.name == 'weight' and len(place.shape) == 2 and not known and is_matrix(place)

