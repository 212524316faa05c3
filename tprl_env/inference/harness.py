"""Pruned LVLMs for lmms-eval, which finds this module by its entry point ``lmms_eval.models``.

    lmms-eval --model tprl_env --model_args lvlm=builtin:crowded,reducer=divprune,budget=14 ...

Only lmms-eval imports it; its package is the extra ``harness``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from loguru import logger

from tprl_env.env.budgets import check_budget
from tprl_env.inference.pruned_lvlm import PrunedLVLM
from tprl_env.lvlm import load_lvlm
from tprl_env.policy.autoencoder import TokenAutoencoder
from tprl_env.policy.pruner import PolicyPruner
from tprl_env.reducers import make_reducer
from tprl_env.reducers.interfaces import Reducer

__all__ = ["HarnessLVLM", "manifest"]

_PLACEHOLDER = "<image>"
_GREEDY = {"do_sample": (False,), "num_beams": (1,), "temperature": (0, None)}
"""Values of generation settings that mean greedy decoding; no others have an effect then."""


def manifest() -> ModelManifest:
    """What lmms-eval asks of an entry point: a name and the class behind it."""
    return ModelManifest("tprl_env", simple_class_path=f"{__name__}.{HarnessLVLM.__name__}")


class HarnessLVLM(lmms):  # type: ignore[misc]
    """An LVLM behind a reducer, as lmms-eval runs models."""

    is_simple = True

    def __init__(
        self,
        lvlm: str,
        reducer: str | None = None,
        budget: int | float | None = None,
        policy: str | None = None,
        autoencoder: str | None = None,
        redundancy_penalty: float = 0.0,
        positions: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        device_map: str | None = None,
        revision: str | None = None,
        max_batch_size: object = None,
        **fields: Any,
    ) -> None:
        """Load an LVLM and a reducer; all arguments may come from ``--model_args``.

        Args:
            lvlm: What ``load_lvlm`` opens.
            reducer: A name for ``make_reducer``. Without it and without ``policy`` nothing is
                pruned.
            budget: Tokens to leave, or a share in (0, 1] of each picture's; of a reducer inside
                the language model the average over its layers.
            policy: Folder of a trained policy instead of ``reducer``.
            autoencoder: Folder of the autoencoder of its store.
            redundancy_penalty: See ``PolicyPruner``.
            positions: Rotary positions of what is left, as in ``PrunedLVLM``.
            batch_size: Questions per pass.
            device: Default: a GPU for each process where there are any.
            dtype: Default: bfloat16 on a GPU, float32 on the CPU.
            device_map: Several GPUs for one process, as for ``load_lvlm``.
            revision: Of a hub checkpoint.
            max_batch_size: Not used; the harness hands it on.
            **fields: Fields of the reducer, such as ``layer=2``.

        Raises:
            ValueError: The arguments do not go together, or name something that there is not.
        """
        super().__init__()
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        if device_map is not None:
            device = None  # the harness has a default device of its own
        elif self._world_size > 1 and torch.cuda.is_available():
            device = f"cuda:{self.accelerator.local_process_index}"
        elif device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            device = None
        self._batch_size = int(batch_size)
        model = load_lvlm(
            lvlm, device=device, dtype=dtype, device_map=device_map, revision=revision
        )
        chosen = _reducer(reducer, policy, autoencoder, redundancy_penalty, budget, fields)
        self._budget = 1.0 if budget is None else budget
        check_budget(self._budget)
        found = None if autoencoder is None else TokenAutoencoder.from_pretrained(autoencoder)
        self._pruned = PrunedLVLM(model, chosen, found, positions)  # type: ignore[arg-type]
        self._device = model.device
        self.tokens: list[float] = []

    @property
    def batch_size(self) -> int:
        """Questions per pass."""
        return self._batch_size

    @property
    def device(self) -> torch.device:
        """Where the LVLM runs."""
        return self._device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Greedy answers; see :class:`lmms`.

        Raises:
            ValueError: A question has no picture, or pictures between its words, or asks for
                sampling or beams.
        """
        written: dict[int, str] = {}
        for limit, numbers in self._alike(requests):
            for some in _parts(numbers, self._batch_size):
                questions, pictures = self._read([requests[i] for i in some])
                answers = self._pruned.answer_batch(pictures, questions, self._budget, limit)
                for i, answer in zip(some, answers, strict=True):
                    settings = requests[i].args[1]
                    written[i] = _until(answer.text, settings.get("until"))
                    self.tokens.append(answer.average_tokens)
        self._report()
        return [written[i] for i in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-probability of an answer with its end token, and whether it is the greedy one.

        Raises:
            ValueError: A question has no picture, or pictures between its words.
        """
        found: list[tuple[float, bool]] = []
        for some in _parts(range(len(requests)), self._batch_size):
            rows = [requests[i] for i in some]
            questions, pictures = self._read(rows)
            answers = [[self._target(one)] for one in rows]
            for score in self._pruned.score_batch(pictures, questions, answers, self._budget):
                likelihood = torch.tensor(score.likelihood, dtype=torch.float64)
                found.append((float(likelihood.log()), bool(score.exact)))
                self.tokens.append(score.average_tokens)
        self._report()
        return found

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refused.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("tprl_env answers single questions, not conversations")

    def _alike(self, requests: Sequence[Instance]) -> list[tuple[int, list[int]]]:
        """Numbers of the requests by the longest answer that they allow."""
        found: dict[int, list[int]] = {}
        for number, one in enumerate(requests):
            settings = one.args[1]
            for name, greedy in _GREEDY.items():
                if settings.get(name, greedy[0]) not in greedy and not _no_sampling(name, settings):
                    raise ValueError(
                        f"{one.task_name}: {name}={settings[name]!r} is not greedy decoding, which "
                        f"is all that tprl_env does; add --gen_kwargs {name}={greedy[0]}"
                    )
            found.setdefault(int(settings.get("max_new_tokens", 128)), []).append(number)
        return list(found.items())

    def _read(self, rows: Sequence[Instance]) -> tuple[list[str], list[Any]]:
        """Questions and pictures."""
        questions, pictures = [], []
        for row in rows:
            text, _, doc_to_visual, doc_id, task, split = row.args
            shown = list(doc_to_visual(self.task_dict[task][split][doc_id]) or ())
            question, marked = text.strip(), 0
            while question.startswith(_PLACEHOLDER):
                question, marked = question.removeprefix(_PLACEHOLDER).lstrip(), marked + 1
            between = _PLACEHOLDER in question or marked not in (0, len(shown))
            if not shown or between or isinstance(shown[0], str):
                kind = "pictures between its words" if between else "no picture"
                kind = "a video" if shown and isinstance(shown[0], str) else kind
                raise ValueError(
                    f"{task}: document {doc_id} of {split} has {kind}, and tprl_env answers "
                    f"questions with their pictures before them; take another task"
                )
            questions.append(question)
            pictures.append(shown)
        return questions, pictures

    def _report(self) -> None:
        """Say what the answers were given from: the harness has no place for it in its tables."""
        mean = sum(self.tokens) / max(1, len(self.tokens))
        logger.info(
            f"tprl_env, process {self.rank}: {mean:.1f} visual tokens per decoder layer on average "
            f"over {len(self.tokens)} answers"
        )

    def _target(self, row: Instance) -> str:
        _, target, _, doc_id, task, split = row.args
        text = target if isinstance(target, str) else target(self.task_dict[task][split][doc_id])
        return str(text).strip()


def _reducer(
    name: str | None,
    policy: str | None,
    autoencoder: str | None,
    redundancy_penalty: float,
    budget: int | float | None,
    fields: dict[str, Any],
) -> Reducer:
    """What the model's arguments ask for.

    Raises:
        ValueError: They do not go together.
    """
    if budget is None and (name or policy):
        raise ValueError("a reducer needs budget=COUNT, or a share such as budget=0.25")
    if policy is not None:
        if name is not None or autoencoder is None or fields:
            raise ValueError(
                "a policy needs autoencoder=FOLDER, and neither a reducer nor its fields"
            )
        return PolicyPruner.from_pretrained(policy, redundancy_penalty=redundancy_penalty)
    if name is not None:
        return make_reducer(name, **fields)
    unused = [*fields, *(["budget"] if budget is not None else [])]
    if unused:
        raise ValueError(
            f"without a reducer nothing is pruned; add reducer=NAME, or leave out "
            f"{', '.join(unused)}"
        )
    return make_reducer("uniform")


def _no_sampling(name: str, settings: dict[str, Any]) -> bool:
    """A temperature has no effect without sampling."""
    return name == "temperature" and settings.get("do_sample") is False


def _parts(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]


def _until(text: str, stops: str | Sequence[str] | None) -> str:
    """The text before the first of the stops."""
    for stop in [stops] if isinstance(stops, str) else stops or ():
        text = text.split(stop)[0] if stop else text
    return text
