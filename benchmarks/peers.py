"""The same networks as each tool builds and runs them: functions of no argument, ready to be timed.

Each takes the inputs in float32 and gives float32, whatever it computes in.
"""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor, nn

from benchmarks.weights import CONFIG, TEXT, Files
from ldm.compiled import compile_network

Run = Callable[[], Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Ours:
    """This project, as its scripts set a model up."""

    def __init__(self, files: Files, precision: str):
        from ldm.memory import place
        from ldm.models.load import load_model

        model = load_model(CONFIG, files.ckpt, dtype=DTYPES[precision], layout=torch.channels_last)
        self.model = place(model, torch.device("cpu"))

    def denoise(self, x: Tensor, t: int, cond: Tensor, uncond: Tensor, scale: float) -> Run:
        """One step of the network with classifier-free guidance: x, (b, 4, h, w), to the noise in it."""
        from ldm.sampling import Level, denoiser

        denoise = denoiser(self.model.apply_model, "eps", cond, uncond, scale)
        level = Level(t, 0.6, 0.8)
        return lambda: denoise(x, level).eps

    def decode(self, z: Tensor) -> Run:
        return lambda: self.model.decode_first_stage(z).float()

    def encode(self, image: Tensor) -> Run:
        return lambda: self.model.encode_first_stage(image).parameters.float()

    def read(self, ids: Tensor) -> Run:
        """Token ids (b, 77) to states."""
        return lambda: self.model.cond_stage_model.encode_ids(ids).float()


class Diffusers:
    """diffusers and transformers in eager mode, each network read from the same file when it is first used."""

    def __init__(self, files: Files, precision: str):
        self.files, self.dtype = files, DTYPES[precision]

    @cached_property
    def _state(self) -> dict[str, Tensor]:
        return torch.load(self.files.ckpt, mmap=True)["state_dict"]

    @cached_property
    def unet(self) -> nn.Module:
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel.from_single_file(
            dict(self._state), original_config=str(CONFIG), torch_dtype=self.dtype).eval()  # fmt: skip

    @cached_property
    def vae(self) -> nn.Module:
        from diffusers import AutoencoderKL

        return AutoencoderKL.from_single_file(
            dict(self._state), original_config=str(CONFIG), torch_dtype=self.dtype).eval()  # fmt: skip

    @cached_property
    def text(self) -> nn.Module:
        from transformers import CLIPTextConfig, CLIPTextModel

        config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        model = CLIPTextModel(config)
        names = [name for name in self._state if name.startswith(TEXT) and not name.endswith("position_ids")]
        model.load_state_dict({name.removeprefix(TEXT): self._state[name] for name in names})
        return model.to(self.dtype).eval()

    def denoise(self, x: Tensor, t: int, cond: Tensor, uncond: Tensor, scale: float) -> Run:
        """As its pipelines do: both halves of the guidance in one call."""
        unet, context, x = self.unet, torch.cat([uncond, cond]).to(self.dtype), x.to(self.dtype)

        def run() -> Tensor:
            out = unet(torch.cat([x, x]), torch.tensor(t), encoder_hidden_states=context, return_dict=False)[0]
            without, given = out.chunk(2)
            return (without + scale * (given - without)).float()

        return run

    def decode(self, z: Tensor) -> Run:
        vae, z = self.vae, (z / 0.18215).to(self.dtype)
        return lambda: vae.decode(z, return_dict=False)[0].float()

    def encode(self, image: Tensor) -> Run:
        vae, image = self.vae, image.to(self.dtype)
        return lambda: vae.encode(image, return_dict=False)[0].parameters.float()

    def read(self, ids: Tensor) -> Run:
        text = self.text
        return lambda: text(ids).last_hidden_state.float()


class OursCompiled(Ours):
    """This project with `--compile`."""

    def __init__(self, files: Files, precision: str):
        super().__init__(files, precision)
        compile_network(self.model.model.diffusion_model, torch.device("cpu"))


class DiffusersCompiled(Diffusers):
    """diffusers with its UNet compiled in the same way."""

    @cached_property
    def unet(self) -> nn.Module:
        network = super().unet
        compile_network(network, torch.device("cpu"))
        return network


class OpenVino:
    """diffusers' networks compiled by OpenVINO for one size each, which it runs fastest."""

    def __init__(self, files: Files, precision: str):
        self.files, self.precision = files, {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}[precision]
        self.torch = Diffusers(files, "fp32")

    def denoise(self, x: Tensor, t: int, cond: Tensor, uncond: Tensor, scale: float) -> Run:
        context = torch.cat([uncond, cond])
        run = self._compile("unet", self.torch, (torch.cat([x, x]), torch.tensor(t), context))

        def step() -> Tensor:
            without, given = run(torch.cat([x, x]), torch.tensor(t), context).chunk(2)
            return without + scale * (given - without)

        return step

    def decode(self, z: Tensor) -> Run:
        run, z = self._compile("vae", self.torch, (z / 0.18215,)), z / 0.18215
        return lambda: run(z)

    def _compile(self, name: str, networks: Diffusers, example: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        """A network converted once to OpenVINO's files, with weights in float16, and compiled for these shapes."""
        import openvino

        shapes = [list(tensor.shape) for tensor in example]
        path = self.files.folder / f"openvino-{name}-{'-'.join(map(str, example[0].shape))}.xml"
        if not path.exists():
            network = getattr(networks, name)
            network.forward = network.decode if name == "vae" else network.forward
            converted = openvino.convert_model(network, example_input=example, input=shapes)
            openvino.save_model(converted, path, compress_to_fp16=True)
        settings = {"INFERENCE_PRECISION_HINT": self.precision}
        request = openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()

        def run(*inputs: Tensor) -> Tensor:
            request.infer([tensor.numpy() for tensor in inputs], share_inputs=True)
            return torch.from_numpy(request.get_output_tensor(0).data)

        return run


TOOLS = {
    "ours": Ours, "diffusers": Diffusers, "openvino": OpenVino,
    "ours-compiled": OursCompiled, "diffusers-compiled": DiffusersCompiled,
}  # fmt: skip
