"""TextVQA (Singh et al. 2019)."""

from tprl_env.data.benchmarks.benchmark import Benchmark, Item, Row, short
from tprl_env.data.benchmarks.fields import texts


def read(row: Row) -> Item:
    """One question, without reference OCR tokens."""
    answers, picture = texts(row["answers"]), str(row["image_id"])
    name = str(row["question_id"])
    return Item(name, [row["image"]], short(row["question"]), answers, image_id=picture)


BENCHMARK = Benchmark(
    title="TextVQA",
    hub="lmms-lab/textvqa",
    splits={"train": (None, "train"), "test": (None, "validation")},
    columns=("image_id", "question_id", "question", "image", "answers"),
    read=read,
    grader="vqa",
    note="without reference OCR tokens in the prompt, which LLaVA-1.5's 58.2 has",
)
