"""Configures Sphinx, which builds the pages of this folder and of `generated`, after it has written the latter."""

import os
import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
# Notebooks run in processes of their own, which import `experiments` from the checkout: no package installs it.
os.environ['PYTHONPATH'] = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get('PYTHONPATH')])])

import generator  # noqa: E402
import recipe_pictures  # noqa: E402

from sparsejax.version import __version__  # noqa: E402

project, author, copyright = 'sparsejax', 'The sparsejax authors', 'The sparsejax authors'
version = release = __version__
extensions = ['myst_nb']
exclude_patterns = ['_build', 'pictures']
html_theme, html_title = 'sphinx_book_theme', 'sparsejax'
html_static_path, html_css_files = ['_static'], ['pages.css']
html_theme_options = {'show_toc_level': 2, 'show_navbar_depth': 1, 'navbar_persistent': []}
nitpicky = True  # A reference that leads nowhere is a warning, and `make docs` makes warnings errors.
myst_heading_anchors = 4  # Links into a page are those of GitHub, so that the pages can be read there, too.
myst_enable_extensions = ['deflist']
nb_execution_mode, nb_execution_in_temp, nb_execution_timeout, nb_execution_raise_on_error = 'cache', True, 900, True
nb_execution_show_tb = True


def setup(app):
  """Writes `generated` before Sphinx looks for pages, and leads links that leave this folder to the copies in there."""
  app.connect('builder-inited', written)
  app.connect('source-read', lambda app, name, source: source.__setitem__(0, generator.inside(source[0])))


def written(app):
  """Writes the pages of the code, and draws the pictures that are older than the code."""
  generator.write(HERE / 'generated')
  recipe_pictures.draw(HERE / 'generated' / 'recipes')
