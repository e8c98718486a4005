"""What the picture of Stable Diffusion 1 takes in memory: each mode in a process of its own, beside the weights.

    python benchmarks/memory.py --memory auto low lowest --precision full bf16 --H 512 --W 512 --steps 2

Without --ckpt, the weights are random ones of full size, written once for each precision into --folder. Measured is
what scripts/txt2img.py does, from the start of the process to its end: on the CPU the peak of resident memory, less
the bytes of the weights; on a GPU the peak of allocated device memory, weights included.
"""

import argparse
import runpy
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "stable-diffusion" / "v1-inference.yaml"
DTYPES = {"full": "float32", "bf16": "bfloat16", "fp16": "float16"}


def write_weights(path: Path, precision: str) -> None:
    """Write random weights of a size that keeps the numbers finite, one tensor of them in memory beside the file's."""
    import torch
    from safetensors.torch import save_file

    from ldm.models.load import build_model

    torch.manual_seed(0)
    state = {}
    for name, weight in build_model(CONFIG).state_dict().items():
        if not weight.is_meta:
            state[name] = weight
        elif weight.ndim < 2:
            state[name] = torch.ones(weight.shape) if name.endswith("weight") else torch.zeros(weight.shape)
        else:
            state[name] = torch.empty(weight.shape).uniform_(-1, 1).mul_(weight[0].numel() ** -0.5)
        if state[name].is_floating_point() and weight.is_meta:
            state[name] = state[name].to(getattr(torch, DTYPES[precision]))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)


def run_one(args: argparse.Namespace) -> None:
    """Draw one picture in this process and say what it took."""
    import torch

    from ldm.generation.loading import weigh

    started = time.perf_counter()
    [mode], [precision] = args.memory, args.precision
    options = {
        "ckpt": args.ckpt, "config": CONFIG, "memory": mode, "precision": precision, "H": args.H, "W": args.W,
        "steps": args.steps, "n_samples": 1, "n_iter": 1, "prompt": "a bench", "outdir": args.folder,
    }  # fmt: skip
    script = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    sys.argv = [str(ROOT / "scripts" / "txt2img.py"), *script, "--skip_grid", "--quiet"]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    seconds = time.perf_counter() - started
    weights = weigh(Path(args.ckpt), getattr(torch, DTYPES[precision]))
    if torch.cuda.is_available():
        took = f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB of device memory"
    else:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        peak = int(status["VmHWM"].split()[0]) << 10
        took = f"peak {peak / 1e9:.2f} GB, {(peak - weights) / 1e9:.2f} GB beside the weights of {weights / 1e9:.2f} GB"
    sys.stdout.write(
        f"{mode:7} {precision:5} {args.W}x{args.H}, {args.steps} steps: {took}, {seconds:.0f} s\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", nargs="+", default=["auto", "low", "lowest"])
    parser.add_argument("--precision", nargs="+", default=["full", "bf16"], choices=DTYPES)
    parser.add_argument("--H", type=int, default=512)
    parser.add_argument("--W", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--ckpt", help="a checkpoint of Stable Diffusion 1 instead of random weights")
    parser.add_argument("--folder", default="outputs/memory", help="for the random weights and the pictures")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        run_one(args)
        return
    for precision in args.precision:
        ckpt = Path(args.ckpt or Path(args.folder).resolve() / f"random-{precision}.safetensors")
        if not ckpt.exists():
            command = f"import memory, pathlib; memory.write_weights(pathlib.Path({str(ckpt)!r}), {precision!r})"
            subprocess.run([sys.executable, "-c", command], check=True, cwd=Path(__file__).parent)
        for mode in args.memory:
            own = ["--memory", mode, "--precision", precision, "--H", str(args.H), "--W", str(args.W)]
            own += ["--steps", str(args.steps), "--ckpt", str(ckpt), "--folder", args.folder]
            subprocess.run([sys.executable, __file__, "--one", *own], check=True)


if __name__ == "__main__":
    main()
