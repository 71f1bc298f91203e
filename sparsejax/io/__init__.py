"""Reads and writes files: safetensors that any reader can open, and Orbax checkpoints.

    io.save('model.safetensors', formats.pack(params, '2:4'))
    packed = io.load('model.safetensors')          # every byte verified; `formats.unpack` makes it dense
    params = io.read('checkpoints/')               # any safetensors file, sharded folder or Orbax checkpoint, as arrays
    tree = io.stored('model.safetensors')          # the same without values; `Stored` leaves are read one by one

`io.metadata` returns the strings that were saved with a file.
"""

from sparsejax.io.loading import load, metadata, read, stored
from sparsejax.io.saving import save
from sparsejax.io.stored import Stored

__all__ = ['Stored', 'load', 'metadata', 'read', 'save', 'stored']
