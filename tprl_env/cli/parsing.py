"""Reading the words of a command line; every complaint is one sentence."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from tprl_env.checks import did_you_mean

__all__ = [
    "Parser",
    "TrainHelp",
    "at_least_one",
    "budgets",
    "counts",
    "names",
    "overrides",
    "path",
    "place",
    "resume",
]


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one sentence, like every other mistake of the user."""

    def __init__(self, **options: Any) -> None:
        # Abbreviations would take `--re` of a config field for `--resume`.
        super().__init__(**{**options, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving the process."""
        raise ValueError(f"{message}{_near_choice(message)}; see `{self.prog} --help`")


def _near_choice(message: str) -> str:
    """The choice that was meant, from argparse's own complaint about another word."""
    found = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)$", message, re.DOTALL)
    return did_you_mean(found[1], re.findall(r"[\w-]+", found[2])) if found else ""


class TrainHelp(argparse.Action):
    """The help of ``tprl train``, followed by every setting of the config that was named."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        """Print and leave."""
        from tprl_env.cli.train_help import settings_help

        settings = settings_help(getattr(namespace, "config", None))
        print(f"{parser.format_help()}\nSettings of the run, --PART.SETTING VALUE:\n\n{settings}")
        parser.exit()


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add ``--trust``."""
    parser.add_argument(
        "--trust",
        action="store_true",
        help="compare the sizes of a store's files only, not their checksums (faster to start)",
    )


def counts(text: str) -> tuple[int, ...]:
    """``"48,29"`` to ``(48, 29)``, each once."""
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"expected whole numbers separated by commas, such as 48,29,14, got {text!r}"
        ) from error


def budgets(text: str) -> tuple[int | float, ...]:
    """``"48,0.1"`` to ``(48, 0.1)``, counts and shares, each once."""
    try:
        parts = [float(part) if "." in part else int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"expected counts or shares separated by commas, such as 48,29,14 or 0.2,0.1, got "
            f"{text!r}"
        ) from error
    return tuple(dict.fromkeys(parts))


def names(text: str) -> list[str]:
    """``"random,uniform"`` to a list."""
    found = [part.strip() for part in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"expected names separated by commas, got {text!r}")
    return found


def place(text: str) -> str:
    """A path, name or URI; ``~`` is expanded, which shells leave alone in ``--out=~/x``."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"expected a path or a name, got {text!r}")
    if not text.startswith("~"):
        return text
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise argparse.ArgumentTypeError(f"there is no home folder for {text!r}")
    return expanded


def path(text: str) -> Path:
    """A path; ``~`` is expanded, nothing is not the current folder."""
    return Path(place(text))


def at_least_one(text: str) -> int:
    """A whole number that is not below one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def resume(text: str) -> str:
    """The ``auto`` of ``--resume auto``."""
    if text != "auto":
        raise argparse.ArgumentTypeError(
            f"expected nothing or auto, got {text!r}; write --resume after the config"
        )
    return text


def overrides(words: Sequence[str]) -> dict[str, str]:
    """``["--policy.width", "64", "--seed=2"]`` to a dict of strings; ``~`` is expanded.

    Raises:
        ValueError: A word is no ``--field``, or a field has no value.
    """
    fields: dict[str, str] = {}
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"expected --field value, got {word!r}")
        name, equals, value = word[2:].partition("=")
        if not equals:
            if not queue or queue[0].startswith("--"):
                raise ValueError(f"--{name} has no value; write --{name} VALUE")
            value = queue.pop(0)
        fields[name.replace("-", "_")] = os.path.expanduser(value)
    return fields
