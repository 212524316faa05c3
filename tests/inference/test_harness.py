"""The plug-in for lmms-eval: its own logic here, the harness itself in a slow test."""

from __future__ import annotations

import json
import math
import subprocess
import sysconfig
import tomllib
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from lmms_eval_stand_in import Instance, plug_in

from tprl_env.data import load_dataset
from tprl_env.inference import PrunedLVLM
from tprl_env.lvlm import load_lvlm
from tprl_env.reducers import make_reducer

ROOT = Path(__file__).parents[2]
LVLM = "builtin:crowded"
HARNESS = ("lmms-eval==0.7.3", "loguru", "sacrebleu", "evaluate", "datasets", "pytz", "tenacity",
           "pytablewriter")  # fmt: skip
"""The harness without its dependencies, and those that a task of one's own needs."""


@pytest.fixture(scope="module")
def module() -> Any:
    return plug_in()


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    samples = load_dataset("scenes-crowded", "test", limit=6)
    return [
        {"image": Image.fromarray(s.image), "question": s.question, "answer": s.answers[0]}
        for s in samples
    ]


def made(module: Any, rows: list[dict[str, Any]], **arguments: Any) -> Any:
    model = module.HarnessLVLM(LVLM, device="cpu", **arguments)
    model.task_dict = {"scenes": {"test": rows}}
    return model


def requests(
    rows: list[dict[str, Any]], kind: str = "generate_until", **settings: Any
) -> list[Instance]:
    greedy = {"max_new_tokens": 4, "temperature": 0, "do_sample": False, **settings}
    found = []
    for number, row in enumerate(rows):
        second: Any = greedy if kind == "generate_until" else (lambda doc: doc["answer"])
        words = (row["question"], second, lambda doc: [doc["image"]], number, "scenes", "test")
        found.append(Instance(kind, words, number, "scenes"))
    return found


def test_the_entry_point_names_the_class(module: Any) -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert points == {"lmms_eval.models": {"tprl_env": "tprl_env.inference.harness:manifest"}}
    found = module.manifest()
    assert found.model_id == "tprl_env" and module.HarnessLVLM.is_simple
    assert found.simple_class_path == "tprl_env.inference.harness.HarnessLVLM"


@pytest.mark.parametrize(
    ("arguments", "same"),
    [
        ({"reducer": "question_rows", "budget": 48, "batch_size": 4}, ("question_rows", 48)),
        ({"reducer": "divprune", "budget": 0.25, "batch_size": 1}, ("divprune", 36)),
        ({"reducer": "fastv", "budget": 60, "layer": 1, "batch_size": 6}, ("fastv", 60)),
        ({"batch_size": 6}, ("uniform", 144)),
    ],
)
def test_it_answers_as_a_pruned_lvlm(
    module: Any, rows: list[dict[str, Any]], arguments: dict[str, Any], same: tuple[str, int]
) -> None:
    model = made(module, rows, **arguments)
    pictures, questions = [r["image"] for r in rows], [r["question"] for r in rows]
    fields = {"layer": 1} if same[0] == "fastv" else {}
    pruned = PrunedLVLM(load_lvlm(LVLM, device="cpu"), make_reducer(same[0], **fields))
    wanted = pruned.answer_batch(pictures, questions, same[1], 4)
    asked = requests(rows)
    first = asked[0].arguments
    asked[0].arguments = ("<image>\n" + first[0], *first[1:])  # how some tasks write it
    assert model.generate_until(asked) == [one.text for one in wanted]
    assert np.mean(model.tokens) == pytest.approx(np.mean([one.average_tokens for one in wanted]))
    scored = pruned.score_batch(pictures, questions, [[r["answer"]] for r in rows], same[1])
    for (value, greedy), one in zip(
        model.loglikelihood(requests(rows, "loglikelihood")), scored, strict=True
    ):
        assert math.exp(value) == pytest.approx(one.likelihood, rel=1e-5)
        assert greedy == bool(one.exact)


def test_an_answer_ends_before_the_first_stop(module: Any) -> None:
    assert module._until("red\nblue. green", ["\n", "."]) == "red"
    assert module._until("red\nblue", "blue") == "red\n"
    assert module._until("red", None) == module._until("red", [""]) == "red"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"budget": 14}, "nothing is pruned; add reducer=NAME, or leave out budget"),
        ({"reducer": "divprune"}, "needs budget=COUNT"),
        ({"reducer": "divprun", "budget": 4}, "did you mean 'divprune'"),
        ({"reducer": "divprune", "budget": 1.5}, "budget must be a count"),
        ({"policy": "p", "budget": 4}, "needs autoencoder=FOLDER"),
        ({"policy": "p", "autoencoder": "a", "reducer": "tome", "budget": 4}, "neither a reducer"),
        ({"reducer": "fastv", "budget": 60, "layers": 3}, "layers"),
    ],
)
def test_arguments_that_do_not_go_together(module: Any, arguments: Any, said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        module.HarnessLVLM(LVLM, device="cpu", **arguments)


def test_what_it_cannot_do_is_refused_by_name(module: Any, rows: list[dict[str, Any]]) -> None:
    model = made(module, rows)
    for settings, said in (
        ({"num_beams": 3}, "num_beams=3 is not greedy decoding"),
        ({"do_sample": True}, "do_sample=True is not greedy"),
    ):
        with pytest.raises(ValueError, match=said):
            model.generate_until(requests(rows[:1], **settings))
    assert model.generate_until(requests(rows[:1], temperature=0.7))  # no effect without sampling
    one, one_question = rows[0]["image"], rows[0]["question"]
    for shown, text, said in (
        ([], "why ?", "has no picture"),
        ([one, one], "<image>why ?", "has pictures between its words"),
        ([one], "why <image> ?", "has pictures between its words"),
        (["a.mp4"], "why ?", "a video"),
    ):
        asked = requests(rows[:1])
        words = list(asked[0].arguments)
        words[0], words[2] = text, lambda doc, shown=shown: shown
        asked[0].arguments = tuple(words)
        with pytest.raises(ValueError, match=f"document 0 of test .*{said}"):
            model.generate_until(asked)
    words[0], words[2] = f"<image> <image>\n{one_question}", lambda doc: [one, one]
    asked[0].arguments = tuple(words)
    wanted = model._pruned.answer([one, one], one_question, 1.0, 4).text
    assert model.generate_until(asked) == [wanted]
    with pytest.raises(NotImplementedError):
        model.generate_until_multi_round([])


TASK = """
dataset_path: {data}
dataset_kwargs:
  load_from_disk: True
task: scenes
test_split: test
output_type: generate_until
doc_to_visual: !function scenes_task.pictures
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  max_new_tokens: 4
  temperature: 0
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.mark.slow
def test_the_harness_itself_measures_what_a_pruned_lvlm_measures(tmp_path: Path) -> None:
    place = tmp_path / "harness"
    venv.create(place, with_pip=True)
    site = next((place / "lib").glob("python*")) / "site-packages"
    (site / "outer.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = str(place / "bin" / "python")
    quiet = [python, "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt")]
    subprocess.run([*quiet, "--no-deps", HARNESS[0]], check=True)
    subprocess.run([*quiet, *HARNESS[1:]], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", str(ROOT)], check=True)
    samples = load_dataset("scenes-crowded", "test", limit=24)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for number, sample in enumerate(samples):
        Image.fromarray(sample.image).save(tasks / f"{number}.png")
    table = [{"question": s.question, "answer": s.answers[0]} for s in samples]
    (tasks / "rows.json").write_text(json.dumps(table))
    (tasks / "scenes_task.py").write_text("def pictures(doc):\n    return [doc['image']]\n")
    (tasks / "scenes.yaml").write_text(TASK.format(data=tmp_path / "data"))
    script = """
import json, sys
from pathlib import Path
from datasets import Dataset, DatasetDict, Image
rows = json.loads(Path(sys.argv[1], "rows.json").read_text())
for number, row in enumerate(rows):
    row["image"] = str(Path(sys.argv[1], f"{number}.png"))
data = Dataset.from_list(rows).cast_column("image", Image())
DatasetDict({"test": data}).save_to_disk(sys.argv[2])
"""
    subprocess.run([python, "-c", script, str(tasks), str(tmp_path / "data")], check=True)
    pictures, questions = [s.image for s in samples], [s.question for s in samples]
    model = load_lvlm(LVLM, device="cpu")
    for name, budget in (("question_rows", 48), ("visionzip", 20)):
        done = subprocess.run(
            [python, "-m", "lmms_eval", "--model", "tprl_env", "--tasks", "scenes",
             "--model_args", f"lvlm={LVLM},reducer={name},budget={budget}", "--batch_size", "8",
             "--device", "cpu", "--include_path", str(tasks),
             "--output_path", str(tmp_path / name)],
            capture_output=True, text=True, timeout=280, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads(next((tmp_path / name).rglob("*results.json")).read_text())
        pruned = PrunedLVLM(model, make_reducer(name))
        texts = [one.text for one in pruned.answer_batch(pictures, questions, budget, 4)]
        right = np.mean([t in s.answers for t, s in zip(texts, samples, strict=True)])
        assert found["results"]["scenes"]["exact_match,none"] == pytest.approx(right)
        assert f"{budget}.0 visual tokens per decoder layer" in done.stderr + done.stdout
