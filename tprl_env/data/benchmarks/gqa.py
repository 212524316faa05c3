"""GQA (Hudson and Manning 2019): questions and pictures are two tables, joined by imageId."""

from tprl_env.data.benchmarks.benchmark import Benchmark, Item, Row, short


def read(row: Row) -> Item:
    """One question."""
    picture = str(row["imageId"])
    answers = (str(row["answer"]),)
    return Item(str(row["id"]), [row["image"]], short(row["question"]), answers, image_id=picture)


BENCHMARK = Benchmark(
    title="GQA",
    hub="lmms-lab/GQA",
    splits={
        "train": ("train_balanced_instructions", "train"),
        "validation": ("val_balanced_instructions", "val"),
        "test": ("testdev_balanced_instructions", "testdev"),
    },
    columns=("id", "imageId", "question", "answer"),
    read=read,
    grader="exact",
    pictures_from={
        "train": "train_balanced_images",
        "validation": "val_balanced_images",
        "test": "testdev_balanced_images",
    },
)
