"""The model of an evaluation: which CLIP is its own, and that a stop costs nothing."""

import signal

import pytest
from omegaconf import OmegaConf
from support import GOLDENS
from tiny import write_clip, write_model

from ldm.errors import ConfigError
from ldm.evaluation.drawing import Studio, clip_of
from ldm.generation.loading import choose
from ldm.generation.options import ModelOptions
from ldm.generation.request import Request


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ModelOptions:
    return ModelOptions(ckpt=str(write_model(tmp_path_factory.mktemp("model"))), device="cpu", precision="full")


def with_stage(model: ModelOptions, stage) -> object:
    chosen = choose(model)
    OmegaConf.update(chosen.section, "params.cond_stage_config", stage, merge=False)
    return chosen


def test_the_clip_of_a_model_is_the_folder_that_its_config_names_if_it_has_both_towers(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    clip = write_clip(tmp_path / "clip")
    assert clip_of(with_stage(model, {"target": "x.Y", "params": {"version": str(clip)}})) == clip
    for stage in ({"target": "x.Y", "params": {"version": str(GOLDENS / "tiny-clip")}}, "__is_unconditional__"):
        with pytest.raises(ConfigError, match="--clip FOLDER"):
            clip_of(with_stage(model, stage))
    openai = write_clip(tmp_path / "models" / "clip-vit-large-patch14")
    assert clip_of(with_stage(model, {"target": "x.Y"})).resolve() == openai


def test_drawing_that_was_interrupted_goes_on_with_the_same_call(model, tmp_path, monkeypatch, caplog):
    studio = Studio(model, choose(model), tmp_path, batch_size=1)
    requests = [Request(prompt=text, steps=1, sampler="ddim") for text in ("a fox", "a hare", "a fox")]
    generate, asked = studio.run.pipeline.generate, []

    def interrupting(batch, *others):
        asked.append(batch[0])
        if len(asked) == 2:
            signal.raise_signal(signal.SIGINT)
        return generate(batch, *others)

    monkeypatch.setattr(studio.run.pipeline, "generate", interrupting)
    with pytest.raises(KeyboardInterrupt):
        studio.draw("foxes", requests)
    assert "stopped after 2 pictures; the same command goes on" in caplog.text
    paths = studio.draw("foxes", requests)
    assert [request.seed for request in asked] == [42, 43, 44]
    assert len({path.read_bytes() for path in paths}) == 3
    assert studio.draw("foxes", requests) == paths
    assert len(asked) == 3
