"""What kind of model a checkpoint is, told by the names and shapes of a few of its weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ldm.checkpoint.names import rename

Shape = tuple[int | None, ...]

FIRST = "model.diffusion_model.input_blocks.0.0.weight"  # (model channels, latent and concatenated channels, 3, 3)
CONTEXT = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"  # (_, conditioning)
CODEBOOK = "quantize.embedding.weight"  # (codes, channels)
DECODED = "first_stage_model.decoder.conv_out.weight"  # (channels of the picture, channels, 3, 3)
TO_LATENT = "post_quant_conv.weight"  # (channels, channels, 1, 1)


@dataclass(frozen=True)
class Family:
    """A kind of model. `tell` maps a weight's name (a pattern if it has a *) to its shape; None is any shape or side.

    config: the YAML that builds it, None where there is none yet. script: the command that it is for. note: what else
    is built from weights of the same names and shapes. eps: its YAML where `config` is for a network that predicts v
    and this one turns out to predict the noise. instead: what to do with a file that is no model by itself.
    watermark: what its original writes into pictures.
    """

    name: str
    config: str | None
    script: str | None
    tell: Mapping[str, Shape | None]
    note: str = ""
    eps: str | None = None
    instead: str = ""
    watermark: str = "StableDiffusionV1"

    def advice(self) -> str:
        """What to do with a file of this family, as a clause for an error message."""
        if self.instead:
            return self.instead
        if self.config is None:
            return "there is no config for it here"
        note, script = (f" ({self.note})" if self.note else ""), (f" with {self.script}" if self.script else "")
        return f"use {self.config}{note}{script}"


def unet(channels: int, inputs: int, context: int | None = None, **others: Shape | None) -> dict[str, Shape | None]:
    """The tell-tale weights of a UNet and, by name with __ for a dot, of what stands beside it."""
    tell: dict[str, Shape | None] = {FIRST: (channels, inputs, 3, 3)}
    if context:
        tell[CONTEXT] = (None, context)
    return tell | {key.replace("__", "."): shape for key, shape in others.items()}


SD, LDM, FIRST_STAGES = "configs/stable-diffusion", "models/ldm", "models/first_stage_models"
TXT2IMG, INPAINT, SAMPLE = "scripts/txt2img.py", "scripts/inpaint.py", "scripts/sample_diffusion.py"
EDIT = "scripts/edit.py"
DEPTH, UPSCALE = "scripts/depth2img.py", "scripts/upscale.py"
IMG2IMG, VARIATION = "scripts/img2img.py", "scripts/variation.py"
LORA = "add it to a model with --lora FILE"
EMBEDDING = "add its word to a model with --embedding FILE"
SDV2, SDXL = "SDV2", "0xb3ec907bb19e"  # Stability AI's watermarks; the second is 48 bits that are no text
FOLDER = "name the folder that it is a part of, which has a model_index.json"

# The first row that fits is the answer, so the particular stands before the general.
FAMILIES = (
    Family("Stable Diffusion XL", f"{SD}/sd_xl_base.yaml", TXT2IMG,
           {"conditioner.embedders.1.model.ln_final.weight": (1280,)}, watermark=SDXL),
    Family("Stable Diffusion XL refiner", f"{SD}/sd_xl_refiner.yaml", f"{IMG2IMG}, or as --refiner of {TXT2IMG}",
           {"conditioner.embedders.0.model.ln_final.weight": (1280,)}, watermark=SDXL),
    Family("ControlNet", None, None, {"control_model.*": None}),
    Family("Stable Diffusion x4 upscaler", f"{SD}/x4-upscaling.yaml", UPSCALE,
           unet(256, 7, model__diffusion_model__label_emb__weight=None), watermark=SDV2),
    Family("x2 latent upscaler", f"{SD}/x2-latent-upscaling.yaml", f"{UPSCALE} --scale_factor 2",
           {"model.diffusion_model.time_embed.frequencies": None}),
    Family("Stable Diffusion 2 depth-to-image", f"{SD}/v2-midas-inference.yaml", DEPTH, unet(320, 5, 1024),
           watermark=SDV2),
    Family("Stable Diffusion 2 inpainting", f"{SD}/v2-inpainting-inference.yaml", INPAINT, unet(320, 9, 1024),
           watermark=SDV2),
    Family("Stable unCLIP 2.1 (ViT-H)", f"{SD}/v2-1-stable-unclip-h-inference.yaml", VARIATION,
           unet(320, 4, 1024, model__diffusion_model__label_emb__0__0__weight=(1280, 2048)), watermark=SDV2),
    Family("Stable unCLIP 2.1 (ViT-L)", f"{SD}/v2-1-stable-unclip-l-inference.yaml", VARIATION,
           unet(320, 4, 1024, model__diffusion_model__label_emb__0__0__weight=(1280, 1536)), watermark=SDV2),
    Family("Stable Diffusion 2", f"{SD}/v2-inference-v.yaml", TXT2IMG, unet(320, 4, 1024),
           "v2-inference.yaml for the base models", eps=f"{SD}/v2-inference.yaml", watermark=SDV2),
    Family("Stable Diffusion image variations", f"{SD}/sd-image-variations.yaml", VARIATION,
           unet(320, 4, 768, cond_stage_model__model__visual__conv1__weight=None)),
    Family("Stable Diffusion 1.5 inpainting", f"{SD}/v1-inpainting-inference.yaml", INPAINT, unet(320, 9, 768)),
    Family("LDM3D upscaler", None, f"{UPSCALE} --depth-img FILE --scale_factor 2",
           {FIRST: (None, 8, 3, 3), DECODED: (4, 128, 3, 3)}),
    Family("InstructPix2Pix", f"{SD}/instruct-pix2pix.yaml", EDIT, unet(320, 8, 768)),
    Family("LDM3D", f"{SD}/ldm3d.yaml", TXT2IMG, unet(320, 4, 768, **{DECODED: (6, 128, 3, 3)})),
    Family("LDM3D-4C", f"{SD}/ldm3d-4c.yaml", TXT2IMG, unet(320, 4, 768, **{DECODED: (4, 128, 3, 3)})),
    Family("Stable Diffusion 1", f"{SD}/v1-inference.yaml", TXT2IMG, unet(320, 4, 768)),
    Family("latent-diffusion text-to-image 1.45B", "configs/latent-diffusion/txt2img-1p4B-eval.yaml",
           f"{TXT2IMG} --laion400m", unet(320, 4, 1280)),
    Family("retrieval-augmented diffusion", "configs/retrieval-augmented-diffusion/768x768.yaml", None,
           unet(448, 16, 768)),
    Family("latent-diffusion inpainting", f"{LDM}/inpainting_big/config.yaml", INPAINT, unet(256, 7)),
    Family("latent-diffusion churches", f"{LDM}/lsun_churches256/config.yaml", SAMPLE, unet(192, 4)),
    Family("latent-diffusion faces or bedrooms", f"{LDM}/celeba256/config.yaml", SAMPLE, unet(224, 3),
           "or that of ffhq256 or lsun_beds256"),
    Family("latent-diffusion ImageNet (f=4)", "configs/latent-diffusion/cin256-v2.yaml", SAMPLE,
           unet(192, 3, cond_stage_model__embedding__weight=(1001, 512))),
    Family("latent-diffusion ImageNet (f=8)", f"{LDM}/cin256/config.yaml", SAMPLE, unet(256, 4)),
    Family("latent-diffusion text-to-image", f"{LDM}/text2img256/config.yaml", TXT2IMG,
           unet(192, 3, cond_stage_model__transformer__token_emb__weight=(None, 640))),
    Family("latent-diffusion super-resolution", f"{LDM}/bsr_sr/config.yaml", None, unet(160, 6)),
    Family("latent-diffusion layout-to-image", f"{LDM}/layout2img-openimages256/config.yaml", None, unet(128, 3)),
    Family("latent-diffusion semantic synthesis", f"{LDM}/semantic_synthesis256/config.yaml", None, unet(128, 6),
           "or that of semantic_synthesis512"),
    Family("vq-f4 autoencoder", f"{FIRST_STAGES}/vq-f4/config.yaml", None,
           {CODEBOOK: (8192, 3), "encoder.mid.attn_1.q.weight": None}),
    Family("vq-f4-noattn autoencoder", f"{FIRST_STAGES}/vq-f4-noattn/config.yaml", None, {CODEBOOK: (8192, 3)}),
    Family("vq-f8 autoencoder", f"{FIRST_STAGES}/vq-f8/config.yaml", None, {CODEBOOK: (16384, 4)}),
    Family("vq-f8-n256 autoencoder", f"{FIRST_STAGES}/vq-f8-n256/config.yaml", None, {CODEBOOK: (256, 4)}),
    Family("vq-f16 autoencoder", f"{FIRST_STAGES}/vq-f16/config.yaml", None, {CODEBOOK: (16384, 8)}),
    Family("kl-f4 autoencoder", f"{FIRST_STAGES}/kl-f4/config.yaml", None, {TO_LATENT: (3, 3, 1, 1)}),
    Family("kl-f8 autoencoder", f"{FIRST_STAGES}/kl-f8/config.yaml", None, {TO_LATENT: (4, 4, 1, 1)}),
    Family("kl-f16 autoencoder", f"{FIRST_STAGES}/kl-f16/config.yaml", None, {TO_LATENT: (16, 16, 1, 1)}),
    Family("kl-f32 autoencoder", f"{FIRST_STAGES}/kl-f32/config.yaml", None, {TO_LATENT: (64, 64, 1, 1)}),
    Family("LoRA", None, None, {"*lora[_.]*": None}, instead=LORA),
    Family("textual inversion", None, None, {"emb_params": (None, None)}, instead=EMBEDDING),
    Family("textual inversion", None, None, {"clip_g": (None, None), "clip_l": (None, None)}, instead=EMBEDDING),
    Family("textual inversion", None, None, {"<*>": None}, instead=EMBEDDING),
    Family("diffusers UNet", None, None, {"down_blocks.0.resnets.0.conv1.weight": None}, instead=FOLDER),
    Family("diffusers autoencoder", None, None, {"encoder.down_blocks.0.resnets.0.conv1.weight": None},
           instead=FOLDER),
    Family("bare CLIP text encoder", None, None, {"text_model.embeddings.token_embedding.weight": None}),
)
UNKNOWN = Family("unknown", None, None, {})


def identify(shapes: Mapping[str, tuple[int, ...]]) -> Family:
    """The family of a checkpoint from {name: shape of the weight}; UNKNOWN where no row of the table fits."""
    shapes = rename(shapes)
    return next((family for family in FAMILIES if _fits(family, shapes)), UNKNOWN)


def _fits(family: Family, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    for key, wanted in family.tell.items():
        if "*" in key:
            if not any(fnmatchcase(name, key) for name in shapes):
                return False
        elif key not in shapes or (wanted is not None and not _same(tuple(shapes[key]), wanted)):
            return False
    return True


def _same(shape: tuple[int, ...], wanted: Shape) -> bool:
    return len(shape) == len(wanted) and all(want in (None, side) for side, want in zip(shape, wanted))
