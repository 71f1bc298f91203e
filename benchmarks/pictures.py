"""Draws the file of results: for each claim, how far the measured value and its spread are from the bar."""

import pathlib

from matplotlib.figure import Figure

from benchmarks.results import Section


def draw(section: Section, path: pathlib.Path) -> None:
  """Draws the claims of a section as a PNG: the measured value divided by the bar, on a logarithmic axis.

  A round mark has to be right of 1, a square mark left of 1. Marks of claims that do not hold are red.
  """
  claims = section.claims
  figure = Figure(figsize=(11, 1 + 0.28 * len(claims)), layout='constrained')
  axes = figure.add_subplot()
  for row, claim in enumerate(claims):
    color = 'tab:blue' if claim.holds else 'tab:red'
    axes.plot([end / claim.bar for end in claim.spread], [row, row], color=color, linewidth=2)
    axes.plot(claim.measured / claim.bar, row, 'o' if claim.at_least else 's', color=color)
  axes.axvline(1, color='black', linewidth=1)
  axes.set(xscale='log', ylim=(len(claims) - 0.5, -0.5))
  figure.suptitle(section.hardware, fontsize=10)
  figure.supxlabel(f'measured / bar, {section.spread}; round is to be right of 1, square left', fontsize=9)
  for set_format in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
    set_format('{x:g}')
  axes.set_yticks(range(len(claims)), [claim.what for claim in claims], fontsize=7)
  figure.savefig(path, dpi=120)
