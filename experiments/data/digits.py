"""Builds a TFDS set of scikit-learn's handwritten digits, which are part of that package and need no download.

    builder = digits.prepared('/tmp/data')
    source = builder.as_data_source(split='train')
    source[0]['image']  # uint8[8, 8, 1], values 0 to 16
"""

import contextlib
import fcntl
import io
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds


class Digits(tfds.core.GeneratorBasedBuilder):
  """The `Digits` are 1,797 grey images of 8 x 8 pixels, values 0 to 16: 1,437 for training and 360 for test.

  The test split is every fifth image of the list that is sorted by label (stable). Both splits therefore have the same
  share of every class, and about the same share of every writer. The customary test split, the last 360 images, is
  harder and not comparable. A support vector machine (`gamma=0.001`, `C=10`) classifies 96.4 % of the customary test
  split correctly, and 99.2 % of the test split here.
  """

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First release.'}

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
        builder=self,
        description=self.__doc__,
        homepage='https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits',
        features=tfds.features.FeaturesDict({
            'image': tfds.features.Image(shape=(8, 8, 1), dtype=np.uint8, encoding_format='png'),
            'label': tfds.features.ClassLabel(num_classes=10),
        }),
        supervised_keys=('image', 'label'),
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
    del dl_manager  # The images are part of scikit-learn.
    images, labels = all_images()
    test = np.sort(np.argsort(labels, kind='stable')[::5])
    train = np.setdiff1d(np.arange(len(labels)), test)
    return {'train': self._generate_examples(images, labels, train),
            'test': self._generate_examples(images, labels, test)}

  def _generate_examples(self, images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> Iterator[tuple[int, dict]]:
    for row in map(int, rows):
      # TFDS would encode an array with TensorFlow, which is not installed, and encodes a PIL image without.
      yield row, {'image': PIL.Image.fromarray(images[row]), 'label': int(labels[row])}


def all_images() -> tuple[np.ndarray, np.ndarray]:
  """Returns all images, `uint8[1797, 8, 8]`, and their labels, `int32[1797]`, in the order of scikit-learn."""
  from sklearn import datasets  # An import at the top would cost every later start a second, and is needed once.

  digits = datasets.load_digits()
  return digits.images.astype(np.uint8), digits.target.astype(np.int32)


def every_fifth() -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Returns images `float32[N, 8, 8]` from 0 to 1, and labels, of `train` and of `test`, which is every fifth image.

  The place decides, and not the label as in the TFDS set: `experiments.structured` was measured on these splits.
  """
  images, labels = all_images()
  images, last = images.astype(np.float32) / 16, np.arange(len(labels)) % 5 == 4
  return {'train': (images[~last], labels[~last]), 'test': (images[last], labels[last])}


def prepared(root: str | os.PathLike[str]) -> Digits:
  """Returns the builder, after writing the records under `root` if any record is missing or damaged.

  Concurrent processes may call `prepared` with the same `root`. Raises `ValueError` if `root` cannot be written to.
  """
  root = pathlib.Path(root)
  if (builder := _whole(root)) is not None:
    return builder
  try:
    with _locked(root):
      return _whole(root) or _prepare(root)
  except OSError as error:
    raise ValueError(f'digits.prepared: cannot write the digits to {str(root)!r}: {error.strerror or error}; '
                     'choose another data_dir.') from error


def _whole(root: pathlib.Path) -> Digits | None:
  """Returns the builder if every record of both splits can be read, else `None`.

  The format checks the hash of each chunk, so that truncated and altered files are detected too, in 20 ms. Any
  exception means that the records are to be prepared again: a missing file, broken JSON and a wrong hash each raise the
  exception of another library.
  """
  try:
    builder = Digits(data_dir=root, file_format='array_record')
    sources = builder.as_data_source(deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    counts = {split: len(source.__getitems__(range(len(source)))) for split, source in sources.items()}
  except Exception as error:
    logging.getLogger(__name__).info('digits in %s are to be prepared: %s', root, error)
    return None
  return builder if counts == {'train': 1437, 'test': 360} else None


def _prepare(root: pathlib.Path) -> Digits:
  shutil.rmtree(root / Digits.name / str(Digits.VERSION), ignore_errors=True)
  builder = Digits(data_dir=root, file_format='array_record')
  # TFDS makes a download directory though nothing is downloaded, and shows progress bars for a tenth of a second.
  with tempfile.TemporaryDirectory() as empty, contextlib.redirect_stdout(io.StringIO()), \
      contextlib.redirect_stderr(io.StringIO()):
    builder.download_and_prepare(download_dir=empty)
  return builder


@contextlib.contextmanager
def _locked(root: pathlib.Path) -> Iterator[None]:
  root.mkdir(parents=True, exist_ok=True)
  with open(root / '.digits.lock', 'w') as file:
    fcntl.flock(file, fcntl.LOCK_EX)  # The kernel releases the lock when the process ends, even if it is killed.
    yield
