"""Draws the file of results: for each claim, how far the measured value and its spread are from the bar."""

import pathlib

from benchmarks.results import Section
from sparsejax import plot


def draw(section: Section, path: pathlib.Path) -> None:
  """Draws the claims of a section as a PNG: the measured value divided by the bar, on a logarithmic axis.

  A round mark has to be right of 1, a square mark left of 1. Marks of claims that do not hold are red.
  """
  claims = section.claims
  with plot.saved(path, figsize=(11, 1 + 0.28 * len(claims))) as axes:
    axis = axes[0, 0]
    plot.intervals(
        [claim.what for claim in claims], [claim.measured / claim.bar for claim in claims],
        [(claim.spread[0] / claim.bar, claim.spread[1] / claim.bar) for claim in claims], axis,
        colours=['tab:blue' if claim.holds else 'tab:red' for claim in claims],
        marks=['o' if claim.at_least else 's' for claim in claims])
    axis.axvline(1, color='black', linewidth=1)
    axis.set_xscale('log')
    axis.tick_params('y', labelsize=7)
    axis.set_title(section.hardware, fontsize=9)
    axis.set_xlabel(f'measured / bar, {section.spread}; round is to be right of 1, square left', fontsize=9)
    for set_format in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
      set_format('{x:g}')
