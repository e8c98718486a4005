"""Where the processor time of a step of the UNet goes, layer by layer, without what the layers inside one take.

  python -m benchmarks.shares --side 512 --tool ours
  python -m benchmarks.shares --side 512 --tool diffusers
"""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from benchmarks.networks import denoise
from benchmarks.peers import DTYPES, TOOLS
from benchmarks.weights import ROOT, Files
from ldm.memory import keep_freed_memory


class Watch:
    """Hooks of all modules of the process, which add up the seconds of each kind."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.open: list[list[float]] = []  # of each call that goes on: when it began, and what its parts took
        register_module_forward_pre_hook(self.begin)
        register_module_forward_hook(self.end)

    def begin(self, module: nn.Module, inputs: tuple) -> None:
        self.open.append([time.process_time(), 0.0])

    def end(self, module: nn.Module, inputs: tuple, output: object) -> None:
        begun, parts = self.open.pop()
        took = time.process_time() - begun
        self.seconds[kind(module, inputs)] += took - parts
        if self.open:
            self.open[-1][1] += took


def kind(module: nn.Module, inputs: tuple) -> str:
    """What a module is counted as; attention by the tokens that it goes over."""
    name = type(module).__name__
    if not hasattr(module, "to_k"):
        return name
    across = "cross" if module.to_k.in_features != module.to_q.in_features else "self"
    return f"{name}, {across}, {inputs[0].shape[1]} tokens"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=512, metavar="PIXELS")
    parser.add_argument("--tool", choices=("ours", "diffusers"), default="ours")
    parser.add_argument("--precision", choices=list(DTYPES), default="bf16")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "benchmarks", help="for the weights")
    args = parser.parse_args()
    files = Files(args.folder.resolve())
    files.write()
    if args.tool == "ours":
        keep_freed_memory()
    run = denoise(TOOLS[args.tool](files, args.precision), args.side, 1, 7.5)
    run()
    watch = Watch()
    begun = time.process_time()
    run()
    whole = time.process_time() - begun
    watch.seconds["beside the network"] = whole - sum(watch.seconds.values())
    sys.stdout.write(f"{args.tool} {args.precision}, {args.side}x{args.side}: {whole:.2f} s of processor time\n")
    for name, seconds in watch.seconds.most_common():
        if seconds > whole / 200:
            sys.stdout.write(f"{seconds / whole:6.1%}  {name}\n")


if __name__ == "__main__":
    main()
