"""The model card of a policy: what it is for, what it was trained on, and with which figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tprl_env.env.budgets import Budget
from tprl_env.inference.origin import Origin

_BUILTIN = "builtin:"
_TAGS = ("visual-token-pruning", "vision-language-models", "reinforcement-learning")


def model_card(
    name: str,
    origin: Origin,
    settings: Mapping[str, Any],
    budget: Budget | None,
    license: str | None = None,
) -> str:
    """README.md with metadata that the hub reads.

    Args:
        name: Hub id or folder, for the example.
        origin: What the policy was trained on.
        settings: How it acts.
        budget: Default budget.
        license: Identifier, if there is one.
    """
    title = f"Token pruner for {origin.lvlm}"
    parts = [
        _metadata(title, origin, license),
        f"# {title}",
        f"Chooses which visual tokens of {origin.lvlm} the language model sees. Made with "
        f"`tprl-env`; the LVLM itself is not part of this and stays as it is.",
        "## Use",
        _example(name, origin, budget),
        "The budget counts the visual tokens of a prompt, its pictures together; a float in (0, 1] "
        "is a share of them. On another LVLM the pruner is refused: its weights are compared with "
        "those below. `TokenPruner.from_pretrained(..., allow_other_lvlm=True)` prunes all the "
        "same, with a warning.",
        "## Trained on",
        _table(("", ""), _training(origin, settings, budget)),
        "## Measured",
        _results(origin),
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(title: str, origin: Origin, license: str | None) -> str:
    """YAML whose texts are quoted as JSON, which YAML includes."""
    lines = ["---", "library_name: tprl-env", "tags:", *(f"- {tag}" for tag in _TAGS)]
    if license is not None:
        lines.append(f"license: {json.dumps(license)}")
    if origin.lvlm.count("/") == 1 and not origin.lvlm.startswith((".", "/", _BUILTIN)):
        lines.append(f"base_model: {json.dumps(origin.lvlm)}")
    rows = [row for row in origin.results if row["knowledge"] == "policy"]
    if rows:
        data = json.dumps(origin.evaluated_on or "not recorded")
        lines += ["model-index:", f"- name: {json.dumps(title)}", "  results:"]
        for row in rows:
            lines += [
                "  - task:",
                "      type: visual-question-answering",
                "    dataset:",
                f"      name: {data}",
                f"      type: {data}",
                "    metrics:",
                "    - type: accuracy",
                f"      value: {json.dumps(row['accuracy'])}",
                f"      name: {json.dumps('accuracy at ' + _tokens(row))}",
            ]
    return "\n".join([*lines, "---"])


def _example(name: str, origin: Origin, budget: Budget | None) -> str:
    lvlm, more = json.dumps(origin.lvlm), ""
    if origin.lvlm.startswith(_BUILTIN):
        task = json.dumps(origin.lvlm.removeprefix(_BUILTIN))
        lvlm, more = "lvlm", f"lvlm = builtin_path({task})\n"
        imports = "from tprl_env.lvlm.tiny import builtin_path\n"
    else:
        imports = ""
    amount = "" if budget is not None else ", budget=0.25"
    return f"""```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tprl_env.inference import TokenPruner
{imports}
{more}model = AutoModelForImageTextToText.from_pretrained({lvlm})
processor = AutoProcessor.from_pretrained({lvlm})
pruner = TokenPruner.from_pretrained({json.dumps(name)})

content = [
    {{"type": "image", "image": Image.open("picture.png")}},
    {{"type": "text", "text": "what color is it ?"}},
]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device)
pruned = pruner.prune(model, inputs{amount})
output = model.generate(**pruned, max_new_tokens=20)
print(processor.decode(output[0, pruned["input_ids"].shape[1] :], skip_special_tokens=True))
```"""


def _training(
    origin: Origin, settings: Mapping[str, Any], budget: Budget | None
) -> list[tuple[str, str]]:
    rows = [
        ("LVLM", f"{origin.lvlm} (`{origin.model_type}`)"),
        ("fingerprint of its files", f"`{origin.lvlm_fingerprint}`"),
        ("fingerprint of its weights", f"`{origin.lvlm_signature}`"),
        ("data", f"{origin.dataset or 'not recorded'}, {origin.samples} samples"),
        ("fingerprint of the data", f"`{origin.dataset_fingerprint or 'not recorded'}`"),
        ("visual tokens of a picture", f"up to {origin.visual_tokens}"),
    ]
    if origin.budgets:
        low, high = min(origin.budgets), max(origin.budgets)
        text = f"{low}" if low == high else f"{low} to {high}"
        unit = "of the visual tokens" if isinstance(high, float) else "visual tokens"
        rows.append(("budgets in training", f"{text} {unit}"))
    rows += [(name.replace("_", " "), str(value)) for name, value in origin.training.items()]
    rows.append(("default budget", "none" if budget is None else str(budget)))
    rows += [(name.replace("_", " "), str(value)) for name, value in settings.items()]
    return rows


def _results(origin: Origin) -> str:
    if not origin.results:
        return "Nothing was measured, or the results were not given when this was saved."
    head = ("method", "visual tokens", "accuracy", "95 % interval")
    rows = [
        (
            str(row["name"]),
            _tokens(row),
            f"{row['accuracy']:.3f}",
            f"{row['ci95'][0]:.3f} to {row['ci95'][1]:.3f}",
        )
        for row in origin.results
    ]
    return f"On {origin.evaluated_on or 'data that were not recorded'}:\n\n{_table(head, rows)}"


def _tokens(row: Mapping[str, Any]) -> str:
    return f"{row['mean_tokens']:g} visual tokens"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
