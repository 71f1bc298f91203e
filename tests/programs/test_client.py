"""Tests new clients of both interpreters, which are written outside of the library, through public names only."""

import ast
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import kernels_pallas
import sparsejax as sj
from sparsejax.programs import FactRules, ValueRules, evaluate, follow, structures, trace


def depends(apply, *args):
  """Returns, for each result, the numbers of the arguments that it depends on."""
  program = trace(apply, args)
  rules = FactRules(operation=lambda eqn, facts, here: [frozenset().union(*facts)] * len(eqn.outvars),
                    joined=lambda facts: frozenset().union(*facts), constant=frozenset())
  return program.unflatten(follow(program, [frozenset({i}) for i in program.arguments], rules))


def test_a_client_of_follow_reads_loops_and_branches():
  def apply(x, y, z):
    first, _ = lax.scan(lambda c, _: ((c[1], c[2], c[2]), None), (x, y, z), length=2)
    return first[0], lax.cond(x > 0, lambda: y, lambda: z), jax.jit(jnp.sin)(x) + 1

  a = jnp.float32(1)
  # The branch that is taken depends on x, but this client does not say so: `cond` joins what its branches give.
  assert depends(apply, a, a, a) == ({0, 1, 2}, {1, 2}, {0})


def without(primitive, apply):
  """Returns `apply` with the identity in place of an operation, wherever it stands."""
  def call(*args):
    program = trace(apply, args)
    rules = ValueRules(lambda eqn, values, here: values[:1] if eqn.primitive.name == primitive else None)
    return program.unflatten(evaluate(program, program.arrays, rules))

  return call


def test_a_client_of_evaluate_changes_an_operation_inside_of_every_structure():
  def apply(w, x):
    x = lax.scan(lambda x, w: (jnp.tanh(jax.checkpoint(lambda x: x @ w)(x)), None), x, w)[0]
    return lax.cond(x[0, 0] > 9, jnp.sin, jax.jit(jnp.tanh), x)

  w, x = jnp.full((3, 2, 2), 0.5), jnp.ones((1, 2))
  np.testing.assert_allclose(jax.jit(without('tanh', apply))(w, x), x @ w[0] @ w[1] @ w[2], rtol=1e-6)
  assert 'scan' in str(jax.make_jaxpr(without('tanh', apply))(w, x)) and sj.programs.ValueRules is ValueRules


def test_one_module_knows_the_parameters_of_jax_and_one_package_knows_its_structures():
  """Reads all sources: `jaxprs` and `sizes` read `eqn.params`; packed models have no rule for loops and branches."""
  folders = [pathlib.Path(package.__file__).parent for package in (sj, kernels_pallas)]
  clients = [folders[1] / name for name in ('models.py', 'held.py')]
  reads = lambda node: (isinstance(node, ast.Attribute) and node.attr == 'params' and
                        ast.unparse(node.value).endswith('eqn'))
  readers = {path.name for folder in folders for path in folder.rglob('*.py')
             if any(map(reads, ast.walk(ast.parse(path.read_text()))))}
  assert readers == {'jaxprs.py', 'sizes.py'}
  for path in clients:
    assert not [name for name in (*structures.KEPT, *structures.WALKED) if repr(name) in path.read_text()]
