"""The compiled denoiser: the same numbers under the same names, and what it says."""

import logging

import pytest
import torch
from support import tiny_model
from tiny import write_model

from ldm.compiled import cache_folder, check_compiler, compile_network
from ldm.errors import DeviceError, RequestError
from ldm.generation.loading import choose, open_run
from ldm.generation.options import ModelOptions, RunOptions
from ldm.generation.request import Request
from ldm.generation.rows import Row

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method.:DeprecationWarning")  # torch's own


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def run(checkpoint, outdir, request=Request("a circle", steps=1), **options):  # noqa: B008 -- it is frozen
    model = ModelOptions(ckpt=str(checkpoint), device="cpu", compile=True, **options)
    return open_run([Row(request)], model, RunOptions(str(outdir)), lambda event, **facts: None, choose(model))


@torch.inference_mode()
def test_it_computes_the_same_and_the_weights_keep_their_names(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    network = tiny_model().model.diffusion_model.eval()
    names, given = list(network.state_dict()), (torch.randn(2, 4, 8, 8), torch.tensor([3, 7]), torch.randn(2, 5, 64))
    want = network(*given)
    compile_network(network, CPU, backend="eager")
    torch.testing.assert_close(network(*given), want)
    assert list(network.state_dict()) == names


@torch.inference_mode()
def test_it_tells_of_each_size_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    network = torch.nn.Conv2d(4, 4, 3)
    compile_network(network, CPU, backend="eager")
    compile_network(network, CPU, backend="eager")
    with caplog.at_level(logging.INFO):
        for side in (8, 16, 8):
            network(torch.randn(2, 4, side, side))
    told = [record.message for record in caplog.records if "compil" in record.message]
    assert len(told) == 4
    assert "8x8, 2 at once" in told[0]
    assert str(tmp_path) in told[1]


def test_the_code_is_kept_where_the_user_says_or_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    assert str(cache_folder()) == "elsewhere"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "ldm" / "compiled"


def test_without_a_compiler_it_is_said_before_anything_is_read(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    with pytest.raises(DeviceError, match=r"C\+\+ compiler.*leave --compile out"):
        check_compiler(CPU)


def test_a_compiler_that_fails_is_quoted_with_the_way_out_and_not_tried_again(tmp_path, monkeypatch):
    tries = []

    def backend(graph, inputs):
        tries.append(graph)
        raise RuntimeError("fatal error: omp.h: No such file")

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    network = torch.nn.Conv2d(4, 4, 3)
    compile_network(network, CPU, backend=backend)
    for side in (8, 8, 16):
        with pytest.raises(DeviceError, match=r"leave it out.*omp\.h: No such file"):
            network(torch.randn(1, 4, side, side))
    assert len(tries) == 1


def test_where_weights_come_and_go_nothing_is_compiled_and_it_is_said(checkpoint, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("ldm.generation.loading.check_compiler", lambda device: None)
    ready = run(checkpoint, tmp_path, memory="low")
    assert ready.recorder.how["compile"] is False
    assert "--compile is left out: with --memory low" in caplog.text


def test_it_is_recorded_and_token_merging_is_refused_beside_it(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.generation.loading.check_compiler", lambda device: None)
    assert run(checkpoint, tmp_path).recorder.how["compile"] is True
    with pytest.raises(RequestError, match="leave one of them out"):
        run(checkpoint, tmp_path, Request("a circle", steps=1, token_merging=0.5))
