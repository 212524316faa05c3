"""The journal of a running encoding, and the manifest at its end.

A store is written in *units*. A unit is a run of samples with the images that appear in it for
the first time: ``images-<k>.arrow`` and ``samples-<k>.arrow``. The journal (``encoding.json``)
lists the finished units, so that an interrupted encoding continues behind the last of them, and
so does one whose dataset has grown. What continues is decided by the content of the samples, not
by the name of the dataset.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tprl_env.data.features.arrow import ArrowRows
from tprl_env.data.features.channels import remove_channels
from tprl_env.data.features.manifest import (
    JOURNAL_NAME,
    MANIFEST_NAME,
    PACKAGES,
    SEAL,
    FileEntry,
    Manifest,
    StoreError,
    check_file,
    check_seal,
    default_verify,
    read_json,
    seal,
)
from tprl_env.data.sample import Sample
from tprl_env.files import LOCK_NAME, versions, write_json

logger = logging.getLogger(__name__)

START_OVER = "start over with resume=False"
_OWN_FILES = re.compile(
    r"\.?((images|samples)-\d+\.arrow|channel-[a-z0-9_]+\.(arrow|json|raw\.tmp)|manifest\.json|"
    r"encoding\.json|skipped\.jsonl)(-\d+\.tmp)?"
)

Skipped = dict[str, str]
"""A sample that was left out: its ``id`` and the ``reason``."""

COMPUTING = {
    "dtype": "with that one (dtype={})",
    "image_backend": "where transformers prepares pictures with {} (torchvision, if installed)",
}
"""How an LVLM computed, beside what it is, and how to continue with the same."""


@dataclass(frozen=True)
class UnitEntry:
    """A finished unit: its two files, the dataset hash behind its last sample, what it skipped."""

    images: FileEntry
    samples: FileEntry
    dataset: str
    skipped: tuple[Skipped, ...] = ()

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> UnitEntry:
        """Read what ``dataclasses.asdict`` wrote."""
        images, samples = (FileEntry(**content[name]) for name in ("images", "samples"))
        return cls(images, samples, content["dataset"], tuple(content.get("skipped", ())))


def unit_names(unit: int) -> tuple[str, str]:
    """Return the file names of a unit."""
    return f"images-{unit:05d}.arrow", f"samples-{unit:05d}.arrow"


@dataclass
class Journal:
    """The state of an encoding, finished or not.

    Attributes:
        folder: The store's folder.
        dataset: Description of the samples; a name for readers, never compared.
        settings: What decides how samples fall into units and what is stored.
        lvlm: Identity of the LVLM; empty until known.
        units: The finished units in order.
    """

    folder: Path
    dataset: str
    settings: dict[str, Any]
    lvlm: dict[str, Any] = field(default_factory=dict)
    units: list[UnitEntry] = field(default_factory=list)

    @classmethod
    def start(
        cls, folder: Path, dataset: str, settings: dict[str, Any], *, resume: bool
    ) -> Journal:
        """Start or continue an encoding.

        Raises:
            StoreError: The folder holds something else, was started with other settings, or
                files of finished units are damaged.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / JOURNAL_NAME
        if not resume and path.is_file():
            _clear(folder)
            return cls(folder, dataset, settings)
        if not path.is_file():
            leftovers = [
                p.name
                for p in folder.iterdir()
                if not p.name.endswith(".tmp") and p.name != LOCK_NAME
            ]
            if leftovers and not all(p.startswith(("images-", "samples-")) for p in leftovers):
                raise StoreError(
                    f"{folder} is not empty and no encoding was started there (it holds "
                    f"{sorted(leftovers)[0]!r}); choose an empty or new folder"
                )
            return cls(folder, dataset, settings)
        content = read_json(path)
        check_seal(path, content, START_OVER)
        if unknown := content.keys() - {"dataset", "settings", "lvlm", "units", SEAL}:
            raise StoreError(f"{path} is damaged (fields {sorted(unknown)}); {START_OVER}")
        try:
            units = [UnitEntry.from_json(entry) for entry in content["units"]]
            journal = cls(folder, dataset, content["settings"], content["lvlm"], units)
        except (KeyError, TypeError) as error:
            raise StoreError(f"{path} is damaged (field {error}); {START_OVER}") from error
        for name, wanted in settings.items():
            found = journal.settings.get(name)
            if found != wanted:
                raise StoreError(
                    f"{folder} was started with {name} {found!r}, not {wanted!r}; continue with "
                    f"that, {START_OVER}, or choose another folder"
                )
        for number, unit in enumerate(units):
            for name, entry in zip(unit_names(number), (unit.images, unit.samples), strict=True):
                check_file(folder / name, entry, verify=default_verify(), cure=START_OVER)
        return journal

    def identify(self, lvlm: dict[str, Any]) -> None:
        """Set the LVLM's identity, or compare it with the one that started the encoding.

        Raises:
            StoreError: Another LVLM started it, or the same in another number type or with
                another image backend, whose features must not stand in one store.
        """
        if not self.lvlm:
            self.lvlm = lvlm
            return
        skipped = set(COMPUTING)
        if not self.lvlm.get("model_type"):  # not recorded by the first releases
            skipped.add("model_type")
        before = {k: v for k, v in self.lvlm.items() if k not in skipped}
        if before != {k: v for k, v in lvlm.items() if k not in skipped}:
            raise StoreError(
                f"{self.folder} was started with the LVLM {self.lvlm['name']} (fingerprint "
                f"{self.lvlm['fingerprint']}), not {lvlm['name']} ({lvlm['fingerprint']}); "
                f"continue with that one, {START_OVER}, or choose another folder"
            )
        if not any(self.lvlm.get(name) for name in COMPUTING):
            if (self.folder / MANIFEST_NAME).is_file():
                return  # finished: nothing will be added to it
            raise StoreError(
                f"{self.folder} was started by a release that did not record the number type, so "
                f"it cannot be continued without mixing two; {START_OVER}, or choose another folder"
            )
        for name, cure in COMPUTING.items():
            found, given = self.lvlm.get(name, ""), lvlm.get(name, "")
            if found != given:
                raise StoreError(
                    f"{self.folder} was started with {name} {found!r}, not {given!r}; continue "
                    f"{cure.format(found)}, {START_OVER}, or choose another folder"
                )

    @property
    def cuts(self) -> list[int]:
        """Samples of each finished unit: the same data is cut there again, also with more of it.

        Those that the LVLM could not be asked belong to a unit, though it has no rows of them.
        """
        return [unit.samples.rows + len(unit.skipped) for unit in self.units]

    def check(self, unit: int, dataset_hash: str, first: str, last: str) -> None:
        """Compare the samples of a finished unit with those given now.

        Args:
            unit: Number of the unit.
            dataset_hash: Hash of the given samples up to its end.
            first: Id of its first sample, for the message.
            last: Id of its last one.

        Raises:
            StoreError: They are other samples.
        """
        if self.units[unit].dataset != dataset_hash:
            raise StoreError(
                f"{self.folder} was started with other samples than the given ones (they differ "
                f"in unit {unit}, from {first!r} to {last!r}); samples may be added at the end "
                f"only: continue with the same, {START_OVER}, or choose another folder"
            )

    def commit(self, entry: UnitEntry) -> None:
        """Record that the next unit is finished; its files must be in place."""
        self.units.append(entry)
        content = {
            "dataset": self.dataset,
            "settings": self.settings,
            "lvlm": self.lvlm,
            "units": [asdict(unit) for unit in self.units],
        }
        write_json(self.folder / JOURNAL_NAME, seal(content))

    def rows(self, which: int) -> ArrowRows:
        """Open the finished units' images (0) or samples (1)."""
        names = [unit_names(k)[which] for k in range(len(self.units))]
        entries = [(unit.images, unit.samples)[which] for unit in self.units]
        return ArrowRows([self.folder / n for n in names], [e.rows for e in entries])

    @property
    def skipped(self) -> list[Skipped]:
        """What the finished units left out."""
        return [one for unit in self.units for one in unit.skipped]

    def finish(self, units: int, skipped: int) -> None:
        """Write the manifest; the store is complete from here on.

        A manifest of the same samples stays as it is, whatever the dataset is called by now.
        Channels of fewer samples are removed, because they say nothing about the new ones.

        Args:
            units: Number of units there are.
            skipped: Samples left out, here and while reading.

        Raises:
            StoreError: There are no samples, or fewer than were encoded before.
        """
        if not self.units:
            raise StoreError("there are no samples to encode; check the dataset and its filters")
        if not any(unit.samples.rows for unit in self.units):
            first = self.skipped[0]["reason"]
            _clear(self.folder)
            raise StoreError(f"every sample was left out, the first because: {first}")
        if units != len(self.units):
            raise StoreError(
                f"{self.folder} holds more samples than the given ones; {START_OVER} or choose "
                f"another folder"
            )
        images, samples = self.rows(0), self.rows(1)
        files: dict[str, FileEntry] = {}
        for number, unit in enumerate(self.units):
            files.update(zip(unit_names(number), (unit.images, unit.samples), strict=True))
        counts = images.vector("count")
        manifest = Manifest(
            lvlm=self.lvlm["name"],
            lvlm_fingerprint=self.lvlm["fingerprint"],
            model_type=self.lvlm["model_type"],
            dataset=self.dataset,
            dataset_fingerprint=self.units[-1].dataset,
            samples=len(samples),
            images=len(images),
            max_tokens=int(counts.max()),
            max_question_tokens=int(samples.vector("question_tokens").max()),
            token_width=self.lvlm["token_width"],
            tower_width=len(images.view("tower", 0)) // int(counts[0]),
            query_width=self.lvlm["query_width"],
            skipped=skipped,
            files=files,
            packages=versions(PACKAGES),
            dtype=self.lvlm.get("dtype", ""),
            image_backend=self.lvlm.get("image_backend", ""),
        )
        if (self.folder / MANIFEST_NAME).is_file():
            before = Manifest.read(self.folder)
            same = before.dataset_fingerprint == manifest.dataset_fingerprint
            if same and before.files == manifest.files:
                return
            for cure in remove_channels(self.folder):
                logger.warning("made for fewer samples and removed: %s", cure)
        manifest.write(self.folder)


def _clear(folder: Path) -> None:
    """Remove what an encoding wrote, the manifest first and the journal last, nothing else."""
    own = [path for path in folder.iterdir() if _OWN_FILES.fullmatch(path.name)]
    order = {MANIFEST_NAME: 0, JOURNAL_NAME: 2}
    for path in sorted(own, key=lambda path: order.get(path.name, 1)):
        path.unlink()


class DatasetHash:
    """Running hash over samples in order: ids, texts and pictures."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256(b"samples v1")

    def add(self, sample: Sample, picture_digest: bytes) -> None:
        """Add one sample."""
        texts: Iterable[str] = (
            *(sample.id, sample.image_id, sample.question_type, sample.grader),
            *(sample.question, *sample.answers),
        )  # fmt: skip
        for text in texts:
            data = text.encode()
            self._hash.update(len(data).to_bytes(8, "little") + data)
        self._hash.update(picture_digest)
        if sample.relevance is not None:
            self._hash.update(np.ascontiguousarray(sample.relevance, np.float32).tobytes())

    def digest(self) -> str:
        """Return the hash of everything added so far."""
        return self._hash.copy().hexdigest()[:32]


def picture_digest(*pictures: npt.NDArray[np.uint8]) -> bytes:
    """Return a digest of the shapes and pixels of a sample's pictures, in order."""
    parts = []
    for picture in pictures:
        digest = hashlib.blake2b(repr(picture.shape).encode(), digest_size=16)
        digest.update(np.ascontiguousarray(picture).data)
        parts.append(digest.digest())
    if len(parts) == 1:
        return parts[0]
    return hashlib.blake2b(b"".join(parts), digest_size=16).digest()
