"""The ``tprl`` command."""

from tprl_env.cli.commands import main

__all__ = ["main"]
