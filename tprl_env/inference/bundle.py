"""A policy in a folder or on the hub, with all that belongs to it.

    config.json, model.safetensors   the policy, as `PruningPolicy.save_pretrained` writes it
    autoencoder/                     the autoencoder whose codes it looks at
    pruner.json                      settings, default budget, the template around a question, what
                                     it was trained on, and the sha256 of the files above
    README.md                        the model card

No pickle. `pruner.json` is written last, so a folder counts once all of it is there.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tprl_env.checks import check_fields, quoted
from tprl_env.data.features.manifest import check_seal, file_sha256, seal
from tprl_env.env.budgets import check_budget
from tprl_env.files import write_json, write_text
from tprl_env.inference.card import model_card
from tprl_env.inference.origin import Origin
from tprl_env.policy.autoencoder import TokenAutoencoder
from tprl_env.policy.network import PruningPolicy
from tprl_env.policy.pruner import PolicyPruner

if TYPE_CHECKING:
    from tprl_env.inference.token_pruner import TokenPruner

PRUNER_NAME = "pruner.json"
CARD_NAME = "README.md"
AUTOENCODER = "autoencoder"
FORMAT = "tprl-token-pruner"
VERSION = 1
FILES = (
    *("config.json", "model.safetensors"),
    *(f"{AUTOENCODER}/config.json", f"{AUTOENCODER}/model.safetensors"),
)
SETTINGS = ("mode", "threshold", "steps", "redundancy_penalty", "discount")
_FIELDS = ("format", "version", "settings", "budget", "question", "origin", "files")
_CURE = "copy or download the folder again, or save the pruner again"


def save_bundle(pruner: TokenPruner, folder: Path, *, license: str | None = None) -> Path:
    """Write a bundle; see :meth:`TokenPruner.save_pretrained`."""
    return _write(pruner, folder, str(folder), license)


def _write(pruner: TokenPruner, folder: Path, name: str, license: str | None) -> Path:
    policy, origin, question = pruner.reducer, pruner.origin, pruner.question
    if not isinstance(policy, PolicyPruner) or pruner.autoencoder is None:
        raise ValueError(
            f"only a policy has something to save; {policy.name!r} is made again by "
            f"make_reducer({policy.name!r})"
        )
    if origin is None or question is None:
        raise ValueError(
            "it is not known what the policy was trained on, so nobody could tell where it may be "
            "used; make the pruner with TokenPruner.from_run(run)"
        )
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder")
    (folder / PRUNER_NAME).unlink(missing_ok=True)  # until all files are of this save
    policy.policy.save_pretrained(folder)
    pruner.autoencoder.save_pretrained(folder / AUTOENCODER)
    settings = {one: getattr(policy, one) for one in SETTINGS}
    write_text(folder / CARD_NAME, model_card(name, origin, settings, pruner.budget, license))
    content = {
        "format": FORMAT,
        "version": VERSION,
        "settings": settings,
        "budget": pruner.budget,
        "question": {"before": list(question.before), "behind": list(question.behind)},
        "origin": origin.as_dict(),
        "files": {one: file_sha256(folder / one) for one in FILES},
    }
    write_json(folder / PRUNER_NAME, seal(content))
    return folder


def load_bundle(
    source: str | Path, revision: str | None, settings: Mapping[str, Any]
) -> TokenPruner:
    """Read a bundle; see :meth:`TokenPruner.from_pretrained`."""
    from tprl_env.inference.token_pruner import TokenPruner
    from tprl_env.lvlm.processed.question import QuestionFrame

    folder = _fetch(source, revision)
    content = read_record(folder)
    where = str(folder / PRUNER_NAME)
    for name, wanted in content["files"].items():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; {_CURE}")
        if file_sha256(path) != wanted:
            raise ValueError(
                f"{path} is not the file that was saved with {PRUNER_NAME} (their sha256 differ); "
                f"{_CURE}"
            )
    policy = PruningPolicy.from_pretrained(folder)
    fields = {"policy": policy, **content["settings"], **settings}
    check_fields("PolicyPruner", PolicyPruner, fields)
    question = content["question"]
    return TokenPruner(
        PolicyPruner(**fields),
        TokenAutoencoder.from_pretrained(folder / AUTOENCODER),
        content["budget"],
        QuestionFrame(tuple(question["before"]), tuple(question["behind"])),
        Origin.from_dict(content["origin"], where),
    )


def read_record(folder: Path) -> dict[str, Any]:
    """``pruner.json``, checked.

    Raises:
        FileNotFoundError: It is missing.
        ValueError: It is damaged, or of a later version.
    """
    path = folder / PRUNER_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {PRUNER_NAME}, so it is no pruner that was saved whole; "
            f"TokenPruner.from_run(run).save_pretrained(folder) makes one of a training run"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no valid JSON ({error}); {_CURE}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} must describe a {FORMAT}, got {quoted(content)}; {_CURE}")
    if content.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {quoted(content.get('version'))}, this release reads {VERSION}; "
            f"install the release of tprl-env that wrote it"
        )
    if missing := [name for name in _FIELDS if name not in content]:
        raise ValueError(f"{path} lacks {', '.join(missing)}; {_CURE}")
    check_seal(path, content, _CURE)
    _check_parts(path, content)
    return content


def _check_parts(path: Path, content: Mapping[str, Any]) -> None:
    """Refuse what a correct seal can still hold: a file written by somebody else's hand."""
    question, files, settings = content["question"], content["files"], content["settings"]
    ids = [question.get(name) for name in ("before", "behind")] if _is_object(question) else [None]
    if not all(isinstance(part, list) and all(map(_is_count, part)) for part in ids):
        raise ValueError(f"{path}: question must hold two lists of ids, got {quoted(question)}")
    if not _is_object(files) or set(files) != set(FILES):
        raise ValueError(f"{path}: files must be {', '.join(FILES)}, got {quoted(files)}")
    if not _is_object(settings) or set(settings) != set(SETTINGS):
        raise ValueError(f"{path}: settings must be {', '.join(SETTINGS)}, got {quoted(settings)}")
    if content["budget"] is not None:
        check_budget(content["budget"])


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < math.inf


def _fetch(source: str | Path, revision: str | None) -> Path:
    """The folder of a bundle; downloads it where ``source`` is a hub id."""
    from tprl_env.lvlm.loading.checkpoint import is_local

    if isinstance(source, Path) or is_local(source):
        folder = Path(source).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{str(source)!r} is no folder; give one that save_pretrained wrote, or a hub id "
                f"'owner/name'"
            )
        if revision is not None:
            raise ValueError("revision is for hub repositories; a folder has one content")
        return folder
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        got = huggingface_hub.snapshot_download(
            str(source), revision=revision, allow_patterns=[*FILES, PRUNER_NAME]
        )
    except (OSError, HfHubHTTPError) as error:
        raise FileNotFoundError(
            f"{str(source)!r} is neither an existing folder nor a reachable hub repository "
            f"({type(error).__name__}); check the name, the revision and the network"
        ) from error
    return Path(got)


def push_bundle(
    pruner: TokenPruner,
    repo_id: str,
    private: bool,
    license: str | None,
    upload: Mapping[str, Any],
) -> str:
    """Write a bundle and upload it; see :meth:`TokenPruner.push_to_hub`."""
    import huggingface_hub

    huggingface_hub.utils.validate_repo_id(repo_id)
    if repo_id.count("/") != 1:
        raise ValueError(f"a hub repository is named 'owner/name', got {repo_id!r}")
    with tempfile.TemporaryDirectory() as place:
        folder = _write(pruner, Path(place), repo_id, license)
        api = huggingface_hub.HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        options = {"commit_message": "Upload token pruner", **upload}
        done = api.upload_folder(repo_id=repo_id, folder_path=folder, **options)
    return str(getattr(done, "commit_url", done))
