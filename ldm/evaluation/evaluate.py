"""An evaluation from its options to its tables."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec

import torch

from ldm.errors import RequestError
from ldm.evaluation import measures
from ldm.evaluation.clip_score import Clip
from ldm.evaluation.drawing import Studio, clip_of
from ldm.evaluation.fid import INCEPTION, Features, Inception, find_inception
from ldm.evaluation.measures import Table
from ldm.evaluation.options import EvaluationOptions
from ldm.evaluation.report import lines, write
from ldm.generation.loading import Chosen, choose
from ldm.generation.options import ModelOptions
from ldm.image.io import check_outdir
from ldm.memory import pick_device
from ldm.util import optional

logger = logging.getLogger(__name__)


def evaluate(options: EvaluationOptions, model: ModelOptions) -> Iterator[str]:
    """Take each measure and write it down; gives the tables as text, and the path of each file.

    Raises LdmError; KeyboardInterrupt where drawing was interrupted. The same call goes on with what is drawn.
    """
    chosen, outdir, device = choose(model), check_outdir(options.outdir), pick_device(model.device)
    curve = prepare_curve(options, chosen, device) if "curve" in options.measures else None
    studio = Studio(model, chosen, outdir, options.batch_size)
    draw, n, seed, place = studio.draw, options.n, options.seed, (studio.side, outdir)
    [one, *_], every = options.ways("ddim:50"), options.ways("plms:50", "ddim:50", "dpmpp_2m:20")
    scale = 7.5 if options.scale is None else options.scale
    take: dict[str, Callable[[], Table]] = {
        "curve": lambda: curve(studio),
        "exact": lambda: measures.exact(draw, n, every, scale, seed),
        "autoencoder": lambda: measures.autoencoder(studio.round_trip, n, studio.side, seed),
        "img2img": lambda: measures.img2img(draw, n, *place, one, 5.0 if options.scale is None else scale, seed),
        "inpaint": lambda: measures.inpaint(draw, n, *place, one, scale, seed),
    }
    for name in dict.fromkeys(options.measures):
        table = take[name]()
        table = replace(table, facts={**table.facts, **studio.facts})
        yield from lines(table)
        yield from map(str, write(table, outdir))


def prepare_curve(options: EvaluationOptions, chosen: Chosen, device: torch.device) -> Callable[[Studio], Table]:
    """What draws the curve; that something is missing is told now, before the model is loaded.

    The statistics of the reference are left in the output folder for another time.
    """
    optional("matplotlib.figure", "eval")
    captions = measures.read_captions(options.captions, options.n, options.seed)
    clip = Clip.load(options.clip or clip_of(chosen), device)
    features = find_features(options, clip, device)
    reference = measures.read_reference(options.reference or options.captions, features, options.n_reference,
                                        options.seed, chosen.geometry.side)
    reference.save(check_outdir(options.outdir) / f"reference-{features.name}.npz")
    [way, *_] = options.ways("plms:50")
    return lambda studio: measures.curve(studio.draw, captions, options.scales, way, options.seed, clip, features,
                                         reference)


def find_features(options: EvaluationOptions, clip: Clip, device: torch.device) -> Features:
    """The features of the distance. Raises RequestError where they are not at hand, MissingExtra."""
    wanted = "inception" if options.inception else options.features
    weights = find_inception(options.inception) if wanted != "clip" else None
    if wanted == "inception" and weights is None:
        raise RequestError(f"the weights of Inception are not at hand: put {INCEPTION} from the releases of "
                           f"torch-fidelity into {torch.hub.get_dir()}/checkpoints, name it with --inception FILE, "
                           "or take --features clip")
    if wanted == "inception" or (weights and find_spec("torch_fidelity")):
        return Inception(weights, device)
    if wanted == "auto":
        logger.info("Inception is not at hand: the distance is on the features of CLIP (frechet_clip), and is no FID")
    return clip
