"""The blocks of a cache's arrays: writing of rows, checksums, damage and what is lost by it.

A block is a number of consecutive rows of one view of an array; the manifest has a checksum of each. All checksums are
compared when the file's size, times or inode differ from those of the last check, as after copying. The
state of the last check stands in ``checked.json``, which may be missing: the checksums are compared then.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mergetune.data.cache_documents import Array, BlockRecord, Identities, LastCheck, Layout, Manifest, Plan
from mergetune.data.cache_files import (
    ARRAYS,
    LAST_CHECK,
    MANIFEST,
    mend,
    read_images,
    read_records,
    write_plan,
    write_record,
)
from mergetune.io import (
    FLOAT_DTYPES,
    compact_json,
    hidden,
    open_regular,
    parse_document,
    read_at,
    read_regular,
    write_atomically,
)

CHUNK = 1 << 22  # bytes that are hashed at once
SHOWN = 5  # ranges of rows that a message names
LARGE = 1 << 30  # bytes from which on opening shows a bar while it compares checksums

Block = tuple[int, int, int]
"""View, first row and number of rows."""


@dataclass(frozen=True)
class Damage:
    """What is wrong with the file of the arrays.

    Attributes:
        rows: ranges (first, last) of damaged rows, ascending; none if the file is only too long.
        text: what is wrong, with the name of the file and the rows.
    """

    rows: tuple[tuple[int, int], ...]
    text: str

    def numbers(self, plan: Plan) -> set[int]:
        """The numbers of the blocks of images to encode again."""
        size = plan.shard_size
        return {number for first, last in self.rows for number in range(first // size, last // size + 1)}


# -- writing -----------------------------------------------------------------------------------------------------------


def allocate(path: Path, plan: Plan) -> None:
    """Makes the file of the arrays, or gives it its size; what it holds stays.

    Raises:
        OSError: the disk is full, for example; the message names the file.
    """
    file = path / ARRAYS
    descriptor = _open_own(file)
    try:
        found = os.fstat(descriptor).st_size
        if found > plan.bytes:
            os.ftruncate(descriptor, plan.bytes)
        elif found < plan.bytes:
            try:
                os.posix_fallocate(descriptor, 0, plan.bytes)
            except (AttributeError, OSError) as error:  # macOS lacks it, and so do some file systems
                if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                    raise OSError(error.errno, error.strerror, str(file)) from None
                os.ftruncate(descriptor, plan.bytes)
    finally:
        os.close(descriptor)


def write_block(path: Path, plan: Plan, number: int, arrays: Mapping[str, Tensor], images: Identities,
                skipped: dict[str, str]) -> None:  # fmt: skip
    """Writes the rows of a block of images, and then its record, which marks the block as finished.

    Args:
        path: folder of the cache.
        plan: its plan.
        number: number of the block.
        arrays: rows [V, n, ...] of each array for the n files of the block; those of skipped files are zeros.
        images: identities of the images.
        skipped: {file: reason} of those that could not be read.

    Raises:
        OSError: the rows cannot be written; the message names the file.
    """
    file, sha256 = path / ARRAYS, []
    descriptor = _open_own(file)
    try:
        for layout in plan.arrays:
            rows, checksums = arrays[layout.name].to(FLOAT_DTYPES[layout.dtype]).contiguous(), []
            for view, of_view in enumerate(rows):
                content = of_view.view(torch.uint8).numpy().reshape(-1).data
                checksums.append(hashlib.sha256(content).hexdigest())
                _write_at(descriptor, content, layout.place(view, number * plan.shard_size))
            sha256.append(tuple(checksums))
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error
    finally:
        os.close(descriptor)
    write_record(path, number, BlockRecord(plan=plan.id, sha256=tuple(sha256), images=images, skipped=skipped))


def refuse_foreign(path: Path) -> None:
    """Raises ValueError if writing into the file of the arrays would change another file."""
    if os.path.lexists(path / ARRAYS):
        os.close(_open_own(path / ARRAYS))


def _open_own(file: Path) -> int:
    """The descriptor of the file of the arrays for writing; a file of another place must not change with it."""
    got = ""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            os.close(descriptor)
            got = "a file with a second name (a hard link)" if stat.S_ISREG(found.st_mode) else "another kind of file"
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        descriptor, got = -1, "a link" if error.errno == errno.ELOOP else "another kind of file"
    if got:
        raise ValueError(
            f"{file} must be a regular file with one name, because it is written in place, got {got}: put a copy of "
            "it in its place, or remove it and all features are encoded again"
        )
    return descriptor


def _write_at(descriptor: int, content: memoryview, offset: int) -> None:
    while content:
        count = os.pwrite(descriptor, content, offset)
        content, offset = content[count:], offset + count


# -- checking ----------------------------------------------------------------------------------------------------------


def finished_blocks(path: Path, plan: Plan) -> tuple[dict[int, BlockRecord], tuple[tuple[int, int], ...]]:
    """The finished blocks of an unfinished cache.

    Returns:
        {number: record} of the blocks whose rows have their checksums, and ranges of rows that differ from theirs.
    """
    records = read_records(path, plan)
    wanted = (
        (layout, (view, number * plan.shard_size, len(plan.files_of(number))), sha256)
        for number, record in records.items()
        for layout, checksums in zip(plan.arrays, record.sha256, strict=True)
        for view, sha256 in enumerate(checksums)
    )
    lost = _differing(path / ARRAYS, wanted)
    numbers = Damage(lost, "").numbers(plan)
    return {number: record for number, record in records.items() if number not in numbers}, lost


def find_damage(path: Path, manifest: Manifest, *, trust: bool = True, progress: bool | None = None) -> Damage | None:
    """Compares size and checksums of the file with the arrays of a finished cache.

    Args:
        path: folder of the cache.
        manifest: its manifest.
        trust: do not read a file whose size, times (of modification and of change) and inode are those of the last
            check.
        progress: show a bar; None shows one for a large file.

    Returns:
        The damage; None if the contents are whole, which is remembered if the folder can be written.
    """
    file = path / ARRAYS
    try:
        with open_regular(file) as opened:
            found = os.fstat(opened.fileno())
    except FileNotFoundError:
        last = len(manifest.files) - 1
        return Damage(((0, last),), f"{file} is missing")
    state = LastCheck(
        bytes=found.st_size,
        mtime_ns=found.st_mtime_ns,
        ctime_ns=found.st_ctime_ns,
        inode=found.st_ino,
        blocks=_digest_of_blocks(manifest),
    )
    if trust and found.st_size == manifest.bytes and _last_check(path) == state:
        return None
    blocks = _blocks_of(manifest.arrays, manifest.shard_size)
    if progress or (progress is None and manifest.bytes > LARGE):
        total, about = manifest.bytes, f"check {file.name}"
        with tqdm(total=total, desc=about, unit="B", unit_scale=True, disable=hidden()) as bar:
            rows = _differing(file, blocks, bar)
    else:
        rows = _differing(file, blocks)
    if not rows and found.st_size == manifest.bytes:
        with contextlib.suppress(OSError):  # a read-only folder is checked by each process that opens it
            write_atomically(path / LAST_CHECK, compact_json(state.model_dump()))
        return None
    forget_check(path)
    state_in_words = "truncated" if found.st_size < manifest.bytes else "damaged"
    told = []
    if found.st_size != manifest.bytes:
        told.append(f"the file must have {manifest.bytes} bytes, got {found.st_size}")
    if rows:
        told.append(f"{in_words(rows)} must have the checksums in {MANIFEST}, got others")
    return Damage(rows, f"{file} is {state_in_words}: {', and '.join(told)}")


def refuse_damage(path: Path, manifest: Manifest, *, trust: bool = True, progress: bool | None = None) -> None:
    """Raises ValueError, with the way on, if :func:`find_damage` finds any."""
    if damage := find_damage(path, manifest, trust=trust, progress=progress):
        raise ValueError(f"{damage.text}; {mend(path)}")


def checks_open_file(path: Path, manifest: Manifest) -> Callable[[int], None]:
    """Function of a descriptor of the arrays' file that compares all checksums; it raises ValueError as above.

    It can be sent to another process. A cache that is open calls it when its file has been written or touched.
    """
    return functools.partial(_check_open_file, path, manifest.arrays, manifest.shard_size)


def _check_open_file(path: Path, arrays: Sequence[Array], shard_size: int, descriptor: int) -> None:
    if rows := _differing_in(descriptor, list(_blocks_of(arrays, shard_size))):
        told = f"{in_words(rows)} must have the checksums in {MANIFEST}, got others since the cache was opened"
        raise damaged_rows(path, told)


def _blocks_of(arrays: Sequence[Array], shard_size: int) -> Iterator[tuple[Layout, Block, str]]:
    """The blocks of the arrays of a finished cache with their checksums."""
    for array in arrays:
        for block, sha256 in zip(array.blocks(shard_size), array.sha256, strict=True):
            yield array, block, sha256


def damaged_rows(path: Path, told: str) -> ValueError:
    """The error for rows that are found to be damaged when they are read. The last check no longer counts."""
    forget_check(path)
    return ValueError(f"{path / ARRAYS} is damaged: {told}; {mend(path)}")


def reopen(path: Path, manifest: Manifest, damage: Damage) -> None:
    """Makes a damaged cache an unfinished one that lacks the damaged blocks. It may be killed at any time."""
    images, lost = list(read_images(path, manifest).each()), damage.numbers(manifest)
    fields = {name: getattr(manifest, name) for name in (*Plan.model_fields, *(manifest.model_extra or ()))}
    arrays = [{name: getattr(array, name) for name in Layout.model_fields} for array in manifest.arrays]
    write_plan(path, Plan.model_validate({**fields, "arrays": arrays}))
    for number in range(manifest.shard_count):
        if number in lost:
            continue
        first, count = number * manifest.shard_size, manifest.shard_count
        files = manifest.files_of(number)
        record = BlockRecord(
            plan=manifest.id,
            sha256=tuple(array.sha256[number::count] for array in manifest.arrays),
            images=Identities.of(images[first : first + len(files)]),
            skipped={file: manifest.skipped[file] for file in files if file in manifest.skipped},
        )
        write_record(path, number, record)
    (path / MANIFEST).unlink()


def forget_check(path: Path) -> None:
    """Removes the state of the last check, so that the checksums are compared at the next opening."""
    with contextlib.suppress(OSError):
        (path / LAST_CHECK).unlink(missing_ok=True)


def in_words(ranges: Iterable[tuple[int, int]]) -> str:
    """ "row 3" or "rows 0 to 1,023 and 4,096 to 5,119"."""
    ranges = list(ranges)
    texts = [f"{first:,}" if first == last else f"{first:,} to {last:,}" for first, last in ranges[:SHOWN]]
    more = f" and {len(ranges) - SHOWN:,} other ranges" if len(ranges) > SHOWN else ""
    one = len(ranges) == 1 and ranges[0][0] == ranges[0][1]
    return f"row{'' if one else 's'} {', '.join(texts[:-1])}{' and ' if texts[1:] else ''}{texts[-1]}{more}"


def _digest_of_blocks(manifest: Manifest) -> str:
    digest = hashlib.sha256()
    for array in manifest.arrays:
        digest.update("".join((array.name, *array.sha256)).encode())
    return digest.hexdigest()


def _last_check(path: Path) -> LastCheck | None:
    """The state of the last check; None if there is none that can be read."""
    try:
        return parse_document(read_regular(path / LAST_CHECK, limit=1 << 12), LastCheck, name=LAST_CHECK, way_on="")
    except (OSError, ValueError):
        return None


def _differing(
    file: Path, blocks: Iterable[tuple[Layout, Block, str]], bar: tqdm | None = None
) -> tuple[tuple[int, int], ...]:
    """Ranges of rows whose blocks have other checksums, ascending and joined."""
    blocks = list(blocks)
    if not file.is_file():
        return _joined(block for _, block, _ in blocks)
    with open_regular(file) as opened:
        return _differing_in(opened.fileno(), blocks, bar)


def _differing_in(
    descriptor: int, blocks: Sequence[tuple[Layout, Block, str]], bar: tqdm | None = None
) -> tuple[tuple[int, int], ...]:
    """As :func:`_differing`, for an open file. Several threads hash."""
    lost = []
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:

        def checksum(block: tuple[Layout, Block, str]) -> str | None:
            layout, (view, first, count), _ = block
            return _sha256(descriptor, layout.place(view, first), count * layout.row_bytes)

        for (layout, block, wanted), found in zip(blocks, pool.map(checksum, blocks), strict=True):
            if found != wanted:
                lost.append(block)
            if bar is not None:
                bar.update(block[2] * layout.row_bytes)
    return _joined(lost)


def _sha256(descriptor: int, offset: int, size: int) -> str | None:
    """The checksum of some bytes of a file; None if the file ends before."""
    digest, buffer, end = hashlib.sha256(), memoryview(bytearray(min(size, CHUNK))), offset + size
    while offset < end:
        part = buffer[: end - offset]
        try:
            read_at(descriptor, part, offset)
        except EOFError:
            return None
        digest.update(part)
        offset += len(part)
    return digest.hexdigest()


def _joined(blocks: Iterable[Block]) -> tuple[tuple[int, int], ...]:
    """The ranges (first, last) of the rows of some blocks."""
    joined: list[tuple[int, int]] = []
    for first, last in sorted({(first, first + count - 1) for _, first, count in blocks}):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = joined[-1][0], max(last, joined[-1][1])
        else:
            joined.append((first, last))
    return tuple(joined)
