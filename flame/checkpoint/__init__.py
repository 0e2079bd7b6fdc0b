"""Checkpoints: complete or absent, loadable on any layout, exportable to Hugging Face."""

from flame.checkpoint.manager import CheckpointManager

__all__ = ["CheckpointManager"]
