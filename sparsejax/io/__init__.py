"""Reads and writes files: safetensors that any reader can open, and Orbax checkpoints.

    io.save('model.safetensors', formats.pack(params, '2:4'))
    packed = io.load('model.safetensors')          # every byte verified; `formats.unpack` makes it dense
    params = io.read('checkpoints/')               # any safetensors file or Orbax checkpoint, as NumPy arrays

`io.metadata` returns the strings that were saved with a file.
"""

from sparsejax.io.safetensors_files import load, metadata, read, save

__all__ = ['load', 'metadata', 'read', 'save']
