"""Contains the parts of the training loop: sharding, checkpoints, measurements, stop requests and several hosts."""
