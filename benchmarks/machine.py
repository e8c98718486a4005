"""What a machine is, and the most that it can do."""

import importlib.metadata
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

PACKAGES = ("torch", "diffusers", "transformers", "openvino")
UNITS = ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_fp16")


def describe() -> dict[str, object]:
    """The processor, the threads that torch takes, the versions, the day, and how busy the machine is."""
    import torch

    able = torch.cpu.get_capabilities()
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": processor(),
        "units": [unit for unit in UNITS if able.get(unit)],
        "threads": torch.get_num_threads(),
        "versions": versions,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "load": load(),
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    facts = dict(reversed([line.split(":", 1) for line in lines if ":" in line]))
    told = {name.strip(): value.strip() for name, value in facts.items()}
    return f"{told.get('model name', platform.processor())} ({told.get('cpu family')}/{told.get('model')})"


def load() -> list[float]:
    """How many threads wanted to run in the last 1, 5 and 15 minutes: more than there are cores is a shared machine."""
    try:
        return [float(one) for one in Path("/proc/loadavg").read_text().split()[:3]]
    except OSError:
        return []


def ceilings() -> dict[str, float]:
    """TFLOP/s of a large product and a convolution, and GB/s of a copy, with as many threads as torch takes."""
    import torch

    made = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.randn(4096, 4096).to(dtype)
        made[f"{name} matmul, TFLOP/s"] = 2 * 4096**3 / seconds(lambda a=a: a @ a) / 1e12
        x = torch.randn(2, 320, 64, 64).to(dtype).to(memory_format=torch.channels_last)
        conv = torch.nn.Conv2d(320, 320, 3, padding=1).to(dtype).to(memory_format=torch.channels_last)
        work = 2 * x.numel() * 320 * 9
        made[f"{name} convolution, TFLOP/s"] = work / seconds(lambda conv=conv, x=x: conv(x)) / 1e12
    source, target = torch.empty(2, 1 << 26)
    made["copy, GB/s"] = 2 * source.nbytes / seconds(lambda: target.copy_(source)) / 1e9
    return {name: round(value, 3) for name, value in made.items()}


def seconds(run: Callable[[], object], times: int = 5) -> float:
    import torch

    took = []
    with torch.inference_mode():
        for _ in range(times + 1):
            begun = time.perf_counter()
            run()
            took.append(time.perf_counter() - begun)
    return median(took[1:])
