"""ScienceQA (Lu et al. 2022), the questions with a picture."""

from tprl_env.data.benchmarks.benchmark import LETTERS, Benchmark, Item, Row, with_options
from tprl_env.data.benchmarks.fields import is_missing


def read(row: Row) -> Item | None:
    """One question; None without a picture. The dataset gives no ids: its place is the id."""
    if row["image"] is None:
        return None
    hint = "" if is_missing(row["hint"]) else str(row["hint"])
    question = with_options(str(row["question"]), list(map(str, row["choices"])), hint)
    return Item(str(row["place"]), [row["image"]], question, (LETTERS[int(row["answer"])],))


BENCHMARK = Benchmark(
    title="ScienceQA (image)",
    hub="lmms-lab/ScienceQA",
    splits={
        "train": ("ScienceQA-IMG", "train"),
        "validation": ("ScienceQA-IMG", "validation"),
        "test": ("ScienceQA-IMG", "test"),
    },
    columns=("image", "question", "choices", "answer", "hint"),
    read=read,
    grader="letter",
)
