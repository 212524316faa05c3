"""The library's sentences in the words of a shell.

The library names what its callers write, ``skip_bad=True``; on a command line the same is
``--skip-bad``. Sentences are put into the shell's words here, where they are printed.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Iterable, Sequence

from tprl_env.checks import did_you_mean

__all__ = ["ShellWords", "shell_words", "unknown_arguments"]

_PHRASES = {
    "skip_bad=True": "--skip-bad",
    "grade=True": "--grade",
    "allow_outside=True": "--allow-outside",
    "resume=False": "--restart",
    "resume=True": "--resume",
    "another out": "another --out",
}
_PASSED = re.compile(
    r"(\bpass |\bwith |(?<!\w)\()([a-z][a-z_.]*)=([^\s;)]+?)(?=[,.]?(?:\s|;|\)|$))"
)
_SUBJECT = re.compile(r"^([a-z]+(?:_[a-z]+)*) must ")


def shell_words(sentence: str, options: Iterable[str] = ()) -> str:
    """A sentence of the library as a user of the command line can act on it.

    Args:
        sentence: What went wrong and how to go on.
        options: The command's options as Python names, such as ``batch_size``.
    """
    for python, shell in _PHRASES.items():
        sentence = re.sub(rf"\b{re.escape(python)}\b", shell, sentence)
    sentence = _PASSED.sub(lambda m: f"{m[1]}--{m[2].replace('_', '-')} {m[3]}", sentence)
    subject = _SUBJECT.match(sentence)
    if subject and subject[1] in options:
        return f"--{subject[1].replace('_', '-')}{sentence[subject.end(1) :]}"
    return sentence


class ShellWords(logging.Formatter):
    """Log lines in the same words."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return shell_words(super().format(record))


def unknown_arguments(parser: argparse.ArgumentParser, rest: Sequence[str]) -> str:
    """The sentence about words that a command does not take, with the nearest option."""
    options = [text for action in parser._actions for text in action.option_strings]
    flags = [word.partition("=")[0] for word in rest if word.startswith("--")]
    near = did_you_mean(flags[0], options) if flags else ""
    return f"unknown arguments {' '.join(rest)}{near}; see `{parser.prog} --help`"
