"""MMBench (Liu et al. 2023): every rotation of a question's options must be answered right."""

from tprl_env.data.benchmarks.benchmark import LETTERS, Benchmark, Item, Row, with_options
from tprl_env.data.benchmarks.fields import is_missing
from tprl_env.data.graders import sets

_ROTATIONS = 1_000_000


def read(row: Row) -> Item:
    """One rotation; those of a question have its index below a million in common."""
    options = [row[name] for name in LETTERS[:4] if not is_missing(row[name])]
    hint = "" if is_missing(row["hint"]) else str(row["hint"])
    index = int(row["index"])
    return Item(
        str(index),
        [row["image"]],
        with_options(str(row["question"]), [str(one) for one in options], hint),
        (str(row["answer"]),),
        category=str(row["category"]),
        group=str(index % _ROTATIONS),
        image_id=str(index % _ROTATIONS),
    )


BENCHMARK = Benchmark(
    title="MMBench",
    hub="lmms-lab/MMBench_EN",
    splits={"test": (None, "dev")},
    columns=("index", "question", "hint", *"ABCD", "answer", "category", "image"),
    read=read,
    grader="letter",
    metric=sets.circular,
    note="dev split, letters by rule; the leaderboard reads answers out with a large model",
)
