"""Measures post-training pruning: SparseGPT beside NumPy and its memory, ExactOBS by rows, Wanda of a whole encoder."""

import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sparsejax as sj
from benchmarks import timing
from benchmarks.timing import Measurement
from experiments.models import encoders
from sparsejax import calibration, hessians
from sparsejax.patterns import Unstructured
from sparsejax.post_training import Chooser, Stack, repairs, stack_of

SIZE, LARGE, BLOCK, DAMPING = 2048, 4096, 128, 0.01
ROWS, INPUTS = (64, 256), 256
HALF = Chooser(Unstructured(0.5), 0.5)
SENTENCES, TOKENS = 128, 32
BARS = {'faster': 2.0, 'copies': 4.0, 'linear': 1.25, 'passes': 3.0}


def layer(rows: int, inputs: int) -> tuple[Stack, calibration.Gram]:
  """Returns a layer of normal weights and the Gram matrix of twice as many rows as inputs, which are correlated."""
  w, x, mix = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(
      [(1, rows, inputs), (1, 2 * inputs, inputs), (inputs, inputs)]))
  return stack_of(w), calibration.gram(calibration.Rows(x @ (jnp.eye(inputs) + mix / inputs**0.5)))


def by_numpy(w: np.ndarray, gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns weights `[R, K]` pruned by half and their mask, by SparseGPT's algorithm as published, by LAPACK."""
  w, mask = w.copy(), np.ones(w.shape, bool)
  hessian = gram / np.mean(np.diagonal(gram)) + np.eye(len(gram), dtype=w.dtype) * np.float32(DAMPING)
  upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
  for start in range(0, len(gram), BLOCK):
    own, part = upper[start:start + BLOCK, start:start + BLOCK], w[:, start:start + BLOCK].copy()
    scores, errors = np.square(part / np.diagonal(own)), np.zeros_like(part)
    kept = scores > np.partition(scores.reshape(-1), scores.size // 2 - 1)[scores.size // 2 - 1]
    for i in range(part.shape[1]):
      errors[:, i] = np.where(kept[:, i], 0, part[:, i]) / own[i, i]
      part[:, i:] -= np.outer(errors[:, i], own[i, i:])
    w[:, start:start + BLOCK] = np.where(kept, part, 0)
    w[:, start + BLOCK:] -= errors @ upper[start:start + BLOCK, start + BLOCK:]
    mask[:, start:start + BLOCK] = kept
  return w, mask


def run(rounds: int = 5) -> Iterator[Measurement]:
  """Yields one claim each on speed, memory, rows and passes. Both SparseGPTs have to leave the same output error."""
  yield _speed(rounds)
  yield _memory()
  yield _rows(rounds)
  yield _passes(rounds)


def _speed(rounds: int) -> Measurement:
  stack, stats = layer(SIZE, SIZE)
  w, gram = np.asarray(stack.dense[0]), np.asarray(stats.gram[0])
  repair = repairs.columns(BLOCK, DAMPING)
  ways: dict[str, Any] = {'numpy': lambda: by_numpy(w, gram), 'columns': lambda: repair(stack, HALF, stats).w}
  ours, theirs = _error(np.asarray(ways['columns']()[0]), w, gram), _error(by_numpy(w, gram)[0], w, gram)
  if abs(ours / theirs - 1) > 1e-3:
    raise AssertionError(f'post_training: columns leaves the error {ours:.6f}, and NumPy {theirs:.6f}.')
  what = f'sparsegpt of {SIZE} x {SIZE}, CPU seconds of NumPy over ours'
  seconds = timing.take_turns(ways, rounds, clock=time.process_time)
  return timing.claim(what, seconds, 'numpy', 'columns', BARS['faster'])


def _error(w: np.ndarray, dense: np.ndarray, gram: np.ndarray) -> float:
  change = w - dense
  return float(np.sum(change @ gram * change) / np.sum(dense @ gram * dense))


def _memory() -> Measurement:
  """Returns how many copies of a layer are held at the peak besides the Gram matrix: weights, mask, factor and result.

  The three compiled programs run one after the other, beside the Gram matrix, the weights and the mask.
  """
  stack, stats = jax.eval_shape(lambda: layer(LARGE, LARGE))
  gram = jax.ShapeDtypeStruct((LARGE, LARGE), jnp.float32)
  factor = hessians.InverseFactor(gram, DAMPING, 0, jax.ShapeDtypeStruct((LARGE,), jnp.bool))
  told = np.full((1, LARGE // BLOCK), LARGE * BLOCK // 2, np.int32)
  sweep = repairs.swept_layer.lower(stack.dense, stack.mask, told, (HALF, BLOCK, None), np.int32(0), factor)
  programs = hessians.lower.lower(stats.gram, DAMPING, np.int32(0)), hessians.inverted.lower(gram), sweep
  given = 4 * LARGE**2, 0, 5 * LARGE**2  # of the arguments: the Gram matrix, nothing, weights and mask
  held = max(_held(program) - counted for program, counted in zip(programs, given))
  copies = (held + 5 * LARGE**2) / (4 * LARGE**2)
  return Measurement(f'sparsegpt of {LARGE} x {LARGE}, copies of the layer at the peak besides the Gram matrix', copies,
                     (copies,) * 2, BARS['copies'], False, 1)


def _held(program: Any) -> int:
  memory = program.compile().memory_analysis()
  return (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
          + memory.temp_size_in_bytes)


def _rows(rounds: int) -> Measurement:
  """Returns how much longer a row takes among many rows than among few, in seconds of all cores."""
  few, many = ROWS
  layers = {str(rows): layer(rows, INPUTS) for rows in ROWS}
  ways = {rows: lambda own=own: repairs.greedy()(own[0], HALF, own[1]).w for rows, own in layers.items()}
  seconds = timing.take_turns(ways, rounds, clock=time.process_time)
  scaled = [{str(many): each[str(many)] * few / many, str(few): each[str(few)]} for each in seconds]
  return timing.claim(f'exact_obs of {INPUTS} inputs, CPU seconds a row at {many} rows over those at {few}', scaled,
                      str(many), str(few), BARS['linear'], at_least=False)


def _passes(rounds: int) -> Measurement:
  """Returns how many times longer Wanda takes for the pretrained encoder than forward passes of the same batches."""
  params = jax.tree.map(jnp.asarray, encoders.load_pretrained())
  tokens = jax.random.randint(jax.random.key(0), (SENTENCES, TOKENS), 1, 30_000)
  batches = [(each, each > 0) for each in jnp.split(tokens, 2)]
  forward, where = jax.jit(encoders.embed), sj.trees.named('attention/*/kernel', 'mlp/*/kernel')
  ways: dict[str, Any] = {
      'forward': lambda: [forward(params, *batch) for batch in batches],
      'wanda': lambda: sj.prune(encoders.embed, params, batches, sj.recipes.wanda(0.5), where=where).params}
  what = 'wanda of the pretrained encoder, CPU seconds over those of its calibration forward passes'
  seconds = timing.take_turns(ways, rounds, clock=time.process_time)
  return timing.claim(what, seconds, 'wanda', 'forward', BARS['passes'], at_least=False)
