"""FrozenClip: one frozen view of open_clip's CLIP and CustomTextCLIP, image and text side alike."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from warnings import warn

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from open_clip.transformer import LayerNormFp32, ResidualAttentionBlock, Transformer
from torch import Tensor, nn
from torchvision.transforms import Compose, RandomHorizontalFlip

from mergetune.backbones import Backbone, check_weights, checked_backbone
from mergetune.blocks import ACTIVATIONS, Layout, run_blocks
from mergetune.files import jsonable
from mergetune.pickles import is_torchscript

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PLAIN = "a photo of a {}."
EMBEDDED = 16  # sets of class embeddings that are remembered
COOP_CROP_SCALE = (0.08, 1.0)  # CoOp trains on random resized crops of this share of the area, and flips


@dataclass(frozen=True)
class TextParts:
    """The parts of a text tower, wherever open_clip keeps them. W is the tower's width, D the embedding's.

    Attributes:
        token_embedding: the vocabulary, [V, W].
        positional_embedding: [L, W].
        blocks: the residual attention blocks, in order.
        ln_final: the layer norm after the last block.
        projection: W -> D as a matrix [W, D], a linear layer, or None.
        pool: which row becomes the feature: "argmax" (highest token id), "eos" or "last".
        eos_id: the token that "eos" looks for.
        causal: whether a token sees only what stands before it.
        heads: attention heads.
        context_length: L, tokens in a text.
    """

    token_embedding: nn.Embedding
    positional_embedding: Tensor
    blocks: tuple[ResidualAttentionBlock, ...]
    ln_final: nn.Module
    projection: Tensor | nn.Linear | None
    pool: str
    eos_id: int | None
    causal: bool
    heads: int
    context_length: int

    @property
    def width(self) -> int:
        return self.token_embedding.embedding_dim

    @property
    def dtype(self) -> torch.dtype:
        return self.blocks[0].mlp.c_fc.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.positional_embedding.device

    def astype(self, dtype: torch.dtype) -> TextParts:
        """A copy in another precision."""
        norm = torch.float32 if isinstance(self.ln_final, LayerNormFp32) else dtype  # the former works in float32 alone
        return replace(
            self,
            token_embedding=deepcopy(self.token_embedding).to(dtype),
            positional_embedding=self.positional_embedding.to(dtype),
            blocks=tuple(deepcopy(block).to(dtype) for block in self.blocks),
            ln_final=deepcopy(self.ln_final).to(norm),
            projection=None if self.projection is None else deepcopy(self.projection).to(dtype),
        )

    def pooled_position(self, tokens: Tensor) -> Tensor:
        """The row of each text that becomes its feature. tokens [C, L] -> [C]."""
        if self.pool == "last":
            return torch.full((len(tokens),), tokens.shape[1] - 1, device=tokens.device)
        found = tokens.argmax(-1) if self.pool == "argmax" else (tokens == self.eos_id).int().argmax(-1)
        return found

    def project(self, x: Tensor) -> Tensor:
        """Class features of the pooled rows: [..., W] -> [..., D] float32, not normalised."""
        x = self.ln_final(x)
        if isinstance(self.projection, nn.Linear):
            x = self.projection(x)
        elif self.projection is not None:
            x = x @ self.projection
        return x.float()


@dataclass(frozen=True, eq=False)
class FrozenClip:
    """A CLIP that is never trained. Make one with :func:`load_clip`, or from a model of your own.

    Attributes:
        model: open_clip's ``CLIP`` or ``CustomTextCLIP``; put into eval mode, gradients off.
        tokenizer: (texts, context_length=L) -> LongTensor [n, L].
        name: the backbone's name, kept with every solution.
        preprocess_cfg: open_clip's preprocessing settings (JSON-able); empty takes those that open_clip keeps with the
            model.
    """

    model: nn.Module
    tokenizer: Callable[..., Tensor]
    name: str
    preprocess_cfg: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.model, (open_clip.CLIP, open_clip.CustomTextCLIP)) or hasattr(
            self.model, "text_decoder"
        ):
            raise _refused_model(type(self.model).__name__)
        self.model.eval().requires_grad_(False)
        _ = self.text  # an unknown text tower is refused here, before any image is encoded
        cfg = self.preprocess_cfg or open_clip.get_model_preprocess_cfg(self.model)
        cfg = jsonable(merge_preprocess_dict(PreprocessCfg(), cfg))
        object.__setattr__(self, "preprocess_cfg", cfg)

    # -- what it is ---------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        return self.text.dtype

    @property
    def embed_dim(self) -> int:
        projection = self.text.projection
        if projection is None:
            return self.text.width
        return projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]

    @cached_property
    def logit_scale(self) -> float:
        """exp of the model's learned log-temperature; 100 for OpenAI's."""
        return self.model.logit_scale.detach().float().exp().item()

    @cached_property
    def logit_bias(self) -> float:
        """SigLIP's bias; the same for every class, so that softmax and argmax do not see it. 0 elsewhere."""
        bias = self.model.logit_bias
        return 0.0 if bias is None else bias.detach().float().item()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all the weights."""
        return _fingerprint(self.model.state_dict())

    @cached_property
    def image_fingerprint(self) -> str:
        """SHA-256 of the image tower's weights: the key of cached features."""
        return _fingerprint(self.model.visual.state_dict())

    @cached_property
    def text_fingerprint(self) -> str:
        """SHA-256 of everything but the image tower: what a prompt depends on."""
        return _fingerprint({k: v for k, v in self.model.state_dict().items() if not k.startswith("visual.")})

    # -- images -------------------------------------------------------------------------------------------------------

    @cached_property
    def preprocess(self) -> Callable[[Any], Tensor]:
        """The evaluation transform: PIL image -> [3, H, W]."""
        return image_transform_v2(PreprocessCfg(**self.preprocess_cfg), is_train=False)

    @cached_property
    def augment(self) -> Callable[[Any], Tensor]:
        """CoOp's training transform: crop, resize, flip, drawn from torch's global RNG. PIL image -> [3, H, W]."""
        crop = image_transform_v2(
            PreprocessCfg(**self.preprocess_cfg), is_train=True, aug_cfg={"scale": COOP_CROP_SCALE}
        )
        return Compose([RandomHorizontalFlip(), crop])

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensor:
        """Image features. pixels [B, 3, H, W] -> [B, D] float32, unit norm."""
        # The convolution that takes the pixels: in open_clip's mixed precision the parameters before it are float32.
        weight = max(self.model.visual.parameters(), key=Tensor.dim)
        features = self.model.encode_image(pixels.to(device=weight.device, dtype=weight.dtype))
        return F.normalize(_pooled(features).float(), dim=-1)

    # -- texts --------------------------------------------------------------------------------------------------------

    @cached_property
    def text(self) -> TextParts:
        """The text tower's parts, refused by name if they are not understood."""
        return _text_parts(self.model)

    @cached_property
    def _text_copies(self) -> dict[torch.dtype, TextParts]:
        return {self.text.dtype: self.text}

    def text_as(self, dtype: torch.dtype) -> TextParts:
        """The text tower in another precision, copied once."""
        if dtype not in self._text_copies:
            self._text_copies[dtype] = self.text.astype(dtype)
        return self._text_copies[dtype]

    @cached_property
    def first_token(self) -> int:
        """Where a text's own tokens begin: 1 if the tokenizer puts a start token first, 0 if not (SigLIP)."""
        # Against no text at all: two words may begin alike, as a sentencepiece "▁" before each.
        empty, word = self.tokenizer(["", "cat"], context_length=self.text.context_length)
        return int((empty != word).int().argmax())

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids. texts -> LongTensor [n, L].

        Raises:
            ValueError: a text is longer than the tower's context; tokenizers would cut it in silence.
        """
        length = self.text.context_length
        # Given twice the room, a text that fits has no more tokens. What stands in the middle of no text is padding.
        tokens, roomy = (self.tokenizer(list(texts), context_length=room) for room in (length, 2 * length))
        padding = self.tokenizer([""], context_length=2 * length)[0, length]
        too_long = (roomy != padding).sum(-1) > (tokens != padding).sum(-1)
        if too_long.any():
            text = texts[int(too_long.int().argmax())]
            raise ValueError(f"texts must fit the text tower's {length} tokens, got {text!r}")
        return tokens.to(self.device)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str], *, batch_size: int = 256) -> Tensor:
        """open_clip's own text features. texts -> [n, D] float32, not normalised."""
        tokens = self.tokenize(texts)
        return torch.cat([_pooled(self.model.encode_text(chunk)).float() for chunk in tokens.split(batch_size)])

    @torch.no_grad()
    def class_embeddings(self, classnames: Sequence[str], templates: str | Sequence[str] = PLAIN) -> Tensor:
        """Zero-shot class embeddings: the mean over templates of unit features, made unit again (Radford et al. 2021).

        Args:
            classnames: C names.
            templates: one or more texts with ``{}`` where the name goes.

        Returns:
            [C, D] float32, unit norm.
        """
        key = check_classnames(classnames), check_templates(templates)
        if key not in self._embedded:
            if len(self._embedded) >= EMBEDDED:
                self._embedded.pop(next(iter(self._embedded)))
            names, templates = key
            total = torch.zeros(len(names), self.embed_dim, device=self.device)
            for template in templates:
                total += F.normalize(self._packed_features([fill(template, name) for name in names]), dim=-1)
            self._embedded[key] = F.normalize(total / len(templates), dim=-1)
        return self._embedded[key].clone()

    @cached_property
    def _embedded(self) -> dict[tuple[tuple[str, ...], tuple[str, ...]], Tensor]:
        """The latest results of :meth:`class_embeddings`: a run asks for the same ones again and again."""
        return {}

    def _packed_features(self, texts: Sequence[str], *, batch_size: int = 128) -> Tensor:
        """:meth:`encode_text` without the padding: in a causal tower nothing behind a text's last token reaches it."""
        text = self.text
        if not text.causal:
            return self.encode_text(texts)
        tokens = self.tokenize(texts)
        lengths = text.pooled_position(tokens) + 1
        order = lengths.argsort(stable=True)
        features = []
        for chunk in order.split(batch_size):
            inside = torch.arange(tokens.shape[1], device=self.device) < lengths[chunk, None]
            x = text.token_embedding(tokens[chunk]).to(text.dtype) + text.positional_embedding.to(text.dtype)
            pooled = lengths[chunk].cumsum(0) - 1
            layout = Layout(0, tuple(lengths[chunk].tolist()), pooled, text.heads, causal=True)
            features.append(text.project(run_blocks(text.blocks, x[inside][None], layout))[0])
        return torch.cat(features)[order.argsort()]


def check_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """The templates as a tuple; each must hold exactly one ``{}``."""
    templates = (templates,) if isinstance(templates, str) else tuple(templates)
    if not templates:
        raise ValueError("templates must hold at least one text, got none")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"a template must hold exactly one {{}} for the class name, got {template!r}")
    return templates


def words_before(template: str) -> str:
    """The template's words before the class name; a dataset's own may have none: "{} texture."."""
    return template.partition("{}")[0].strip()


def fill(template: str, name: str) -> str:
    """The template with a class name in its place."""
    return template.replace("{}", name)


def check_classnames(classnames: Sequence[str]) -> tuple[str, ...]:
    """The names as a tuple: at least one, none empty. Two classes may have one name: CLIP's ImageNet has such pairs."""
    if isinstance(classnames, str):
        raise TypeError(f"classnames must be a list of names, got the text {classnames!r}")
    names = tuple(classnames)
    if not names:
        raise ValueError("classnames must hold at least one name, got none")
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"classnames must be texts, got {name!r}")
    return names


def load_clip(
    name: str,
    pretrained: str | None = None,
    *,
    device: str | torch.device = "cpu",
    precision: str = "float32",
    cache_dir: str | Path | None = None,
    allow_torchscript: bool = False,
) -> FrozenClip:
    """Load any open_clip model, frozen.

    No code of the model's files is run: configurations and tokenizers of "hf-hub:" and "local-dir:" may name a network
    and a vocabulary, weights may hold tensors, and of a TorchScript archive, as OpenAI publishes, the tensors are read.

    Args:
        name: an open_clip model name ("ViT-B-16-quickgelu"), "hf-hub:org/repo" or "local-dir:path".
        pretrained: open_clip's tag ("openai") or a local checkpoint; not used with "hf-hub:" and "local-dir:". A
            checkpoint does not tell its preprocessing: where all of open_clip's tags for the name share one that is not
            the default (SigLIP, MobileCLIP, CLIPA, PE), it is taken, with a warning.
        device: where the model lives.
        precision: "float32", "bfloat16" or "float16" for the weights; features are float32 always.
        cache_dir: where open_clip keeps downloads.
        allow_torchscript: run a TorchScript archive whose tensors cannot be read otherwise. It is a program: allow it
            for an author whom you would let run one.

    Raises:
        ValueError: unknown precision; no weights named; weights given twice; files that ask for more than a network, a
            vocabulary and tensors, naming the file and the key.
        RuntimeError: open_clip does not know the model or the tag; weights of another model; a package for its
            tokenizer is missing.
        TypeError: a model without a text tower that mergetune understands.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    complete = name.startswith(("hf-hub:", "local-dir:"))
    if complete and pretrained is not None:
        raise ValueError(f"pretrained must be None when name holds the weights ({name!r}), got {pretrained!r}")
    if not complete and pretrained is None:
        raise ValueError(
            f"pretrained must name the weights of {name!r}, got None: a tag of open_clip or a local checkpoint"
        )
    published = {}
    if not complete:
        name = name.replace("/", "-")  # as open_clip reads names, but not in its tokenizers
        config = open_clip.get_model_config(name) or {"text_cfg": {}}
        if "multimodal_cfg" in config:  # refused before gigabytes are downloaded
            raise _refused_model("CoCa")
        if config["text_cfg"].get("hf_model_name"):
            raise _refused_tower("HFTextEncoder")
        warn_quickgelu(name, str(pretrained))
        published = _published_preprocess(name, str(pretrained))
        opened = nullcontext(_built_in(name, str(pretrained), config, cache_dir))
    else:
        opened = checked_backbone(name, cache_dir=cache_dir)
    with opened as source:
        state = None if source.weights is None else check_weights(source.weights, allow_torchscript=allow_torchscript)
        try:
            model = open_clip.create_model(
                source.name,
                None if complete else str(pretrained),
                device=device,
                load_weights=state is None,
                require_pretrained=state is None,
                force_preprocess_cfg=published,
                cache_dir=cache_dir,
            )
        except AssertionError as error:  # from open_clip's resizing of position embeddings
            raise RuntimeError(f"the weights {pretrained or name} are not those of {name!r}: {error}") from error
        if state is not None:
            _load_archive(model, state)
        tokenizer = _load_tokenizer(name, source, cache_dir)
    logit_scale = model.logit_scale.detach().clone()
    model.to(dtype=PRECISIONS[precision])
    model.logit_scale.data = logit_scale  # the temperature is not rounded: a half type would change every logit
    return FrozenClip(model, tokenizer, name if complete else f"{name}/{pretrained}")


def _built_in(name: str, pretrained: str, config: Mapping[str, Any], cache_dir: str | Path | None) -> Backbone:
    """One of open_clip's own models, with the weights of a tag, which are downloaded, or of a file."""
    weights = pretrained if Path(pretrained).is_file() else ""
    if tag := open_clip.get_pretrained_cfg(name, pretrained):
        try:
            weights = open_clip.download_pretrained(tag, cache_dir=cache_dir)
        except Exception as error:  # whatever a download raises
            raise RuntimeError(f"the weights {pretrained!r} of {name!r} could not be downloaded: {error}") from error
    huggingface = bool(config["text_cfg"].get("hf_tokenizer_name"))
    return Backbone(name, Path(weights) if weights else None, huggingface)


def _load_archive(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load what a TorchScript archive holds: a state dict, and buffers that no state dict has."""
    described = {"input_resolution", "context_length", "vocab_size"}  # in OpenAI's
    described |= {name for name, _ in model.named_buffers()} - model.state_dict().keys()
    model.load_state_dict({k: v.float() for k, v in state.items() if k not in described})


def _load_tokenizer(name: str, source: Backbone, cache_dir: str | Path | None) -> Callable[..., Tensor]:
    options = {"trust_remote_code": False} if source.huggingface else {}  # transformers would ask at the terminal
    try:
        return open_clip.get_tokenizer(source.name, cache_dir=cache_dir, **options)
    except ImportError as error:  # open_clip does not ask for transformers itself
        raise RuntimeError(f"the tokenizer of {name!r} needs a package: pip install transformers ({error})") from error
    except Exception as error:  # transformers raises many kinds on files that are not a tokenizer's
        reason = str(error).replace(str(source.folder), name) if source.folder else error
        raise RuntimeError(f"the tokenizer of {name!r} cannot be loaded: {type(error).__name__}: {reason}") from error


def warn_quickgelu(name: str, pretrained: str) -> None:
    """Warn when OpenAI weights from a file would meet GELU: they were trained with QuickGELU (open_clip issue 771).

    A checkpoint does not record its activation. For a tag open_clip warns itself; a file passes in silence.
    """
    path = Path(pretrained)
    if not path.is_file() or name.endswith("-quickgelu") or f"{name}-quickgelu" not in open_clip.list_models():
        return
    if "openai" in path.name.lower() or is_torchscript(path):
        warn(
            f"{path.name} looks like OpenAI's weights, which were trained with QuickGELU, but {name!r} uses GELU: "
            f"features would be silently wrong. Load it as {name + '-quickgelu'!r}.",
            stacklevel=3,
        )


def _published_preprocess(name: str, pretrained: str) -> dict[str, Any]:
    """The preprocessing that a local checkpoint needs: what all tags of the model share, if it is not the default."""
    if not Path(pretrained).is_file():
        return {}
    tags = open_clip.list_pretrained_tags_by_model(name)
    default = merge_preprocess_dict(PreprocessCfg(), {})
    shared = [merge_preprocess_dict(default, {**open_clip.get_pretrained_cfg(name, tag), "size": None}) for tag in tags]
    if not shared or shared[0] == default or any(cfg != shared[0] for cfg in shared):
        return {}
    cfg = {key: value for key, value in shared[0].items() if value != default[key]}
    settings = ", ".join(f"{key} {value}" for key, value in cfg.items())
    warn(
        f"{Path(pretrained).name} does not tell its preprocessing; taken as for open_clip's own {name!r}: {settings}",
        stacklevel=3,
    )
    return cfg


def _pooled(features: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Towers with ``output_tokens`` give (pooled, tokens)."""
    return features[0] if isinstance(features, tuple) else features


def _refused_model(kind: str) -> TypeError:
    return TypeError(
        f"model must be open_clip's CLIP or CustomTextCLIP, got {kind}: its text tower is not one that mergetune "
        "understands"
    )


def _refused_tower(kind: str) -> TypeError:
    hint = ": Hugging Face's text models (RoBERTa, mT5, NLLB) are not supported" if kind == "HFTextEncoder" else ""
    return TypeError(f"text tower must be open_clip's TextTransformer, got {kind}{hint}")


def _text_parts(model: nn.Module) -> TextParts:
    tower = model.text if isinstance(model, open_clip.CustomTextCLIP) else model
    kind = type(tower).__name__
    blocks = getattr(getattr(tower, "transformer", None), "resblocks", ())
    pool = getattr(tower, "text_pool_type", None) or getattr(tower, "pool_type", None)
    if not isinstance(getattr(tower, "transformer", None), Transformer) or not len(blocks):
        raise _refused_tower(kind)
    for block in blocks:
        if type(block) is not ResidualAttentionBlock:
            raise TypeError(f"text tower {kind} must be made of ResidualAttentionBlock, got {type(block).__name__}")
        if type(block.mlp.gelu) not in ACTIVATIONS:
            got = type(block.mlp.gelu).__name__
            raise TypeError(f"text tower {kind} must have the activation GELU or QuickGELU, got {got}")
    if getattr(tower, "cls_emb", None) is not None or getattr(tower, "use_pad_mask", False):
        raise TypeError(f"text tower {kind} must have neither a class token (CoCa) nor a padding mask, got one")
    if pool not in ("argmax", "eos", "last"):
        raise TypeError(f"text tower {kind} must pool by argmax, eos or last, got {pool!r}")
    mask = tower.attn_mask
    if mask is not None and not torch.equal(mask, torch.full_like(mask, float("-inf")).triu(1)):
        raise TypeError(f"text tower {kind} must have the causal attention mask or none, got another")
    return TextParts(
        token_embedding=tower.token_embedding,
        positional_embedding=tower.positional_embedding,
        blocks=tuple(blocks),
        ln_final=tower.ln_final,
        projection=tower.text_projection,
        pool=pool,
        eos_id=getattr(tower, "text_eos_id", getattr(tower, "eos_id", None)),
        causal=mask is not None,
        heads=blocks[0].attn.num_heads,
        context_length=tower.context_length,
    )


def _fingerprint(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy() if value.numel() else b"")
    return digest.hexdigest()
