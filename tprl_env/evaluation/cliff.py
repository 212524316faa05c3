"""The information cliff: from which layer on does the LVLM no longer need its visual tokens?

Two measurements, both by dropping, because attention mass does not tell: accuracy when every
visual token is dropped before layer k, per question type (TOP-RL, figure 1), and for any rule the
map of how many tokens stay from which layer on.

Shapes: S samples, N visual tokens (padded), L decoder layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tprl_env.checks import check_choice, did_you_mean
from tprl_env.evaluation.intervals import mean_interval
from tprl_env.evaluation.measure import by_type, check_budgets, iterate_chunks, keep_masks
from tprl_env.evaluation.plots import new_figure, save_figure
from tprl_env.files import versions, write_json
from tprl_env.lvlm.protocol import Positions
from tprl_env.reducers import PRUNERS, make_pruner
from tprl_env.reducers.interfaces import Pruner, cure_for, prune_inputs
from tprl_env.reducers.layer import LAYER_PRUNERS, make_layer_pruner
from tprl_env.reducers.layer_pruner import LayerPruner, OneCut, RankingLayerPruner

if TYPE_CHECKING:
    from tprl_env.data.features.store import FeatureStore
    from tprl_env.scoring.lvlm_scorer import LVLMScorer

COUNTS = (72, 48, 29, 14, 7, 4)
RULES = ("question_rows", "fastv", "random")

Rule = Pruner | RankingLayerPruner
IntArray = npt.NDArray[np.int64]


def make_rule(name: str, store: FeatureStore) -> Rule:
    """A pruner by name, or a method that ranks the tokens of a layer.

    Raises:
        ValueError: There is no such rule, it does more than rank, or the store lacks its inputs.
    """
    if name in LAYER_PRUNERS:
        found: LayerPruner = make_layer_pruner(name)
        if not isinstance(found, RankingLayerPruner):
            raise ValueError(
                f"{name!r} does not rank the tokens of a layer alone; rules that do are "
                "question_rows, fastv, pyramiddrop and autoprune"
            )
        return found
    if name not in PRUNERS:
        known = (*LAYER_PRUNERS, *PRUNERS)
        raise ValueError(f"unknown rule {name!r}, they are {', '.join(known)}"
                         f"{did_you_mean(name, known)}")  # fmt: skip
    pruner = make_pruner(name)
    example = prune_inputs(store, 0)
    missing = [need for need in pruner.needs if getattr(example, need) is None]
    if missing:
        raise ValueError(
            f"rule {name!r} needs {', '.join(missing)}, which this store does not hold; "
            f"{cure_for(missing)}"
        )
    return pruner


def drop_all(scorer: LVLMScorer, samples: IntArray, positions: Positions) -> list[dict[str, Any]]:
    """Accuracy with every visual token dropped before layer L, L - 1, ..., 0 (L: none dropped)."""
    store = scorer.store
    types = np.array([store.question_type(int(sample)) for sample in samples])
    exists = store.exists(samples).astype(np.uint8)
    rows = []
    for layer in range(scorer.lvlm.num_layers, -1, -1):
        lives = exists * np.uint8(layer)
        scores = scorer.score_inside(samples, lives=lives, positions=positions).exact
        rows.append(
            {
                "layer": layer,
                "accuracy": round(float(scores.mean()), 5),
                "ci95": [round(bound, 5) for bound in mean_interval(scores)],
                "by_type": {
                    name: round(value, 5) for name, value in by_type(types, scores).items()
                },
            }
        )
    return rows


def heat_map(
    scorer: LVLMScorer,
    samples: IntArray,
    rule: Rule,
    layers: Sequence[int],
    counts: Sequence[int],
    positions: Positions,
) -> list[list[float | None]]:
    """Accuracy (layers, counts) of a rule that drops once, before a layer.

    A pruner chooses before the language model, whatever the layer; a rule that looks at the layer
    below has no entry for layer 0.
    """
    rows: list[list[float | None]] = []
    for layer in layers:
        row: list[float | None] = []
        for count in counts:
            if isinstance(rule, Pruner):
                lives = _lives_of(rule, scorer, samples, layer, count)
                found = scorer.score_inside(samples, lives=lives, positions=positions)
            elif layer == 0 and rule.wants(0).source == "previous":
                row.append(None)
                continue
            else:
                cut = OneCut(rule, layer, count)
                found = scorer.score_inside(samples, reducer=cut, positions=positions)
            row.append(round(float(found.exact.mean()), 5))
        rows.append(row)
    return rows


def _lives_of(
    pruner: Pruner, scorer: LVLMScorer, samples: IntArray, layer: int, count: int
) -> npt.NDArray[np.uint8]:
    """(S, N): what the pruner keeps lives through all layers, the rest up to ``layer``."""
    store = scorer.store
    lives = store.exists(samples).astype(np.uint8) * np.uint8(layer)
    for part in iterate_chunks(samples):
        keep = keep_masks(pruner, store, samples[part], count)
        lives[part][keep] = scorer.lvlm.num_layers
    return lives


def measure_cliff(
    store: str | Path,
    lvlm: str,
    out: str | Path,
    *,
    rules: Sequence[str] = RULES,
    counts: Sequence[int] = COUNTS,
    layers: Sequence[int] | None = None,
    positions: Positions = "original",
    limit: int | None = None,
) -> dict[str, Any]:
    """Measure the cliff and the maps on a store; write ``cliff.json``, then the PNG files.

    Args:
        store: Encoded split.
        lvlm: The LVLM that encoded it, as for ``load_lvlm``.
        out: Folder for ``cliff.json``, ``cliff.png`` and one ``map-RULE.png`` per rule.
        rules: Keys of ``PRUNERS`` or ``LAYER_PRUNERS``; may be empty.
        counts: Tokens that stay, for the maps.
        layers: Layers of the maps; all by default.
        positions: Rotary positions of what stays.
        limit: Number of questions used, from the first; None uses all.

    Returns:
        Content of ``cliff.json``.

    Raises:
        ValueError: Something does not fit or is out of range.
    """
    from tprl_env.data.features.store import FeatureStore
    from tprl_env.lvlm import load_lvlm
    from tprl_env.scoring.lvlm_scorer import LVLMScorer

    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    check_choice("positions", positions, ("original", "contiguous"))
    model = load_lvlm(lvlm)
    opened = FeatureStore.open(store, lvlm_fingerprint=model.fingerprint)
    counts = (
        [count for count in counts if count <= opened.max_tokens] if counts is COUNTS else counts
    )
    check_budgets(counts, opened.max_tokens)
    depth = model.num_layers
    layers = list(range(depth)) if layers is None else list(layers)
    if any(not 0 <= layer < depth for layer in layers):
        raise ValueError(f"layers must lie in [0, {depth - 1}], the decoder layers, got {layers}")
    chosen = {name: make_rule(name, opened) for name in rules}
    samples = np.arange(len(opened), dtype=np.int64)[:limit]
    scorer = LVLMScorer(model, opened, positions=positions)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)  # a place that cannot be written to is refused now
    cliff = drop_all(scorer, samples, positions)
    print_cliff(cliff)
    maps: dict[str, Any] = {}
    for name, rule in chosen.items():
        found = heat_map(scorer, samples, rule, layers, counts, positions)
        maps[name] = {"layers": layers, "counts": list(counts), "accuracy": found}
        print_map(name, maps[name])
    content = {
        "store": str(store),
        "lvlm": lvlm,
        "lvlm_fingerprint": model.fingerprint,
        "questions": len(samples),
        "visual_tokens": opened.max_tokens,
        "num_layers": depth,
        "positions": positions,
        "cliff": cliff,
        "maps": maps,
        "versions": versions(),
    }
    write_json(out / "cliff.json", content)
    plot_cliff(cliff, out / "cliff.png")
    for name, one in maps.items():
        plot_map(name, one, out / f"map-{name}.png")
    return content


def print_cliff(cliff: Sequence[Mapping[str, Any]]) -> None:
    """One line per layer: accuracy, then by question type."""
    print("no visual token from layer   all   " + " ".join(f"{n:>7}" for n in cliff[0]["by_type"]))
    for row in cliff:
        name = "(none dropped)" if row is cliff[0] else str(row["layer"])
        values = " ".join(f"{value:7.3f}" for value in row["by_type"].values())
        print(f"{name:>26}  {row['accuracy']:.3f}  {values}")


def print_map(name: str, found: Mapping[str, Any]) -> None:
    """One line per layer."""
    print(f"{name}: tokens that stay  " + " ".join(f"{count:5d}" for count in found["counts"]))
    for layer, row in zip(found["layers"], found["accuracy"], strict=True):
        values = " ".join("    -" if value is None else f"{value:5.3f}" for value in row)
        print(f"{'before layer ' + str(layer):>{len(name) + 19}} {values}")


def plot_cliff(cliff: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Accuracy against the layer from which there are no visual tokens, per question type."""
    figure, axes = new_figure()
    rows = sorted(cliff, key=lambda row: int(row["layer"]))
    layers = [row["layer"] for row in rows]
    for name in rows[0]["by_type"]:
        values = [row["by_type"][name] for row in rows]
        axes.plot(layers, values, marker=".", linewidth=1, alpha=0.8, label=name)
    mean = [row["accuracy"] for row in rows]
    axes.plot(layers, mean, color="black", linewidth=2.5, marker="o", label="all questions")
    axes.set_xticks(layers, [*map(str, layers[:-1]), "none"])
    axes.set_xlabel("every visual token dropped before this layer")
    axes.set_ylabel("accuracy")
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    return save_figure(figure, path)


def plot_map(name: str, found: Mapping[str, Any], path: Path) -> Path:
    """Accuracy by layer and number of tokens that stay from it on."""
    figure, axes = new_figure()
    table = np.array(
        [[np.nan if value is None else value for value in row] for row in found["accuracy"]]
    )
    picture = axes.imshow(table, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        if not np.isnan(value):
            ink = "white" if value < 0.6 else "black"
            axes.text(column, row, f"{value:.3f}", ha="center", va="center", color=ink)
    axes.set_xticks(range(len(found["counts"])), [str(count) for count in found["counts"]])
    axes.set_yticks(range(len(found["layers"])), [str(layer) for layer in found["layers"]])
    axes.set_xlabel("visual tokens that stay")
    axes.set_ylabel("from this layer on")
    axes.set_title(f"{name}: accuracy")
    figure.colorbar(picture, ax=axes)
    return save_figure(figure, path)
