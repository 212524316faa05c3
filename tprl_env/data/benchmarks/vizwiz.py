"""VizWiz-VQA (Gurari et al. 2018): pictures by blind people, some without an answer."""

from tprl_env.data.benchmarks.benchmark import SHORT, Benchmark, Item, Row
from tprl_env.data.benchmarks.fields import texts

_CLOSING = "When the provided information is insufficient, respond with 'Unanswerable'."


def read(row: Row) -> Item:
    """One question."""
    question = f"{row['question']}\n{_CLOSING}\n{SHORT}"
    return Item(str(row["question_id"]), [row["image"]], question, texts(row["answers"]))


BENCHMARK = Benchmark(
    title="VizWiz",
    hub="lmms-lab/VizWiz-VQA",
    splits={"test": (None, "val")},
    columns=("question_id", "image", "question", "answers"),
    read=read,
    grader="vqa",
    note="the validation split: the test split is graded by a server",
)
