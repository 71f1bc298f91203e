"""Compares losses and scores with NumPy, with weights, with padding and at the edges of the range."""

import jax
import numpy as np
import pytest

from experiments.loop import tasks

pytestmark = pytest.mark.usefixtures('standard_promotion')


@pytest.mark.parametrize('shape', [(7,), (2, 5)])
def test_classification_against_numpy(shape):
  rng = np.random.default_rng(3)
  logits, labels = rng.normal(size=(*shape, 4)).astype(np.float32), rng.integers(0, 4, shape).astype(np.int32)
  picked = np.take_along_axis(logits, labels[..., None], -1)[..., 0]
  each = np.log(np.exp(logits).sum(-1)) - picked
  agree('classification', logits, labels, each, (logits.argmax(-1) == labels).astype(np.float32))


def test_super_resolution_against_numpy():
  rng = np.random.default_rng(3)
  images, targets = rng.normal(0.5, 0.5, (7, 4, 6, 2)).astype(np.float32), rng.random((7, 4, 6, 2), np.float32)
  squared = ((np.clip(images, 0, 1) - targets)**2).mean((1, 2, 3))
  agree('super_resolution', images, targets, np.abs(images - targets).mean((1, 2, 3)), 10 * np.log10(1 / squared))


def agree(name, outputs, labels, losses, scores):
  """Asserts that the loss and the score of `outputs` are the means of `losses` and `scores`, weighted or not."""
  task = tasks.named(name)
  weight = np.random.default_rng(4).integers(0, 3, losses.shape).astype(np.float32)
  for function, values in ((task.loss, losses), (task.score, scores)):
    np.testing.assert_allclose(function(outputs, labels, None), values.mean(), rtol=1e-5)
    np.testing.assert_allclose(function(outputs, labels, weight), np.average(values, weights=weight), rtol=1e-5)
    assert function(outputs, labels, np.zeros_like(weight)) == 0
    of_examples = weight.reshape(len(labels), -1)[:, 0]  # The weight of an example is that of each of its labels.
    spread = np.broadcast_to(of_examples.reshape([-1] + [1] * (values.ndim - 1)), values.shape)
    np.testing.assert_allclose(function(outputs, labels, of_examples), np.average(values, weights=spread), rtol=1e-5)


def test_a_perfect_image_has_a_finite_psnr():
  image = np.full((1, 2, 2, 1), 0.5, np.float32)
  assert tasks.psnr(image, image) == pytest.approx(100)
  assert tasks.psnr(image, image + 0.1) == pytest.approx(20, rel=1e-4)


@pytest.mark.parametrize('name, outputs, labels', [
    ('classification', np.ones((4, 3), np.float32), np.zeros(4, np.int32)),
    ('super_resolution', np.ones((4, 2, 2, 1), np.float32), np.zeros((4, 2, 2, 1), np.float32)),
])
def test_padding_has_no_gradient(name, outputs, labels):
  grads = jax.grad(tasks.named(name).loss)(outputs, labels, np.array([1, 1, 0, 0], np.float32))
  assert bool((grads[2:] == 0).all()) and bool((grads[:2] != 0).all())


def test_an_unknown_task_is_refused():
  with pytest.raises(ValueError, match="Did you mean 'super_resolution'"):
    tasks.named('superresolution')
