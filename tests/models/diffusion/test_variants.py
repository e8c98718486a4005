from types import SimpleNamespace

import pytest
import torch
from support import tiny_model
from torch import nn

from ldm.errors import ConfigError
from ldm.models.diffusion import ddpm, variants

IDENTITY = {"target": "torch.nn.Identity"}
UPSCALER = {
    "target": "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation",
    "params": {"noise_schedule_config": {"timesteps": 10}, "max_noise_level": 5},
}
ADM = {"num_classes": "sequential", "adm_in_channels": 8}


@pytest.fixture
def pictures(batch):
    return batch | {
        "mask": torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1).expand(2, 16, 16, 1),
        "masked_image": 0.5 * batch["image"],
        "lr": torch.randn(2, 16, 16, 3),
        "LR": torch.randn(2, 8, 8, 3),
        "midas_in": torch.randn(2, 1, 16, 16),
    }


@pytest.fixture
def build(small_model):
    """Each variant at its smallest, by name."""
    configs = {
        "LatentInpaintDiffusion": {"unet": {"in_channels": 9}, "conditioning_key": "hybrid"},
        "LatentEditDiffusion": {"unet": {"in_channels": 8}, "conditioning_key": "hybrid", "cond_stage_key": "edit"},
        "LatentDepth2ImageDiffusion": {"unet": {"in_channels": 5}, "conditioning_key": "hybrid",
                                       "depth_stage_config": IDENTITY},
        "LatentUpscaleDiffusion": {"unet": {"in_channels": 7, "num_classes": 10}, "conditioning_key": "hybrid-adm",
                                   "low_scale_config": UPSCALER},
        "LatentUpscaleFinetuneDiffusion": {"unet": {"in_channels": 16}, "conditioning_key": "hybrid",
                                           "reshuffle_patch_size": 2},
        "ImageEmbeddingConditionedLatentDiffusion": {
            "unet": ADM, "conditioning_key": "crossattn-adm", "embedding_key": "image",
            "embedder_config": {"target": "torch.nn.Flatten"}},
    }  # fmt: skip
    return lambda name, **params: small_model(name, **(configs[name] | params))


VARIANTS = ("LatentInpaintDiffusion", "LatentDepth2ImageDiffusion", "LatentUpscaleDiffusion",
            "LatentUpscaleFinetuneDiffusion")  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_a_batch_becomes_what_the_network_takes_and_can_be_trained_on(build, pictures, name):
    model = build(name)
    loss, parts = model.shared_step(pictures)
    loss.backward()
    assert parts["train/loss"] == loss
    assert model.model.diffusion_model.out[2].bias.grad.abs().sum() > 0


@pytest.mark.parametrize("name", VARIANTS)
def test_the_log_draws_from_all_conditions_and_shows_them(build, pictures, name):
    log = build(name).eval().log_images(pictures, N=1, ddim_steps=2, plot_progressive_rows=False)
    shown = {"LatentInpaintDiffusion": "masked_image", "LatentDepth2ImageDiffusion": "depth",
             "LatentUpscaleDiffusion": "x_lr"}.get(name, "inputs")  # fmt: skip
    assert len(log[shown]) == 1
    assert log["samples"].shape == log["samples_inpainting"].shape == (1, 4, 8, 8)


def test_guidance_changes_only_the_text_of_several_conditions(build, pictures):
    model = build("LatentUpscaleDiffusion").eval()
    options = {"unconditional_guidance_scale": 2.0, "unconditional_guidance_label": torch.zeros(1, 3, 8)}
    log = model.log_images(pictures, ddim_steps=2, plot_progressive_rows=False, inpaint=False, **options)
    assert log["samples_cfg_scale_2.00"].shape == (2, 4, 8, 8)


def test_only_the_entries_asked_for_are_conditioned_on(build, pictures):
    z, cond = build("LatentUpscaleDiffusion").get_input(pictures, "image", bs=1)
    assert {len(z), len(cond["c_concat"][0]), len(cond["c_crossattn"][0]), len(cond["c_adm"])} == {1}


def test_flags_bring_pictures_reconstructions_and_raw_conditions(build, pictures):
    out = build("LatentInpaintDiffusion").get_input(pictures, "image", return_first_stage_outputs=True)
    assert len(out) == 5
    z, _, x, reconstruction, raw = out
    assert x.shape == reconstruction.shape == z.shape
    assert raw is pictures["txt"]


# Inpainting -----------------------------------------------------------------------------------------------------------


def test_inpainting_is_told_the_mask_and_then_the_masked_latents(build, pictures):
    model = build("LatentInpaintDiffusion", scale_factor=2.0)
    concat = model.get_input(pictures, "image")[1]["c_concat"][0]
    assert concat.shape == (2, 5, 8, 8)
    assert concat[:, 0].mean(dim=(1, 2)).tolist() == [0.0, 1.0]
    torch.testing.assert_close(concat[:, 1:], pictures["image"].movedim(-1, 1))


def test_the_order_of_concatenation_is_the_configurations(build, pictures):
    concat = build("LatentInpaintDiffusion", concat_keys=["masked_image", "mask"]).get_input(pictures, "image")[1]
    assert concat["c_concat"][0][:, 4].mean(dim=(1, 2)).tolist() == [0.0, 1.0]
    with pytest.raises(ConfigError, match="masked_image_key"):
        build("LatentInpaintDiffusion", concat_keys=["mask"])


def test_the_published_form_of_the_inpainting_model_builds():
    model = tiny_model("tiny-inpaint")
    assert isinstance(model, variants.LatentInpaintDiffusion)
    assert (model.concat_keys, model.masked_image_key) == (("mask", "masked_image"), "masked_image")


# Editing --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def edits(batch):
    """A batch of 40 times the same edit."""
    image, text = batch["image"][:1].expand(40, -1, -1, -1), batch["txt"][:1].expand(40, -1, -1)
    return {"image": image, "edit": {"c_concat": 0.5 * image, "c_crossattn": text}}


def test_an_edit_is_told_the_text_and_the_unscaled_latents_of_the_picture(build, edits):
    model = build("LatentEditDiffusion", scale_factor=2.0).eval()
    z, cond = model.get_input(edits, "image")
    torch.testing.assert_close(cond["c_concat"][0], z / 4)
    assert torch.equal(cond["c_crossattn"][0], edits["edit"]["c_crossattn"])


def test_training_drops_text_and_picture_of_an_edit_alone_and_together(build, edits):
    model = build("LatentEditDiffusion").train()
    model.get_learned_conditioning = lambda c: torch.zeros(1, 3, 8) if c == [""] else c
    model.dropped = 0.25
    torch.manual_seed(0)
    cond = model.get_input(edits, "image")[1]
    kept = zip(cond["c_crossattn"][0].flatten(1).any(1).tolist(), cond["c_concat"][0].flatten(1).any(1).tolist())
    assert {*kept} == {(True, True), (True, False), (False, True), (False, False)}
    loss, _ = model.shared_step(edits)
    assert loss.isfinite()


# Starting with fewer channels -----------------------------------------------------------------------------------------


@pytest.fixture
def saved(small_model, tmp_path):
    """A text-to-image checkpoint with 4 input channels, weights all 1."""
    model = small_model(use_ema=True)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.model_ema.buffers()]:
            tensor.fill_(1)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "start.ckpt")
    return str(tmp_path / "start.ckpt")


def test_new_input_channels_begin_at_zero_and_the_others_where_the_checkpoint_left_them(build, saved):
    model = build("LatentInpaintDiffusion", use_ema=True, ckpt_path=saved)
    convolution = model.model.diffusion_model.input_blocks[0][0].weight
    for _ in ("weights", "average"):
        assert convolution[:, :4].unique().tolist() == [1.0]
        assert convolution[:, 4:].unique().tolist() == [0.0]
        model.model_ema.copy_to(model.model)


def test_a_checkpoint_of_the_same_shape_is_taken_as_it_is(build, tmp_path):
    first = build("LatentInpaintDiffusion")
    torch.save({"state_dict": first.state_dict()}, tmp_path / "again.ckpt")
    second = build("LatentInpaintDiffusion", ckpt_path=str(tmp_path / "again.ckpt"))
    torch.testing.assert_close(dict(second.named_parameters()), dict(first.named_parameters()))


def test_without_keys_to_grow_another_shape_is_refused(build, saved):
    with pytest.raises(RuntimeError, match="size mismatch"):
        build("LatentInpaintDiffusion", finetune_keys=None, ckpt_path=saved)


def test_latents_among_the_conditions_can_be_decoded_for_the_log(build, pictures):
    model = build("LatentInpaintDiffusion", c_concat_log_start=1).eval()
    log = model.log_images(pictures, sample=False, inpaint=False, plot_progressive_rows=False)
    torch.testing.assert_close(log["c_concat_decoded"], log["masked_image"])


# Depth, upscaling, embeddings, layouts --------------------------------------------------------------------------------


def test_depth_is_stretched_to_the_whole_range_for_each_picture(build, pictures):
    scales = torch.tensor([1.0, 7.0]).reshape(2, 1, 1, 1)
    pictures["midas_in"] = scales * torch.linspace(3.0, 90.0, 16).expand(2, 1, 16, 16)
    depth = build("LatentDepth2ImageDiffusion").get_input(pictures, "image")[1]["c_concat"][0]
    assert depth.shape == (2, 1, 8, 8)
    torch.testing.assert_close(depth[0], depth[1], atol=1e-4, rtol=0)
    assert (depth.min().item(), depth.max().item()) == pytest.approx((-1.0, 1.0), abs=1e-3)


def test_the_upscaler_is_told_the_noise_level_of_its_small_picture(build, pictures):
    model = build("LatentUpscaleDiffusion")
    cond = model.get_input(pictures, "image")[1]
    assert cond["c_concat"][0].shape == (2, 3, 8, 8)
    assert cond["c_adm"].shape == (2,)
    assert cond["c_adm"].max() < 5
    assert "low_scale_model.betas" in model.state_dict()
    with pytest.raises(ConfigError, match="noise_level_key"):
        build("LatentUpscaleDiffusion", noise_level_key="level")


def test_a_large_picture_is_folded_into_channels_patch_by_patch(build, pictures):
    folded = build("LatentUpscaleFinetuneDiffusion").get_input(pictures, "image")[1]["c_concat"][0]
    assert folded.shape == (2, 12, 8, 8)
    quarter = pictures["lr"][:, 8:, :8].movedim(-1, 1)  # second row, first column of patches
    torch.testing.assert_close(folded[:, 6:9], quarter)


def test_a_low_scale_model_noises_what_is_concatenated(build, pictures):
    unet = {"in_channels": 7, "num_classes": 10}
    model = build("LatentUpscaleFinetuneDiffusion", unet=unet, reshuffle_patch_size=None, low_scale_config=UPSCALER,
                  conditioning_key="hybrid-adm")  # fmt: skip
    cond = model.get_input(pictures | {"lr": pictures["LR"]}, "image")[1]
    assert cond["c_adm"].shape == (2,)
    assert model.low_scale_model is not None


def test_an_image_embedding_is_dropped_in_training_only(build, batch):
    model = build("ImageEmbeddingConditionedLatentDiffusion", embedding_dropout=1.0)
    flat = batch["image"].movedim(-1, 1).flatten(1)
    torch.testing.assert_close(model.eval().get_input(batch, "image")[1]["c_adm"], flat)
    assert model.train().get_input(batch, "image")[1]["c_adm"].abs().max() == 0.0
    with pytest.raises(ConfigError, match="freeze_embedder"):
        build("ImageEmbeddingConditionedLatentDiffusion", freeze_embedder=False)


def test_an_augmented_embedding_carries_its_noise_level(build, batch):
    class Augment(nn.Module):
        def forward(self, x):
            return x + 1.0, torch.full((len(x), 2), 9.0)

    model = build("ImageEmbeddingConditionedLatentDiffusion").eval()
    model.noise_augmentor = Augment()
    embedding = model.get_input(batch, "image")[1]["c_adm"]
    assert embedding.shape == (2, 4 * 64 + 2)
    torch.testing.assert_close(embedding[:, :-2], batch["image"].movedim(-1, 1).flatten(1) + 1.0)


def test_layouts_need_their_key(small_model):
    with pytest.raises(ConfigError, match="coordinates_bbox"):
        small_model("Layout2ImgDiffusion", cond_stage_key="txt")
    assert small_model("Layout2ImgDiffusion", cond_stage_key="coordinates_bbox").cond_stage_key == "coordinates_bbox"


def test_layouts_are_plotted_by_the_builder_of_their_data_set(small_model, batch):
    class Boxes:
        def plot(self, tokens, label, size):
            return torch.full((3, *size), float(label(int(tokens[0]))))

        def get_category_id(self, number):
            return number + 1

        def get_textual_label(self, category):
            return str(10 * category)

    data = Boxes()
    data.conditional_builders = {"coordinates_bbox": data}
    trainer = SimpleNamespace(datamodule=SimpleNamespace(datasets={"validation": data}))
    model = small_model("Layout2ImgDiffusion", cond_stage_key="coordinates_bbox").eval()
    model.trainer = trainer
    layouts = {"coordinates_bbox": torch.tensor([[1, 2], [3, 4]])}
    boxes = model.condition_images(batch | layouts, None, None, torch.zeros(2, 4, 8, 8))["bbox_image"]
    assert boxes.shape == (2, 3, 8, 8)
    assert boxes[:, 0, 0, 0].tolist() == [20.0, 40.0]


def test_a_variant_does_not_train_its_cond_stage(build):
    with pytest.raises(ConfigError, match="cond_stage_trainable"):
        build("LatentInpaintDiffusion", cond_stage_trainable=True)


def test_the_variants_are_one_class_each_under_both_dotted_names():
    for name in ddpm.VARIANTS:
        assert getattr(ddpm, name) is getattr(variants, name)
