"""Judges pruned copies of the pretrained encoder: cosine to the dense embeddings, and the accuracy of a linear probe.

The sentences are those of SST-2. Without a folder that has them, they are the first lines of the docstrings of the
standard library, and the probe tells classes from functions.
"""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data import sst2, stdlib
from experiments.models import encoders
from experiments.pruning.subjects import Subject
from sparsejax import trees
from sparsejax.types import Array, PyTree

CALIBRATED, PROBED, HELD_OUT = 256, 512, 512  # sentences: to prune, to train the probe, to judge
BATCH = 64  # sentences
STRENGTH = 10.0  # the inverse of the probe's L2 penalty, for embeddings of norm 1
ROUNDING = 8  # a batch is cut to its longest sentence, rounded up to a multiple of this many tokens

SIZES = {'calibration': f'{CALIBRATED} sentences', 'probe': f'{PROBED} sentences', 'held out': f'{HELD_OUT} sentences',
         'tokens a sentence, at most': sst2.LENGTH}
WHERE = trees.named('attention/*/kernel', 'mlp/*/kernel')
Sentences = Mapping[str, np.ndarray]  # `inputs` and `labels`


def subject(data_dir: str | None, seed: int) -> Subject:
  """Returns the encoder with the sentences that `seed` draws. Raises `ValueError` where a file or a package is missing.
  """
  train, test, name = _sentences(data_dir)
  calibration, probed = np.split(_drawn(train, CALIBRATED + PROBED, seed), [CALIBRATED])
  held_out = _drawn(test, HELD_OUT, seed)
  params = jax.tree.map(jnp.asarray, encoders.load_pretrained())
  tokens = [jnp.asarray(train['inputs'][rows]) for rows in np.split(calibration, len(calibration) // BATCH)]
  probe = _Probe({key: value[probed] for key, value in train.items()},
                 {key: value[held_out] for key, value in test.items()})
  dense = probe.embedded(params)
  linear = probe.fitted(dense[0])
  labels = train['labels'][calibration[:BATCH]]
  return Subject(
      encoders.embed, params, [(each, each != encoders.PADDING) for each in tokens],
      [each != encoders.PADDING for each in tokens], WHERE, functools.partial(_loss, linear, jnp.asarray(labels)),
      lambda path: path.split('/')[0], functools.partial(_scored, probe, dense[1]),
      {'data': name, **SIZES, 'seed': seed})


def _sentences(data_dir: str | None) -> tuple[Sentences, Sentences, str]:
  """Returns training sentences, test sentences and the name of the set."""
  if data_dir is not None:
    splits = sst2.load(pathlib.Path(data_dir).expanduser(), sst2.LENGTH)
    return splits['train'], splits['test'], 'SST-2, sentences'
  found = stdlib.docstrings()
  tokens = sst2.tokens([text for text, _ in found], sst2.LENGTH)
  labels = np.array([label for _, label in found], np.int32)
  last = np.arange(len(found)) % 4 == 3
  part = lambda rows: {'inputs': tokens[rows], 'labels': labels[rows]}
  return part(~last), part(last), 'docstrings of the standard library, class or function'


def _drawn(sentences: Sentences, count: int, seed: int) -> np.ndarray:
  """Returns the numbers of `count` sentences, none twice."""
  if len(sentences['labels']) < count:
    raise ValueError(f'pruning: {count} sentences are needed, and there are {len(sentences["labels"])}. Give SST-2 by '
                     '--data_dir.')
  return np.random.default_rng(seed).permutation(len(sentences['labels']))[:count]


class Judge(NamedTuple):
  """A `Judge` scores other embeddings of the sentences that a seed draws, by the scores of `subject`.

  `scored(embed, params)` returns the cosine to the dense embedding and whether the probe, trained anew, is right.
  `calibration`: the sentences to calibrate on. `nats(embeddings, labels)` is the mean loss of the dense probe.
  """

  scored: Callable[[Callable[..., Array], PyTree], Mapping[str, np.ndarray]]
  calibration: Sentences
  nats: Callable[[Array, Array], Array]


def judge(data_dir: str | None, seed: int) -> Judge:
  """Returns the judge of the sentences that `seed` draws. A function that embeds is compiled once."""
  train, test, _ = _sentences(data_dir)
  calibration, probed = np.split(_drawn(train, CALIBRATED + PROBED, seed), [CALIBRATED])
  held_out = _drawn(test, HELD_OUT, seed)
  part = lambda each, rows: {key: value[rows] for key, value in each.items()}
  made = functools.lru_cache(maxsize=2)(functools.partial(_Probe, part(train, probed), part(test, held_out)))
  probe = made(encoders.embed)
  dense = probe.embedded(jax.tree.map(jnp.asarray, encoders.load_pretrained()))
  return Judge(lambda embed, params: _scored(made(embed), dense[1], params), part(train, calibration),
               functools.partial(_nats, probe.fitted(dense[0])))


class _Probe:
  """A `_Probe` embeds the sentences of the probe and the held-out sentences, and fits the probe."""

  def __init__(self, probed: Sentences, held_out: Sentences, embed: Callable[..., Array] = encoders.embed):
    self.labels = probed['labels'], held_out['labels']
    self._batches = [_batches(each['inputs']) for each in (probed, held_out)]
    self._embed = jax.jit(lambda params, tokens: embed(params, tokens, tokens != encoders.PADDING))

  def embedded(self, params: PyTree) -> tuple[np.ndarray, np.ndarray]:
    """Returns the embeddings of the probe's sentences and of the held-out ones, each `float32[N, width]`."""
    return tuple(self._of(params, batches) for batches in self._batches)

  def _of(self, params: PyTree, batches: list[tuple[np.ndarray, Array]]) -> np.ndarray:
    parts = [np.asarray(self._embed(params, tokens)) for _, tokens in batches]
    found = np.concatenate(parts)
    return found[np.argsort(np.concatenate([rows for rows, _ in batches]))]

  def fitted(self, embeddings: np.ndarray) -> Any:
    """Returns logistic regression on the embeddings of the probe's sentences."""
    from sklearn.linear_model import LogisticRegression  # The import takes a second.
    return LogisticRegression(C=STRENGTH, max_iter=1000).fit(embeddings, self.labels[0])


def _batches(tokens: np.ndarray) -> list[tuple[np.ndarray, Array]]:
  """Returns rows and tokens of batches of sentences of about one length, cut to the longest."""
  lengths = (tokens != encoders.PADDING).sum(1)
  order = np.argsort(lengths, kind='stable')
  made = []
  for rows in np.split(order, range(BATCH, len(order), BATCH)):
    longest = -(-int(lengths[rows].max()) // ROUNDING) * ROUNDING
    made.append((rows, jnp.asarray(tokens[rows, :longest])))
  return made


def _scored(probe: _Probe, dense: np.ndarray, params: PyTree) -> dict[str, np.ndarray]:
  """Returns, for each held-out sentence, the cosine to its dense embedding, and whether the probe is right.

  The probe is trained anew on the embeddings of `params`.
  """
  probed, held_out = probe.embedded(params)
  right = probe.fitted(probed).predict(held_out) == probe.labels[1]
  return {'cosine': np.sum(dense * held_out, 1), 'accuracy': right.astype(np.float64)}


def _loss(linear: Any, labels: Array, params: PyTree, batch: tuple[Array, Array]) -> Array:
  """Returns the cross-entropy of the dense probe on one batch."""
  return _nats(linear, encoders.embed(params, *batch), labels)


def _nats(linear: Any, embeddings: Array, labels: Array) -> Array:
  logits = embeddings @ jnp.asarray(linear.coef_[0], jnp.float32) + float(linear.intercept_[0])
  return jnp.mean(jax.nn.softplus(jnp.where(labels == 1, -logits, logits)))
