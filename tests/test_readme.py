"""The README's blocks, run in order in one folder: what a reader copies must work."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.readme_results import readme_section, replace_section, results_section
from tprl_env.cli.commands import main
from tprl_env.data.scenes import load_scenes

README = Path(__file__).resolve().parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_the_first_screen_holds_what_a_visitor_needs():
    screen = TEXT.splitlines()[:30]
    text = "\n".join(screen)
    assert "make quickstart" in text
    assert "make test" in text
    assert "pip install" in text
    assert "https://arxiv.org/abs/" in text
    assert re.search(r"!\[.*\]\(docs/images/.*\.png\)", text)
    assert "<!-- results:begin -->" in text
    assert TEXT.index("<!-- results:begin -->") < TEXT.index("<!-- results:end -->")


def test_the_results_are_those_of_the_records():
    folder = README.parent
    record = folder / "benchmarks/results/experiments"
    for name, section in (("README.md", readme_section), ("docs/results.md", results_section)):
        text = (folder / name).read_text(encoding="utf-8")
        assert text == replace_section(text, section(record)), "run benchmarks.readme_results"


def test_what_the_readme_links_to_exists():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    # the picture is drawn from a finished run, by hand
    local = [link for link in links if "://" not in link and not link.startswith("docs/images/")]
    assert local
    assert [link for link in local if not (README.parent / link).exists()] == []


def test_the_file_tree_names_what_there_is():
    (tree,) = re.findall(r"^```\n(tprl_env/.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    folder = README.parent
    for line in tree.splitlines():
        indent, names = re.match(r"( *)([\w./]+(?:, [\w./]+)*)", line).groups()
        for name in names.split(", "):
            path = folder / "tprl_env" / name if indent else folder / name
            assert path.exists(), f"{name} in: {line}"


def run_bash(block: str) -> list[str]:
    """Run the `tprl` lines of a block; returns the sub-commands."""
    done = []
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["tprl"]:
            assert main(words[1:]) == 0, line
            done.append(words[1])
        else:
            assert words[:1] in ([], ["make"]), f"a line that no test runs: {line}"
    return done


@pytest.mark.timeout(600)  # Ray's workers are niced: a busy machine starves them
def test_every_block_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    for name, sample in zip(("a.png", "b.png"), load_scenes("sparse", "test", 2, 1), strict=True):
        Image.fromarray(sample.image).save(name)
    namespace = {"__name__": "readme"}
    commands = []
    for language, block in BLOCKS:
        if language == "python":
            exec(compile(block, str(README), "exec"), namespace)
        elif language == "json":
            Path("questions.jsonl").write_text(block, encoding="utf-8")
        else:
            assert language == "bash"
            commands += run_bash(block)
    assert commands == ["encode"] * 3 + ["autoencoder", "train", "evaluate"]
    said = capsys.readouterr().out
    assert "2 questions about 2 images in stores/mine" in said
    assert re.search(r"DivPrune +14 tokens: [01]\.\d\d", said)  # the own pruner's block
    assert namespace["keep"].sum() == 14
    assert namespace["answer"].keep.sum() == 14
    results = json.loads(Path("runs/mine/evaluation/results.json").read_text())
    assert results["training"]["preset"] == "recommended"
    assert results["training"]["lvlm_scores"] > 0
    for name in ("report.html", "accuracy.png", "per_question.parquet"):
        assert Path("runs/mine/evaluation", name).is_file()
