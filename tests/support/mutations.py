"""Makes damaged and forged checkpoints from sound ones, deterministically: a seed names a file.

    name = mutations.mutated(folder, 17)      # writes a file or a sharded folder, and returns what was done to it

Damage changes bytes. A forgery changes what a file says of itself and corrects every digest, as an attacker would.
"""

import functools
import hashlib
import itertools
import json
import pathlib
import random
import tempfile

import numpy as np
import safetensors.numpy
from raw import sparse

import sparsejax as sj
from sparsejax import formats, io
from sparsejax.io import bodies, folders, headers, saving

EVIL = (None, True, False, -1, 0, 1, 2, 3, 8, 255, 2**31 - 1, 2**31, 2**62, 2**63, 10**9, 10**400, -10**18, 1.5, 1e300,
        float('nan'), float('inf'), '', 'x', '2', '../x', '/', 'a/' * 300, '.' * 300, '\0', '\x1b[2J', '\ud800', 'é',
        'bool', 'float64', 'F32', 'dict', 'list', 'dense', 'csc', 'bitmask', [], [0], [10**9], [-1], [[]], [2**33] * 2,
        [1] * 70, ['list', 10**9], [['list', 10**9]], [['dict', 'a']] * 200, {}, {'a': {}}, {'version': 2})
INDEX = 'model.safetensors.index.json'


@functools.cache
def tree():
  """Returns leaves of every format and of several dtypes, small, in dicts and lists."""
  blocks = np.kron(np.eye(2, dtype='float32'), np.ones((4, 4), 'float32'))
  packed = {'nm': formats.NMArray.from_dense(sparse(8, 3, dtype='bfloat16'), 2, 4, 0),
            'vectors': formats.NMArray.from_dense(np.repeat(sparse(8, 2), 2, 1), 2, 4, 0, width=2),
            'bits': formats.BitmaskArray.from_dense(sparse(8, 3)),
            'gaps': formats.RelativeIndexArray.from_dense(np.eye(24, dtype='float32')[:3]),
            'csc': formats.CSCArray.from_dense(sparse(8, 3)),
            'blocks': formats.BlockSparseArray.from_dense(blocks, None, (4, 4)),
            'hopper': formats.Sparse24Array.from_dense(sparse(8, 3, dtype='bfloat16'))}
  packed['csc'] = formats.with_axes(packed['csc'], sj.types.Axes((0,), (1,)))
  bias = np.ones(3, 'float16')
  return {'layers': [packed, {'bias': bias, 'tied': bias}], 'step': np.asarray(3), 'by': {7: np.zeros((0, 2), 'int8')}}


@functools.cache
def saved():
  """Returns the bytes of a file of `tree()`."""
  with tempfile.TemporaryDirectory() as folder:
    io.save(f'{folder}/f', tree(), metadata={'run': 'a'})
    return pathlib.Path(folder, 'f').read_bytes()


def foreign():
  return {'a.weight': sparse(4, 4), 'a.bias': np.ones(4, 'float16'), 'b.0.weight': np.arange(6).reshape(2, 3)}


def mutated(folder, seed):
  """Writes one mutation to `folder`, and returns its name and the path to read, in the folder."""
  rng, folder = random.Random(seed), pathlib.Path(folder)
  kind = KINDS[seed % len(KINDS)]
  path = folder / 'model.safetensors'
  name = kind(rng, path)
  return f'{seed}: {kind.__name__}, {name}', path if path.exists() else folder


# Bytes.


def damage(rng, path):
  path.write_bytes(saved())
  return _damaged(rng, path)


def _damaged(rng, path):
  data = bytearray(path.read_bytes())
  header = 8 + int.from_bytes(data[:8], 'little')
  at = rng.choice([rng.randrange(9), rng.randrange(min(header, len(data))), rng.randrange(len(data))])
  long = rng.choice([1, 2, 8, 100])
  name, change = rng.choice([
      ('flip', lambda: data.__setitem__(at, data[at] ^ 1 << rng.randrange(8))),
      ('another byte', lambda: data.__setitem__(at, rng.randrange(256))),
      ('truncate', lambda: data.__delitem__(slice(at, None))),
      ('take out', lambda: data.__delitem__(slice(at, at + long))),
      ('twice', lambda: data.__setitem__(slice(at, at), data[at:at + long])),
      ('zeros', lambda: data.__setitem__(slice(at, at + long), bytes(len(data[at:at + long])))),
      ('length', lambda: data.__setitem__(slice(0, 8), rng.choice([2**64 - 1, 2**63, 10**8, header, header - 9, 0])
                                          .to_bytes(8, 'little')))])
  change()
  path.write_bytes(data)
  return f'{name} at {at}'


# A file's claims of itself.


def forged(rng, path):
  """Changes the entry `sparsejax`, with correct digests."""
  path.write_bytes(saved())
  about, tensors = _contents(path)
  leaves = about['leaves']
  name = _replaced(rng, {'leaves': leaves})
  if rng.random() < 0.2:
    rng.shuffle(leaves) if isinstance(leaves, list) else None
  _write_own(path, leaves, tensors)
  return name


def forged_tensors(rng, path):
  """Changes bytes, shape or dtype of a tensor, with correct digests: indices outside, unsorted, too many."""
  path.write_bytes(saved())
  about, tensors = _contents(path)
  name = rng.choice(sorted(tensors))
  tensor = tensors[name].copy()
  flat = tensor.reshape(-1).view(np.uint8)
  kind = rng.choice(['bytes', 'largest', 'reversed', 'shorter', 'longer', 'dtype', 'shape', 'gone', 'empty'])
  if kind == 'bytes' and len(flat):
    flat[rng.randrange(len(flat))] = rng.randrange(256)
  elif kind == 'largest' and tensor.size and tensor.dtype.kind in 'iu':
    largest = np.iinfo(tensor.dtype).max
    tensor.reshape(-1)[rng.randrange(tensor.size)] = rng.choice([-1, 10**8, 2**31 - 1, 127]) & largest
  elif kind in ('reversed', 'shorter', 'empty') and tensor.ndim:
    tensor = {'reversed': tensor[::-1], 'shorter': tensor[:-1], 'empty': tensor[:0]}[kind]
  elif kind == 'longer' and tensor.ndim:
    tensor = np.concatenate([tensor, tensor])
  elif kind == 'dtype':
    tensor = flat.view(rng.choice(['int8', 'uint8', 'float8_e5m2', 'bool']))
  elif kind == 'shape':
    tensor = tensor.reshape(rng.choice([(1, -1), (-1, 1), (-1,), (1, 1, 1, -1)]))
  tensors[name] = np.ascontiguousarray(tensor)
  if kind == 'gone':
    del tensors[name]
  _write_own(path, about['leaves'], tensors)
  return f'{kind} of {name}'


def forged_header(rng, path):
  """Changes the header of another program's file: offsets, shapes, dtypes, names, metadata of our names."""
  metadata = rng.choice([None, {'sha256': 'f' * 64}, {'sparsejax': '0.3'}, {'sparsejax': '{}', 'sha256': ''}])
  safetensors.numpy.save_file(foreign(), path, metadata)
  header, data = _split(path)
  name = _replaced(rng, header)
  text = json.dumps(header)
  if rng.random() < 0.2:
    text = rng.choice([text.replace('"a.bias"', '"a.weight"'), text.replace('}', '}' + ' ' * 9), '[' * 9999 + text,
                       text[:-1] + ',"x":' + '[' * 99999 + ']' * 99999 + '}', text[:-1] + ',"n":' + '9' * 5000 + '}'])
  path.write_bytes(len(text.encode()).to_bytes(8, 'little') + text.encode() + data)
  return name


def named(rng, path):
  """Writes a sound file of another program with names that are deep, long, empty or of control characters."""
  names = ['/' * 100, 'a/' * rng.choice([5, 127, 128, 60_000]) + 'w', 'a.' * 60_000, 'x' * 300_000, '', '.',
           '\x1b[31mred', 'a\nb', '\u202e', 'a', 'a/b', 'a.b', 'a/' + 'b.' * 500, *('m/' * i + 'w' for i in range(40))]
  chosen = rng.sample(names, rng.randrange(1, 5))
  safetensors.numpy.save_file({name: np.ones((4, 4), 'float32') for name in chosen}, path)
  return f'{len(chosen)} names, the longest of {max(map(len, chosen))}'


def sharded(rng, path):
  """Writes a folder of parts, and damages its index, a part, or what belongs together."""
  parts = {f'model-{i}.safetensors': dict([pair]) for i, pair in enumerate(foreign().items())}
  for part, tensors in parts.items():
    safetensors.numpy.save_file(tensors, path.parent / part)
  index = {'metadata': {}, 'weight_map': {name: part for part, tensors in parts.items() for name in tensors}}
  kind = rng.choice(['index', 'index', 'text', 'part', 'gone'])
  name = _replaced(rng, index) if kind == 'index' else kind
  text = json.dumps(index)
  if kind == 'text':
    text = rng.choice([text[:rng.randrange(len(text))], '[' * 99999, text.replace('a.bias', 'a.weight'), 'NaN', ''])
  (path.parent / INDEX).write_bytes(text.encode())
  part = path.parent / rng.choice(sorted(parts))
  if kind == 'part':
    name = _damaged(rng, part)
  if kind == 'gone':
    part.unlink()
  return name


KINDS = (damage, forged, forged_tensors, forged_header, named, sharded, forged, forged_header)


def _replaced(rng, value):
  """Puts an evil value in the place of a node of `value`, takes the node out, or moves another node there."""
  nodes = list(_nodes(value))
  holder, key = rng.choice(nodes)
  kind = rng.choice(['evil', 'evil', 'evil', 'out', 'moved', 'renamed'])
  if kind == 'out':
    del holder[key]
  elif kind == 'moved':
    other, there = rng.choice(nodes)
    if not isinstance(other[there], (dict, list)):  # no circles
      holder[key] = other[there]
  elif kind == 'renamed' and isinstance(holder, dict):
    holder[str(rng.choice([each for each in EVIL if isinstance(each, str)]))] = holder.pop(key)
  else:
    holder[key] = rng.choice(EVIL)
  return f'{kind} {key!r}'


def _nodes(value):
  pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
  for key, child in list(pairs):
    yield value, key
    yield from _nodes(child)


def _split(path):
  data = path.read_bytes()
  end = 8 + int.from_bytes(data[:8], 'little')
  return json.loads(data[8:end]), data[end:]


def _contents(path):
  header = headers.read(path)
  return json.loads(header.metadata['sparsejax']), {
      name: tensor.read() for name, tensor in folders.of_header(header).items()}


def _write_own(path, leaves, tensors):
  """Writes a file with these entries and tensors, whose digests are correct."""
  data = {name: bytes(bodies.raw(tensor)) for name, tensor in tensors.items()}
  ends = itertools.accumulate(map(len, data.values()))
  places = {name: headers.Extent(tensors[name].dtype, tensors[name].shape, end - len(data[name]), end)
            for name, end in zip(data, ends)}
  digests = {name: hashlib.sha256(each).hexdigest() for name, each in data.items()}
  text = saving._header(leaves, places, digests, {}, 0)
  path.write_bytes(len(text).to_bytes(8, 'little') + text + b''.join(data.values()))
