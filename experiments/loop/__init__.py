"""What a run does while it trains: data to devices, checkpoints, measurements, signals and several hosts."""
