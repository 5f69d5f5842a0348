"""A tiny CLIP that counts, its images, and unfinished caches."""

import hashlib
import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from mergetune.data import ImageList

SIDE = 8


@dataclass(frozen=True)
class TinyClip:
    """What cache_features needs of a FrozenClip: a random projection of the pixels."""

    name: str = "tiny"
    embed_dim: int = 6
    image_fingerprint: str = "tiny weights"
    image_dtype: torch.dtype = torch.float32
    preprocess_cfg: dict[str, Any] = field(default_factory=lambda: {"size": (SIDE, SIDE)})
    seconds: float = 0.0
    device: torch.device = torch.device("cpu")

    def preprocess(self, image: Image.Image) -> Tensor:
        pixels = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR).tobytes()
        return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(SIDE, SIDE, 3).permute(2, 0, 1) / 255

    def augment(self, image: Image.Image) -> Tensor:
        return self.preprocess(image) * torch.rand(3, 1, 1)

    def encode_image(self, pixels: Tensor) -> Tensor:
        time.sleep(self.seconds)
        weights = torch.randn(3 * SIDE * SIDE, self.embed_dim, generator=torch.Generator().manual_seed(0))
        return F.normalize(pixels.flatten(1) @ weights, dim=-1)


def draw_images(root: Path, count: int, classes: int = 3) -> ImageList:
    noise = random.Random(0)
    root.mkdir(parents=True, exist_ok=True)
    files = [f"{i:03d}.png" for i in range(count)]
    for file in files:
        Image.frombytes("RGB", (SIDE, SIDE), noise.randbytes(3 * SIDE * SIDE)).save(root / file)
    return ImageList(root, files, [i % classes for i in range(count)], [f"class {c}" for c in range(classes)])


def array_bytes(path: Path) -> bytes:
    """The file with the arrays of a finished cache; its manifest must have been written."""
    assert (Path(path) / "manifest.json").exists()
    return (Path(path) / "arrays.bin").read_bytes()


BUILD = {"shard_size": 4, "batch_size": 3, "views": 2}  # 11 images: blocks of 4, 4, 3
ROW_BYTES = 6 * 4  # of a TinyClip


def resealed(manifest: dict[str, Any]) -> bytes:
    """A manifest that was changed by hand, with the checksum that fits."""
    content = json.dumps({name: value for name, value in manifest.items() if name != "checksum"})[1:].encode()
    return b'{"checksum":"%b",%b' % (hashlib.sha256(content).hexdigest().encode(), content)


def as_version_1(path: Path) -> Path:
    """Turns a finished cache into what version 0.1 would have written."""
    manifest = json.loads((path / "manifest.json").read_text())
    images = json.loads((path / "images.json").read_text())["images"]
    identities = list(zip(images["sha256"], images["bytes"], images["mtime_ns"], strict=True))
    (array,), skipped, size = manifest.pop("arrays"), manifest.pop("skipped"), manifest["shard_size"]
    content = torch.frombuffer(bytearray((path / "arrays.bin").read_bytes()), dtype=getattr(torch, array["dtype"]))
    rows, shards = content.view(array["shape"]), []
    for number, begin in enumerate(range(0, len(manifest["files"]), size)):
        files = manifest["files"][begin : begin + size]
        kept = [begin + i for i, file in enumerate(files) if file not in skipped]
        file = path / f"shard-{number:05d}.safetensors"
        save_file({"features": rows[:, kept].contiguous()}, file, metadata={"format": "pt"})
        shards.append({
            "bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "rows": len(kept),
            "images": identities[begin : begin + size],
            "skipped": {file: skipped[file] for file in files if file in skipped},
        })  # fmt: skip
    new = {name: value for name, value in manifest.items() if name not in ("checksum", "rows", "bytes", "decoding")}
    new |= {"format": "mergetune.features/1", "shards": shards}
    (path / "manifest.json").write_text(json.dumps(new, separators=(",", ":")))
    for name in ("arrays.bin", "images.json", "checked.json"):
        (path / name).unlink()
    return path


@dataclass(frozen=True)
class NoMoreEncoding(TinyClip):
    """Proof that nothing is encoded again."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        raise AssertionError("encoded again")
