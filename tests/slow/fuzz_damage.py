"""Damage to small files: to their bytes, and to what they mean (JSON fields, tensors, entries of archives)."""

from __future__ import annotations

import copy
import functools
import io
import json
import pickle
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import joblib
import numpy as np
import torch
from safetensors.torch import load, save

DEEP = 3000
JUNK: list[Any] = [
    None, True, False, 0, -1, 7, 1 << 62, 10**30, 0.5, 1e308, float("nan"), float("inf"), "", "x", "..", "../../etc",
    "/dev/zero", "\0", "\x1b[2J", "\ud800", "a\nb", "x" * 5000, [], [[]], [None], [1, "a"], {}, {"": 1}, {"a": [{}]},
]  # fmt: skip
HUGE = [0, 1, 0x7F, 0xFF, 0xFFFF, 1 << 20, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.int8,
    torch.bool,
]  # fmt: skip
PNG, SAFETENSORS_LIMIT = b"\x89PNG\r\n\x1a\n", 1 << 20

Damage = Callable[[bytes, random.Random], bytes]

# -- bytes -------------------------------------------------------------------------------------------------------------


def flip_bits(content: bytes, dice: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(dice.choice([1, 1, 2, 8, 32]) if changed else 0):
        changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def truncate(content: bytes, dice: random.Random) -> bytes:
    return content[: dice.choice([0, 1, 8, dice.randrange(len(content) + 1), max(0, len(content) - 1)])]


def insert(content: bytes, dice: random.Random) -> bytes:
    at = dice.randrange(len(content) + 1)
    added = dice.choice([dice.randbytes(dice.randint(1, 40)), b"\0" * dice.randint(1, 4000), b"\x1b[2J", b"\n" * 3000])
    return content[:at] + added + content[at:]


def delete(content: bytes, dice: random.Random) -> bytes:
    at = dice.randrange(len(content) + 1)
    return content[:at] + content[at + dice.randint(1, 1 + len(content) // 4) :]


def repeat(content: bytes, dice: random.Random) -> bytes:
    at, start = dice.randrange(len(content) + 1), dice.randrange(len(content) + 1)
    return content[:at] + content[start : start + dice.randint(1, 400)] + content[at:]


def zero(content: bytes, dice: random.Random) -> bytes:
    at = dice.randrange(len(content) + 1)
    count = min(len(content) - at, dice.randint(1, 1 + len(content) // 2))
    return content[:at] + b"\0" * count + content[at + count :]


def enlarge(content: bytes, dice: random.Random) -> bytes:
    """A number somewhere, most often in the header or in the end of the file, becomes large or 0."""
    kind = dice.choice(["<H", ">H", "<I", ">I", "<Q", ">Q"])
    size = struct.calcsize(kind)
    if len(content) < size:
        return content
    last = len(content) - size
    at = dice.choice([dice.randint(0, last), dice.randint(0, min(last, 64)), max(0, last - dice.randint(0, 64))])
    number = struct.pack(kind, dice.choice(HUGE) & ((1 << 8 * size) - 1))
    return content[:at] + number + content[at + size :]


def replace_all(content: bytes, dice: random.Random) -> bytes:
    return dice.choice([b"", b"[]", b"null", b"<!DOCTYPE html>", b"[" * 100_000, dice.randbytes(200), b"version https"])


BYTES: list[Damage] = [flip_bits, flip_bits, truncate, insert, delete, repeat, zero, enlarge, enlarge, replace_all]

# -- JSON --------------------------------------------------------------------------------------------------------------


def spoil_value(value: Any, dice: random.Random) -> Any:
    """One place somewhere inside is dropped, doubled, renamed, made deep or replaced."""
    if isinstance(value, dict | list) and value and dice.random() < 0.85:
        key = dice.choice(list(value) if isinstance(value, dict) else range(len(value)))
        kind = dice.random()
        if kind < 0.15:
            del value[key]
        elif kind < 0.25 and isinstance(value, list):
            value.extend(value[key : key + 1] * dice.choice([1, 2, 1000]))
        elif kind < 0.25:
            value[str(dice.choice(JUNK))] = value.pop(key)
        else:
            value[key] = spoil_value(value[key], dice)
        return value
    if type(value) in (int, float) and dice.random() < 0.5:
        return dice.choice([-value, value + 1, value * 2, value * 10**6, float(value), str(value), [value]])
    return copy.deepcopy(dice.choice(JUNK))


def spoil_json(content: bytes, dice: random.Random) -> bytes:
    value = json.loads(content)
    spots = dice.choice([1, 1, 1, 3])
    for _ in range(spots):
        value = spoil_value(value, dice)
    text = json.dumps(value)
    if dice.random() < 0.1 and (at := text.find(": ")) >= 0:
        opening, closing = dice.choice([("[", "]"), ('{"a":', "}")])
        depth = dice.choice([200, DEEP, 100_000])
        inner = opening * depth + "1" + closing * depth
        text = f"{text[: at + 2]}{inner}, {json.dumps(str(dice.random()))}: {text[at + 2 :]}"
    if dice.random() < 0.05:
        text = text.replace("1", "1" * dice.choice([400, 5000]), 1)
    return text.encode("utf-8", "surrogatepass") if dice.random() < 0.95 else text.encode("utf-16")


def is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except ValueError:
        return False
    return True


# -- text --------------------------------------------------------------------------------------------------------------


def spoil_lines(content: bytes, dice: random.Random) -> bytes:
    lines = content.split(b"\n")
    at = dice.randrange(len(lines))
    junk = [str(value).encode("utf-8", "surrogatepass") for value in JUNK]
    sign = next((sign for sign in (b"\t", b";", b",") if sign in content), b" ")
    cells = lines[at].split(sign)
    cells[dice.randrange(len(cells))] = dice.choice(junk)
    lines[at : at + 1] = dice.choice(
        [[], [lines[at]] * 3, [dice.choice(junk)], [sign.join(cells)], [b'"' + lines[at]], [lines[at] + b"\r"]]
    )
    return b"\n".join(lines)


def spoil_json_line(content: bytes, dice: random.Random) -> bytes:
    lines = content.split(b"\n")
    at = dice.randrange(len(lines) - 1)
    lines[at] = spoil_json(lines[at], dice)
    return b"\n".join(lines)


def is_json_lines(content: bytes) -> bool:
    return content[:1] == b"{" and not is_json(content) and is_json(content.partition(b"\n")[0])


# -- tensors -----------------------------------------------------------------------------------------------------------


def other_tensor(tensor: torch.Tensor, dice: random.Random) -> torch.Tensor:
    """A tensor of another shape, dtype or content."""
    flat = tensor.reshape(-1)
    return dice.choice(
        [
            lambda: tensor.to(dice.choice(DTYPES)),
            lambda: flat,
            lambda: tensor[None],
            lambda: tensor[:0] if tensor.ndim else tensor,
            lambda: tensor.T.contiguous() if tensor.ndim == 2 else tensor[None, None],
            lambda: torch.cat([tensor, tensor]) if tensor.ndim else flat,
            lambda: tensor[..., :-1].contiguous() if tensor.ndim else flat,
            lambda: tensor.float() * float("nan"),
            lambda: tensor.float() * 1e38 * 10,
            lambda: tensor.float() * 0,
            lambda: torch.zeros(dice.choice([(), (0,), (1, 0), (3, 1, 1, 1, 2)])),
        ]
    )()


def spoil_safetensors(content: bytes, dice: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    if length > len(content):
        return content
    header, data = content[8 : 8 + length], content[8 + length :]
    if dice.random() < 0.5:
        tensors = load(content)
        metadata = json.loads(header).get("__metadata__")
        name, kind = dice.choice(list(tensors) or [None]), dice.random() if tensors else 1
        if kind < 0.7:
            tensors[name] = other_tensor(tensors[name], dice)
        elif kind < 0.85:
            tensors[dice.choice(["", "other", "\x1b[2J", f"module.{name}", "x" * 3000])] = tensors.pop(name)
        else:
            metadata = spoil_metadata(metadata or {}, dice)
        return save({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, metadata)
    header = spoil_json(header, dice)
    return struct.pack("<Q", len(header)) + header + data


def spoil_metadata(metadata: dict[str, str], dice: random.Random) -> dict[str, str]:
    """The texts in the metadata may be JSON documents themselves."""
    if not metadata:
        return {"scale": dice.choice(["[", "{}", "1e999", "nan", "[" * DEEP])}
    key = dice.choice(list(metadata))
    inner = metadata[key].encode()
    damage = spoil_json if is_json(inner) else flip_bits
    return {**metadata, key: damage(inner, dice).decode(errors="replace")}


def is_safetensors(content: bytes) -> bool:
    return len(content) > 9 and content[8:9] == b"{" and struct.unpack("<Q", content[:8])[0] < SAFETENSORS_LIMIT


def spoil_content(value: Any, dice: random.Random) -> Any:
    """One tensor or plain value somewhere in a checkpoint is replaced."""
    if isinstance(value, dict) and value and dice.random() < 0.95:
        key = dice.choice(list(value))
        kind = dice.random()
        if kind < 0.1:
            del value[key]
        elif kind < 0.2:
            value[dice.choice([0, "", "other", None, ("a",), "\x1b[2J", "x" * 3000])] = value.pop(key)
        else:
            value[key] = spoil_content(value[key], dice)
        return value
    if not isinstance(value, torch.Tensor) or dice.random() < 0.1:
        others = [*JUNK[:12], "x", [], {}, ["a"], (1,), torch.zeros(2), torch.float32, {"a": {"b": []}}]
        return copy.deepcopy(dice.choice(others))
    if dice.random() < 0.6:
        return other_tensor(value, dice)
    return dice.choice(
        [
            lambda: torch.zeros(1).expand(1 << 18, 1 << 12),
            lambda: torch.zeros(1).expand(1, 1 << 40),
            lambda: [value.as_strided((1,) * value.ndim, (1,) * value.ndim)] * 100,
            lambda: value.float().to_sparse() if value.ndim else value,
            lambda: torch.empty_like(value, device="meta"),
            lambda: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8),
            lambda: value.to(torch.complex64),
            lambda: torch.nn.Parameter(value.float()),
            lambda: value.float().to(torch.float8_e4m3fn),
            lambda: value.as_strided((0,) * value.ndim, (1 << 40,) * value.ndim),
        ]
    )()


def spoil_checkpoint(content: bytes, dice: random.Random) -> bytes:
    value = spoil_content(torch.load(io.BytesIO(content), weights_only=True), dice)
    out = io.BytesIO()
    torch.save(value, out, _use_new_zipfile_serialization=dice.random() < 0.8)
    return out.getvalue()


def is_checkpoint(content: bytes) -> bool:
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception:
        return False
    return True


def other_array(array: np.ndarray, dice: random.Random) -> np.ndarray:
    return dice.choice(
        [
            lambda: array.astype(dice.choice(["f2", "f4", "f8", "i4", "i8", "u1", "?", "c8", "U8", "S3", ">f4"])),
            lambda: array.reshape(-1),
            lambda: array[None],
            lambda: array[:0] if array.ndim else array,
            lambda: array.T,
            lambda: np.concatenate([array, array]) if array.ndim else array,
            lambda: np.zeros((), "f4"),
            lambda: np.zeros(3, [("a", "f4"), ("b", "i8")]),
            lambda: np.full(array.shape, np.nan, "f4"),
            lambda: np.full(array.shape, "\x1b[2J"),
            lambda: np.zeros(array.shape, "M8[s]"),
            lambda: np.array([{"a": 1}], dtype=object),
        ]
    )()


def spoil_array(content: bytes, dice: random.Random) -> bytes:
    if (at := content.find(pickle.PROTO)) > 0 and dice.random() < 0.5:  # an array of objects
        return content[:at] + dice.choice(damages_of(content[at:]))(content[at:], dice)
    out = io.BytesIO()
    np.save(out, other_array(np.load(io.BytesIO(content), allow_pickle=True), dice), allow_pickle=True)
    return out.getvalue()


def spoil_arrays(content: bytes, dice: random.Random) -> bytes:
    with np.load(io.BytesIO(content), allow_pickle=True) as opened:
        arrays = dict(opened)
    name = dice.choice(list(arrays))
    kind = dice.random()
    if kind < 0.15:
        arrays[dice.choice(["other", "a/b", "x" * 300])] = arrays.pop(name)
    elif kind < 0.25:
        arrays[name] = np.zeros((1 << 24, 2), "f4")  # 128 MiB that deflate to 130 kB
    else:
        arrays[name] = other_array(arrays[name], dice)
    out = io.BytesIO()
    writer = np.savez_compressed if kind < 0.4 else np.savez
    writer(out, **arrays)  # pyright: ignore[reportArgumentType]
    return out.getvalue()


# -- archives and pictures ---------------------------------------------------------------------------------------------


def spoil_entry(content: bytes, dice: random.Random) -> bytes:
    """One entry of a zip file is damaged, dropped, doubled or compressed; the checksums of the archive are right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    at, kind = dice.randrange(len(entries)), dice.random()
    name, inner = entries[at]
    if kind < 0.7:
        entries[at] = name, dice.choice(damages_of(inner))(inner, dice)
    elif kind < 0.8:
        del entries[at]
    elif kind < 0.9:
        entries[at] = dice.choice([name.replace("/", "/../", 1), f"/{name}", "data.pkl", "x" * 300]), inner
    with zipfile.ZipFile(out, "w") as archive:
        for number, (name, inner) in enumerate(entries):
            bomb = kind > 0.9 and number == at
            archive.writestr(
                zipfile.ZipInfo(name),
                inner + b"\0" * (bomb << 27),
                zipfile.ZIP_DEFLATED if bomb else zipfile.ZIP_STORED,
            )
    return out.getvalue()


def is_zip(content: bytes) -> bool:
    return content[:4] == b"PK\3\4"


def spoil_png(content: bytes, dice: random.Random) -> bytes:
    """One chunk is damaged; its checksum is right, so that the damage reaches the decoder."""
    chunks, at = [], len(PNG)
    while at < len(content):
        (size,) = struct.unpack(">I", content[at : at + 4])
        chunks.append([content[at + 4 : at + 8], content[at + 8 : at + 8 + size]])
        at += size + 12
    chunk = dice.choice(chunks)
    if chunk[1]:
        chunk[1] = dice.choice([flip_bits, truncate, enlarge])(chunk[1], dice)
    return PNG + b"".join(
        struct.pack(">I", len(inner)) + kind + inner + struct.pack(">I", zlib.crc32(kind + inner))
        for kind, inner in chunks
    )


def spoil_pickle(content: bytes, dice: random.Random) -> bytes:
    """An instruction between the bytes: push, repeat, build, reduce."""
    at = dice.randrange(len(content))
    code = dice.choice(
        [b"}", b"]", b"K\1", b"0", b"2", b"R", b"b", b"u", b"s", b"a", b"Q", b"h\0", b"(", b"t", b"cos\nsystem\n"]
    )
    return content[:at] + code * dice.choice([1, 1, 3, 1000]) + content[at:]


def is_pickle(content: bytes) -> bool:
    return content[:1] == pickle.PROTO and not is_zip(content)


# -- models and joblib -------------------------------------------------------------------------------------------------


def spoil_model(content: bytes, dice: random.Random) -> bytes:
    """A field of a fitted model of scikit-learn, or of a step of its pipeline, is dropped or replaced."""
    model = joblib.load(io.BytesIO(content))
    part = dice.choice([model, *(step for _, step in getattr(model, "steps", ()))])
    name = dice.choice([name for name, value in vars(part).items() if name.endswith("_") or dice.random() < 0.3])
    value, kind = getattr(part, name), dice.random()
    if kind < 0.1:
        delattr(part, name)
    else:
        array = isinstance(value, np.ndarray) and kind < 0.8
        setattr(part, name, other_array(value, dice) if array else copy.deepcopy(dice.choice(JUNK)))
    out = io.BytesIO()
    form = dice.choice([{}, {"protocol": 5}, {"compress": 3}, None])
    if form is None:
        return pickle.dumps(model, protocol=dice.choice([0, 2, 4, 5]))
    joblib.dump(model, out, **form)
    return out.getvalue()


def is_model(content: bytes) -> bool:
    return b"sklearn" in (inflated(content) or content)


def spoil_deflated(content: bytes, dice: random.Random) -> bytes:
    """What zlib or gzip has inside is damaged; its checksum is right."""
    inner = inflated(content)
    return zlib.compress(dice.choice(damages_of(inner))(inner, dice))


def inflated(content: bytes) -> bytes:
    """The content of zlib or gzip; nothing for other bytes."""
    try:
        return zlib.decompressobj(wbits=47).decompress(content)
    except zlib.error:
        return b""


# -- all ---------------------------------------------------------------------------------------------------------------

MEANINGS: list[tuple[Callable[[bytes], object], Damage]] = [
    (is_json, spoil_json),
    (is_safetensors, spoil_safetensors),
    (is_checkpoint, spoil_checkpoint),
    (lambda content: content[:6] == b"\x93NUMPY", spoil_array),
    (lambda content: is_zip(content) and b".npy" in content, spoil_arrays),
    (is_zip, spoil_entry),
    (is_model, spoil_model),
    (inflated, spoil_deflated),
    (lambda content: content.startswith(PNG), spoil_png),
    (is_pickle, spoil_pickle),
    (is_json_lines, spoil_json_line),
    (lambda content: b"\0" not in content and not is_json(content), spoil_lines),
]
"""Which files a damage to the meaning fits."""


@functools.lru_cache(1024)
def damages_of(content: bytes) -> list[Damage]:
    """All damages of a file: half of them to its meaning, if there is one."""
    meant = [damage for fits, damage in MEANINGS if fits(content)]
    return BYTES + meant * (len(BYTES) // len(meant)) if meant else BYTES
