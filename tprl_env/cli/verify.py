"""`tprl verify`: every artefact of this package below a path, each read in full."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tprl_env.files import JsonLog

__all__ = ["add_verify", "verify_path"]

_LOGS = ("metrics.jsonl", "skipped.jsonl", "learning_curve.jsonl")
_MARK = ".whole.json"
Check = tuple[Path, str, Callable[[Path], str]]


def add_verify(commands: Any) -> None:
    """Add the command."""
    sub = commands.add_parser(
        "verify",
        help="read and check every file of a store, dataset, policy, run, result or LVLM folder",
    )
    sub.add_argument(
        "path",
        type=Path,
        help="a .jsonl dataset, a results.json, or a folder; folders in it are checked too",
    )
    sub.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    found = verify_path(args.path.expanduser(), say=print)
    print(f"{found} {'artefact is' if found == 1 else 'artefacts are'} whole")
    return 0


def verify_path(path: Path, say: Callable[[str], object] = lambda line: None) -> int:
    """Check an artefact and every one in the folders below it.

    Args:
        path: A file or folder.
        say: Gets one line per artefact.

    Returns:
        How many were found, all of them whole.

    Raises:
        ValueError: One is damaged, or nothing is there that this package writes or reads.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a file or folder to verify")
    checks = list(_find(path))
    if not checks:
        raise ValueError(
            f"{path} holds nothing that can be verified: no .jsonl dataset, feature store, policy, "
            f"autoencoder, run, results or LVLM"
        )
    bad = []
    for place, name, check in checks:
        try:
            say(f"ok       {place}: {name}, {check(place)}")
        except (ValueError, OSError, RecursionError) as error:  # the last: brackets in brackets
            reason = " ".join(str(error).split())
            say(f"DAMAGED  {place}: {name}, {reason}")
            bad.append(reason)
    if bad:
        more = f" (and {len(bad) - 1} more, listed above)" if len(bad) > 1 else ""
        raise ValueError(f"{len(bad)} of {len(checks)} artefacts are damaged: {bad[0]}{more}")
    return len(checks)


def _modules() -> dict[object, tuple[str, Callable[[Path], str]]]:
    """Saved modules, by the kind that their config.json names."""
    return {
        "pruning-policy": ("policy", _check_policy),
        "count-head": ("count head", _check_head),
        "token-autoencoder": ("autoencoder", _check_autoencoder),
    }


def _find(path: Path) -> Iterator[Check]:
    if path.is_file():
        yield from _find_file(path)
        return
    names = {entry.name for entry in path.iterdir()}
    config = _config(path) if "config.json" in names else {}
    if names & {"manifest.json", "encoding.json"}:
        yield path, "feature store", _check_store
    elif config.get("kind") in (kinds := _modules()):
        yield path, *kinds[config["kind"]]
    elif "model_type" in config:
        yield path, "LVLM", _check_lvlm
        return  # its other files are described by others
    elif "model.safetensors" in names:
        yield path, "weights", _check_unnamed
    elif "run.json" in names:
        yield path, "run", _check_run
    for entry in sorted(path.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            yield from _find(entry)
        elif entry.name.endswith(_MARK):
            yield entry, "folder of a checkpoint", _check_marked
        elif entry.name in (*_LOGS, "results.json") or entry.suffix == ".jsonl":
            yield from _find_file(entry)


def _find_file(path: Path) -> Iterator[Check]:
    if path.name in _LOGS:
        yield path, "log", _check_log
    elif path.suffix == ".jsonl":
        yield path, "dataset", _check_dataset
    elif path.suffix == ".json":
        yield path, "results", _check_results


def _config(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):  # said when the artefact itself is read
        return {}
    return content if isinstance(content, dict) else {}


def _check_store(path: Path) -> str:
    from tprl_env.data.features.store import FeatureStore

    store = FeatureStore.open(path, verify="checksums")
    for sample in range(len(store)):
        store.pictures(sample), store.picture_box(sample)
    return (
        f"{len(store)} samples about {store.num_images} images in {len(store.manifest.files)} "
        f"files, fingerprint {store.fingerprint}"
    )


def _digest_note(path: Path) -> str:
    from tprl_env.policy.weights import has_digest

    return "" if has_digest(path) else "; saved by a release that wrote no checksum"


def _check_policy(path: Path) -> str:
    from tprl_env.policy.network import PruningPolicy

    policy = PruningPolicy.from_pretrained(path)
    return f"{sum(p.numel() for p in policy.parameters())} weights{_digest_note(path)}"


def _check_head(path: Path) -> str:
    from tprl_env.policy.counts import CountHead
    from tprl_env.policy.network import PruningPolicy

    head = CountHead.from_pretrained(path, PruningPolicy.from_pretrained(path.parent))
    return f"counts {', '.join(map(str, head.config.counts))}{_digest_note(path)}"


def _check_autoencoder(path: Path) -> str:
    from tprl_env.policy.autoencoder import TokenAutoencoder

    return f"code width {TokenAutoencoder.from_pretrained(path).code_width}{_digest_note(path)}"


def _check_unnamed(path: Path) -> str:
    raise ValueError(
        f"{path} holds weights, but its config.json does not say of what: it is missing or damaged"
    )


def _check_lvlm(path: Path) -> str:
    from tprl_env.lvlm.loading.checkpoint import folder_fingerprint
    from tprl_env.lvlm.loading.weights import check_weight_files

    count = check_weight_files(path)
    return (
        f"{count} finite weights, fingerprint {folder_fingerprint(path)} (checkpoints hold no "
        f"checksums: compare it with the one that a store records)"
    )


def _check_run(path: Path) -> str:
    for name in ("config.json", "run.json"):
        try:
            json.loads((path / name).read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            raise ValueError(f"{path / name} is damaged or unreadable ({error})") from error
    return "config and starts are readable"


def _check_marked(mark: Path) -> str:
    from tprl_env.data.features.manifest import file_sha256

    folder = mark.with_name(mark.name.removesuffix(_MARK))
    try:
        files = json.loads(mark.read_text(encoding="utf-8"))["files"]
        wanted = {str(name): str(entry["sha256"]) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{mark} is damaged ({error})") from error
    for name, digest in wanted.items():
        if file_sha256(folder / name) != digest:
            raise ValueError(f"{folder / name} does not have its recorded checksum: bytes changed")
    return f"{len(wanted)} files"


def _check_log(path: Path) -> str:
    return f"{len(JsonLog(path).read())} rows"


def _check_dataset(path: Path) -> str:
    from tprl_env.data import JsonlDataset

    dataset = JsonlDataset(path, skip_bad=True, allow_outside=True)
    count = sum(1 for _ in dataset)
    if dataset.skipped:
        raise ValueError(f"{len(dataset.skipped)} samples are bad: {dataset.skipped[0]}")
    return f"{count} samples, every picture readable"


def _check_results(path: Path) -> str:
    from tprl_env.evaluation.result_files import read_results

    try:
        return f"{len(read_results(path, ())['methods'])} rows"
    except (TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error
