"""Checkpoints: what is supported, prompts, the vision tower."""
