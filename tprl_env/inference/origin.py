"""What a policy was trained on, and with which figures: the record in its bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from tprl_env.checks import quoted


@dataclass(frozen=True)
class Origin:
    """What a policy was trained on.

    Attributes:
        lvlm: Folder name, hub id or ``builtin:<task>`` of the LVLM.
        lvlm_fingerprint: As in the store: over its files, or ``name@commit``.
        lvlm_signature: Over its loaded weights, see ``model_signature``.
        model_type: Its family.
        dataset: Description of the samples.
        dataset_fingerprint: Hash over them.
        samples: Their number.
        budgets: Smallest and largest budget that it was trained for, counts or shares; empty
            where it was told none.
        visual_tokens: Largest number of droppable tokens of a picture in training.
        training: Content of ``training.json``.
        results: Rows of ``results.json`` about the policy and all tokens; empty where it was not
            evaluated.
        evaluated_on: The data of those rows.
    """

    lvlm: str
    lvlm_fingerprint: str
    lvlm_signature: str
    model_type: str
    dataset: str = ""
    dataset_fingerprint: str = ""
    samples: int = 0
    budgets: tuple[int | float, ...] = ()
    visual_tokens: int = 0
    training: dict[str, Any] = field(default_factory=dict)
    results: tuple[dict[str, Any], ...] = ()
    evaluated_on: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: object, where: str) -> Origin:
        """Read :meth:`as_dict` again.

        Raises:
            ValueError: Fields are missing, unknown or of another type.
        """
        known = {one.name: one for one in fields(cls)}
        if not isinstance(content, Mapping) or set(content) != set(known):
            got = sorted(content) if isinstance(content, Mapping) else quoted(content)
            raise ValueError(f"{where}: origin must have the fields {sorted(known)}, got {got}")
        values = dict(content)
        for name in ("budgets", "results"):
            if not isinstance(values[name], (list, tuple)):
                raise ValueError(
                    f"{where}: origin.{name} must be a list, got {quoted(values[name])}"
                )
            values[name] = tuple(values[name])
        for name, wanted in (("samples", int), ("visual_tokens", int), ("training", dict)):
            if not isinstance(values[name], wanted):
                raise ValueError(
                    f"{where}: origin.{name} must be {wanted.__name__}, got {quoted(values[name])}"
                )
        for name, value in values.items():
            if known[name].type == "str" and not isinstance(value, str):
                raise ValueError(f"{where}: origin.{name} must be a text, got {quoted(value)}")
        return cls(**values)
