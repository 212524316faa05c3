"""VQA-v2 (Goyal et al. 2017): ten answers by people; test-dev needs the authors' server."""

from tprl_env.data.benchmarks.benchmark import Benchmark, Item, Row, short
from tprl_env.data.benchmarks.fields import texts


def read(row: Row) -> Item:
    """One question."""
    return Item(
        str(row["question_id"]),
        [row["image"]],
        short(row["question"]),
        texts(row["answers"]),
        category=str(row.get("answer_type", "")),
        image_id=str(row["image_id"]),
    )


BENCHMARK = Benchmark(
    title="VQA-v2",
    hub="lmms-lab/VQAv2",
    splits={"train": (None, "train"), "test": (None, "validation")},
    columns=("question_id", "image_id", "image", "question", "answers"),
    read=read,
    grader="vqa",
    note="the validation split: papers print test-dev, which only its server grades",
)
