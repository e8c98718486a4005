"""What a network predicts is measured on noise alone."""

import pytest
import torch
from tiny import write_model

from ldm.checkpoint import Family
from ldm.checkpoint.families import FIRST
from ldm.errors import CheckpointError
from ldm.generation.loading import choose
from ldm.generation.options import ModelOptions
from ldm.models.probe import noise_returned

OUT = "model.diffusion_model.out.2."


@pytest.fixture(scope="module")
def predictors(tmp_path_factory):
    """A network that gives noise back, as one that predicts eps does (the weights of the contract make it so), and one
    that gives back a guess at the picture with its sign turned, as one that predicts v does: both without a config."""
    root = tmp_path_factory.mktemp("predictors")
    eps = write_model(root / "of", "v")
    state = torch.load(eps)["state_dict"]
    guess = {f"{OUT}weight": -0.01 * state[f"{OUT}weight"]}
    paths = {"config": eps.with_name("config.yaml")}
    for name, weights in {"eps": state, "v": state | guess}.items():
        paths[name] = root / f"{name}.ckpt"
        torch.save({"state_dict": weights}, paths[name])
    torch.save({"state_dict": {key: weight.half() for key, weight in state.items()}}, root / "half.ckpt")
    return paths | {"half": root / "half.ckpt"}


@pytest.mark.parametrize(("name", "low", "high"), [("eps", 0.8, 1.0), ("half", 0.8, 1.0), ("v", -1.0, 0.2)])
def test_a_network_that_predicts_eps_gives_noise_back_and_one_that_predicts_v_does_not(predictors, name, low, high):
    assert low < noise_returned(predictors["config"], predictors[name]) < high


@pytest.mark.parametrize("name", ["eps", "v"])
def test_weights_of_two_configs_are_read_with_the_one_that_fits_what_they_predict(
    predictors, name, monkeypatch, tmp_path, caplog
):
    for kind in ("eps", "v"):
        text = predictors["config"].read_text()
        (tmp_path / f"{kind}.yaml").write_text(text.replace("parameterization: v", f"parameterization: {kind}"))
    family = Family("Tiny 2", f"{tmp_path}/v.yaml", None, {FIRST: (32, 4, 3, 3)}, eps=f"{tmp_path}/eps.yaml")
    monkeypatch.setattr("ldm.checkpoint.families.FAMILIES", (family,))
    with caplog.at_level("INFO"):
        chosen = choose(ModelOptions(ckpt=str(predictors[name])))
    assert chosen.config == tmp_path / f"{name}.yaml"
    assert chosen.section.params.parameterization == name
    (said,) = caplog.messages
    assert "of the family Tiny 2, and of noise alone it gives back " in said and said.endswith(f"{name}.yaml")


def test_weights_that_do_not_fit_are_told_instead_of_measured(predictors, tmp_path):
    state = torch.load(predictors["eps"])["state_dict"]
    del state[f"{OUT}bias"]
    torch.save({"state_dict": state}, tmp_path / "part.ckpt")
    with pytest.raises(CheckpointError, match=r"out\.2\.bias"):
        noise_returned(predictors["config"], tmp_path / "part.ckpt")
