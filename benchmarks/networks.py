"""Cases of single networks in one process: both sides in memory, the outputs compared, then A-B-B-A."""

from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import Case, Measured, Settings
from benchmarks.peers import TOOLS, Run
from benchmarks.timing import alternate

# Most that outputs may be apart, max|a - b| / max|b|, by the less precise of the two sides.
AGREE = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.02}


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def denoise(tool, side: int, batch: int, scale: float) -> Run:
    cond, uncond = draw(2 * batch, 77, 768).chunk(2)
    return tool.denoise(draw(batch, 4, side // 8, side // 8), 500, cond, uncond, scale)


def decode(tool, side: int) -> Run:
    return tool.decode(0.18215 * draw(1, 4, side // 8, side // 8))


def encode(tool, side: int) -> Run:
    return tool.encode(draw(1, 3, side, side).tanh())


def read(tool) -> Run:
    return tool.read(torch.arange(2 * 77).reshape(2, 77))


def compare(case: Case, settings: Settings) -> Measured:
    """Time `case.options`, a function of a tool and its arguments, on both sides, after their outputs agree; the calls
    that tell so are the ones that warm up.

    The outputs of the UNet are compared without guidance, which multiplies whatever they are apart by its scale.
    """
    make, *given = case.options
    tools = [TOOLS[name](settings.files, precision) for name, precision in map(str.split, (case.ours, case.theirs))]
    with torch.inference_mode():  # in which neither side loads its weights, as in use
        unguided = {"scale": 0.0} if make is denoise else {}
        ours, theirs = (make(tool, *given, **unguided)() for tool in tools)
        difference = float((ours - theirs).abs().max() / theirs.abs().max())
        most = max(AGREE[side.split()[1]] for side in (case.ours, case.theirs))
        if not difference <= most:
            raise ValueError(f"{case.title}: outputs are {difference:.1e} apart, more than {most:.0e}: "
                             "nothing to compare")
        guided = {"scale": 7.5} if make is denoise else {}
        runs = [make(tool, *given, **guided) for tool in tools]
        return Measured(*alternate(*runs, settings.rounds), difference)


def cases(name: str, what: str, options: tuple, goals: dict[tuple[str, str], float | None]) -> list[Case]:
    run = partial(Case, name, what=what, run=compare, options=options)
    return [run(ours, theirs, goal=goal) for (ours, theirs), goal in goals.items()]


FULL, HALF, COMPILED = "ours fp32", "ours bf16", "ours-compiled bf16"
THEIR_FULL, THEIR_HALF, OPENVINO = "diffusers fp32", "diffusers bf16", "openvino bf16"

CASES = [
    *cases("unet-512", "a step of the UNet with guidance, one picture of 512x512", (denoise, 512, 1), {
        (FULL, THEIR_FULL): 0.9, (HALF, THEIR_FULL): 0.2, (HALF, THEIR_HALF): 0.62, (HALF, OPENVINO): 1.0,
    }),
    *cases("unet-256", "the same at 256x256", (denoise, 256, 1), {(HALF, THEIR_HALF): 0.6, (HALF, OPENVINO): 1.1}),
    *cases("unet-512-compiled", "a step at 512x512 after torch.compile, which is not timed", (denoise, 512, 1), {
        (COMPILED, "diffusers-compiled bf16"): None, (COMPILED, HALF): None,
    }),
    *cases("unet-512-batch-4", "the same, four pictures of 512x512", (denoise, 512, 4), {(HALF, THEIR_HALF): None}),
    *cases("unet-256-batch-4", "the same, four pictures of 256x256", (denoise, 256, 4), {(HALF, THEIR_HALF): None}),
    *cases("decode-512", "the autoencoder's decoder, one picture of 512x512", (decode, 512), {
        (FULL, THEIR_FULL): 0.9, (HALF, THEIR_FULL): 0.2, (HALF, THEIR_HALF): 0.45, (HALF, OPENVINO): None,
    }),
    *cases("encode-512", "its encoder", (encode, 512), {(FULL, THEIR_FULL): None, (HALF, THEIR_HALF): None}),
    *cases("text", "the text encoder, a prompt and its negative", (read,), {
        (FULL, THEIR_FULL): None, (HALF, THEIR_HALF): None,
    }),
]  # fmt: skip
