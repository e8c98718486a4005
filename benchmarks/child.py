"""What the cases of whole programs run in a fresh process: `python -m benchmarks.child VERB ...` tells in JSON."""

import argparse
import os
import runpy
import sys
import time
from pathlib import Path

from benchmarks.timing import ROOT, tell
from benchmarks.weights import CONFIG, Files

UNETS = ("UNetModel", "UNet2DConditionModel")


def load(tool: str, precision: str, file: Path) -> None:
    """Read float32 weights to `precision`, ready to run, and tell the seconds without those of the imports."""
    from benchmarks.peers import DTYPES

    if tool == "ours":
        import torch

        from ldm.memory import place
        from ldm.models.load import load_model

        begun, used = time.perf_counter(), time.process_time()
        place(load_model(CONFIG, file, dtype=DTYPES[precision], layout=torch.channels_last), torch.device("cpu"))
    elif file.is_dir():
        from diffusers import StableDiffusionPipeline

        begun, used = time.perf_counter(), time.process_time()
        StableDiffusionPipeline.from_pretrained(file, torch_dtype=DTYPES[precision])
    else:
        import diffusers  # noqa: F401 -- its networks are imported where they are named
        import transformers  # noqa: F401
        from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: F401
        from transformers import CLIPTextModel  # noqa: F401

        from benchmarks.peers import Diffusers

        begun, used = time.perf_counter(), time.process_time()
        networks = Diffusers(Files(file.parent), precision)
        networks.unet, networks.vae, networks.text  # noqa: B018 -- each is read at its first use
    tell(seconds=time.perf_counter() - begun, cpu=time.process_time() - used)


def end_at_first_step() -> None:
    """Let the process end where it would first call the UNet, and tell so."""
    from torch.nn.modules.module import register_module_forward_pre_hook

    def end(module, inputs) -> None:
        if type(module).__name__ in UNETS:
            tell()
            os._exit(0)

    register_module_forward_pre_hook(end)


def script(words: list[str]) -> None:
    """Run scripts/txt2img.py with these words in this process."""
    sys.argv = [str(ROOT / "scripts" / "txt2img.py"), *words]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            raise


def pipeline(folder: Path, precision: str, steps: int, side: int, prompt: str, out: Path) -> None:
    """Draw a picture as the documentation of diffusers does, with PLMS, which it calls PNDM."""
    import torch
    from diffusers import StableDiffusionPipeline

    dtype = {} if precision == "default" else {"torch_dtype": getattr(torch, precision)}
    pipe = StableDiffusionPipeline.from_pretrained(folder, **dtype)
    pipe(prompt, num_inference_steps=steps, height=side, width=side).images[0].save(out)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--halt", action="store_true")
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("load")
    one.add_argument("tool")
    one.add_argument("precision")
    one.add_argument("file", type=Path)
    verbs.add_parser("script")
    one = verbs.add_parser("pipeline")
    one.add_argument("folder", type=Path)
    one.add_argument("precision")
    one.add_argument("steps", type=int)
    one.add_argument("side", type=int)
    one.add_argument("prompt")
    one.add_argument("out", type=Path)
    known, words = parser.parse_known_args()
    options = vars(known)
    if options.pop("halt"):
        end_at_first_step()
    match options.pop("verb"):
        case "load":
            load(**options)
        case "script":
            script(words)
            tell()
        case "pipeline":
            pipeline(**options)
            tell()


if __name__ == "__main__":
    main()
