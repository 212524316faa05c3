"""What the library's processors make of prompts and pictures, for tiny random checkpoints.

The processor classes of most families need torchvision for their videos; tokenizer and image
processor do not, and give the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText

from tprl_env.lvlm import load_lvlm
from tprl_env.lvlm.tiny.families import save_random

SIZES = ((40, 70), (28, 28), (90, 33))
QUESTIONS = ("what color is the 7 ?", "yes or no")
GROUPS = ([0], [1, 2])
PAD = 3


class Checkpoint:
    """A family's checkpoint: the library's model, and inputs for it."""

    def __init__(self, name: str, folder: Path) -> None:
        save_random(name, folder)
        self.name, self.folder = name, folder
        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
        self.lvlm: Any = load_lvlm(folder)
        self.images = AutoImageProcessor.from_pretrained(folder)
        rng = np.random.default_rng(0)
        self.pictures = [rng.integers(0, 255, (*s, 3), dtype=np.uint8) for s in SIZES]
        self.visuals = self.lvlm.encode_images(self.pictures)

    def ids(self, question: str, group: list[int]) -> list[int]:
        """A prompt's ids with all placeholders."""
        visuals = [self.visuals[i] for i in group]
        prompt = self.lvlm.prompt(question, visuals)
        count = sum(len(visual.tokens) for visual in visuals)
        runs = iter([count] if prompt.placement is None else prompt.placement.runs)
        ids: list[int] = []
        for at, token in enumerate(prompt.ids):
            ids += [token] * (next(runs) if at in prompt.visual_at else 1)
        return ids

    def inputs(
        self,
        groups: tuple[list[int], ...] = GROUPS,
        questions: tuple[str, ...] = QUESTIONS,
        left: bool = True,
    ) -> dict[str, torch.Tensor]:
        """What one call of the processor gives for a batch."""
        rows = [
            self.ids(question, group) for question, group in zip(questions, groups, strict=True)
        ]
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), PAD)
        mask = torch.zeros_like(ids)
        for row, one in enumerate(rows):
            where = slice(longest - len(one), longest) if left else slice(0, len(one))
            ids[row, where], mask[row, where] = torch.tensor(one), 1
        opened = [[Image.fromarray(self.pictures[i]) for i in group] for group in groups]
        nested = opened if self.name == "smolvlm" else [one for group in opened for one in group]
        made = self.images(images=nested, return_tensors="pt")
        inputs = {"input_ids": ids, "attention_mask": mask, **made}
        inputs.pop("num_patches", None)  # InternVL's processor keeps it to itself
        if hasattr(self.model.base_model, "get_rope_index"):
            inputs["mm_token_type_ids"] = (ids == self.model.config.image_token_id).int()
        return inputs

    def positions(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, S), or (3, B, S), by the library."""
        mask = inputs["attention_mask"]
        if "mm_token_type_ids" not in inputs:
            return (mask.cumsum(1) - 1).clamp(min=0)
        found: torch.Tensor = self.model.base_model.get_rope_index(
            inputs["input_ids"], mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=inputs["image_grid_thw"], attention_mask=mask,
        )[0]  # fmt: skip
        return found

    @torch.no_grad()
    def masked_logits(
        self, inputs: dict[str, torch.Tensor], keep: list[np.ndarray]
    ) -> torch.Tensor:
        """(m, V) logits of all places that stay, where nobody sees the dropped tokens."""
        ids, stay = inputs["input_ids"], inputs["attention_mask"].bool().clone()
        stay[ids == self.model.config.image_token_id] = torch.from_numpy(np.concatenate(keep))
        size = ids.shape[1]
        mask = torch.ones(size, size, dtype=torch.bool).tril()[None, None] & stay[:, None, None]
        mask = mask | torch.eye(size, dtype=torch.bool)
        rest = {n: v for n, v in inputs.items() if n != "attention_mask"}
        logits = self.model(**rest, attention_mask=mask, position_ids=self.positions(inputs)).logits
        return logits[stay]

    @torch.no_grad()
    def logits(self, inputs: Any) -> torch.Tensor:
        """(m, V) logits of all places that are no padding."""
        return self.model(**inputs).logits[inputs["attention_mask"].bool()]

    def write(self, inputs: Any, new: int = 8, **how: Any) -> torch.Tensor:
        """(B, new) generated ids."""
        fixed = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, **how}
        return self.model.generate(**inputs, **fixed)[:, inputs["input_ids"].shape[1] :]
