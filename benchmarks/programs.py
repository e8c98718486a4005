"""Cases of whole programs, each run in a fresh process: loading, the start, a picture, many pictures."""

from benchmarks.cases import Case, Measured, Settings
from benchmarks.timing import Timing, alternate, fresh

CHILD = ("-m", "benchmarks.child")
PROMPT = "a photograph of an astronaut riding a horse"
PROMPTS = 16
SINGLE = 2  # of the sixteen are also drawn by a process of their own


def loading(case: Case, settings: Settings) -> Measured:
    mine, other = case.options
    runs = [
        lambda side=side, file=file: fresh(*CHILD, "load", *side.split(), getattr(settings.files, file))
        for side, file in ((case.ours, mine), (case.theirs, other))
    ]
    return Measured(*alternate(*runs, settings.rounds))


def ours(settings: Settings, side: int, *words: object, halt: bool = False) -> dict:
    """Run scripts/txt2img.py for one picture of `side` pixels, with the defaults and these words."""
    given = ["--ckpt", settings.files.ckpt, "--outdir", settings.scratch, "--skip_grid", "--quiet", "--plms",
             "--n_samples", 1, "--n_iter", 1, "--H", side, "--W", side, "--ddim_steps", settings.steps]  # fmt: skip
    return fresh(*CHILD, *["--halt"] * halt, "script", *given, *words)


def theirs(settings: Settings, precision: str, side: int, halt: bool = False) -> dict:
    out = settings.scratch / "diffusers.png"
    return fresh(*CHILD, *["--halt"] * halt, "pipeline", settings.files.diffusers, precision, settings.steps, side,
                 PROMPT, out)  # fmt: skip


def starting(case: Case, settings: Settings) -> Measured:
    precision = case.theirs.split()[1]
    return Measured(*alternate(
        lambda: ours(settings, 512, "--prompt", PROMPT, halt=True),
        lambda: theirs(settings, precision, 512, halt=True), settings.rounds))  # fmt: skip


def picture(case: Case, settings: Settings) -> Measured:
    precision = case.theirs.split()[1]
    return Measured(*alternate(
        lambda: ours(settings, 512, "--prompt", PROMPT), lambda: theirs(settings, precision, 512), 1))  # fmt: skip


def many(case: Case, settings: Settings) -> Measured:
    """Per picture: the seconds of the file by its prompts, and those of single runs."""
    prompts = [f"{PROMPT}, number {number}" for number in range(PROMPTS)]
    file = settings.scratch / "prompts.txt"
    file.write_text("\n".join(prompts))

    def all_of_them() -> dict:
        told = ours(settings, 256, "--from-file", file, "--n_samples", 4)
        return {**told, "seconds": told["seconds"] / PROMPTS, "cpu": told["cpu"] / PROMPTS}

    together, alone = Timing(), Timing()
    for prompt in prompts[:SINGLE]:
        alone.add(lambda prompt=prompt: ours(settings, 256, "--prompt", prompt))
    for _ in range(SINGLE):
        together.add(all_of_them)
    return Measured(together, alone)


CASES = [
    Case("load-ckpt", "ours bf16", "diffusers bf16", "float32 .ckpt to bf16, ready to run, imports left out", loading,
         0.9, 0.6, ("ckpt", "ckpt")),
    Case("load-safetensors", "ours bf16", "diffusers bf16", "the same from .safetensors, theirs from its own folder",
         loading, 0.9, 0.6, ("safetensors", "diffusers")),
    Case("start", "ours", "diffusers default", "txt2img.py from its start to the first call of the UNet", starting,
         0.55),
    Case("start", "ours", "diffusers bfloat16", "the same", starting, 0.55),
    Case("picture", "ours", "diffusers default", "a picture of 512x512 in 50 PLMS steps, process and all", picture,
         0.25),
    Case("many", "one run", "single runs", f"{PROMPTS} prompts from a file by runs of one, per picture, 256x256",
         many, 0.5),
]  # fmt: skip
