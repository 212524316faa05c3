"""SEED-Bench (Li et al. 2023): four options; questions about videos have several pictures."""

from tprl_env.data.benchmarks.benchmark import Benchmark, Item, Row, with_options
from tprl_env.data.graders import sets


def read(row: Row) -> Item:
    """One question."""
    options = [str(row[f"choice_{letter}"]) for letter in "abcd"]
    pictures = row["image"] if isinstance(row["image"], (list, tuple)) else [row["image"]]
    return Item(
        str(row["question_id"]),
        pictures,
        with_options(str(row["question"]), options),
        (str(row["answer"]),),
        category=str(row["data_type"]),
    )


BENCHMARK = Benchmark(
    title="SEED-Bench",
    hub="lmms-lab/SEED-Bench",
    splits={"test": (None, "test")},
    columns=(
        *("question_id", "image", "question", "choice_a", "choice_b", "choice_c", "choice_d"),
        *("answer", "data_type"),
    ),
    read=read,
    grader="letter",
    metric=sets.by_category,
    note="all questions first, then those about single pictures and videos apart; papers differ",
)
