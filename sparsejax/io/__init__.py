"""Files: safetensors that any reader can open, and checkpoints of Orbax."""

from sparsejax.io.safetensors_files import load, metadata, read, save

__all__ = ['load', 'metadata', 'read', 'save']
