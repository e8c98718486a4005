"""The Fréchet distance on Gaussians whose distance is known, and what keeps unlike features apart."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm

from ldm.errors import ImageError, MissingExtra, RequestError
from ldm.evaluation.fid import Inception, Statistics, find_inception, frechet_distance, read_folder, statistics


class MeanColour:
    """Features that can be told by hand."""

    name, identity, resize = "colour", "mean colour", "none"

    def __call__(self, pictures):
        return np.array([np.asarray(picture, np.float64).mean(axis=(0, 1)) for picture in pictures])


def gaussian(mean, covariance, features="mean colour", resize="none") -> Statistics:
    return Statistics(np.array(mean, float), np.array(covariance, float), 100, features, resize, "a test")


def colours(n: int, seed: int = 0) -> list[Image.Image]:
    drawn = np.random.default_rng(seed).integers(0, 255, (n, 3)).tolist()
    return [Image.new("RGB", (4, 4), tuple(rgb)) for rgb in drawn]


def test_a_set_of_pictures_is_at_no_distance_from_itself():
    found = statistics(colours(40), MeanColour(), "colours")
    assert frechet_distance(found, found) == pytest.approx(0, abs=1e-6)


def test_gaussians_apart_by_their_means_are_at_the_square_of_that():
    covariance = [[2.0, 0.5], [0.5, 1.0]]
    assert frechet_distance(gaussian([0, 0], covariance), gaussian([3, 4], covariance)) == pytest.approx(25)


def test_the_distance_of_diagonal_covariances_is_that_of_their_roots():
    first, second = gaussian([0, 0, 1], np.diag([1.0, 4.0, 0.0])), gaussian([1, 0, 1], np.diag([9.0, 4.0, 16.0]))
    assert frechet_distance(first, second) == pytest.approx(1 + (1 - 3) ** 2 + 0 + 4**2)


def test_covariances_that_do_not_commute_have_the_trace_of_the_root_of_their_product():
    a, b = (m @ m.T for m in np.random.default_rng(0).standard_normal((2, 5, 5)))
    expected = np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert frechet_distance(gaussian(np.zeros(5), a), gaussian(np.zeros(5), b)) == pytest.approx(expected)


def test_statistics_are_the_mean_and_covariance_of_the_features_over_batches(caplog):
    pictures = colours(70)
    found = statistics(iter(pictures), MeanColour(), "colours")
    vectors = MeanColour()(pictures)
    np.testing.assert_allclose(found.mean, vectors.mean(axis=0))
    np.testing.assert_allclose(found.covariance, np.cov(vectors.T))
    assert (found.n, found.features, found.resize, found.source) == (70, "mean colour", "none", "colours")
    assert not caplog.records
    statistics(colours(3), MeanColour(), "few")
    assert "3 pictures are few for 3 features" in caplog.text


def test_a_distance_of_different_features_is_refused():
    for other in (gaussian([0], [[1]], "inception"), gaussian([0], [[1]], resize="64x64")):
        with pytest.raises(RequestError, match="cannot be compared"):
            frechet_distance(gaussian([0], [[1]]), other)


def test_one_picture_makes_no_distribution():
    with pytest.raises(RequestError, match="two pictures at least; colours has 1"):
        statistics(colours(1), MeanColour(), "colours")


def test_statistics_are_kept_with_what_they_are_of(tmp_path):
    found = statistics(colours(10), MeanColour(), "colours")
    again = Statistics.load(found.save(tmp_path / "reference.npz"))
    assert frechet_distance(found, again) == pytest.approx(0, abs=1e-6)
    assert (again.n, again.features, again.resize, again.source) == (10, "mean colour", "none", "colours")


def test_statistics_without_a_label_are_refused(tmp_path):
    np.savez(tmp_path / "unlabelled.npz", mu=np.zeros(3), sigma=np.eye(3))
    (tmp_path / "text.npz").write_text("no arrays")
    for name in ("unlabelled", "text"):
        with pytest.raises(RequestError, match="say what features"):
            Statistics.load(tmp_path / f"{name}.npz")
    with pytest.raises(RequestError, match="no statistics at"):
        Statistics.load(tmp_path / "nowhere.npz")


def test_the_pictures_of_a_folder_are_read_in_the_order_of_their_names(tmp_path):
    (tmp_path / "more").mkdir()
    for name, picture in zip(("b.png", "a.jpg", "more/c.png"), colours(3)):
        picture.save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    found = [picture.getpixel((0, 0)) for picture in read_folder(tmp_path)]
    assert found[0] != found[1] == colours(3)[0].getpixel((0, 0))
    assert len(found) == 3
    (tmp_path / "damaged.png").write_text("no picture")
    with pytest.raises(ImageError, match=r"damaged\.png"):
        list(read_folder(tmp_path))
    with pytest.raises(RequestError, match="no pictures in"):
        read_folder(tmp_path / "empty")


def test_inception_is_looked_for_and_never_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert find_inception() is None
    with pytest.raises(RequestError, match="no weights of Inception at"):
        find_inception(str(tmp_path / "mine.pth"))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth").touch()
    assert find_inception() == tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"


def test_without_torch_fidelity_its_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(MissingExtra, match=r"\.\[eval\]"):
        Inception(tmp_path / "weights.pth", torch.device("cpu"))


def test_inception_is_given_eight_bit_pixels_and_its_own_weights(tmp_path, monkeypatch):
    class Extractor(torch.nn.Module):
        def __init__(self, name, features_list, feature_extractor_weights_path):
            super().__init__()
            assert (features_list, feature_extractor_weights_path) == (["2048"], str(tmp_path / "weights.pth"))

        def forward(self, x):
            assert x.dtype == torch.uint8
            return (x.float().mean(dim=(2, 3)),)

    package, module = ModuleType("torch_fidelity"), ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Extractor
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    pictures = [*colours(2), Image.new("RGB", (8, 4))]
    found = Inception(tmp_path / "weights.pth", torch.device("cpu"))(pictures)
    np.testing.assert_allclose(found, MeanColour()(pictures), rtol=1e-6)
