"""How each built-in model is trained: one frozen record per task."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Recipe:
    """Step counts and hyper-parameters of one training run.

    Attributes:
        task: Name of the scenes task.
        attend: Tower layers with attention inside a cell; empty: no patch carries its neighbours.
        tower_digits: Digits per scene in the tower stage's first 80 %.
        tower_decoys: Decoys per scene in that part.
        tower_steps: Tower stage, batches of 24 scenes.
        head_steps: CLS head in the tower's last layer, batches of 32 scenes.
        align_steps: Projector alone, batches of 24 scenes.
        language_steps: Projector and LLM, batches of 16 scenes with 10 questions each.
        pruned_steps: The same with pruned prefixes mixed in.
        short_share: Share of the language stage spent on prefixes of 12 whole cells.
        pruned_share: Share of the batches of the last stage with pruned prefixes.
        warps: Warped versions kept of every scan in stages 3b and 4; twice as many in stage 1.
    """

    task: str
    attend: tuple[int, ...] = ()
    tower_digits: tuple[int, int] = (30, 36)
    tower_decoys: tuple[int, int] = (0, 3)
    tower_steps: int = 2800
    head_steps: int = 500
    align_steps: int = 400
    language_steps: int = 2000
    pruned_steps: int = 360
    short_share: float = 0.22
    pruned_share: float = 0.6
    warps: int = 12

    def scaled(self, scale: float) -> Recipe:
        """The recipe with every step count multiplied by ``scale``, at least one step each.

        A ``scale`` below one also keeps fewer warped scans, so that smoke runs start quickly.

        Raises:
            ValueError: ``scale`` is not positive.
        """
        if not scale > 0:
            raise ValueError(f"scale must be positive, got {scale}; 1.0 is the full training")
        names = [name for name in self.__dataclass_fields__ if name.endswith("_steps")]
        steps = {name: max(1, round(scale * getattr(self, name))) for name in names}
        return replace(self, warps=max(1, round(min(1.0, scale) * self.warps)), **steps)


RECIPES = {
    "crowded": Recipe("crowded", pruned_steps=420, pruned_share=0.7),
    "sparse": Recipe(
        "sparse",
        attend=(1, 2),
        tower_digits=(22, 28),
        tower_decoys=(4, 8),
        tower_steps=1600,
        align_steps=300,
        language_steps=1900,
        pruned_steps=360,
        short_share=0.5,
    ),
}
