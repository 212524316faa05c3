"""Rows spread over several memory-mapped Arrow IPC files, addressed by one running number.

Arrays of any rank are stored flattened in a list column and come back as views into the mapped
file: nothing is copied until somebody asks for a padded batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from tprl_env.data.features.manifest import StoreError
from tprl_env.files import write_atomically

if TYPE_CHECKING:
    import pyarrow as pa


class ArrowRows:
    """Reader of Arrow IPC files with the same schema, one after the other.

    Args:
        paths: The files, in row order.
        rows: Expected rows of each file.

    Raises:
        StoreError: A file is not an Arrow file, is damaged or has another number of rows.
    """

    def __init__(self, paths: Sequence[Path], rows: Sequence[int]) -> None:
        found_batches: list[pa.RecordBatch] = []
        for path, count in zip(paths, rows, strict=True):
            batches = _map_batches(path)
            found = sum(batch.num_rows for batch in batches)
            if found != count:
                raise StoreError(
                    f"{path} holds {found} rows, its feature store recorded {count}; "
                    f"encode the store again with resume=False"
                )
            found_batches.extend(batch for batch in batches if batch.num_rows)
        self.batches = tuple(found_batches)
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self.batches)])
        self._lists: dict[tuple[str, int], tuple[npt.NDArray[Any], npt.NDArray[np.int64]]] = {}

    def __len__(self) -> int:
        """Return the number of rows in all files."""
        return int(self._starts[-1])

    def _locate(self, row: int) -> tuple[int, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} does not exist; there are {len(self)} rows")
        block = int(np.searchsorted(self._starts, row, side="right")) - 1
        return block, row - int(self._starts[block])

    def _list(self, name: str, block: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        key = (name, block)
        if key not in self._lists:
            column = self.batches[block].column(name)
            self._lists[key] = (
                column.values.to_numpy(zero_copy_only=True),
                column.offsets.to_numpy(zero_copy_only=True),
            )
        return self._lists[key]

    def vector(self, name: str) -> npt.NDArray[Any]:
        """Return a column of numbers of all files as one array."""
        parts = [b.column(name).to_numpy(zero_copy_only=True) for b in self.batches]
        return np.concatenate(parts)

    def optional_numbers(self, name: str) -> npt.NDArray[np.float32]:
        """As :meth:`vector`, NaN where a cell is null or its file lacks the column."""
        parts = [
            batch.column(name).to_numpy(zero_copy_only=False).astype(np.float32)
            if batch.schema.get_field_index(name) >= 0
            else np.full(batch.num_rows, np.nan, np.float32)
            for batch in self.batches
        ]
        return np.concatenate(parts)

    def lengths(self, name: str) -> npt.NDArray[np.int64]:
        """Return how many numbers each list cell holds."""
        return np.concatenate([np.diff(self._list(name, i)[1]) for i in range(len(self.batches))])

    def list_lengths(self, name: str) -> npt.NDArray[np.int64]:
        """As :meth:`lengths`, 0 in files that were written without that column."""
        parts = [
            np.diff(self._list(name, i)[1])
            if batch.schema.get_field_index(name) >= 0
            else np.zeros(batch.num_rows, np.int64)
            for i, batch in enumerate(self.batches)
        ]
        return np.concatenate(parts)

    def value(self, name: str, row: int) -> Any:
        """Return one cell as a Python value."""
        block, local = self._locate(row)
        return self.batches[block].column(name)[local].as_py()

    def optional(self, name: str, row: int) -> Any:
        """Return one cell, or None where the row's file was written without that column."""
        block, _ = self._locate(row)
        return self.value(name, row) if name in self.batches[block].schema.names else None

    def view(self, name: str, row: int) -> npt.NDArray[Any]:
        """Return one list cell as a flat view into the mapped file; empty where it is null."""
        block, local = self._locate(row)
        values, offsets = self._list(name, block)
        return values[offsets[local] : offsets[local + 1]]

    def padded(
        self, name: str, rows: npt.NDArray[np.int64], length: int, width: int
    ) -> npt.NDArray[np.float32]:
        """Gather list cells that hold (n, width) arrays, n <= length.

        Returns:
            ``(B, length, width)`` float32, zero behind the first n entries of each row.

        Raises:
            IndexError: A row does not exist.
        """
        if rows.size and not (0 <= rows.min() and rows.max() < len(self)):
            raise IndexError(
                f"rows {rows.min()} to {rows.max()} were requested; there are {len(self)} rows"
            )
        out = np.zeros((len(rows), length, width), dtype=np.float32)
        blocks = np.searchsorted(self._starts, rows, side="right") - 1
        for block in np.unique(blocks):
            where = np.flatnonzero(blocks == block)
            local = rows[where] - self._starts[block]
            values, offsets = self._list(name, int(block))
            count = len(offsets) - 1
            # Equal lengths make the block a dense array, and the gather one call on it.
            if len(values) == count * length * width and _uniform(offsets):
                dense = values.reshape(count, length, width)
                out[where] = dense[local]
                continue
            first = offsets[local] // width
            counts = offsets[local + 1] // width - first
            mask = np.arange(length) < counts[:, None]
            index = first[:, None] + np.arange(length)
            piece = np.zeros((len(where), length, width), dtype=np.float32)
            piece[mask] = values.reshape(-1, width)[index[mask]]
            out[where] = piece
        return out


def _uniform(offsets: npt.NDArray[np.int64]) -> bool:
    return bool((np.diff(offsets) == offsets[1]).all())


def _map_batches(path: Path) -> list[pa.RecordBatch]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        for batch in batches:  # a wrong offset would end the process at the first look at a cell
            batch.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise StoreError(
            f"{path} is not a readable Arrow file ({error}); encode the store again with "
            f"resume=False"
        ) from error
    return batches


def write_arrow(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
    """Write an Arrow IPC file atomically and durably.

    Args:
        path: Final name; the data goes to a temporary name next to it first.
        schema: Schema of the batches.
        batches: May be a generator: one batch is in memory at a time.

    Returns:
        Rows written.

    Raises:
        OSError: The disk is full or the folder is not writable; the temporary file is removed.
    """
    import pyarrow as pa

    rows = 0

    def fill(stream: BinaryIO) -> None:
        nonlocal rows
        with pa.ipc.new_file(stream, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
                rows += batch.num_rows

    write_atomically(path, fill)
    return rows


def list_column(
    arrays: Sequence[npt.NDArray[Any] | None], dtype: npt.DTypeLike
) -> pa.LargeListArray:
    """Build a list column from arrays of any rank, flattened; ``None`` becomes null."""
    import pyarrow as pa

    flat = [np.empty(0, dtype) if a is None else np.asarray(a, dtype).ravel() for a in arrays]
    offsets = np.cumsum([0, *(len(a) for a in flat)], dtype=np.int64)
    values = np.concatenate(flat) if flat else np.empty(0, dtype)
    missing = [a is None for a in arrays]
    return pa.LargeListArray.from_arrays(
        pa.array(offsets), pa.array(values), mask=pa.array(missing) if any(missing) else None
    )
