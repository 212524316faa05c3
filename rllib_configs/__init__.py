"""Experiments as Python: each file holds ``CONFIG`` and ``build(config) -> PPOConfig``.

Complete in themselves, without inheritance, so that a file can be read, copied and diffed.
"""
