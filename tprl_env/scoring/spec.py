"""`ScorerSpec`: how a scorer actor builds its scorer in another process.

Only names and paths travel, never weights or features: large constructor arguments live in Ray's
object store and would break the restart of an actor.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from tprl_env.checks import check_choice
from tprl_env.env.scorer import Scorer

__all__ = ["KINDS", "PoolAddress", "ScorerSpec"]

KINDS = ("lvlm", "toy", "import")


@dataclass(frozen=True)
class ScorerSpec:
    """A scorer by name; small, picklable and JSON-able.

    Attributes:
        source: Store path or ``"toy:..."``, opened by `tprl_env.data.features.store.open_source`.
        score_kind: ``"exact"``, ``"likelihood"`` or ``"graded"``.
        kind: ``"lvlm"`` (a frozen LVLM scores), ``"toy"`` (the toy source's rule), or
            ``"import"`` (``factory`` builds the scorer).
        lvlm: What `tprl_env.lvlm.load_lvlm` takes; only for ``kind="lvlm"``.
        batch_size: Rows of one forward pass; also the largest micro-batch of an actor.
        device: torch device of the LVLM, None for the best one.
        device_map: How the LVLM is spread over the actor's GPUs, None for one device.
        dtype: torch dtype name of the LVLM, None for its default.
        factory: ``"module:function"``; the function gets this spec and returns a Scorer.
        options: Free JSON values for ``factory``.
    """

    source: str
    score_kind: str = "likelihood"
    kind: str = "lvlm"
    lvlm: str = ""
    batch_size: int = 128
    device: str | None = None
    dtype: str | None = None
    factory: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    device_map: str | None = None

    def __post_init__(self) -> None:
        """Validate what can be checked without building anything."""
        check_choice("kind", self.kind, KINDS)
        if self.kind == "lvlm" and not self.lvlm:
            raise ValueError("kind='lvlm' needs lvlm='...', what load_lvlm opens")
        if self.kind == "import" and ":" not in self.factory:
            raise ValueError(f"kind='import' needs factory='module:function', got {self.factory!r}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    def build(self) -> Scorer:
        """Open the source, load the LVLM and return the raw scorer (no cache).

        Raises:
            ValueError: If the source or the factory does not fit.
        """
        if self.kind == "import":
            module, _, name = self.factory.partition(":")
            build: Callable[[ScorerSpec], Scorer] = getattr(importlib.import_module(module), name)
            return build(self)
        if self.kind == "toy":
            return self._toy()
        return self._lvlm()

    def _toy(self) -> Scorer:
        from tprl_env.data.features.store import open_source
        from tprl_env.data.features.toy import ToyScorer, ToyStore

        source = open_source(self.source)
        if not isinstance(source, ToyStore):
            raise ValueError(f"kind='toy' needs a source 'toy:...', got {self.source!r}")
        return ToyScorer(source, self.score_kind)  # type: ignore[arg-type]

    def _lvlm(self) -> Scorer:
        from tprl_env.data.features.store import FeatureStore
        from tprl_env.lvlm import load_lvlm
        from tprl_env.scoring.graded_scorer import GradedScorer
        from tprl_env.scoring.lvlm_scorer import LVLMScorer

        lvlm = load_lvlm(
            self.lvlm, device=self.device, dtype=self.dtype, device_map=self.device_map
        )
        store = FeatureStore.open(self.source, lvlm_fingerprint=lvlm.fingerprint)
        if self.score_kind == "graded":
            return GradedScorer(lvlm, store, self.batch_size)
        return LVLMScorer(lvlm, store, self.score_kind, batch_size=self.batch_size)


@dataclass(frozen=True)
class PoolAddress:
    """How another process of the same Ray job reaches a running pool; JSON-able.

    Attributes:
        names: Actor names.
        namespace: Ray namespace of the names.
        spec: The pool's `ScorerSpec` as a dict.
        limits: Keyword arguments of `ScorerPool` (caps and time limits).
    """

    names: tuple[str, ...]
    namespace: str
    spec: dict[str, Any]
    limits: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain dict for a config."""
        return asdict(self)
