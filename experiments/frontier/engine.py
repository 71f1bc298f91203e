"""Measures one rule at one sparsity: how good the model still is, what it reads, and how long it takes.

A line of the ledger has these keys:

- `rule`, `sparsity`, `environment`, `facts`; `achieved`, the fraction of pairs of tokens that are left out.
- `scores`: a number for each held-out example, by name.
- `bytes` and `flops`, of attention, for one sequence; `cpu` and `wall`: seconds for one sequence, compiled. Lines of
  rules for activations have those of the weights instead, for one token, see `activating`.
- `config`: the facts that have to be the same for the line to count.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.frontier.activating import ActivationBench, rounded
from experiments.frontier.costs import Request
from experiments.frontier.rules import BLOCK, DENSE, RULES
from experiments.models import encoders
from experiments.models.stepping import LayerState, Stepper, read
from experiments.pruning import decoder as trained
from experiments.pruning import encoder
from kernels_pallas import decoder, sparse_attention
from sparsejax import attention
from sparsejax.attention import decode
from sparsejax.types import Array


class FrontierSizes(NamedTuple):
  """`FrontierSizes` are the numbers of held-out windows and their bytes, and those of the needle task.

  `length`: bytes of a window, in training too. `haystack`: bytes of a window of the needle task, with the passage of
  `needle` bytes at both ends. `reach`: bytes over which windows of the training reach, whatever `length` is, because
  they leave a part out (`experiments.pruning.decoder.reaching`), or 0 for plain windows.
  """

  windows: int = 16
  length: int = 128
  needles: int = 4
  haystack: int = 4096
  needle: int = 64
  reach: int = 0


class EncoderBench:
  """An `EncoderBench` has the scores of the pretrained encoder on SST-2, with any attention."""

  def __init__(self, data_dir: str | None, seed: int):
    self._judge = encoder.judge(data_dir, seed)
    self._params = jax.tree.map(jnp.asarray, encoders.load_pretrained())
    self._tokens = jnp.full((encoder.BATCH, 32), 100, jnp.int32)

  def line(self, rule: str, sparsity: float) -> dict[str, Any]:
    """Returns the scores, the costs and the seconds of a rule."""
    builder = attention.full(BLOCK) if rule == DENSE else RULES['encoder'][rule](sparsity, self._tokens.shape[1])
    embed = encoders.embed if rule == DENSE else sparse_attention(encoders.embed, builder)
    given = self._params, self._tokens, self._tokens > 0
    rows = sparse_attention(encoders.embed, builder, explain=True)(*given).rows
    if dense := [row for row in rows if row.problem]:
      raise ValueError(f'frontier: attention at {dense[0].place} stays dense: {dense[0].problem}.')
    achieved = float(np.mean([row.achieved for row in rows]))
    heads, tokens = rows[0].shape[1], rows[0].shape[2]
    d = self._params['block_0']['attention']['query']['kernel'].shape[2]
    pairs = len(rows) * heads * tokens**2 * (1 - achieved)
    return {'achieved': achieved, 'scores': rounded(self._judge.scored(embed, self._params)), 'flops': 4 * pairs * d,
            'bytes': 4 * 2 * pairs * d / BLOCK, **_seconds(jax.jit(embed), given, encoder.BATCH)}


class DecoderBench:
  """A `DecoderBench` has the losses of a trained decoder, token by token: on held-out text and on needles.

  A needle is a passage of text that stands at the beginning of a window and again at its end: the score is the loss on
  the last half of the second, where a model that finds the first knows every byte. All before the second passage is a
  prompt, which is read at once by exact attention, and the second passage is decoded by the rule.
  """

  def __init__(self, params: Any, content: bytes, sizes: FrontierSizes, seed: int):
    self._params, self._sizes = params, sizes
    rng = np.random.default_rng(seed)
    array = np.frombuffer(content, np.uint8).astype(np.int32)
    cut = lambda n: array[(start := int(rng.integers(0, len(array) - n))):start + n]
    self._text = jnp.asarray(np.stack([cut(sizes.length + 1) for _ in range(sizes.windows)]))
    rows = []
    for _ in range(sizes.needles):
      needle, hay = cut(sizes.needle), cut(sizes.haystack + 1 - 2 * sizes.needle)
      rows.append(np.concatenate([needle, hay, needle]))
    self._needles = jnp.asarray(np.stack(rows))
    self._prompt = read(params, self._needles[:, :-1 - sizes.needle])
    self._keys: list[Array] = []
    self._models: dict[Any, Stepper] = {}
    whole = self._model(DENSE, 0.0, sizes.length)
    self._keys = [layer.cache.k for layer in whole.fed(whole.start(sizes.windows), self._text[:, :-1])[1]]

  def line(self, rule: str, sparsity: float) -> dict[str, Any]:
    """Returns the scores, the costs and the seconds of a rule."""
    sizes = self._sizes
    model = self._model(rule, sparsity, sizes.haystack)
    found = _nats(model, model.reading(self._prompt), self._needles[:, -1 - sizes.needle:])
    model = self._model(rule, sparsity, sizes.length)
    nats = _nats(model, model.start(sizes.windows), self._text)
    inputs = self._text[:, :-1]
    heads, d = self._keys[0].shape[2:]
    cost = Request(0, heads, heads, d, 0, sizes.haystack, bytes_each=4, intensity=1.0)
    keep = None if rule == DENSE else self._rules(rule, sparsity, sizes.haystack)[0].keep
    run, layers = lambda tokens: model.fed(model.start(len(tokens)), tokens)[0], len(self._keys)
    return {'achieved': 1 - cost.pairs(keep) / cost.pairs(), 'flops': layers * cost.compute(keep),
            'bytes': layers * (cost.memory(keep) + self._labels(rule, sparsity) * sizes.haystack),
            'scores': rounded({'nats': nats.mean(1), 'needle': found[:, -sizes.needle // 2:].mean(1)}),
            **_seconds(run, (inputs,), len(inputs))}

  def _rules(self, rule: str, sparsity: float, tokens: int) -> list[decode.DecodeRule]:
    if rule == DENSE:
      return [decode.every(tokens)] * sum(name.startswith('block_') for name in self._params)
    return RULES['decoder'][rule](sparsity, tokens, self._keys)

  def _labels(self, rule: str, sparsity: float) -> float:
    """Returns the bytes of labels that a step of the needle task reads in one layer."""
    shape = jax.ShapeDtypeStruct((1, self._sizes.haystack, *self._keys[0].shape[2:]), jnp.float32)
    return 4 * jax.eval_shape(self._rules(rule, sparsity, self._sizes.haystack)[0].labels, shape).size

  def _model(self, rule: str, sparsity: float, length: int) -> Stepper:
    """Returns the model with this rule, whose programs are compiled once."""
    cell = rule, sparsity, length
    if cell not in self._models:
      decoders = tuple(map(decoder, self._rules(rule, sparsity, length)))
      self._models[cell] = Stepper(self._params, decoders, length)
    return self._models[cell]

def _nats(model: Stepper, state: tuple[LayerState, ...], tokens: Array) -> np.ndarray:
  """Returns the loss of each of `tokens`, `[N, T]`, after the first, `[N, T - 1]`, from this state on."""
  logits, state = model.fed(state, tokens[:, :-1])
  for layer in state:
    decode.check(layer.cache)
  return np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))


def bench(table: str, data_dir: str | None, workdir: Any, request: Any, steps: int, seed: int, sizes: FrontierSizes,
          config: Mapping[str, Any] = trained.CONFIG) -> Any:
  """Returns the bench of a table; the decoder is trained first, in `workdir`, unless it is there already."""
  if table == 'activation':
    return ActivationBench(data_dir, seed)
  if table == 'encoder':
    return EncoderBench(data_dir, seed)
  subject = trained.subject(data_dir, workdir, request, steps, seed, config, sizes.length, sizes.reach)
  return DecoderBench(subject.params, trained.split_texts(data_dir)[0]['test'], sizes, seed)


def cells(names: Sequence[str], sparsities: Sequence[float]) -> list[tuple[str, float]]:
  """Returns the cells in their order: the dense model, then every rule at every sparsity."""
  return [(DENSE, 0.0), *((name, sparsity) for name in names for sparsity in sparsities)]


def _seconds(run: Callable[..., Any], given: tuple[Any, ...], count: int) -> dict[str, float]:
  """Returns the processor seconds and the seconds on the wall of a compiled call, over `count`: medians of three."""
  jax.block_until_ready(run(*given))
  taken = []
  for _ in range(3):
    began = time.process_time(), time.perf_counter()
    jax.block_until_ready(run(*given))
    taken.append((time.process_time() - began[0], time.perf_counter() - began[1]))
  cpu, wall = np.median(taken, 0) / count
  return {'cpu': float(cpu), 'wall': float(wall)}
