"""POPE (Li et al. 2023): is there such an object, in three splits of absent objects."""

from tprl_env.data.benchmarks.benchmark import Benchmark, Item, Row, short
from tprl_env.data.graders import sets


def read(row: Row) -> Item:
    """One question; the same number occurs in every split."""
    category = str(row["category"])
    return Item(
        f"{category}-{row['question_id']}",
        [row["image"]],
        short(row["question"]),
        (str(row["answer"]),),
        category=category,
        image_id=str(row["image_source"]),
    )


BENCHMARK = Benchmark(
    title="POPE",
    hub="lmms-lab/POPE",
    splits={"test": (None, "test")},
    columns=("question_id", "question", "answer", "image_source", "image", "category"),
    read=read,
    grader="yes_no",
    metric=sets.pope,
    note="mean F1 of the three splits; some harnesses pool all questions (F1 pooled)",
)
