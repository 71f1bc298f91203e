"""Uses a trained ticket for another task without training its weights: visual prompts, label maps, linear probes.

    prompt = jnp.zeros((32, 32, 1))                                        # trained; the model is not
    logits = model.apply(ticket, transfer.prompted(images, prompt))        # of the source's classes
    chosen = transfer.frequency_map(logits, labels, targets=10)            # once an epoch
    loss = cross_entropy(logits[:, chosen], labels)

    probe = optax.chain(optax.adam(1e-2), transforms.only(where=trees.named('head/*')))      # trains the head alone
"""

import jax
import jax.numpy as jnp

from sparsejax import arguments, labelled
from sparsejax.argument_kinds import ARRAY, FLAG, TIMES
from sparsejax.arguments import checked
from sparsejax.types import Array

__all__ = ['frequency_map', 'prompted']

arguments.declare('frequency_map', logits=ARRAY, labels=ARRAY, targets=TIMES)
arguments.declare('prompted', x=ARRAY, prompt=ARRAY, squashed=FLAG)


@checked
def frequency_map(logits: Array, labels: Array, targets: int) -> Array:
  """Returns a source class for each of `targets` classes, `int32[targets]`, no class twice (Chen et al. 2023, ILM).

  `logits`: of the source's classes, `[n, sources]`. `labels`: the target's classes, `int[n]`. Greedy: of all
  pairs, the pair that most examples vote for is taken first. An example of target t that the model takes for source
  class s votes for (s, t). Ties go to the lower source class, then to the lower target, as in the code of Reprogram_LT.
  Targets without votes get the lowest free classes. A NaN wins its `argmax`. Raises `ValueError` for fewer source
  classes than targets.
  """
  if logits.ndim != 2 or labels.shape != logits.shape[:1] or logits.shape[1] < targets:
    raise ValueError(f'transfer.frequency_map: logits of shape {logits.shape} and labels of shape {labels.shape} for '
                     f'{targets} targets; give [n, sources] and [n], with at least as many source classes as targets.')
  labelled.refuse_labels('transfer.frequency_map', labels, targets)
  votes = jnp.zeros((logits.shape[1], targets), jnp.int32).at[jnp.argmax(logits, 1), labels].add(1)

  def match(_: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
    votes, chosen = carry
    source, target = jnp.unravel_index(jnp.argmax(votes), votes.shape)
    votes = votes.at[source].set(-1).at[:, target].set(-1)
    return votes, chosen.at[target].set(source.astype(jnp.int32))

  return jax.lax.fori_loop(0, targets, match, (votes, jnp.zeros(targets, jnp.int32)))[1]


@checked
def prompted(x: Array, prompt: Array, squashed: bool = True) -> Array:
  """Returns images inside of a trained border, `[batch, H, W, C]` of `x` `[batch, h, w, C]` and `prompt` `[H, W, C]`.

  The image is in the middle, an odd rest being on the left and on top. The border is `sigmoid(prompt)`, which begins at
  one half, or with `squashed=False` the prompt itself (Bahng et al. 2022). The prompt gets no gradient under the image.
  Normalise the result as the source was. Raises `ValueError` for a prompt without a border.
  """
  inner, outer = x.shape[1:3], prompt.shape
  if x.ndim != 4 or len(outer) != 3 or outer[2] != x.shape[3] or outer[:2] == inner or any(
      big < small for big, small in zip(outer, inner)):
    raise ValueError(f'transfer.prompted: images of shape {x.shape} in a prompt of shape {outer}; give [batch, h, w, '
                     'C] and a larger [H, W, C].')
  room = [((big - small + 1) // 2, (big - small) // 2) for big, small in zip(outer, inner)]
  inside = jnp.pad(jnp.ones((*inner, 1), bool), (*room, (0, 0)))
  border = (jax.nn.sigmoid(prompt) if squashed else prompt).astype(x.dtype)
  return jnp.pad(x, ((0, 0), *room, (0, 0))) + jnp.where(inside, jnp.zeros((), x.dtype), border)[None]
