"""Contrastive pretraining of a tiny CLIP on icons and their names, in two stages; a run that was killed resumes."""

import json
import math
import os
import random
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from views import attribute_caption, attribute_views, plain_caption, plain_views

CONFIG = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 48, "width": 24, "layers": [2, 2, 2, 1], "head_width": 64},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 4},
}
PREPROCESS = {"mean": [0.85] * 3, "std": [0.3] * 3, "size": 48, "interpolation": "bicubic", "resize_mode": "squash"}

BATCH = 512
WARM_UP = 18  # steps
COMMON = 0.85  # share of a batch whose caption is used by several icon sets
SHARED_BY = 3  # that many sets
WEIGHT_DECAY = 0.1
START, END = 49406, 49407  # text tokens


@dataclass(frozen=True)
class Stage:
    """One stage of pretraining.

    Attributes:
        name: of the weights that it ends with.
        steps: how many batches.
        lr: highest learning rate.
        attributes: whether images are tilted, tinted, blurred ... and the captions say so.
        own: part of the target that belongs to an image's own caption; the rest is shared by all equal names.
        standardised: part of the stage during which a loss on batch-standardised features helps alignment to start.
    """

    name: str
    steps: int
    lr: float
    attributes: bool
    own: float
    standardised: float


STAGES = (
    Stage("names", steps=1374, lr=1e-3, attributes=False, own=0.0, standardised=0.3),
    Stage("attributes", steps=430, lr=6e-4, attributes=True, own=0.85, standardised=0.0),
)


class Icons:
    """The pretraining icons as random batches of augmented images and token ids."""

    def __init__(self, data: Path) -> None:
        everything = json.loads((data / "icons.json").read_text(encoding="utf-8"))
        self.rows = np.array([row for row, record in enumerate(everything) if not record["held_out"]])
        self.records = [everything[row] for row in self.rows]
        self.images = np.load(data / "images.npy", mmap_mode="r")
        self.colour = torch.tensor([record["colour"] for record in self.records])
        captions = {text: index for index, text in enumerate(sorted({record["caption"] for record in self.records}))}
        self.caption = torch.tensor([captions[record["caption"]] for record in self.records])
        known = common_captions(self.records)
        self.common = torch.tensor([row for row, record in enumerate(self.records) if record["caption"] in known])

    def batch(self, stage: Stage, rng: random.Random) -> tuple[Tensor, Tensor, Tensor]:
        """Draw images [B, 3, 48, 48] in 0..1, token ids [B, L] and caption numbers [B]."""
        common = int(BATCH * COMMON)
        picks = self.common[torch.randint(len(self.common), (common,))]
        picks = torch.cat([picks, torch.randint(len(self.records), (BATCH - common,))])
        images = torch.from_numpy(self.images[self.rows[picks.numpy()]]).permute(0, 3, 1, 2).float() / 255
        records = [self.records[pick] for pick in picks.tolist()]
        if stage.attributes:
            images, words = attribute_views(images, self.colour[picks], rng)
            texts = [attribute_caption(record, pair, rng) for record, pair in zip(records, words, strict=True)]
        else:
            images = plain_views(images, self.colour[picks])
            texts = [plain_caption(record, rng) for record in records]
        return images, tokenize(texts), self.caption[picks]


def common_captions(records: list[dict], shared_by: int = SHARED_BY) -> set[str]:
    """Captions that at least `shared_by` pretraining sets use: what they mean can be learned."""
    sets = {}
    for record in records:
        if not record["held_out"]:
            sets.setdefault(record["caption"], set()).add(record["set"])
    return {caption for caption, names in sets.items() if len(names) >= shared_by}


@cache
def encode_word(word: str) -> list[int]:
    """Token ids of one word."""
    return tokenizer().encode(word)


@cache
def tokenizer() -> SimpleTokenizer:
    """The tokenizer, made once."""
    return SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])


def tokenize(texts: list[str]) -> Tensor:
    """Token ids [B, L] where L is the longest text, not the context length: padding behind the end has no effect."""
    room = CONFIG["text_cfg"]["context_length"] - 2
    rows = [[START, *[token for word in text.split() for token in encode_word(word)][:room], END] for text in texts]
    length = max(map(len, rows))
    return torch.tensor([row + [0] * (length - len(row)) for row in rows])


def encode_text(model: CLIP, tokens: Tensor) -> Tensor:
    """Text features [B, D] of token ids [B, L], L at most the context length."""
    length = tokens.shape[1]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    return x[torch.arange(len(x)), tokens.argmax(-1)] @ model.text_projection


def clip_loss(image: Tensor, text: Tensor, scale: Tensor, target: Tensor) -> Tensor:
    """Symmetric cross-entropy of image and text features [B, D] with soft targets [B, B]."""
    logits = scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    return -(target * (logits.log_softmax(1) + logits.T.log_softmax(1))).sum(1).mean() / 2


def standardise(features: Tensor) -> Tensor:
    """Give every feature mean 0 and variance 1 over the batch."""
    return (features - features.mean(0)) / (features.std(0) + 1e-4)


def new_model() -> CLIP:
    """The untrained model."""
    model = CLIP(**CONFIG)
    nn.init.normal_(model.token_embedding.weight, std=0.05)
    nn.init.normal_(model.positional_embedding, std=0.03)
    model.visual.to(memory_format=torch.channels_last)
    return model


def new_optimizer(model: CLIP, stage: Stage) -> torch.optim.Optimizer:
    """AdamW; norms, biases and embeddings do not decay."""
    decays = {True: [], False: []}
    for name, parameter in model.named_parameters():
        decays[parameter.ndim >= 2 and "embedding" not in name].append(parameter)
    groups = [{"params": decays[True], "weight_decay": WEIGHT_DECAY}, {"params": decays[False], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=stage.lr, betas=(0.9, 0.98), eps=1e-6)


def train_step(
    model: CLIP, optimizer: torch.optim.Optimizer, stage: Stage, step: int, icons: Icons, seed: int
) -> float:
    """Take one step and return its loss. What is random depends on the seed, the stage and the step alone."""
    rng = random.Random(f"{seed} {stage.name} {step}")
    torch.manual_seed(rng.getrandbits(63))
    progress = step / stage.steps
    rate = stage.lr * min(1, (step + 6) / WARM_UP) * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)
    for group in optimizer.param_groups:
        group["lr"] = rate

    images, tokens, captions = icons.batch(stage, rng)
    images = (images - PREPROCESS["mean"][0]) / PREPROCESS["std"][0]
    # Short sequences: plain attention has a faster backward on the CPU than the fused one.
    with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
        image = model.encode_image(images.contiguous(memory_format=torch.channels_last))
        text = encode_text(model, tokens)
    image, text = image.float(), text.float()

    same = (captions[:, None] == captions).float()
    target = stage.own * torch.eye(len(same)) + (1 - stage.own) * same
    target = target / target.sum(1, keepdim=True)
    scale = model.logit_scale.exp()
    loss = total = clip_loss(image, text, scale, target)
    if progress < stage.standardised:
        weight = 1 - progress / stage.standardised
        total = loss + weight * clip_loss(standardise(image), standardise(text), scale.detach(), target)

    optimizer.zero_grad(set_to_none=True)
    total.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    with torch.no_grad():
        model.logit_scale.clamp_(max=math.log(100))
    return loss.item()


def save_atomically(state: dict, path: Path) -> None:
    """Write a checkpoint so that a killed run leaves either the old or the new one, never half of one."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def main(
    data: Annotated[Path, typer.Argument(help="folder that icons.py wrote", exists=True, file_okay=False)],
    out: Annotated[Path, typer.Argument(help="folder for checkpoint.pt, names.safetensors and attributes.safetensors")],
    seed: Annotated[int, typer.Option(help="of the weights, the batches and the augmentation")] = 0,
    every: Annotated[int, typer.Option(help="steps between checkpoints")] = 50,
) -> None:
    """Train both stages. The same command again continues a run that was stopped."""
    torch.set_flush_denormal(True)
    out.mkdir(parents=True, exist_ok=True)
    icons = Icons(data)
    torch.manual_seed(seed)
    model = new_model()
    checkpoint = out / "checkpoint.pt"
    state = torch.load(checkpoint, weights_only=True) if checkpoint.exists() else {"stage": 0, "step": 0, "seed": seed}
    if state["seed"] != seed:
        raise typer.BadParameter(f"seed must be {state['seed']}, the seed of the run in {out}, got {seed}")
    if "model" in state:
        model.load_state_dict(state["model"])

    for number, stage in enumerate(STAGES[state["stage"] :], start=state["stage"]):
        optimizer = new_optimizer(model, stage)
        resumed = number == state["stage"] and state["step"]
        if resumed:
            optimizer.load_state_dict(state["optimizer"])
        first = state["step"] if resumed else 0
        bar = tqdm(range(first, stage.steps), stage.name, initial=first, total=stage.steps, disable=None)
        for step in bar:
            began = time.perf_counter()
            loss = train_step(model, optimizer, stage, step, icons, seed)
            bar.set_postfix(loss=f"{loss:.3f}", scale=f"{model.logit_scale.exp().item():.1f}", refresh=False)
            with (out / "log.jsonl").open("a") as log:
                line = {"stage": stage.name, "step": step, "loss": loss, "seconds": time.perf_counter() - began}
                log.write(json.dumps(line) + "\n")
            if (step + 1) % every == 0 and step + 1 < stage.steps:
                now = {"stage": number, "step": step + 1, "seed": seed, "model": model.state_dict()}
                save_atomically({**now, "optimizer": optimizer.state_dict()}, checkpoint)
        weights = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(weights, out / f"{stage.name}.safetensors")
        save_atomically({"stage": number + 1, "step": 0, "seed": seed, "model": weights}, checkpoint)
    typer.echo(f"{out / 'attributes.safetensors'}: trained")


if __name__ == "__main__":
    typer.run(main)
