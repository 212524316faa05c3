"""The built-in LVLM: two small, real LLaVA checkpoints trained by this package.

Importing this package is cheap; ``train`` needs torch and transformers.
"""

from __future__ import annotations

from pathlib import Path

from tprl_env.checks import check_choice
from tprl_env.data.scenes import TASKS

_WEIGHTS = Path(__file__).parent / "weights"


def builtin_path(task: str) -> Path:
    """Folder of the shipped checkpoint of a built-in task.

    Raises:
        ValueError: ``task`` is not a built-in task.
        FileNotFoundError: The weights are missing from this installation.
    """
    check_choice("task", task, TASKS)
    folder = _WEIGHTS / task
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"no weights in {folder}; train them: tprl tiny-lvlm train --task {task} --out {folder}"
        )
    return folder
