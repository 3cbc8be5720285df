"""Checkpoints, tokenizers, and one file per architecture."""
