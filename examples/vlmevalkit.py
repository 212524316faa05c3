"""Pruned LVLMs in VLMEvalKit: `python vlmevalkit.py --data MME --model tprl` in a checkout of it.

The table and the command line are VLMEvalKit's own; this file adds one model to them. Which LVLM,
which reducer and how many tokens stand at the end. No published checkpoint and no copy of
VLMEvalKit can be had where this was written: it has not been run on them.
"""

from __future__ import annotations

import runpy
from functools import partial
from typing import Any

from vlmeval.vlm.base import BaseModel

from tprl_env.inference import PrunedLVLM
from tprl_env.lvlm import load_lvlm
from tprl_env.reducers import make_reducer


class PrunedModel(BaseModel):
    """An LVLM behind a reducer."""

    INTERLEAVE = False

    def __init__(self, lvlm: str, reducer: str, budget: float, **fields: Any) -> None:
        """Load both; fields are the reducer's."""
        self.pruned = PrunedLVLM(load_lvlm(lvlm), make_reducer(reducer, **fields))
        self.budget = budget

    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        """Answer a question about the pictures before it."""
        kinds = [part["type"] for part in message]
        if kinds != sorted(kinds) or kinds[0] != "image":
            raise ValueError(f"{dataset}: a message of {kinds}; pictures must come first")
        pictures = [part["value"] for part in message if part["type"] == "image"]
        question = "\n".join(part["value"] for part in message if part["type"] == "text")
        return self.pruned.answer(pictures, question, self.budget, max_new_tokens=128).text


if __name__ == "__main__":
    from vlmeval.config import supported_VLM

    supported_VLM["tprl"] = partial(
        PrunedModel, lvlm="llava-hf/llava-1.5-7b-hf", reducer="divprune", budget=64
    )
    runpy.run_path("run.py", run_name="__main__")
