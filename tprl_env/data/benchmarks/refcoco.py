"""RefCOCO (Kazemzadeh et al. 2014), comprehension: the box of what a phrase names."""

from collections.abc import Sequence

from tprl_env.data.benchmarks.benchmark import Benchmark, Item, Row
from tprl_env.data.benchmarks.fields import size_of

_ASK = "Please provide the bounding box coordinate of the region this sentence describes: {}"


def read(row: Row) -> Sequence[Item]:
    """One item per phrase; boxes are left, top, right, bottom as shares of the picture."""
    width, height = size_of(row["image"])
    x, y, w, h = (float(number) for number in row["bbox"])
    box = (x / width, y / height, (x + w) / width, (y + h) / height)
    wanted = "[" + ", ".join(f"{edge:.4f}" for edge in box) + "]"
    return [
        Item(
            f"{row['question_id']}-{place}",
            [row["image"]],
            _ASK.format(phrase),
            (wanted,),
            image_id=str(row["question_id"]),
        )
        for place, phrase in enumerate(row["answer"])
    ]


BENCHMARK = Benchmark(
    title="RefCOCO (REC)",
    hub="lmms-lab/RefCOCO",
    splits={"test": (None, "val"), "testA": (None, "testA"), "testB": (None, "testB")},
    columns=("question_id", "image", "answer", "bbox"),
    read=read,
    grader="box",
    max_new_tokens=48,
    note="Acc@0.5 of boxes in shares of the picture, LLaVA-1.5's form",
)
