"""Keeps the models of several tasks in one set of weights: a mask for each task, and no task changes another's weights.

    bank = continual.Bank(params)                                  # no task yet
    for task in tasks:
      tx = sj.recipes.cl_dst(optax.adam(1e-3), 0.8, bank=bank, total_steps=1_000, key=key)
      state = tx.init(bank.params)
      params = sj.project(bank.params, state)
      ...                                                          # the usual loop, over the data of the task
      bank = bank.added(params, state)
    bank.task(0)                                                   # parameters of the first task, bit for bit
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import arguments, counts, errors, ranking, scores, states, trees
from sparsejax.arguments import checked
from sparsejax.types import Array, Predicate, PyTree, Signals

__all__ = ['Bank', 'separate']


class Bank(NamedTuple):
  """A `Bank` holds the weights of all tasks, and what belongs to each task alone.

  `params`: dense parameters, from which the next task begins. `masks`: for each task a tree of masks, as `sj.masks`
  gives it. `own`: for each task a tree of the leaves without a mask, such as biases, and placeholders elsewhere. A
  bank is a pytree, so that every tool that saves arrays saves it.
  """

  params: PyTree
  masks: tuple[PyTree, ...] = ()
  own: tuple[PyTree, ...] = ()

  def used(self) -> PyTree:
    """Returns which weights belong to a task, a tree like the parameters, with scalars for leaves without a mask."""
    none = jax.tree.map(lambda _: jnp.zeros((), bool), self.params)
    belongs = lambda *each: sum((m for m in each if m.ndim), jnp.zeros((), bool))
    return jax.tree.map(belongs, none, *self.masks)

  def task(self, number: int) -> PyTree:
    """Returns the parameters of a task, with zeros where its mask prunes. Raises `ValueError` for a task unknown."""
    if not 0 <= number < len(self.masks):
      raise ValueError(f'continual.Bank: there is no task {number} among {len(self.masks)}.')
    structure: Any = jax.tree.structure(self.params)
    rows = zip(jax.tree.leaves(self.params), structure.flatten_up_to(self.masks[number]),
               structure.flatten_up_to(self.own[number]))
    return structure.unflatten([jnp.where(mask, w, jnp.zeros((), w.dtype)) if trees.is_dense(own) else own
                                for w, mask, own in rows])

  def added(self, params: PyTree, opt_state: PyTree) -> 'Bank':
    """Returns the bank with one more task, which was trained to `params` under the optimizer state.

    The weights behind the zeros are those of the state's master, or else those of the bank. Raises `ValueError` if a
    weight of an earlier task has changed, which `recipes.cl_dst(bank=...)` prevents, and for parameters of another
    model.
    """
    given, here = ({path: w.shape for path, w in zip(*trees.flatten(tree)[:2])} for tree in (params, self.params))
    if others := [path for path in given | here if given.get(path) != here.get(path)]:
      raise ValueError(f'continual.Bank: {errors.some(others)}: shape {given.get(others[0])}, and the bank has '
                       f'{here.get(others[0])}. Train from bank.params.')
    masks = states.masks(params, opt_state)
    masters = {path: w for state in states.find(opt_state) for path, w in states.by_path(state.master).items()}
    paths, held, structure = trees.flatten(params)
    rows = zip(paths, held, *(structure.flatten_up_to(tree) for tree in (masks, self.params, self.used())))
    new = []
    for path, w, mask, old, used in rows:
      value = masters.get(path, jnp.where(mask, w, old)).astype(old.dtype)
      changed = used & mask & (w != old) if mask.ndim else jnp.zeros((), bool)
      if arguments.is_known(changed) and bool(jnp.any(changed)):
        raise errors.at_leaf('continual.Bank', path, w.shape, f'{int(jnp.sum(changed))} weights of earlier tasks have '
                             'changed. Train with recipes.cl_dst(bank=...), from bank.params.')
      new.append(jnp.where(used, old, value) if mask.ndim else old)
    own = [trees.DENSE if mask.ndim else w for w, mask in zip(held, structure.flatten_up_to(masks))]
    return Bank(structure.unflatten(new), (*self.masks, masks), (*self.own, structure.unflatten(own)))


@checked
def separate(bank: Bank, sparsity: float, key: Array, *, where: Predicate | PyTree = trees.matrices) -> PyTree:
  """Returns random masks for the next task among the weights that belong to no task: tasks that share nothing.

  Each leaf of `where` keeps `1 - sparsity` of all of its weights, exactly; other leaves have a scalar `True`. The masks
  are for `recipes.fixed`. Raises `ValueError` if a leaf has fewer free weights, so that the masks cannot be disjoint.
  """
  paths, leaves, structure = trees.flatten(bank.params)
  picked, used = trees.select('continual.separate', where, bank.params), structure.flatten_up_to(bank.used())
  masks = []
  for number, (path, w, pick, taken) in enumerate(zip(paths, leaves, picked, used)):
    keep = counts.kept_of(sparsity, w.size) if pick else 0
    free = w.size - int(np.sum(np.broadcast_to(np.asarray(taken), w.shape)))
    if pick and free < keep:
      raise errors.at_leaf('continual.separate', path, w.shape, f'{keep} weights are asked for task {len(bank.masks)}, '
                           f'and {free} belong to no task. Raise `sparsity`, or let tasks share: recipes.cl_dst.')
    drawn = scores.random(w, Signals(key=jax.random.fold_in(key, number)))
    masks.append(ranking.top_n(jnp.where(taken, -1.0, drawn), keep) if pick else jnp.ones((), bool))
  return structure.unflatten(masks)
