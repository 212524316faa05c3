"""Fewer visual tokens for LLaVA-1.5, in plain transformers code.

    python examples/llava_1_5.py llava-hf/llava-1.5-7b-hf a.png b.png --question "What is shown?"
    python examples/llava_1_5.py llava-hf/llava-1.5-7b-hf a.png --pruner my/policy --budget 64

One question about each picture, as a batch. The published weights could not be had where this was
written, so it has not been run on them; the tests run it on random weights of the same format.
"""

from __future__ import annotations

import argparse

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tprl_env.inference import TokenPruner
from tprl_env.reducers import make_reducer


def amount(text: str) -> int | float:
    """A count of tokens, or a share such as 0.2."""
    return float(text) if "." in text else int(text)


def main(arguments: list[str] | None = None) -> list[str]:
    """Answer, and print how many visual tokens each answer was given from."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("pictures", nargs="+")
    parser.add_argument("--question", default="What is shown in this picture?")
    parser.add_argument("--pruner", help="folder or hub id of a trained pruner; else DivPrune")
    parser.add_argument("--budget", type=amount, default=0.2, help="a count, or a share below 1")
    parser.add_argument("--beams", type=int, default=1)
    args = parser.parse_args(arguments)

    model = AutoModelForImageTextToText.from_pretrained(args.checkpoint)
    processor = AutoProcessor.from_pretrained(args.checkpoint)
    if args.pruner:
        pruner = TokenPruner.from_pretrained(args.pruner)
    else:
        pruner = TokenPruner(make_reducer("divprune"))

    text = f"USER: <image>\n{args.question} ASSISTANT:"
    pictures = [Image.open(path).convert("RGB") for path in args.pictures]
    inputs = processor(
        images=pictures, text=[text] * len(pictures), return_tensors="pt", padding=True
    )
    pruned = pruner.prune(model, inputs.to(model.device), budget=args.budget)
    written = model.generate(**pruned, max_new_tokens=40, do_sample=False, num_beams=args.beams)

    new = written[:, pruned["input_ids"].shape[1] :]
    answers: list[str] = processor.batch_decode(new, skip_special_tokens=True)
    for path, answer, keep in zip(args.pictures, answers, pruned.keep, strict=True):
        print(f"{path}: {keep.sum()} of {len(keep)} visual tokens: {answer.strip()}")
    return answers


if __name__ == "__main__":
    main()
