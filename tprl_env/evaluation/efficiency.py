"""What a reducer saves: memory of keys and values, operations, and time part by part.

One picture and a prompt of random words: time and memory do not depend on what they say. The
attention of all rows is the same kernel, nothing is attended eagerly, and a reducer's own time is
always counted.

Shapes: n visual tokens of the picture, L decoder layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tprl_env.data.features.placement import Placement, raster
from tprl_env.evaluation.reducer_flops import counted_flops
from tprl_env.lvlm import flops
from tprl_env.lvlm.flops import LANGUAGE_MODELS, TOWERS, LanguageSizes, ModelSizes, TowerSizes
from tprl_env.lvlm.protocol import Prompt
from tprl_env.lvlm.stored import beside_fixed
from tprl_env.reducers.interfaces import Merger, PruneInputs, Pruner, Reducer
from tprl_env.reducers.layer_pruner import LayerPruner

CONVENTIONS = (
    flops.COUNTED,
    flops.COUNTED_VISUAL,
    flops.THREE_MATRIX_MACS,
    flops.TWO_MATRIX_MACS,
    flops.TWICE_THREE_MATRIX,
    flops.PER_PARAMETER,
)
_QUESTION = 12
"""Words at the end of the prompt that a question-aware reducer takes for the question."""


@dataclass(frozen=True)
class Protocol:
    """How often and how long things run.

    Attributes:
        text_tokens: Tokens of the prompt beside the visual ones.
        batch: Prompts per pass, all about the same picture.
        new_tokens: Tokens that are decoded behind the first.
        warmup: Runs before the clock starts.
        samples: Runs that are timed.
    """

    text_tokens: int = 107
    batch: int = 1
    new_tokens: int = 16
    warmup: int = 10
    samples: int = 100

    def __post_init__(self) -> None:
        """Refuse what cannot be run.

        Raises:
            ValueError: A number is too small.
        """
        least = {"text_tokens": _QUESTION + 4, "batch": 1, "new_tokens": 1, "samples": 1}
        for name, low in {**least, "warmup": 0}.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")


class Bench:
    """An LVLM and a picture, on which reducers are timed."""

    def __init__(self, lvlm: Any, picture: Any, protocol: Protocol) -> None:
        """Encode the picture and make the prompt."""
        self.lvlm, self.protocol, self._picture = lvlm, protocol, picture
        (self.visual,) = lvlm.encode_images([picture])
        self.prompt = random_prompt(lvlm, self.visual, protocol.text_tokens)
        shown = self.prompt.droppable(len(self.visual.tokens))
        self._shown = shown
        self.count = int(shown.sum())
        self.fixed = len(shown) - self.count

    def check(self, reducer: Reducer | None, budget: int) -> None:
        """Refuse what :meth:`measure` would, before anything is timed.

        Raises:
            ValueError: As there.
        """
        self._reduction(reducer, budget)()

    def measure(self, label: str, reducer: Reducer | None, budget: int) -> dict[str, Any]:
        """One row: a reducer at a budget, or the whole model where there is none.

        Raises:
            ValueError: The reducer cannot have the budget, or looks at what there is not.
        """
        reduce = self._reduction(reducer, budget)
        given, lengths = reduce()
        batch = self.protocol.batch
        prompts = [self.prompt] * batch
        tokens = given.pop("tokens")

        def write(count: int) -> Any:
            spread = {
                name: [value] * batch if name in ("places", "sizes", "lives") else value
                for name, value in given.items()
            }
            keep = spread.pop("keep", None)
            return self.lvlm.generate_ids(
                prompts, [tokens] * batch, keep and keep * batch, count, **spread
            )

        tower = self.lvlm.tower_pass(self._picture)
        parts: dict[str, Callable[[], Any]] = {"tower": tower, "prefill": lambda: write(1)}
        inside = isinstance(reducer, LayerPruner)
        if reducer is not None and not inside:
            parts["reducer"] = reduce
        timed = {name: self._timed(call) for name, call in parts.items()}
        if isinstance(reducer, LayerPruner):
            timed["reducer"] = self._inside(reducer, budget, timed["prefill"])
        more = self.protocol.new_tokens
        timed["decode_per_token"] = self._decoding(write, more, timed["prefill"])
        row: dict[str, Any] = {
            "reducer": label,
            "budget": budget,
            "text_tokens": self.protocol.text_tokens,
            "batch": batch,
            "tokens_per_layer": lengths,
            "average_tokens": round(sum(lengths) / len(lengths), 3),
            "ms": {name: _summary(values) for name, values in timed.items()},
        }
        first = [name for name in ("tower", "reducer", "prefill") if name in timed]
        row["ms_to_first_token"] = round(sum(row["ms"][name]["median"] for name in first), 4)
        row["kv_bytes"] = self._kv(lengths)
        row["flops"] = self._flops(lengths, write, tower, None if inside else reduce)
        row["peak_bytes"] = self._peak(lambda: write(1 + more))
        return row

    def _reduction(
        self, reducer: Reducer | None, budget: int
    ) -> Callable[[], tuple[dict[str, Any], list[int]]]:
        """What makes the arguments of the LLM's pass, and tokens per layer."""
        layers, tokens = self.lvlm.num_layers, self.visual.tokens
        if reducer is None:
            return lambda: ({"tokens": tokens}, [self.count] * layers)
        if isinstance(reducer, LayerPruner):
            lives = self.lvlm.reduce([self.prompt], [tokens], reducer, float(budget))[0]
            lengths = flops.lengths_of_lives(lives[self._shown], layers)
            found = {"tokens": tokens, "lives": lives, "positions": reducer.positions}
            return lambda: (dict(found), lengths)

        def before() -> tuple[dict[str, Any], list[int]]:
            inputs = self._inputs(reducer)
            if isinstance(reducer, Merger):
                merged = reducer.merge(inputs, budget)
                whole, places = beside_fixed(merged, tokens, self.visual.placement)
                found = {
                    "tokens": whole.to(self.lvlm.device, self.lvlm.dtype),
                    "places": places,
                    "sizes": len(tokens),
                    "positions": reducer.positions,
                }
                return found, [len(merged.places)] * layers
            if not isinstance(reducer, Pruner):
                raise ValueError(f"{reducer.name!r} is no reducer of a known kind")
            mask = reducer.prune(inputs, budget).cpu().numpy()
            keep = np.ones(len(tokens), bool)
            keep[self._shown] = mask
            found = {"tokens": tokens, "keep": [keep], "positions": reducer.positions}
            return found, [int(mask.sum())] * layers

        return before

    def _inputs(self, reducer: Reducer) -> PruneInputs:
        """What a reducer before the LLM reads; the LVLM's own maps are part of its time."""
        needs, visual = reducer.required(), self.visual
        unknown = set(needs) & {"relevance", "codes"}
        if unknown:
            raise ValueError(
                f"reducer {reducer.name!r} reads {', '.join(sorted(unknown))}, which there is not "
                f"here; take another reducer"
            )
        shown = torch.from_numpy(self._shown).to(visual.tokens.device)
        words = self.lvlm.question_embeddings(self.prompt).to(visual.tokens.device)
        attention = visual.cls_attention
        inputs = PruneInputs(
            tokens=visual.tokens[shown].float(),
            tower=visual.tower[shown].float(),
            cls_attention=None if attention is None else attention[shown].float(),
            grid=visual.grid,
            query=words.mean(0),
            query_tokens=words,
        )
        if visual.placement is not None:
            inputs.coords = torch.from_numpy(visual.placement.coords[self._shown])
            inputs.areas = torch.from_numpy(visual.placement.areas())
        tokens = [visual.tokens]
        if "question_attention" in needs:
            found = self.lvlm.question_attention([self.prompt], tokens)[0]
            inputs.question_attention = torch.as_tensor(found[self._shown])
        if "question_rows" in needs:
            from tprl_env.reducers.layer.question_rows import QuestionRows

            found = self.lvlm.saliency([self.prompt], tokens, QuestionRows(layer=0))[0]
            inputs.question_rows = torch.as_tensor(found[self._shown])
        if "vision" in needs:
            inputs.vision = self.lvlm.vision_signals(self._picture)
        return inputs

    def _inside(self, reducer: LayerPruner, budget: int, replay: list[float]) -> list[float]:
        """A rule's own time: a prefill with it, less the replay of what it dropped."""
        prompts = [self.prompt] * self.protocol.batch
        tokens = [self.visual.tokens] * self.protocol.batch
        whole = self._timed(
            lambda: self.lvlm.generate_ids(
                prompts, tokens, None, 1, reducer=reducer, average=float(budget)
            )
        )
        less = float(np.median(replay))
        return [max(one - less, 0.0) for one in whole]

    def _decoding(
        self, write: Callable[[int], Any], more: int, prefill: list[float]
    ) -> list[float]:
        """Per token behind the first; a random model may end early, so tokens are counted."""
        made = max(max(map(len, write(1 + more))) - 1, 1)
        less = float(np.median(prefill))
        return [max(one - less, 0.0) / made for one in self._timed(lambda: write(1 + more))]

    def _timed(self, call: Callable[[], Any]) -> list[float]:
        """Milliseconds of each run, once the device is done."""
        found = []
        for number in range(self.protocol.warmup + self.protocol.samples):
            self._wait()
            began = time.perf_counter()
            with torch.inference_mode():
                call()
            self._wait()
            if number >= self.protocol.warmup:
                found.append(1000 * (time.perf_counter() - began))
        return found

    def _wait(self) -> None:
        if self.lvlm.device.type == "cuda":
            for number in range(torch.cuda.device_count()):
                torch.cuda.synchronize(number)

    def _peak(self, call: Callable[[], Any]) -> int | None:
        """Bytes of a GPU at most during a pass, weights included; None on the CPU."""
        if self.lvlm.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats(self.lvlm.device)
        call()
        return int(torch.cuda.max_memory_allocated(self.lvlm.device))

    def _kv(self, lengths: Sequence[int]) -> dict[str, Any]:
        """Bytes of keys and values per layer: visual tokens, and with those that always stay."""
        config = self.lvlm.text_config
        heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        size = int(
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        one = 2 * heads * size * torch.empty(0, dtype=self.lvlm.dtype).element_size()
        beside = self.protocol.text_tokens + self.fixed
        return {
            "per_token_and_layer": one,
            "visual_per_layer": [one * n for n in lengths],
            "visual": one * sum(lengths),
            "all": one * sum(n + beside for n in lengths),
        }

    def _flops(
        self,
        lengths: list[int],
        write: Callable[[int], Any],
        tower: Callable[[], Any],
        reduce: Callable[[], Any] | None,
    ) -> dict[str, Any]:
        """Counted on this run for one batch, and by each convention for one prompt."""
        found: dict[str, Any] = {
            "counted_tower": counted_flops(tower),
            "counted_reducer": 0 if reduce is None else counted_flops(reduce),
            "counted_prefill": counted_flops(lambda: write(1)) // self.protocol.batch,
        }
        sizes = model_sizes(self.lvlm, self._tiles(tower))
        if sizes is not None:
            text = self.protocol.text_tokens + self.fixed
            found["conventions"] = {
                one.name: round(flops.pass_flops(sizes, lengths, text, one))
                for one in CONVENTIONS
                if sizes.tower is not None or not one.tower
            }
        return found

    def _tiles(self, tower: Callable[[], Any]) -> int:
        """Images or tiles of the picture that the tower sees; AnyRes cuts it into several."""
        modules = self.lvlm.model.named_modules()
        patches = [one for name, one in modules if name.endswith("patch_embedding")]
        if len(patches) != 1:
            return 1
        seen: list[int] = []
        hook = patches[0].register_forward_hook(lambda *given: seen.append(len(given[2])))
        try:
            with torch.inference_mode():
                tower()
        finally:
            hook.remove()
        return sum(seen)

    def largest_batch(self, reducer: Reducer | None, budget: int, limit: int = 1024) -> int | None:
        """Prompts that fit on the GPU at once, by doubling; None on the CPU."""
        if self.lvlm.device.type != "cuda":
            return None
        given, _ = self._reduction(reducer, budget)()
        tokens, keep = given.pop("tokens"), given.pop("keep", None)
        fits, batch = 0, 1
        while batch <= limit:
            spread = {
                name: [value] * batch if name in ("places", "sizes", "lives") else value
                for name, value in given.items()
            }
            try:
                self.lvlm.generate_ids(
                    [self.prompt] * batch, [tokens] * batch, keep and keep * batch,
                    1 + self.protocol.new_tokens, **spread,
                )  # fmt: skip
            except torch.OutOfMemoryError:
                break
            finally:
                torch.cuda.empty_cache()
            fits, batch = batch, 2 * batch
        return fits


def random_prompt(lvlm: Any, visual: Any, text_tokens: int) -> Prompt:
    """A prompt of random words with a picture near its beginning and the question at its end."""
    placement = visual.placement
    runs = 1 if placement is None else len(placement.runs)
    generator = np.random.default_rng(0)
    limit = int(lvlm.text_config.vocab_size)
    words = [int(one) for one in generator.integers(10, limit, text_tokens)]
    words = [one + 1 if one == lvlm.image_token_id else one for one in words]
    head = max(min(text_tokens - _QUESTION - 2, 4), 1)
    ids = [*words[:head], *[lvlm.image_token_id] * runs, *words[head:]]
    end = len(ids) - 2
    if placement is None and getattr(lvlm, "placed", False):
        placement = Placement.in_line(raster(*visual.grid))
    at = tuple(range(head, head + runs))
    return Prompt(tuple(ids), at, (end - _QUESTION, end), placement=placement)


def model_sizes(lvlm: Any, tiles: int = 1) -> ModelSizes | None:
    """Sizes for the closed forms; None where the text model has none of them.

    Args:
        lvlm: A loaded LVLM.
        tiles: Images or tiles that its tower sees.
    """
    config = lvlm.text_config
    kind = "qwen2" if config.model_type == "qwen2_5_vl_text" else config.model_type
    if kind not in LANGUAGE_MODELS:
        return None
    heads = int(config.num_attention_heads)
    language = LanguageSizes(
        int(config.num_hidden_layers),
        int(config.hidden_size),
        int(config.intermediate_size),
        heads,
        int(getattr(config, "num_key_value_heads", None) or heads),
        int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        int(config.vocab_size),
    )
    seen = lvlm.model.config.vision_config
    if seen.model_type not in TOWERS:
        return ModelSizes(language)
    layer = getattr(lvlm.model.config, "vision_feature_layer", -1)
    tower = TowerSizes.from_config(seen)
    blocks = tower.blocks + 1 + layer if isinstance(layer, int) and layer < 0 else None
    return ModelSizes(language, tower, blocks, tiles)


def _summary(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(float(np.median(values)), 4),
        "p90": round(float(np.percentile(values, 90)), 4),
    }
