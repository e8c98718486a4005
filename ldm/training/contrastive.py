"""A small CLIP (Radford et al. 2021) trained on the shapes world, with false captions that differ in a word."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.data.shapes import COLOURS, RELATIONS, SHAPES, SIZES, hard_negatives, parse
from ldm.modules.encoders.clip import CLIP_MEAN, CLIP_STD, ClipConfig, ClipTextTransformer, ClipVisionTransformer
from ldm.modules.encoders.tokenizer import END, START, clip_tokenizer, clip_vocabulary

# What a caption says, attribute by attribute; of what it does not name, the word is None.
ATTRIBUTES = {
    "size": (None, *SIZES), "colour": (*COLOURS,), "shape": (*SHAPES,), "relation": (None, *RELATIONS),
    "other colour": (None, *COLOURS), "other shape": (None, *SHAPES), "background": (*COLOURS,),
}  # fmt: skip
WORDS = ("a", "on", "background", *SIZES, *COLOURS, *SHAPES, *" ".join(RELATIONS).split())


def attributes(text: str) -> list[int]:
    """The number of each attribute's word, in the order of ATTRIBUTES."""
    caption = parse(text)
    first, other = caption.objects[0], caption.objects[1] if caption.relation else None
    said = (first.size, first.colour, first.shape, caption.relation, other and other.colour, other and other.shape,
            caption.background)
    return [words.index(word) for words, word in zip(ATTRIBUTES.values(), said)]


def write_tokenizer(folder: Path) -> None:
    """CLIP's vocabulary cut to its bytes and to the merges that the words of this world take: vocab.json, merges.txt.

    Each of these words is one token; every other text is spelt out.
    """
    symbols, merges = clip_vocabulary()
    whole = clip_tokenizer().backend_tokenizer
    built, needed = {}, set()
    for left, right in merges:
        built.setdefault(left + right, (left, right))
    pending = [token for word in WORDS for token in whole.encode(word, add_special_tokens=False).tokens]
    while pending:
        pair = built.get(pending.pop())
        if pair and pair not in needed:
            needed.add(pair)
            pending += pair
    kept = [pair for pair in merges if pair in needed]
    names = [*list(symbols)[:512], *map("".join, kept), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in kept))


class ContrastiveModel(pl.LightningModule):
    """A text and a picture tower whose vectors (b, embed) agree for a picture and its caption.

    text, vision: options of ClipConfig; the vocabulary is that of the tokenizer in `folder`, which is written if it is
    not there. negatives: how many false captions each picture is shown beside those of the rest of the batch.
    attribute_weight: of the cross-entropy by which linear readers find every attribute in the pooled text state.
    locked_text: the towers of `folder` are gone on with, of which that for text stays as it is (Zhai et al. 2022), so
    that pictures can be learnt for as long as one likes beside, or after, a model that reads its states.
    """

    def __init__(
        self,
        folder: str,
        text: Mapping[str, Any],
        vision: Mapping[str, Any],
        embed: int = 128,
        negatives: int = 3,
        attribute_weight: float = 1.0,
        locked_text: bool = False,
        weight_decay: float = 0.01,
        warm_up_steps: int = 100,
        monitor: str = "val/loss",
    ):
        super().__init__()
        self.folder = Path(folder)
        if not (self.folder / "vocab.json").exists():
            write_tokenizer(self.folder)
        self.tokenizer = clip_tokenizer(self.folder)
        size = len(self.tokenizer)
        self.text_model = ClipTextTransformer(ClipConfig(vocabulary=size, eos=size - 1, **text)).text_model
        self.vision_model = ClipVisionTransformer(ClipConfig(**vision)).vision_model
        self.text_projection = nn.Linear(text["width"], embed, bias=False)
        self.visual_projection = nn.Linear(vision["width"], embed, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        self.readers = nn.Linear(text["width"], sum(map(len, ATTRIBUTES.values())))
        self.text, self.vision, self.embed = dict(text), dict(vision), embed
        self.negatives, self.attribute_weight = negatives, attribute_weight
        self.weight_decay, self.warm_up_steps = weight_decay, warm_up_steps
        self.monitor = monitor
        for embedding in (self.text_model.embeddings, self.vision_model.embeddings):
            nn.init.normal_(embedding.position_embedding.weight, std=0.01)
        nn.init.normal_(self.text_model.embeddings.token_embedding.weight, std=0.02)
        with torch.device("cpu"):
            self.register_buffer("mean", torch.tensor(CLIP_MEAN)[:, None, None], persistent=False)
            self.register_buffer("std", torch.tensor(CLIP_STD)[:, None, None], persistent=False)
        if locked_text:
            self.load_state_dict(load_file(self.folder / "model.safetensors"), strict=False)
            for part in (self.text_model, self.text_projection, self.readers):
                part.requires_grad_(False)

    def encode_text(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Vectors (b, embed) of length 1, and the pooled states (b, width) that they come from."""
        ids = self.tokenizer(list(texts), padding=True, truncation=True, max_length=self.text["length"],
                             return_tensors="pt")["input_ids"]  # what follows the end mark cannot be seen by it
        pooled = self.text_model(ids.to(self.device)).pooler_output
        return F.normalize(self.text_projection(pooled), dim=-1), pooled

    def encode_image(self, images: Tensor) -> Tensor:
        """Vectors (b, embed) of length 1 for pictures (b, 3, h, w) in [-1, 1], which are brought to the right side."""
        side = self.vision["image"]
        if images.shape[-1] != side:
            images = F.interpolate(images, size=side, mode="bicubic", antialias=True)
        pooled = self.vision_model(((images + 1) / 2 - self.mean) / self.std).pooler_output
        return F.normalize(self.visual_projection(pooled), dim=-1)

    def losses(self, batch: Mapping[str, Any], split: str) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch of pictures (b, h, w, 3) and captions, and its parts by name."""
        captions, size = batch["caption"], len(batch["caption"])
        rng = Random(int(torch.randint(2**31, ())))
        false = [text for caption in captions for text in self.false_captions(caption, rng)]
        vectors, pooled = self.encode_text([*captions, *false])
        seen = self.encode_image(batch["image"].movedim(-1, 1))
        scale = self.logit_scale.exp().clamp(max=100.0)
        pairs = scale * seen @ vectors[:size].T
        near = scale * (seen[:, None] * vectors[size:].unflatten(0, (size, self.negatives))).sum(dim=-1)
        truth = torch.arange(size, device=pairs.device)
        by_picture = F.cross_entropy(torch.cat([pairs, near], dim=1), truth)
        contrast = (by_picture + F.cross_entropy(pairs.T, truth)) / 2

        said = torch.tensor([attributes(text) for text in (*captions, *false)], device=pooled.device)
        read = self.readers(pooled).split([len(words) for words in ATTRIBUTES.values()], dim=1)
        reading = sum(F.cross_entropy(logits, words) for logits, words in zip(read, said.T)) / len(read)
        exact = torch.stack([logits.argmax(dim=1) == words for logits, words in zip(read, said.T)])
        loss = contrast + self.attribute_weight * reading if self.readers.weight.requires_grad else contrast
        parts = {
            "loss": loss, "contrast": contrast, "reading": reading,
            "retrieved": (torch.cat([pairs, near], dim=1).argmax(dim=1) == truth).float().mean(),
            "true_over_near": (pairs.diagonal()[:, None] > near).all(dim=1).float().mean(),
            "attributes": exact.float().mean(), "captions_read": exact.all(dim=0).float().mean(),
        }  # fmt: skip
        return loss, {f"{split}/{name}": value.detach() for name, value in parts.items()}

    def false_captions(self, caption: str, rng: Random) -> list[str]:
        """`negatives` captions that differ from this one by a word, by the order of its words or by its colours."""
        found = hard_negatives(caption, rng)
        return [found[i % len(found)] for i in range(self.negatives)]

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        loss, parts = self.losses(batch, "train")
        self.log_dict(parts, batch_size=len(batch["caption"]))
        return loss

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self.log_dict(self.losses(batch, "val")[1], batch_size=len(batch["caption"]))

    def configure_optimizers(self):
        """AdamW with a warm-up, then half a cosine down to zero at the trainer's last step."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        last = max(self.trainer.max_steps, self.warm_up_steps + 1)

        def multiplier(step: int) -> float:
            done = min(max(step - self.warm_up_steps, 0) / (last - self.warm_up_steps), 1.0)
            return min((step + 1) / self.warm_up_steps, 1.0) * (1 + torch.cos(torch.tensor(torch.pi * done)).item()) / 2

        schedule = {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, multiplier), "interval": "step"}
        return [optimizer], [schedule]

    def save_folder(self) -> None:
        """Write config.json and model.safetensors beside the tokenizer, as transformers' CLIPModel reads them."""

        def tower(options: Mapping[str, Any], **others: Any) -> dict[str, Any]:
            return {
                "hidden_size": options["width"], "num_hidden_layers": options["layers"],
                "num_attention_heads": options["heads"], "intermediate_size": 4 * options["width"],
                "hidden_act": "quick_gelu", "projection_dim": self.embed, **others,
            }  # fmt: skip

        end = len(self.tokenizer) - 1
        config = {
            "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": self.embed,
            "text_config": tower(self.text, vocab_size=end + 1, bos_token_id=end - 1, eos_token_id=end,
                                 pad_token_id=end, max_position_embeddings=self.text["length"]),
            "vision_config": tower(self.vision, image_size=self.vision["image"], patch_size=self.vision["patch"]),
        }  # fmt: skip
        (self.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        state = {key: weight.contiguous() for key, weight in self.state_dict().items() if "readers" not in key}
        save_file(state, self.folder / "model.safetensors", metadata={"format": "pt"})


class SaveFolder(Callback):
    """Write a ContrastiveModel in the transformers form after each validation, ready for FrozenCLIPEmbedder."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: ContrastiveModel) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            pl_module.save_folder()
