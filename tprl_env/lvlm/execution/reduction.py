"""What a reducer inside the language model sees, and doing what it chooses.

Shapes: R sequences (one per sample and distinct answer), B samples, S places, M visual tokens
still alive (the most of the batch), N visual tokens of the largest image, H query heads, Q rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tprl_env.lvlm.execution.attention import Probe
from tprl_env.lvlm.execution.decoder import angles, device_of, project, rows_at, turned
from tprl_env.lvlm.execution.layerwise import Stream
from tprl_env.lvlm.execution.shared_prefix import SharedPrefix
from tprl_env.lvlm.protocol import Prompt
from tprl_env.reducers.layer_pruner import Choice, LayerPruner, LayerView, Stage, Wants


def attention_rows(query: Tensor, key: Tensor, places: Tensor, scaling: float) -> Tensor:
    """Softmax rows over all places that a query sees, causal, right padding.

    Args:
        query: (B, H, Q, d), turned.
        key: (B, Hkv, S, d), turned.
        places: (B, Q) place of each query.
        scaling: Of the logits.

    Returns:
        float32 (B, H, Q, S).
    """
    batch, heads, count, width = query.shape
    grouped = query.float().reshape(batch, key.shape[1], -1, width)
    logits = grouped @ key.float().transpose(-1, -2) * scaling
    later = torch.arange(key.shape[2], device=key.device) > places[..., None]
    return (
        logits.reshape(batch, heads, count, -1).masked_fill(later[:, None], -torch.inf).softmax(-1)
    )


class _RowProbe:
    """Keeps the rows of one attention module."""

    def __init__(self, module: nn.Module, first: Tensor | None, places: Tensor) -> None:
        self._module, self._first, self._places = module, first, places
        self.rows: Tensor | None = None

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, scaling: float) -> None:
        if module is not self._module:
            return
        if self._first is not None:
            first = self._first.to(query.device)
            query, key = query[first], key[first]
        # behind a shared prefix there are fewer queries than keys; both end at the same place
        places = self._places.to(query.device)
        index = places - (key.shape[2] - query.shape[2])
        index = index[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1])
        self.rows = attention_rows(query.gather(2, index), key, places, scaling)


class Reduction:
    """Runs a :class:`~tprl_env.reducers.layer_pruner.LayerPruner` in a pass over a batch.

    The sequences of one sample (its answers) share the choice that is made on the first of them.

    Attributes:
        layers: Before which tokens may leave.
        lives: uint8 (B, N), layers that each visual token enters; final when the pass is over.
    """

    def __init__(
        self,
        text: Any,
        reducer: LayerPruner,
        average: float | None,
        prompts: Sequence[Prompt],
        droppable: Sequence[npt.NDArray[np.bool_]],
        owner: Sequence[int],
        contiguous: bool,
    ) -> None:
        """Plan the stages.

        Args:
            text: The language model.
            reducer: The method.
            average: Wanted average of visual tokens per layer, see ``LayerPruner.stages``.
            prompts: B prompts.
            droppable: Per sample bool (n,), the visual tokens that the budget is about; the
                others stay, and count as text.
            owner: (R,) sample of each sequence, ascending.
            contiguous: Close up positions after every stage.

        Raises:
            ValueError: The average cannot be met, or the rows it wants cannot see the image.
        """
        self._text, self._reducer, self._contiguous = text, reducer, contiguous
        self._prompts, self._average = prompts, average
        device = text.embed_tokens.weight.device
        depth = len(text.layers)
        counts, self._sizes = [int(one.sum()) for one in droppable], [len(d) for d in droppable]
        plans = {n: reducer.stages(n, depth, average) for n in set(counts)}
        self.layers = _common_layers(plans, reducer.label)
        kept = [[stage.keep for stage in plans[n]] for n in counts]
        self._keep = torch.tensor(kept, dtype=torch.int64, device=device).view(len(counts), -1)
        self._full = torch.tensor(counts, device=device)
        starts = [owner.index(b) for b in range(len(counts))]
        alone = len(owner) == len(counts)
        self._first = None if alone else torch.tensor(starts, device=device)
        self._owner = None if alone else torch.tensor(owner, device=device)
        fixed = np.subtract(self._sizes, counts)
        runs = [len(prompt.visual_at) for prompt in prompts]
        self._shift = torch.from_numpy(fixed - runs).to(device)
        most = max(self._sizes)
        self._fixed: Tensor | None = None
        if fixed.any():
            table = np.zeros((len(counts), most), np.bool_)
            for row, one in zip(table, droppable, strict=True):
                row[: len(one)] = ~one
            self._fixed = torch.from_numpy(table[list(owner)]).to(device)
        self._lives = torch.full((len(counts), most + 1), depth, dtype=torch.uint8, device=device)
        self._memory: dict[str, Tensor] = {}
        self._probe: _RowProbe | None = None
        for stage in range(len(self.layers)):
            self._check(reducer.wants(stage), self.layers[stage])

    @property
    def lives(self) -> list[npt.NDArray[np.uint8]]:
        """Per sample (n,) uint8."""
        found = self._lives.cpu().numpy()
        return [found[b, :n].copy() for b, n in enumerate(self._sizes)]

    def _check(self, wants: Wants, layer: int) -> None:
        name = self._reducer.label
        if wants.rows and wants.source == "previous" and layer == 0:
            raise ValueError(f"{name} looks at the layer below, which layer 0 does not have")
        behind = all(p.question_span[0] >= p.behind_images for p in self._prompts)
        if wants.rows == "question" and not behind:
            raise ValueError(
                f"{name} needs the image before the question, but this checkpoint's template puts "
                "the question first"
            )
        if any(p.behind_images >= len(p.ids) for p in self._prompts):
            raise ValueError(f"{name} needs text behind the image, which a prompt here lacks")

    def _offered(self, stream: Stream) -> Stream:
        """The stream with the tokens that always stay as text."""
        if self._fixed is None:
            return stream
        stays = self._fixed.gather(1, stream.image.clamp(min=0))
        return replace(stream, image=stream.image.masked_fill(stays, -1))

    def probe(self, stream: Stream, layer: int) -> Probe | None:
        """A probe on the layer below, where the rule wants its rows."""
        stream = self._offered(stream)
        wants = self._reducer.wants(self.layers.index(layer))
        self._probe = None
        if wants.rows and wants.source == "previous":
            alive = self._of_samples((stream.image >= 0).sum(1))
            places, _ = self._text_places(wants.rows, alive)
            module = self._text.layers[layer - 1].self_attn
            self._probe = _RowProbe(module, self._first, places)
        return self._probe

    def cut(self, stream: Stream, layer: int) -> Stream:
        """Show the layer to the rule and drop what it does not keep."""
        stream = self._offered(stream)
        stage = self.layers.index(layer)
        image = self._of_samples(stream.image)
        visual = image >= 0
        alive = visual.sum(1)
        most = int(alive.max())
        # places of the visual tokens, first to last; behind them any place, which is not alive
        columns = (~visual).to(torch.int8).argsort(dim=1, stable=True)[:, :most]
        view = LayerView(
            stage=stage,
            layer=layer,
            num_layers=len(self._text.layers),
            keep=torch.minimum(self._keep[:, stage], alive),
            plan=self._keep,
            alive=torch.arange(most, device=image.device) < alive[:, None],
            places=image.gather(1, columns),
            full=self._full,
            average=self._average,
            memory=self._memory,
        )
        if not most:
            return stream
        choice = self._choose(view, stream, columns, alive)
        if choice.states is None and bool((choice.keep | ~view.alive).all()):
            return stream  # all stay, and what sequences share too
        self._record(view, choice, layer)
        stream = self._apply(stream, choice, view.alive, columns)
        return stream.repacked() if self._contiguous else stream

    def _choose(self, view: LayerView, stream: Stream, columns: Tensor, alive: Tensor) -> Choice:
        """Ask the rule; one that reads the image alone is asked once for all its questions."""
        wants = self._reducer.wants(view.stage)
        if wants.hidden or wants.text or wants.vectors or wants.source == "own":
            stream = self._sampled(stream)
        shared = stream.shared
        if shared is None or wants.rows or wants.text:
            self._look(view, stream, columns, alive)
            return self._reducer.select(view)
        leaders, group = shared.leaders, shared.group
        names = ("keep", "plan", "alive", "places", "full")
        part = replace(view, **{name: getattr(view, name)[leaders] for name in names})
        part.memory = {name: value[leaders] for name, value in view.memory.items()}
        self._look(part, stream.only(leaders), columns[leaders], alive[leaders])
        choice = self._reducer.select(part)
        view.memory.update({name: value[group] for name, value in part.memory.items()})
        states, behind = (
            None if one is None else one[group] for one in (choice.states, choice.behind)
        )
        return Choice(choice.keep[group], states, behind)

    def _sampled(self, stream: Stream) -> Stream:
        """One sequence for each sample, the first."""
        if self._first is None or self._owner is None:
            return stream
        alone, shared = stream.only(self._first), stream.shared
        if shared is None:
            return alone
        # the leader of a prefix is the first sequence of its sample
        leaders, group = self._owner[shared.leaders], shared.group[self._first]
        return replace(alone, shared=SharedPrefix(group, leaders, shared.length))

    def _of_samples(self, values: Tensor) -> Tensor:
        return values if self._first is None else values[self._first]

    def _text_places(self, rows: str, alive: Tensor) -> tuple[Tensor, Tensor]:
        """Places (B, Q) of text behind the image, and which are valid."""
        spans = [_span(prompt, rows) for prompt in self._prompts]
        longest = max(stop - start for start, stop in spans)
        limits = torch.tensor(spans, device=alive.device)
        index = limits[:, :1] + torch.arange(longest, device=alive.device)
        valid = index < limits[:, 1:]
        return torch.minimum(index, limits[:, 1:] - 1) + (alive + self._shift)[:, None], valid

    def _look(self, view: LayerView, stream: Stream, columns: Tensor, alive: Tensor) -> None:
        """Fill in what the rule wants."""
        wants = self._reducer.wants(view.stage)
        if wants.rows:
            places, view.row_valid = self._text_places(wants.rows, alive)
            rows = self._probe.rows if self._probe is not None else None
            if wants.source == "own":
                rows = self._own_rows(stream, view.layer, places)
            if rows is None:
                raise RuntimeError(f"the layer below layer {view.layer} was not seen")
            rows = rows.to(columns.device)  # of a layer on another GPU
            index = columns[:, None, None].expand(-1, rows.shape[1], rows.shape[2], -1)
            view.rows = rows.gather(3, index) * view.alive[:, None, None]
        if wants.hidden:
            view.hidden = rows_at(stream.hidden, columns).to(columns.device)
        if wants.text:
            places, view.text_valid = self._text_places("text", alive)
            view.text = rows_at(stream.hidden, places).to(columns.device)
        if wants.vectors:
            self._vectors(view, stream, columns)

    def _own_rows(self, stream: Stream, number: int, places: Tensor) -> Tensor:
        """Rows of a layer that has not run, from its own queries and keys."""
        layer = self._text.layers[number]
        attention = layer.self_attn
        device = device_of(layer)
        hidden, places = stream.hidden.to(device), places.to(device)
        found = angles(self._text, hidden, stream.positions)
        cos, sin = (one.to(device) for one in found)
        shared = stream.shared
        if shared is None:
            normed = layer.input_layernorm(hidden)
            asked = rows_at(normed, places)
            keys = turned(project(attention.k_proj, attention, normed), cos, sin)
        else:
            begin, first = shared.length, shared.leaders.to(device)
            cos, sin = (one.expand(len(hidden), -1, -1) for one in (cos, sin))
            whole, sines = cos[first, :begin], sin[first, :begin]
            prefix = layer.input_layernorm(hidden[first, :begin])
            before = turned(project(attention.k_proj, attention, prefix), whole, sines)
            normed = layer.input_layernorm(hidden[:, begin:])
            asked = rows_at(normed, places - begin)  # text behind the image, behind the prefix too
            rest = project(attention.k_proj, attention, normed)
            rest = turned(rest, cos[:, begin:], sin[:, begin:])
            keys = shared.spread(before, rest, 2)
        queries = project(attention.q_proj, attention, asked)
        queries = turned(queries, rows_at(cos, places), rows_at(sin, places))
        return attention_rows(queries, keys, places, attention.scaling)

    def _vectors(self, view: LayerView, stream: Stream, columns: Tensor) -> None:
        layer = self._text.layers[view.layer]
        attention = layer.self_attn
        cos, sin = angles(self._text, stream.hidden, stream.positions)
        normed = layer.input_layernorm(rows_at(stream.hidden, columns).to(device_of(layer)))
        view.queries = project(attention.q_proj, attention, normed).to(columns.device)
        view.keys = project(attention.k_proj, attention, normed).to(columns.device)
        view.turned_keys = turned(view.keys, rows_at(cos, columns), rows_at(sin, columns))

    def _record(self, view: LayerView, choice: Choice, layer: int) -> None:
        """Note the layer at which tokens leave; padding goes to a column of its own."""
        spare = self._lives.shape[1] - 1
        places = torch.where(view.alive, view.places, spare)
        before = self._lives.gather(1, places)
        after = torch.where(choice.keep, before, torch.full_like(before, layer))
        self._lives.scatter_(1, places, after)

    def _apply(self, stream: Stream, choice: Choice, alive: Tensor, columns: Tensor) -> Stream:
        """Drop, and write merged states, in all sequences of each sample."""
        keep, states, behind = choice.keep & alive, choice.states, choice.behind
        if self._owner is not None:
            columns, keep, alive = columns[self._owner], keep[self._owner], alive[self._owner]
            states = None if states is None else states[self._owner]
            behind = None if behind is None else behind[self._owner]
        # padding of `columns` writes to a spare column behind the last place
        spare = columns.masked_fill(~alive, stream.image.shape[1])
        text = torch.nn.functional.pad(stream.image < 0, (0, 1))
        stays = text.scatter(1, spare, keep)[:, :-1]
        if states is not None:
            hidden = stream.hidden.clone()
            row, column = torch.nonzero(keep, as_tuple=True)
            width = hidden.shape[-1]
            merged = states.reshape(-1, width).index_select(0, row * states.shape[1] + column)
            places = (row * hidden.shape[1] + columns[row, column]).to(hidden.device)
            hidden.view(-1, width).index_copy_(0, places, merged.to(hidden))
            stream = replace(stream, hidden=hidden)
        moved = None if behind is None else torch.zeros_like(text).scatter(1, spare, behind)[:, :-1]
        return stream.take(stays, moved)


def _span(prompt: Prompt, rows: str) -> tuple[int, int]:
    if rows == "question":
        return prompt.question_span
    end = len(prompt.ids)
    return (end - 1, end) if rows == "last" else (prompt.behind_images, end)


def _common_layers(plans: dict[int, tuple[Stage, ...]], name: str) -> list[int]:
    """The layers of the schedules, which must not depend on the number of tokens."""
    layers = {tuple(stage.layer for stage in plan) for plan in plans.values()}
    if len(layers) != 1:
        raise ValueError(
            f"{name} has other layers for other numbers of tokens, {sorted(layers)}; one batch "
            "needs the same"
        )
    return list(layers.pop())
