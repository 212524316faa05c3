"""A frozen language model that scores and answers from a part of its visual tokens.

Families bring the text model, its output embedding and its end tokens; everything behind the
visual tokens is here.

Shapes: B rows, R sequences (one per row and distinct answer), n visual tokens of one image,
D token width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tprl_env.checks import NotFiniteError
from tprl_env.lvlm.execution.attention import IMPLEMENTATION
from tprl_env.lvlm.execution.decoder import NOT_FINITE, greedy, judge, states_at
from tprl_env.lvlm.execution.layerwise import (
    Cuts,
    NoCuts,
    Replay,
    Stream,
    greedy_with_cuts,
    run_with_cuts,
    states_with_cuts,
)
from tprl_env.lvlm.execution.reduction import Reduction
from tprl_env.lvlm.execution.selection import Selection
from tprl_env.lvlm.execution.sequence import (
    Layout,
    check_context,
    check_rows,
    deep_levels,
    embed,
    layout,
    on_device,
)
from tprl_env.lvlm.execution.shared_prefix import shared_prefix
from tprl_env.lvlm.protocol import LVLMScores, Prompt
from tprl_env.reducers.layer_pruner import (
    Choice,
    LayerPruner,
    LayerView,
    RankingLayerPruner,
    Stage,
    Wants,
)


class LanguageModel:
    """Teacher forcing and greedy decoding, with and without cuts between layers.

    Attributes:
        text: The decoder: ``layers``, ``norm``, ``rotary_emb``, ``embed_tokens``.
        eos_ids: Any of them ends an answer.
        max_positions: Places of its context.
        num_layers: Decoder layers L.
        levels: DeepStack levels: visual tokens bring as many additions to later states.
        placed: Prompts must say where their visual tokens stand.
    """

    def __init__(
        self,
        text: Any,
        head: nn.Module,
        eos_ids: Sequence[int],
        max_positions: int,
        levels: int = 0,
        placed: bool = False,
    ) -> None:
        """Take a frozen model; attention goes through the probe's wrapper from here on."""
        text.set_attn_implementation(IMPLEMENTATION)
        self.text, self._output = text, head
        self.eos_ids = tuple(eos_ids)
        self.max_positions, self.levels, self.placed = max_positions, levels, placed
        self.num_layers = len(text.layers)

    @property
    def head(self) -> Tensor:
        """(V, D) output embedding, the model's own; see ``decoder.logits``."""
        weight: Any = self._output.weight
        found: Tensor = weight
        return found

    @property
    def device(self) -> torch.device:
        """Where sequences are put together; layers may be on other GPUs."""
        device: torch.device = self.text.embed_tokens.weight.device
        return device

    def visual(self, tokens: Sequence[Any]) -> list[Tensor]:
        """Visual tokens on the device, in the model's type."""
        weight = self.text.norm.weight
        width = weight.shape[-1] * (1 + self.levels)
        return on_device(tokens, self.device, weight.dtype, width)

    def score(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[Sequence[Sequence[int]]],
        tokens: Sequence[Any],
        selection: Selection,
    ) -> LVLMScores:
        """See ``LVLM.score``."""
        self._check(prompts, tokens, selection, answers)
        if not prompts:
            return LVLMScores(np.zeros(0, np.float32), np.zeros(0, np.float32))
        distinct = [list(dict.fromkeys(self._one_end(a) for a in row)) for row in answers]
        owner = [b for b, row in enumerate(distinct) for _ in row]
        targets = [answer for row in distinct for answer in row]
        visual = self.visual(tokens)
        plan = self._layout(prompts, [t[:-1] for t in targets], visual, selection, owner)
        check_context(plan, self.max_positions, owner=owner)
        cuts = self._cuts(prompts, visual, selection, owner)
        wrong, log_likelihood = self._teacher_force(plan, [visual[b] for b in owner], targets, cuts)
        if not np.isfinite(log_likelihood).all():
            rows = {owner[i] for i in np.flatnonzero(~np.isfinite(log_likelihood))}
            raise NotFiniteError(NOT_FINITE, sorted(rows))
        exact = np.zeros(len(prompts), np.float32)
        np.maximum.at(exact, owner, (wrong == 0).astype(np.float32))
        likelihood = np.zeros(len(prompts), np.float64)
        np.add.at(likelihood, owner, np.exp(log_likelihood))
        clipped = np.minimum(likelihood, 1.0).astype(np.float32)
        lives = cuts.lives if isinstance(cuts, Reduction) else None
        return LVLMScores(exact, clipped, len(targets), plan.padded_tokens, lives)

    def answer_loss(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[Sequence[int]],
        tokens: Sequence[Any],
        selection: Selection,
    ) -> Tensor:
        """See ``FrozenLVLM.answer_loss``."""
        self._check(prompts, tokens, selection, [[answer] for answer in answers])
        owner = list(range(len(prompts)))
        targets = [self._one_end(answer) for answer in answers]
        visual = self.visual(tokens)
        plan = self._layout(prompts, [t[:-1] for t in targets], visual, selection, owner)
        check_context(plan, self.max_positions, owner=owner)
        cuts = self._cuts(prompts, visual, selection, owner)
        _, log_p = self._judged(plan, visual, targets, cuts)
        return -log_p.mean()

    def generate_ids(
        self,
        prompts: Sequence[Prompt],
        tokens: Sequence[Any],
        max_new_tokens: int,
        selection: Selection,
    ) -> list[list[int]]:
        """Greedy answers as ids without the end token; see ``LVLM.generate``."""
        self._check(prompts, tokens, selection)
        if not prompts:
            return []
        visual = self.visual(tokens)
        rows = range(len(prompts))
        cuts = self._cuts(prompts, visual, selection, list(rows))
        none = [()] * len(prompts)
        plan = self._layout(prompts, none, visual, selection, rows, left=cuts is None)
        check_context(plan, self.max_positions, max_new_tokens)
        ends = frozenset(self.eos_ids)
        if cuts is not None:
            stream = self.stream(plan, visual)
            return greedy_with_cuts(self.text, self.head, stream, cuts, ends, max_new_tokens)
        return greedy(
            self.text,
            self.head,
            embed(plan, visual, self.text.embed_tokens),
            torch.from_numpy(plan.positions).to(self.device),
            torch.from_numpy(plan.valid()).to(self.device),
            ends,
            max_new_tokens,
        )

    def reduce(
        self, prompts: Sequence[Prompt], tokens: Sequence[Any], selection: Selection
    ) -> list[npt.NDArray[np.uint8]]:
        """See ``LVLM.reduce``."""
        self._check(prompts, tokens, selection)
        if not prompts:
            return []
        visual = self.visual(tokens)
        rows = list(range(len(prompts)))
        cuts = self._cuts(prompts, visual, selection, rows)
        if not isinstance(cuts, Reduction):
            raise ValueError("reduce needs a reducer, got none")
        plan = self._layout(prompts, [()] * len(prompts), visual, selection, rows)
        check_context(plan, self.max_positions)
        run_with_cuts(self.text, self.stream(plan, visual), cuts, max(cuts.layers, default=0))
        return cuts.lives

    def saliency(
        self, prompts: Sequence[Prompt], tokens: Sequence[Any], rule: RankingLayerPruner
    ) -> list[npt.NDArray[np.float32]]:
        """See ``LVLM.saliency``."""
        recorder = _Recorder(rule)
        self.reduce(prompts, tokens, Selection(reducer=recorder))
        rows = [np.zeros(len(one), np.float32) for one in tokens]
        for row, places, values in zip(rows, recorder.places, recorder.values, strict=True):
            row[places] = values
        return rows

    def _check(
        self,
        prompts: Sequence[Prompt],
        tokens: Sequence[Any],
        selection: Selection,
        answers: Any = None,
    ) -> None:
        """Refuse arguments that do not fit together."""
        check_rows(prompts, tokens, selection.keep, answers, self.placed)
        for name in ("lives", "places", "sizes"):
            value = getattr(selection, name)
            if value is not None and len(value) != len(prompts):
                raise ValueError(
                    f"{name} has {len(value)} rows, expected {len(prompts)} as prompts"
                )
        selection.check([len(one) for one in tokens], self.num_layers)

    def _one_end(self, answer: Sequence[int]) -> tuple[int, ...]:
        """The answer with the first of its possible end tokens: any of them means the same."""
        ends = answer[-1] in self.eos_ids
        return (*answer[:-1], self.eos_ids[0]) if ends else tuple(answer)

    def _layout(
        self,
        prompts: Sequence[Prompt],
        suffixes: Sequence[Sequence[int]],
        visual: Sequence[Tensor],
        selection: Selection,
        owner: Sequence[int],
        left: bool = False,
    ) -> Layout:
        """The sequences; ``owner`` is the row of each."""
        keep, merged = selection.masks(), selection.places
        counts = selection.full([len(one) for one in visual])
        return layout(
            [prompts[b] for b in owner],
            suffixes,
            [counts[b] for b in owner],
            [keep[b] for b in owner] if keep is not None else None,
            selection.positions,
            left,
            [np.asarray(merged[b]) for b in owner] if merged is not None else None,
        )

    def _cuts(
        self,
        prompts: Sequence[Prompt],
        visual: Sequence[Tensor],
        selection: Selection,
        owner: list[int],
    ) -> Cuts | None:
        """What happens between layers; ``None`` where nothing does."""
        contiguous = selection.positions == "contiguous"
        if selection.reducer is not None:
            droppable = [p.droppable(len(one)) for p, one in zip(prompts, visual, strict=True)]
            return Reduction(
                self.text,
                selection.reducer,
                selection.average,
                prompts,
                droppable,
                owner,
                contiguous,
            )
        if selection.lives is None:
            return self._uncut(prompts)
        lives = torch.from_numpy(selection.padded_lives()[owner]).to(self.device)
        replay = Replay(lives, self.num_layers, contiguous)
        return replay if replay.layers else self._uncut(prompts)

    def _uncut(self, prompts: Sequence[Prompt]) -> Cuts | None:
        """Layer by layer where the library's own forward does not take what a prompt brings."""
        axes = [1 if p.placement is None else len(p.placement.offsets) for p in prompts]
        return NoCuts() if self.levels or max(axes) > 1 else None

    def stream(self, plan: Layout, visual: Sequence[Tensor], share: bool = True) -> Stream:
        """What enters layer 0; with ``share``, sequences that begin alike are known to do so."""
        prefixes, lengths = [], []
        for ids, kept, image, one in zip(plan.ids, plan.kept, plan.image(), visual, strict=True):
            length = int(np.flatnonzero(image >= 0)[-1]) + 1 if len(kept) else 0
            prefixes.append((id(one), kept.tobytes(), ids[:length].tobytes()))
            lengths.append(length)
        width = self.text.norm.weight.shape[-1]
        return Stream(
            embed(plan, visual, self.text.embed_tokens),
            torch.from_numpy(plan.positions).to(self.device),
            torch.from_numpy(plan.lengths).to(self.device),
            torch.from_numpy(plan.image()).to(self.device),
            deep_levels(plan, visual, width) if self.levels else (),
            shared_prefix(prefixes, lengths, self.device) if share else None,
        )

    def _teacher_force(
        self,
        plan: Layout,
        visual: Sequence[Tensor],
        targets: Sequence[tuple[int, ...]],
        cuts: Cuts | None,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Per sequence the number of answer tokens that are not the arg-max, and sum of log p."""
        hits, log_p = self._judged(plan, visual, targets, cuts)
        sizes = np.array([len(target) for target in targets])
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        wrong = np.add.reduceat((~hits).cpu().numpy().astype(np.int64), starts)
        return wrong, np.add.reduceat(log_p.cpu().numpy().astype(np.float64), starts)

    def _judged(
        self,
        plan: Layout,
        visual: Sequence[Tensor],
        targets: Sequence[tuple[int, ...]],
        cuts: Cuts | None,
    ) -> tuple[Tensor, Tensor]:
        """Of every answer token whether it is the arg-max, and its log p; see ``judge``."""
        sizes = np.array([len(target) for target in targets])
        slot = np.arange(sizes.max())
        answered = slot[None] < sizes[:, None]
        from_end = np.maximum(sizes[:, None] - slot, 1)
        if cuts is None:
            places = torch.from_numpy(plan.lengths[:, None] - from_end).to(self.device)
            positions = torch.from_numpy(plan.positions).to(self.device)
            embedded = embed(plan, visual, self.text.embed_tokens)
            states = states_at(self.text, embedded, positions, places)
        else:
            ends = torch.from_numpy(from_end).to(self.device)
            states = states_with_cuts(self.text, self.stream(plan, visual), cuts, ends)
        states = states[torch.from_numpy(answered).to(states.device)]
        wanted = torch.tensor([i for target in targets for i in target], device=self.device)
        return judge(states, self.head, wanted, torch.tensor(self.eos_ids, device=self.device))


class _Recorder(LayerPruner):
    """Drops nothing and remembers what a rule would have ranked by."""

    name = "recorder"

    def __init__(self, rule: RankingLayerPruner) -> None:
        self._rule = rule
        self.places: list[npt.NDArray[np.int64]] = []
        self.values: list[npt.NDArray[np.float32]] = []

    def stages(
        self, num_tokens: int, num_layers: int, average: float | None = None
    ) -> tuple[Stage, ...]:
        """The first stage of the rule, keeping everything."""
        return (Stage(self._rule.stages(num_tokens, num_layers)[0].layer, num_tokens),)

    def wants(self, stage: int) -> Wants:
        return self._rule.wants(stage)

    def select(self, view: LayerView) -> Choice:
        alive = view.alive.cpu().numpy()
        saliency = self._rule.saliency(view).float().cpu().numpy()
        self.values = [row[mask] for row, mask in zip(saliency, alive, strict=True)]
        places = view.places.cpu().numpy()
        self.places = [row[mask] for row, mask in zip(places, alive, strict=True)]
        return Choice(view.alive)
