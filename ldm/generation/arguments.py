"""The command line, declared once: options keep their CompVis spelling and show their default. No torch."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

from ldm.errors import RequestError
from ldm.generation import settings
from ldm.generation.options import (
    LATENT_UPSCALER,
    MEMORIES,
    PRECISIONS,
    SAFETY_ACTIONS,
    WATERMARKS,
    ModelOptions,
    RunOptions,
)
from ldm.generation.request import (
    ETA_SAMPLERS,
    LONG_PROMPTS,
    SAMPLERS,
    SCHEDULES,
    SEED_MODES,
    Request,
)
from ldm.generation.safe import STRENGTHS


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes `-` and `_` in option names alike, and says what is wrong in one line.

    The defaults are those of ldm.toml and the environment where they say something (`ldm.generation.settings`).
    With --print_config it tells where each value is from and exits, or leaves `Origins` as `print_config` in the
    options, for those who `explain_later`.
    """

    explain_later = False

    def __init__(self, description: str | None, **kwargs: Any):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.register("action", "store_true", settings.Switch)
        if self.add_help:
            self.add_argument("--print_config", action="store_true",
                              help="show each setting and where it is from, and exit")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):
        spelled = {name.replace("-", "_"): name for name in self._option_string_actions if name.startswith("--")}

        def respell(argument: str) -> str:
            name, equals, value = argument.partition("=")
            return spelled.get(name.replace("-", "_"), name) + equals + value if name.startswith("--") else argument

        words = [respell(one) for one in (sys.argv[1:] if args is None else args)]
        if namespace is not None:  # a row, whose defaults are there already
            return super().parse_known_args(words, namespace)
        try:
            sources = settings.adopt(self, shared_options)
        except RequestError as error:
            self.exit(2, f"{self.prog}: {error}\n")
        options, rest = super().parse_known_args(words)
        if options.print_config:
            values = {name: value for name, value in vars(options).items() if name != "print_config"}
            options.print_config = settings.Origins(self, values, sources, self._given(words))
            if not self.explain_later:
                sys.stdout.writelines(f"{line}\n" for line in options.print_config.lines(options))
                self.exit()
        return options, rest

    def _given(self, words: Sequence[str]) -> set[str]:
        """The `dest` of each option that is on the command line."""
        kept, defaults = {action: action.default for action in self._actions}, self._defaults
        self._defaults = {}
        for action in kept:
            action.default = argparse.SUPPRESS
        try:
            return set(vars(super().parse_known_args(words)[0]))
        finally:
            self._defaults = defaults
            for action, default in kept.items():
                action.default = default

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help shows the options)\n")


class Several(argparse.Action):
    """An option that may be given several times, with one value or more each: all of them, in a tuple."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, nargs="+", default=(), **kwargs)

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        before = getattr(namespace, self.dest, self.default)  # what ldm.toml names gives way to the command line
        setattr(namespace, self.dest, (*(() if before is self.default else before), *values))


def add_prompts(parser: Parser, prompt: str) -> None:
    group = parser.add_argument_group("what to draw")
    group.add_argument("--prompt", default=prompt, metavar="TEXT", help="the prompt (default: %(default)s)")
    group.add_argument("--negative_prompt", default="", metavar="TEXT", help="what to steer away from")
    group.add_argument("--long_prompt", choices=LONG_PROMPTS, default=Request.long_prompt,
                       help="a prompt past 77 tokens is cut, or encoded in chunks of 75 (default: %(default)s)")
    group.add_argument("--prompt_weights", action=argparse.BooleanOptionalAction, default=Request.prompt_weights,
                       help="read brackets in prompts: (more) [less] (words:1.3), and from step to step [from:to:0.4] "
                       "[a|b]; without it they are text like any other")
    group.add_argument("--safe", metavar="HOW",
                       help="Safe Latent Diffusion: keep away from what is hateful, violent, sexual ...; "
                       f"{', '.join(STRENGTHS)}, or guidance scale, warm-up steps, threshold, momentum scale and "
                       "momentum beta, as in 1000,10,0.01,0.3,0.4")
    group.add_argument("--safe_concept", default=Request.safe_concept, metavar="TEXT",
                       help="what --safe keeps away from, in the words of a prompt (default: that of the paper)")


def add_rows(parser: Parser) -> None:
    """For a script whose options above this group may also stand in the rows of a file."""
    group = parser.add_argument_group("many prompts")
    group.add_argument("--from-file", metavar="FILE",
                       help="draw each row of a UTF-8 file instead of --prompt: .txt has a prompt a line, with options "
                       "behind it where they differ (a fox --seed 7); .jsonl and .csv have the long names of options "
                       "as keys. {red,blue} in a prompt makes a row of each. - takes lines of standard input as they "
                       "come, until it ends")
    group.add_argument("--xy", nargs="+", default=(), metavar="OPTION=A,B",
                       help='lay out two options, the first across and the second down, or one alone, in a labelled '
                       'grid: --xy "steps=10,20,50" "scale=3,7.5". All its pictures start from the same noise; each '
                       "row of a file and each of --n_iter rounds, which has the next seed, makes a grid")
    group.add_argument("--resume", dest="go_on", action="store_true",
                       help="go on with the run of this command that OUTDIR/manifest.jsonl tells of: what is missing, "
                       "altered or failed is made (again), under the same names")


def add_sampling(
    parser: Parser,
    sampler: str,
    scale: float,
    steps: Sequence[str] = ("--ddim_steps", "--steps"),
    eta: Sequence[str] = ("--ddim_eta",),
    guidance: Sequence[str] = ("--scale",),
) -> None:
    """steps, eta, guidance: the spellings of these options."""
    group = parser.add_argument_group("how to sample")
    group.add_argument("--sampler", choices=SAMPLERS, default=sampler, metavar="NAME",
                       help=f"one of {', '.join(SAMPLERS)} (default: %(default)s)")
    group.add_argument("--plms", dest="sampler", action="store_const", const="plms", help="the same as --sampler plms")
    group.add_argument("--dpm_solver", dest="sampler", action="store_const", const="dpm_solver",
                       help="the same as --sampler dpm_solver")
    group.add_argument("--solver_order", type=int, choices=(2, 3), default=Request.solver_order,
                       help="order of dpm_solver (default: %(default)s)")
    group.add_argument("--solver_method", choices=("multistep", "singlestep"), default=Request.solver_method,
                       help="how dpm_solver reaches its order (default: %(default)s)")
    group.add_argument("--schedule", choices=SCHEDULES, default=Request.schedule,
                       help="how the noise levels are spaced; default is the sampler's own (default: %(default)s)")
    group.add_argument(*steps, dest="steps", type=int, default=Request.steps, metavar="N",
                       help="denoising steps of any sampler (default: %(default)s)")
    group.add_argument(*eta, dest="eta", type=float, default=Request.eta, metavar="X",
                       help=f"noise added at each step, 0 to 1, with {', '.join(ETA_SAMPLERS)} (default: %(default)s)")
    group.add_argument(*guidance, dest="scale", type=float, default=scale, metavar="X",
                       help="guidance: 1 is none, more follows the prompt more closely (default: %(default)s)")
    group.add_argument("--guidance_interval", metavar="LO,HI",
                       help="guide only at noise levels, sigma / alpha, above LO and up to HI, such as 0.28,5.4; the "
                       "other steps take half the time (default: everywhere)")
    group.add_argument("--token_merging", type=float, default=Request.token_merging, metavar="SHARE",
                       help="merge this share of the pixels with others that are like them, 0 to 0.75, wherever the "
                       "network's self-attention is over 64x64 or more; 0.5 is usual (default: %(default)s)")
    group.add_argument("--seed", type=int, default=Request.seed, metavar="N", help="(default: %(default)s)")
    group.add_argument("--seed_mode", choices=SEED_MODES, default=Request.seed_mode,
                       help="run: one noise a batch on the sampling device, as CompVis; image: seed, seed+1, ... "
                       "drawn on the CPU, the same on any device and at any batch size (default: %(default)s)")
    group.add_argument("--fixed_code", action=argparse.BooleanOptionalAction, default=Request.fixed_code,
                       help="start every batch from the same noise")


def add_size(parser: Parser) -> None:
    group = parser.add_argument_group("size (default: the model's native one, or that of the picture)")
    group.add_argument("--H", dest="height", type=int, metavar="PIXELS", help="height")
    group.add_argument("--W", dest="width", type=int, metavar="PIXELS", help="width")


def add_measures(parser: Parser) -> None:
    group = parser.add_argument_group("what Stable Diffusion XL is told of the picture")
    group.add_argument("--original_size", metavar="WIDTHxHEIGHT",
                       help="the size that it had before it was resized: smaller is blurred (default: its size)")
    group.add_argument("--crop", metavar="TOP,LEFT", help="how many pixels are cut off there (default: 0,0)")
    group.add_argument("--target_size", metavar="WIDTHxHEIGHT",
                       help="the size that it was resized to (default: its size)")
    group.add_argument("--aesthetic_score", type=float, metavar="X",
                       help="how good it looks, 0 to 10; for the refiner (default: 6)")
    group.add_argument("--refine_from", type=float, default=Request.refine_from, metavar="X",
                       help="the share of the noise after which the --refiner goes on (default: %(default)s)")


def add_refiner(parser: Parser) -> None:
    parser.add_argument_group("two models").add_argument(
        "--refiner", metavar="FILE", help="weights of a second model, which draws the last steps: see --refine_from")


def add_upscaler(parser: Parser) -> None:
    group = parser.add_argument_group("larger pictures")
    group.add_argument("--upscale", type=int, choices=(2,), metavar="2",
                       help="draw the finished latents again at twice their sides, before they become a picture")
    group.add_argument("--upscaler", metavar="DIR",
                       help=f"the model that does so, with --upscale (default: {LATENT_UPSCALER})")


def add_latents(parser: Parser) -> None:
    group = parser.add_argument_group("latents (the config says both; given here, they are checked against it)")
    group.add_argument("--C", dest="channels", type=int, metavar="N", help="latent channels")
    group.add_argument("--f", dest="factor", type=int, metavar="N", help="downsampling factor of the autoencoder")


def add_model(parser: Parser, ckpt: str | None = ModelOptions.ckpt) -> None:
    group = parser.add_argument_group("model")
    if ckpt is not None:
        group.add_argument("--ckpt", default=ckpt, metavar="FILE",
                           help="weights, .ckpt or .safetensors (default: %(default)s)")
    group.add_argument("--config", metavar="YAML",
                       help="how the model is built (default: config.yaml beside the weights, else as they tell)")
    group.add_argument("--use_ema", action=argparse.BooleanOptionalAction,
                       help="take the averaged weights (default: as the config says)")
    group.add_argument("--device", default=ModelOptions.device, metavar="NAME",
                       help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    group.add_argument("--precision", choices=PRECISIONS, default=ModelOptions.precision,
                       help="auto is bf16 on a processor that computes in it, fp16 on an accelerator, else full "
                       "(default: %(default)s)")
    group.add_argument("--lora", action=Several, metavar="FILE:WEIGHT",
                       help="add a LoRA to the model; without :WEIGHT its weight is 1 (may be given several times)")
    group.add_argument("--embedding", action=Several, metavar="FILE:WORD",
                       help="learn a word of textual inversion for use in prompts; without :WORD it is the file's own "
                       "(may be given several times)")
    group.add_argument("--memory", choices=MEMORIES, default=ModelOptions.memory,
                       help="low keeps the text encoder and the autoencoder off the device while they are idle and "
                       "decodes in thin bands; lowest also brings each layer of the network to the device only while "
                       "it runs; auto does as little as the free memory asks for (default: %(default)s)")
    group.add_argument("--compile", action="store_true",
                       help="compile the denoiser with torch.compile, which takes long the first time")
    group.add_argument("--offline", action="store_true", help="never reach for the network")


def add_output(
    parser: Parser,
    outdir: str,
    n_iter: int,
    batch_size: int,
    outdir_option: Sequence[str] = ("--outdir",),
    batch_option: str = "--n_samples",
    verbose: Sequence[str] = ("-v", "--verbose"),
) -> None:
    parser.explain_later = True  # rows and shorthands of its script still change what is drawn
    group = parser.add_argument_group("pictures")
    group.add_argument(*outdir_option, dest="outdir", default=outdir, metavar="DIR", help="(default: %(default)s)")
    group.add_argument("--n_iter", type=int, default=n_iter, metavar="N", help="rounds (default: %(default)s)")
    group.add_argument(batch_option, dest="batch_size", type=int, default=batch_size, metavar="N",
                       help="pictures sampled together (default: %(default)s)")
    group.add_argument("--n_rows", type=int, default=RunOptions.n_rows, metavar="N",
                       help=f"pictures in a row of the grid; 0 takes {batch_option[2:]} (default: %(default)s)")
    group.add_argument("--skip_grid", action="store_true", help="write no grid")
    group.add_argument("--skip_save", action="store_true", help="write no single pictures")
    group.add_argument("--watermark", type=lambda text: "" if text == "off" else text, metavar="TEXT",
                       help="invisible watermark; off writes none (default: that of the model's original, "
                       f"{' or '.join(WATERMARKS)})")
    group.add_argument("--safety", choices=SAFETY_ACTIONS, default=RunOptions.safety,
                       help="what is done with a picture that the safety checker flags; auto flags it where the "
                       "checker's weights are at hand (default: %(default)s)")
    group.add_argument("--preview", type=int, default=RunOptions.preview, metavar="N",
                       help="show the pictures as they come, every N steps, in OUTDIR/preview.png; 0 shows none "
                       "(default: %(default)s)")
    group.add_argument("--json", action="store_true",
                       help="write each event as a JSON object on a line of its own, in place of the paths")
    group.add_argument("--stop_on_error", action="store_true", help="end at the first picture that fails")
    group.add_argument("-q", "--quiet", action="store_const", dest="verbosity", const=-1, default=0, help="only errors")
    group.add_argument(*verbose, action="store_const", dest="verbosity", const=1, help="more of what is done")


def add_picture(parser: Parser, strength: float | None):
    """Gives the group, for a script that has more to add to it; without a strength there is no option for it."""
    group = parser.add_argument_group("what to start from")
    group.add_argument("--init-img", metavar="FILE", help="the picture to start from")
    if strength is not None:
        group.add_argument(
            "--strength", type=float, default=strength, metavar="X",
            help="how much of the picture is noised away: 0 keeps it, 1 forgets it (default: %(default)s)")
    return group


def require(parser: Parser, args: argparse.Namespace, name: str, what: str) -> None:
    """End with a usage error that says `what` to do where an option is missing and no rows or record have it."""
    if not (getattr(args, name) or args.from_file or args.replay or args.print_config):
        parser.error(what)


def add_replay(parser: Parser) -> None:
    group = parser.add_argument_group("again")
    group.add_argument("--replay", metavar="PNG", help="make this picture again, from the record in it")


def pick(kind: type, args: argparse.Namespace, **given: Any):
    """Make a `kind` (a dataclass of settings) from the options of the same names; what is `given` wins."""
    named = {field.name: getattr(args, field.name) for field in fields(kind) if hasattr(args, field.name)}
    return kind(**{**named, **given})


def shared_options() -> set[str]:
    """The names of the options that are declared here, which may be set for all scripts at once."""
    parser = Parser(None)
    add_prompts(parser, "")
    add_picture(parser, 1.0)
    add_sampling(parser, Request.sampler, Request.scale)
    add_size(parser)
    add_measures(parser)
    add_refiner(parser)
    add_upscaler(parser)
    add_rows(parser)
    add_latents(parser)
    add_model(parser)
    add_output(parser, "", 1, 1)
    add_replay(parser)
    return set(settings.options_of(parser))
