"""MME (Fu et al. 2023): two yes-or-no questions per picture in fourteen categories."""

from tprl_env.data.benchmarks.benchmark import Benchmark, Item, Row
from tprl_env.data.graders import sets

_OWN = "Please answer yes or no."


def read(row: Row) -> Item:
    """One question; the two of a picture have its question_id."""
    category, picture = str(row["category"]), str(row["question_id"])
    question = str(row["question"]).replace(_OWN, "").strip()
    return Item(
        f"{category}/{picture}: {question}",
        [row["image"]],
        f"{question}\nAnswer the question using a single word or phrase.",
        (str(row["answer"]),),
        category=category,
        group=f"{category}/{picture}",
        image_id=f"{category}/{picture}",
    )


BENCHMARK = Benchmark(
    title="MME",
    hub="lmms-lab/MME",
    splits={"test": (None, "test")},
    columns=("question_id", "image", "question", "answer", "category"),
    read=read,
    grader="yes_no",
    metric=sets.mme,
    note="papers print perception; the pairs of a picture must be together, so limits are even",
)
