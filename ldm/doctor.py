"""What this installation has, what it lacks, and the command that mends it. Nothing heavy is imported here.

PyTorch and all that needs it are tried in a process of their own: an installation that crashes at an import, as broken
ones do, is then a finding like any other.
"""

import importlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ldm.generation.options import REPOSITORY, SHIPPED, ModelOptions, find, find_checkpoint

PYTHON = (3, 11)
INSTALL = "pip install -c constraints.txt -e ."
EXTRAS = {"train": "training with main.py", "eval": "evaluation", "web": "the web page", "ray": "many machines",
          "test": "the tests"}
VARIABLES = ("CUDA_VISIBLE_DEVICES", "HF_ENDPOINT", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF")
PATIENCE = 300  # seconds that PyTorch gets to load


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. state: ok; note, for what a picture does not need; missing, for what it does."""

    area: str
    text: str
    state: str = "ok"
    mend: str = ""


def examine() -> list[Finding]:
    """Look at everything. Never raises: a look that fails is a finding."""
    tried = attempt()
    looks: dict[str, Callable[[], Iterator[Finding]]] = {
        "python": python, "package": packages, "machine": machine, "torch": lambda: torch_works(tried),
        "import": lambda: imports(tried), "checkpoint": lambda: checkpoints(tried), "safety checker": safety_checker,
        "cache": caches, "environment": environment,
    }  # fmt: skip
    found = []
    for area, look in looks.items():
        try:
            found += look()
        except Exception as error:  # a doctor who falls ill at the sight of an illness is none
            found.append(Finding(area, f"could not be looked at: {type(error).__name__}: {error}", "note"))
    return found


def ready(findings: list[Finding]) -> bool:
    return not any(finding.state == "missing" for finding in findings)


def lines(findings: list[Finding]) -> Iterator[str]:
    """The findings as text, and what they come to."""
    for finding in findings:
        yield f"{finding.state:<8} {finding.area:<15} {finding.text}"
        if finding.mend and finding.state != "ok":
            yield f"{'':<24} {finding.mend}"
    yield "a picture can be made" if ready(findings) else "no picture can be made yet: see what is missing above"


# ------------------------------------------------------------------------------------------------------------ the looks

def python() -> Iterator[Finding]:
    text = f"{platform.python_version()} on {platform.platform()}, {sys.executable}"
    wanted = ".".join(map(str, PYTHON))
    state = "ok" if sys.version_info >= PYTHON else "missing"
    yield Finding("python", text, state, f"install Python {wanted} or newer, and make a new environment with it")


def packages() -> Iterator[Finding]:
    """What is required, against what is installed; the versions that the tests pass on are in constraints.txt."""
    try:
        required = metadata.requires("ldm") or []
    except metadata.PackageNotFoundError:
        yield Finding("package", "ldm itself is not installed", "missing", INSTALL)
        return
    pinned = pins()
    lacking: dict[str, list[str]] = {}
    for line in required:
        name, wanted, extra = split(line)
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            if extra:
                lacking.setdefault(extra, []).append(name)
            else:
                yield Finding("package", f"{name} is not installed", "missing", INSTALL)
            continue
        tested = pinned.get(normal(name))
        if not satisfies(version, wanted):
            state = "note" if extra else "missing"
            yield Finding("package", f"{name} {version}, but {wanted} is needed", state, INSTALL)
        elif tested and not satisfies(version, f"=={tested}"):
            yield Finding("package", f"{name} {version}; the tests pass on {tested}", "note", INSTALL)
        elif not extra:
            yield Finding("package", f"{name} {version}")
    for extra, names in lacking.items():
        yield Finding("package", f"for {EXTRAS.get(extra, extra)}: {', '.join(dict.fromkeys(names))}", "note",
                      f"pip install -c constraints.txt -e '.[{extra}]'")


def machine() -> Iterator[Finding]:
    memory = meminfo()
    text = f"{os.cpu_count()} processors"
    if memory:
        text += f", {size(memory['MemAvailable'])} of {size(memory['MemTotal'])} memory free"
    yield Finding("machine", text)
    yield Finding("disk", f"{size(shutil.disk_usage(Path()).free)} free at {Path().resolve()}")


def torch_works(tried: Mapping[str, Any]) -> Iterator[Finding]:
    """The devices that PyTorch computes on, and what --precision auto means on each."""
    found = tried.get("torch")
    if not found:
        mend = "pip install --force-reinstall -c constraints.txt torch"
        yield Finding("torch", f"does not load: {tried['failure']}", "missing", mend)
        return
    yield Finding("torch", f"{found['version']}, {found['threads']} threads; --device auto is {found['auto']}")
    for device in found["devices"]:
        if device["failure"]:
            auto = device["name"].split(":")[0] == found["auto"]
            yield Finding("device", f"{device['name']} does not compute: {device['failure']}",
                          "missing" if auto else "note", "use --device cpu, or a build of PyTorch for this device")
        else:
            yield Finding("device", f"{device['name']} ({device['what']}): --precision auto is {device['precision']}")


def imports(tried: Mapping[str, Any]) -> Iterator[Finding]:
    if tried.get("torchvision"):
        yield Finding("import", f"torchvision does not load, and with it neither training nor evaluation: "
                      f"{tried['torchvision']}", "note",
                      "pip uninstall torchvision, or install the build of it that fits that of torch")
    if tried.get("imports"):
        yield Finding("import", f"{', '.join(tried['imports'])} load")
    elif tried.get("torch"):
        yield Finding("import", f"the models do not load: {tried['failure']}", "missing", INSTALL)


def checkpoints(tried: Mapping[str, Any]) -> Iterator[Finding]:
    """The weights under models/, which of them can be run, and whether one is where scripts look by default."""
    usable = False
    found = tried.get("checkpoints")
    for path in weights():
        told = (found or {}).get(str(path), {"failure": "not tried"} if found is None else {})
        text = f"{path}, {size(weigh(path))}"
        if told.get("config"):
            usable = True
            yield Finding("checkpoint", f"{text}: {told['family']}, {told['config']}")
        else:
            why = told.get("failure") or f"{told.get('family')}, which no config here is for"
            yield Finding("checkpoint", f"{text}: {why}", "note")
    default, mend = find_checkpoint(ModelOptions()), "python scripts/fetch_model.py v1.5"
    if not usable and found is not None:
        yield Finding("checkpoint", f"no weights that can be run under models/ (scripts look at {ModelOptions.ckpt})",
                      "missing", mend)
    elif default == find(SHIPPED):
        yield Finding("checkpoint", f"none at {ModelOptions.ckpt}, so without --ckpt coloured shapes alone are drawn, "
                      f"by {SHIPPED}", "note", mend)
    elif not default.exists():
        yield Finding("checkpoint", f"none at {ModelOptions.ckpt}, so scripts need --ckpt", "note", mend)


def safety_checker() -> Iterator[Finding]:
    folder = Path("models/safety-checker")
    if any((folder / name).is_file() for name in ("model.safetensors", "pytorch_model.bin")):
        yield Finding("safety checker", f"at {folder}")
    else:
        yield Finding("safety checker", f"none at {folder}, so pictures are not checked", "note",
                      "python scripts/fetch_model.py safety-checker")


def caches() -> Iterator[Finding]:
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    names = sorted(path.name.removeprefix("models--").replace("--", "/") for path in hub.glob("models--*"))
    yield Finding("cache", f"{hub}: {', '.join(names[:5]) or 'empty'}" + (" ..." if len(names) > 5 else ""))


def environment() -> Iterator[Finding]:
    for name in VARIABLES:
        if name in os.environ:
            yield Finding("environment", f"{name}={os.environ[name]}")


# ------------------------------------------------------------------------------------- what is tried in another process

def attempt() -> dict[str, Any]:
    """{stage: what it found} of the stages that went well, and under "failure" what ended them."""
    code = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); from ldm.doctor import probe; probe()"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"failure": str(error)}
    found: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        found["failure"] = f"{signal.Signals(-done.returncode).name}: {last}" if done.returncode < 0 else last
    return found


def probe() -> None:
    """Try each stage and write what it found as a line of JSON; what goes wrong ends the process."""
    for stage in (probe_torch, probe_torchvision, probe_imports, probe_checkpoints):
        sys.stdout.write(json.dumps({stage.__name__.removeprefix("probe_"): stage()}) + "\n")
        sys.stdout.flush()


def probe_torch() -> dict[str, Any]:
    import torch

    from ldm.memory import pick_device, pick_precision

    def look(name: str, what: str) -> dict[str, Any]:
        try:
            device = torch.device(name)
            right = (torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)).sum().item() == 512
            failure = "" if right else "8 ones times 8 ones are not 8"
            return {"name": name, "what": what, "precision": pick_precision("auto", device), "failure": failure}
        except RuntimeError as error:
            return {"name": name, "what": what, "precision": "", "failure": str(error).splitlines()[0]}

    devices = [look("cpu", platform.processor() or platform.machine())]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            what = f"{torch.cuda.get_device_name(index)}, {size(free)} of {size(total)} free"
            devices.append(look(f"cuda:{index}", what))
    if torch.backends.mps.is_available():
        devices.append(look("mps", "Metal"))
    return {"version": torch.__version__, "threads": torch.get_num_threads(), "auto": str(pick_device()),
            "devices": devices}


def probe_torchvision() -> str:
    """Why torchvision does not load, which what trains and evaluates imports where it is there; empty if it does."""
    if importlib.util.find_spec("torchvision"):
        try:
            importlib.import_module("torchvision")
        except Exception as error:  # of another build than torch it ends in a RuntimeError
            return (str(error).splitlines() or [type(error).__name__])[0]
    return ""


def probe_imports() -> list[str]:
    names = ["ldm.generation.loading", "imwatermark"]
    for name in names:
        importlib.import_module(name)
    return names


def probe_checkpoints() -> dict[str, dict[str, Any]]:
    """{path: its family and config, or why it cannot be run}."""
    from ldm.checkpoint import open_checkpoint
    from ldm.errors import LdmError
    from ldm.generation.loading import shipped_config

    def look(path: Path) -> dict[str, Any]:
        try:
            family = open_checkpoint(path).family.name
            return {"family": family, "config": shipped_config(path)}
        except LdmError as error:
            return {"failure": str(error)}

    return {str(path): look(path) for path in weights()}


# -------------------------------------------------------------------------------------------------------------- helpers

def weights() -> list[Path]:
    """The checkpoints under models/, in the working folder and beside the code, the default one first.

    Of several names for one file, it is the first. What lies beside a config.json is a part of a model, as CLIP is.
    """
    default = find_checkpoint(ModelOptions())
    found = [default] if default.exists() else []
    for root in dict.fromkeys((Path("models"), (REPOSITORY / "models"))):
        found += (path.parent for path in sorted(root.rglob("model_index.json")))
        found += (path for path in sorted(root.rglob("*.*")) if path.suffix in (".ckpt", ".safetensors"))
    folders = {path.resolve() for path in found if path.is_dir()}
    unique = {path.resolve(): path for path in reversed(found)
              if path.exists() and not folders & set(path.resolve().parents) and "safety-checker" not in path.parts
              and not (path.parent / "config.json").is_file()}
    return [path for path in found if unique.get(path.resolve()) is path]


def weigh(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def meminfo() -> dict[str, int]:
    """Memory of the machine in bytes, {} where its system does not say; in a container, no more than that has."""
    try:
        rows = re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return {}
    found = {name: 1024 * int(count) for name, count in rows}
    try:
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):
        return found
    return {"MemTotal": min(found["MemTotal"], limit), "MemAvailable": min(found["MemAvailable"], limit - used)}


def pins() -> dict[str, str]:
    """{package: version} of constraints.txt."""
    try:
        text = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    except OSError:
        return {}
    return {normal(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)}


def split(requirement: str) -> tuple[str, str, str]:
    """Name, versions and extra of a requirement such as `torch>=2.13; extra == "x"`."""
    wanted, _, condition = requirement.partition(";")
    name = re.match(r"[\w.-]+", wanted)[0]
    extra = re.search(r"extra == ['\"](\w+)['\"]", condition)
    return name, wanted[len(name):].strip(" ()"), extra[1] if extra else ""


def satisfies(version: str, wanted: str) -> bool:
    """Whether a version is one of those; unknown, and so granted, where the package that can tell is missing."""
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return True
    return SpecifierSet(wanted).contains(version, prereleases=True)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
