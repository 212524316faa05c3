"""Channels: arrays per visual token that are added to a finished feature store.

A channel is ``channel-<name>.arrow`` plus ``channel-<name>.json``; the JSON file is written last
and removed first, so a half-written channel is one that does not exist.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from tprl_env.data.features.arrow import ArrowRows, write_arrow
from tprl_env.data.features.manifest import (
    SEAL,
    FileEntry,
    Manifest,
    StoreError,
    Verify,
    check_file,
    check_numbers,
    check_seal,
    describe_file,
    read_json,
    seal,
)
from tprl_env.data.features.validation import check_channel
from tprl_env.files import write_json

CURES = {
    "codes": "run `tprl autoencoder {store}`",
    "question_attention": "run the same `tprl encode` again with --question-attention",
    "question_rows": "run the same `tprl encode` again with --question-rows",
}
_FIELDS = {"name", "store", "per", "width", "meta", "file", SEAL}


@dataclass(frozen=True)
class Channel:
    """One opened channel.

    Attributes:
        per: ``"image"`` or ``"sample"``.
        width: Numbers per token; 0 for a plain ``(n,)`` channel.
        meta: What the writer said about it.
        file: Recorded size and digest.
        rows: The mapped values.
    """

    per: str
    width: int
    meta: dict[str, Any]
    file: FileEntry
    rows: ArrowRows

    def array(self, index: int) -> npt.NDArray[np.float32]:
        """Return one array, ``(n,)`` or ``(n, width)``."""
        values = self.rows.view("values", index).astype(np.float32)
        return values.reshape(-1, self.width) if self.width else values


def find_channel(channels: Mapping[str, Channel], name: str, store: Path) -> Channel:
    """Return a channel.

    Raises:
        StoreError: It was not written; the message names the cure.
    """
    if name in channels:
        return channels[name]
    cure = CURES.get(name, "write it with FeatureStore.write_channel").format(store=store)
    raise StoreError(f"the feature store {store} has no {name!r}; {cure}")


def check_codes(codes: Channel, fingerprint: str, store: Path) -> None:
    """Compare the autoencoder behind a store's codes with the wanted one.

    Raises:
        StoreError: It is another one.
    """
    found = codes.meta.get("fingerprint")
    if found != fingerprint:
        raise StoreError(
            f"the feature store {store} holds codes of the autoencoder {found}, but this use "
            f"needs those of {fingerprint}; run `tprl autoencoder {store} --load` with its folder"
        )


def load_channels(
    folder: Path, manifest: Manifest, counts: Mapping[str, npt.NDArray[Any]], *, verify: Verify
) -> dict[str, Channel]:
    """Open every finished channel of a store.

    Args:
        folder: The store.
        manifest: Its manifest.
        counts: Visual tokens of each ``"image"`` and of each ``"sample"``.
        verify: How files are checked.

    Raises:
        StoreError: A channel is damaged or belongs to another store.
    """
    channels = {}
    for path in sorted(folder.glob("channel-*.json")):
        content = read_json(path)
        cure = f"delete {path.name} and write the channel again"
        check_seal(path, content, cure)
        if unknown := content.keys() - _FIELDS:
            raise StoreError(f"{path} is damaged: unknown fields {sorted(unknown)}; {cure}")
        data = path.with_suffix(".arrow")
        try:
            entry = FileEntry(**content["file"])
            name, store = content["name"], content["store"]
            width, per, meta = content["width"], content["per"], content["meta"]
            check_numbers(path, content, ("width",), cure)
            check_numbers(path, content["file"], ("rows", "bytes"), cure)
            known = per in counts and isinstance(meta, dict)
        except (KeyError, TypeError) as error:
            raise StoreError(f"{path} is damaged (field {error}); {cure}") from error
        if store != manifest.fingerprint:
            raise StoreError(
                f"{path} belongs to another feature store ({store}, this one is "
                f"{manifest.fingerprint}); {cure}"
            )
        if name != path.stem.removeprefix("channel-") or not known:
            raise StoreError(f"{path} is damaged: its name, per or meta is another's; {cure}")
        check_file(data, entry, verify=verify, cure=cure)
        rows = ArrowRows([data], [entry.rows])
        check_channel(data, rows, width, counts[per], cure)
        channels[name] = Channel(per, width, meta, entry, rows)
    return channels


def remove_channels(folder: Path) -> list[str]:
    """Remove every channel of a store.

    Returns:
        What each was and how to write it again.
    """
    removed = []
    for path in sorted(folder.glob("channel-*.json")):
        name = path.stem.removeprefix("channel-")
        path.unlink()
        path.with_suffix(".arrow").unlink(missing_ok=True)
        cure = CURES.get(name, "write it with FeatureStore.write_channel").format(store=folder)
        removed.append(f"{name} of {folder}; {cure}")
    return removed


def write_channel(
    folder: Path,
    manifest: Manifest,
    name: str,
    arrays: Iterable[npt.ArrayLike],
    counts: npt.NDArray[Any],
    label: Callable[[int], str],
    per: str,
    meta: dict[str, Any],
    dtype: str,
) -> None:
    """Write a channel; see ``FeatureStore.write_channel``.

    The values go to a plain temporary file first and from there, memory-mapped, into one Arrow
    batch: memory stays small and later gathers are one call on one array.

    Raises:
        StoreError: The name, an array's shape or values, or the number of arrays is wrong.
    """
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise StoreError(f"channel name {name!r} must be small letters, digits and underscores")
    if per not in ("image", "sample"):
        raise StoreError(f"channel {name!r}: per must be 'image' or 'sample', got {per!r}")
    if dtype not in ("float16", "float32"):
        raise StoreError(f"channel {name!r}: dtype must be float16 or float32, got {dtype!r}")
    try:
        json.dumps(meta)
    except TypeError as error:
        raise StoreError(f"channel {name!r}: meta must hold JSON values ({error})") from error
    data = folder / f"channel-{name}.arrow"
    description = data.with_suffix(".json")
    raw = data.with_suffix(".raw.tmp")
    try:
        with open(raw, "wb") as stream:
            width = _write_raw(stream, name, arrays, counts, label, per, dtype)
        description.unlink(missing_ok=True)
        rows = _raw_to_arrow(raw, data, counts, width, dtype)
    finally:
        raw.unlink(missing_ok=True)
    content = {
        "name": name,
        "store": manifest.fingerprint,
        "per": per,
        "width": width,
        "meta": meta,
        "file": asdict(describe_file(data, rows)),
    }
    write_json(description, seal(content))


def _write_raw(
    stream: BinaryIO,
    name: str,
    arrays: Iterable[npt.ArrayLike],
    counts: npt.NDArray[Any],
    label: Callable[[int], str],
    per: str,
    dtype: str,
) -> int:
    width, index = 0, -1
    for index, given in enumerate(arrays):
        if index >= len(counts):
            raise StoreError(f"channel {name!r}: more arrays than the store's {len(counts)} {per}s")
        array = np.asarray(given)
        if index == 0:
            width = array.shape[1] if array.ndim == 2 else 0
        expected = (int(counts[index]), width) if width else (int(counts[index]),)
        if array.shape != expected:
            raise StoreError(
                f"channel {name!r}: the array of {per} {label(index)!r} has shape {array.shape}, "
                f"expected {expected}"
            )
        with np.errstate(over="ignore"):
            values = np.ascontiguousarray(array, dtype=dtype)
        if not np.isfinite(values).all():
            raise StoreError(
                f"channel {name!r}: the array of {per} {label(index)!r} has values that are not "
                f"finite in {dtype}; nothing was written"
            )
        stream.write(values.tobytes())
    if index + 1 != len(counts):
        raise StoreError(
            f"channel {name!r}: {index + 1} arrays for the store's {len(counts)} {per}s"
        )
    return width


def _raw_to_arrow(raw: Path, data: Path, counts: npt.NDArray[Any], width: int, dtype: str) -> int:
    import pyarrow as pa

    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(np.asarray(counts, dtype=np.int64) * max(width, 1), out=offsets[1:])
    values = np.memmap(raw, dtype=dtype, mode="r")
    column = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values))
    batch = pa.record_batch({"values": column})
    return write_arrow(data, batch.schema, [batch])
