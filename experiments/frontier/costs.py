"""Counts what a request costs by the model of Kinetics: multiply-adds, and the bytes of the cache as multiply-adds.

    costs = Request(parameters=1e9, heads=32, kv_heads=8, d=128, prompt=1024, length=4096)
    costs.compute(), costs.memory()                          # 8.40e12 and 2.90e13 FLOPs, dense
    costs.compute(keep=512), costs.memory(keep=512)          # 8.23e12 and 4.83e12

Reference: Sadhukhan et al. 2025, arXiv 2506.05333. Parameters are not counted as read, since requests share them.
"""

from typing import NamedTuple


class Request(NamedTuple):
  """A `Request` is one answer of `length` tokens to a prompt, by a model of so many parameters, heads and channels.

  `trials` answers share the prompt. `intensity`: the FLOPs that take as long as reading a byte, `bytes_each` of them a
  number.
  """

  parameters: float
  heads: int
  kv_heads: int
  d: int
  prompt: int
  length: int
  trials: int = 1
  intensity: float = 562.5
  bytes_each: int = 2

  def pairs(self, keep: float | None = None) -> float:
    """Returns the tokens that the queries of the answer see together, at most `keep` each.

    The sum of `min(keep, prompt + t)` over t, as an integral. The authors' code adds the corner that has to be
    subtracted, and does not stop at the tokens that there are.
    """
    dense = self.prompt * self.length + self.length**2 / 2
    if keep is None or keep >= self.prompt + self.length:
      return dense
    return keep * self.length - max(keep - self.prompt, 0)**2 / 2

  def compute(self, keep: float | None = None, page: int | None = None) -> float:
    """Returns the FLOPs of an answer; with `page`, those of scoring pages of so many tokens too."""
    search = 2 * self.pairs() / page if page else 0
    return 2 * self.parameters * self.length + (4 * self.pairs(keep) + search) * self.heads * self.d

  def memory(self, keep: float | None = None, page: int | None = None) -> float:
    """Returns the FLOPs that take as long as reading keys, values and, with `page`, labels of pages.

    All trials share a dense prompt; lists are of each answer.
    """
    whole = (2 * self.prompt + self.length * self.trials) * self.length
    read = whole if keep is None else 2 * self.pairs(keep) * self.trials
    labels = whole // page // 2 if page else 0
    return self.intensity * self.bytes_each * (read + labels) * self.kv_heads * self.d
