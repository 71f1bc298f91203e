"""Reads and runs the programs of JAX functions: the only place of the library that looks inside of the user's function.

`trace` returns a `Program`. Facts flow through it abstractly (`follow`), values flow through it once (`evaluate`). The
structure of programs (`jit`, `scan`, `while`, `cond`, `remat`, custom derivatives, `shard_map`) is known here, once. A
client brings rules for operations, and nothing else:

    def without(primitive, apply):
      \"\"\"Returns `apply` with the identity in place of an operation, inside of loops and branches too.\"\"\"
      def call(*args):
        program = trace(apply, args)
        rules = ValueRules(lambda eqn, values, here: values[:1] if eqn.primitive.name == primitive else None)
        return program.unflatten(evaluate(program, program.arrays, rules))
      return call

    def depends(apply, *args):
      \"\"\"Returns, for each result, the numbers of the arguments that it is computed from.\"\"\"
      program = trace(apply, args)
      union = lambda facts: frozenset().union(*facts)
      rules = FactRules(lambda eqn, facts, here: [union(facts)] * len(eqn.outvars), union, constant=frozenset())
      return program.unflatten(follow(program, [frozenset({i}) for i in program.arguments], rules))

The clients of the library: `contractions` tells along which axes each parameter is contracted, `operands` and `walk`
show what each parameter is multiplied by, `replace` gives other values to intermediates. `arrangements` shows a product
as a stack of matrices, and `origins` tells which position each row comes from. `kernels_pallas.packed` runs the
products of packed parameters.
"""

from sparsejax.programs.contractions import Contractions, contractions
from sparsejax.programs.evaluate import Operation, ValueRules, Walk, evaluate
from sparsejax.programs.follow import FactRules, follow
from sparsejax.programs.operands import Site, operands, walk
from sparsejax.programs.replace import replace
from sparsejax.programs.structures import Enter, Stop
from sparsejax.programs.tracing import Program, trace

__all__ = [
  'Contractions', 'Enter', 'FactRules', 'Operation', 'Program', 'Site', 'Stop', 'ValueRules', 'Walk', 'contractions',
  'evaluate', 'follow', 'operands', 'replace', 'trace', 'walk',
]
