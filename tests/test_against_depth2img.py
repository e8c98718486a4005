"""A depth-to-image model and diffusers' StableDiffusionDepth2ImgPipeline on the same weights draw the same latents."""

import diffusers
import numpy as np
import pytest
import torch
from depth import their_dpt
from folders import assert_reads_as, save_folder
from PIL import Image
from support import assert_matches
from test_against_diffusers import BETAS, COMPVIS, NEGATIVES, PROMPTS, FromOneLevelAbove, Ours, Theirs, seeded
from tiny import write_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported"),  # it asks for float32
    pytest.mark.filterwarnings("ignore:You have passed 2 text prompts:FutureWarning"),
]


class AtOurSize:
    """A feature extractor that shows the network pictures in [0, 1] at the size that we do."""

    def __init__(self, prepare):
        self.prepare = prepare

    def __call__(self, images, return_tensors):
        return type("Features", (), {"pixel_values": self.prepare(2 * torch.stack(list(images)) - 1)})


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    checkpoint = write_model(tmp_path_factory.mktemp("depth"), "depth")
    ours, theirs = Ours(checkpoint), Theirs(checkpoint)
    prefix = "depth_model.model."
    state = torch.load(checkpoint)["state_dict"]
    theirs.depth_estimator = their_dpt({
        key.removeprefix(prefix): weight for key, weight in state.items() if key.startswith(prefix)})
    theirs.feature_extractor = AtOurSize(ours.model.depth_model.prepare)
    return ours, theirs


@pytest.fixture
def photo(tmp_path):
    """A picture as a file, and as a tensor (1, 3, h, w) in [0, 1]."""
    pixels = np.random.default_rng(3).integers(0, 256, (16, 16, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png"), torch.tensor(pixels).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize(("sampler", "given"), [("ddim", False), ("euler", True)])
def test_depth_to_image_draws_the_same_latents(both, photo, tmp_path, monkeypatch, sampler, given):
    ours, theirs = both
    path, image = photo
    depth = torch.linspace(0, 200, 24 * 24).reshape(1, 24, 24).round()
    if given:
        Image.fromarray(depth[0].numpy().astype(np.uint8)).save(tmp_path / "depth.png")
    scheduler = {
        "ddim": FromOneLevelAbove(**BETAS, **COMPVIS, clip_sample=False),
        "euler": diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="linspace"),
    }[sampler]
    drawn, _ = ours.draw(sampler=sampler, steps=10, scale=7.5, strength=0.5, init_img=path,
                         depth_img=str(tmp_path / "depth.png") if given else None)
    pipeline = diffusers.StableDiffusionDepth2ImgPipeline(**vars(theirs), scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    monkeypatch.setattr(pipeline.vae, "encode", lambda x: type("Posterior", (), {"latents": mode(pipeline.vae, x)}))
    want = pipeline(PROMPTS, image.expand(2, -1, -1, -1), depth.expand(2, -1, -1) if given else None,
                    strength=0.5, num_inference_steps=10, guidance_scale=7.5, negative_prompt=NEGATIVES,
                    generator=seeded(), output_type="latent").images  # fmt: skip
    assert_matches(drawn, want, 1e-3)


def mode(vae: diffusers.AutoencoderKL, image: torch.Tensor) -> torch.Tensor:
    """The mean of the posterior, where the pipeline would draw from it."""
    return diffusers.AutoencoderKL.encode(vae, image).latent_dist.mode()


def test_a_folder_of_diffusers_reads_as_the_same_model(both, tmp_path):
    ours, theirs = both
    save_folder(tmp_path, theirs, scheduler=diffusers.DDIMScheduler(**BETAS))
    assert_reads_as(tmp_path, ours.model)
