"""Tests that the documentation can start each recipe whose training it draws; drawing all of them takes minutes."""

import importlib
import pathlib

import jax
import pytest

import sparsejax as sj

pytestmark = pytest.mark.usefixtures('standard_promotion')
DOCS = pathlib.Path(sj.__file__).parents[1] / 'docs'


@pytest.mark.parametrize('name', sj.recipes.TABLE)
def test_a_recipe_starts_on_the_network_of_its_picture(name, monkeypatch):
  monkeypatch.syspath_prepend(DOCS)
  params, loss, tx = importlib.import_module('recipe_pictures').training(name)
  state = jax.eval_shape(tx.init, params)
  jax.eval_shape(lambda params, state: tx.update(jax.grad(loss)(params), state, params), params, state)
