"""Checkpoints from and for other code: import, export, merged adapters, model cards."""
