"""Small datasets in exactly the schema of each published benchmark."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Rows = list[dict[str, Any]]


def picture(number: int, size: tuple[int, int] = (60, 40)) -> Any:
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def gqa() -> Rows:
    return [
        {"id": f"20{n}", "imageId": f"n{n // 2}", "question": f"Is it {n}?", "isBalanced": True,
         "answer": "yes" if n % 2 else "no", "fullAnswer": "Yes.", "groups": {"global": None}}
        for n in range(4)
    ]  # fmt: skip


def gqa_pictures() -> Rows:
    return [{"id": f"n{n}", "image": picture(n)} for n in range(2)]


def vqa_v2() -> Rows:
    return [
        {"question_type": "what", "multiple_choice_answer": "red", "answer_type": "other",
         "answers": [{"answer": "red" if i < 4 else "blue", "answer_confidence": "yes",
                      "answer_id": i + 1} for i in range(10)],
         "image_id": 42 + n // 2, "question_id": 42000 + n, "question": "What color?",
         "image": picture(n // 2)}
        for n in range(3)
    ]  # fmt: skip


def textvqa() -> Rows:
    return [
        {"image_id": f"im{n}", "question_id": 34602 + n, "question": "what brand?",
         "question_tokens": ["what", "brand"], "image": picture(n), "image_width": 60,
         "image_height": 40, "ocr_tokens": ["nokia"], "set_name": "val",
         "answers": ["nokia"] * 9 + ["answering does not require reading text in the image"]}
        for n in range(2)
    ]  # fmt: skip


def vizwiz() -> Rows:
    return [
        {"question_id": f"VizWiz_val_{n:08}.jpg", "image": picture(n), "question": "What is this?",
         "answers": ["unanswerable"] * 10, "category": "unanswerable"} for n in range(2)
    ]  # fmt: skip


def pope() -> Rows:
    return [
        {"id": str(i), "question_id": str(n + 1), "question": "Is there a snowboard in the image?",
         "answer": "yes" if n % 2 else "no", "image_source": f"COCO_val2014_{n:012}",
         "image": picture(n), "category": category}
        for i, (category, n) in enumerate(
            (c, n) for c in ("adversarial", "popular", "random") for n in range(2))
    ]  # fmt: skip


def mme() -> Rows:
    return [
        {"question_id": f"{category}/00{n}.png", "image": picture(n),
         "question": f"Is this a {turn}? Please answer yes or no.",
         "answer": "Yes" if turn else "No", "category": category}
        for category in ("existence", "code_reasoning") for n in range(2) for turn in range(2)
    ]  # fmt: skip


def mmbench() -> Rows:
    return [
        {"index": 241 + 1_000_000 * turn, "question": "Which is it?", "hint": "nan", "A": "cat",
         "B": "dog", "C": "nan" if turn else "bird", "D": "nan", "answer": "AB"[turn],
         "category": "object_localization", "image": picture(0), "source": "coco",
         "L2-category": "finegrained_perception", "comment": "nan", "split": "dev"}
        for turn in range(2)
    ]  # fmt: skip


def seed_bench() -> Rows:
    shared = {"question": "How many towels?", "choice_a": "One", "choice_b": "Two",
              "choice_c": "Three", "choice_d": "Four", "answer": "A", "data_source": "cc3m",
              "question_type_id": 5, "segment": None}  # fmt: skip
    return [
        {**shared, "question_id": "101669", "data_type": "image", "data_id": "1",
         "image": [picture(0)]},
        {**shared, "question_id": "v1", "data_type": "video", "data_id": "v",
         "image": [picture(1), picture(2)]},
    ]  # fmt: skip


def science_qa() -> Rows:
    return [
        {"image": picture(n), "question": "Which is farther north?", "answer": n % 2, "hint": "",
         "choices": ["Ohio", "Georgia"], "task": "closed choice", "grade": "grade2",
         "subject": "social science", "topic": "geography", "category": "Geography",
         "skill": "Read a map", "lecture": "", "solution": ""} for n in range(3)
    ]  # fmt: skip


def ai2d() -> Rows:
    return [
        {"question": "which of these define dairy item", "options": ["c", "D", "b", "a"],
         "answer": "1", "image": picture(n)} for n in range(2)
    ]  # fmt: skip


def mathvista() -> Rows:
    shared = {"image": "images/1.jpg", "unit": None, "precision": 1.0, "query": "Hint: ...",
              "metadata": {"task": "figure question answering"}}  # fmt: skip
    return [
        {**shared, "pid": "1", "question": "How long?", "decoded_image": picture(0),
         "choices": None, "answer": "1.2", "question_type": "free_form", "answer_type": "float"},
        {**shared, "pid": "2", "question": "Which?", "decoded_image": picture(1),
         "choices": ["red", "blue"], "answer": "red", "question_type": "multi_choice",
         "answer_type": "text"},
    ]  # fmt: skip


def refcoco() -> Rows:
    return [
        {"question_id": str(n), "image": picture(n), "answer": ["left cup", "cup near the edge"],
         "question": "Please carefully observe the area ...", "segmentation": [1.0, 2.0],
         "bbox": [6.0, 10.0, 30.0, 20.0], "iscrowd": 0, "file_name": f"{n}.jpg"} for n in range(2)
    ]  # fmt: skip


def flickr30k() -> Rows:
    return [
        {"image": picture(n), "caption": [f"a dog number {n} runs", "a dog on grass"],
         "sentids": ["0", "1"], "img_id": str(n), "filename": f"{n}.jpg"} for n in range(3)
    ]  # fmt: skip


ROWS: dict[str, Callable[[], Rows]] = {
    **{"gqa": gqa, "vqa_v2": vqa_v2, "textvqa": textvqa, "vizwiz": vizwiz, "pope": pope},
    **{"mme": mme, "mmbench": mmbench, "seed_bench": seed_bench, "science_qa": science_qa},
    **{"ai2d": ai2d, "mathvista": mathvista, "refcoco": refcoco, "flickr30k": flickr30k},
}


def table(rows: Rows) -> Any:
    """As the hub's: picture columns hold encoded files and are opened as pictures."""
    from datasets import Dataset, Features, Image, List

    found = Dataset.from_list([{k: v for k, v in row.items() if not _pictures(v)} for row in rows])
    for name, value in rows[0].items():
        if not _pictures(value):
            continue
        kind = List(Image()) if isinstance(value, list) else Image()
        column = Dataset.from_dict({name: [row[name] for row in rows]},
                                   features=Features({name: kind}))  # fmt: skip
        from datasets import concatenate_datasets

        found = concatenate_datasets([found, column], axis=1)
    return found


def _pictures(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, Image.Image)


def save(name: str, folder: Path, split: str = "test", form: str = "disk") -> Path:
    """Write a benchmark's copy as ``save_to_disk`` or as the hub's parquet files."""
    from datasets import DatasetDict

    from tprl_env.data.benchmarks import BENCHMARKS

    known = BENCHMARKS[name]
    parts = [(known.splits[split][0], ROWS[name]())]
    if split in known.pictures_from:
        parts.append((known.pictures_from[split], gqa_pictures()))
    own = known.splits[split][1]
    for config, rows in parts:
        place = folder / config if config else folder
        if form == "disk":
            DatasetDict({own: table(rows)}).save_to_disk(str(place))
        else:
            place.mkdir(parents=True, exist_ok=True)
            table(rows).to_parquet(str(place / f"{own}-00000-of-00001.parquet"))
    return folder
