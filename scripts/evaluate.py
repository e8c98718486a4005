"""Measure a model: Fréchet distance and CLIP score over guidance scales, and the exact score of the shapes world.

  python scripts/evaluate.py                                               # the curve of the model that ships
  python scripts/evaluate.py --exact --autoencoder --img2img --inpaint     # and all that its pictures can tell
  python scripts/evaluate.py --ckpt sd-v1-4.ckpt --captions coco.txt --reference coco-val/ --clip clip-vit-large/

Writes OUTDIR/NAME.csv and NAME.json of each measure, with versions, n, resizing and reference, OUTDIR/curve.png, and
the pictures. What an earlier run of the same settings has drawn is kept: the same command goes on after a stop.
"""

import sys

from ldm.evaluation.options import FEATURES, EvaluationOptions
from ldm.generation import arguments
from ldm.generation.command import execute, set_up
from ldm.generation.options import ModelOptions

WHAT = {
    "curve": "Fréchet distance and CLIP score over --scales (the default)",
    "exact": "of the shapes world: is every attribute of a caption right?",
    "autoencoder": "of the shapes world: PSNR and exact score of encoded and decoded scenes",
    "img2img": "of the shapes world: what stays of a picture at strength 0.3 and 1",
    "inpaint": "of the shapes world: does an object appear where it is asked for?",
}


def parse(argv: list[str] | None = None):
    parser, default = arguments.Parser(__doc__), EvaluationOptions
    group = parser.add_argument_group("what to measure (several may be given)")
    for name, what in WHAT.items():
        group.add_argument(f"--{name}", dest="measures", action="append_const", const=name, help=what)
    group = parser.add_argument_group("how")

    def add(name: str, **options) -> None:
        group.add_argument(name, default=getattr(default, name[2:]), **options)

    add("--n", type=int, metavar="N", help="captions, of each set (default: %(default)s)")
    add("--captions", metavar="FILE", help="a caption a line, or shapes, the shapes world (default: %(default)s)")
    add("--scales", type=float, nargs="+", metavar="X", help="of the curve (default: %(default)s)")
    add("--scale", type=float, metavar="X", help="of the rest (default: 7.5, and 5 for img2img, as in the scripts)")
    add("--samplers", nargs="+", metavar="NAME:STEPS",
        help="to compare by the exact score; the rest takes the first (default: plms:50 ddim:50 dpmpp_2m:20; ddim:50 "
        "for img2img and inpaint)")
    add("--seed", type=int, metavar="N", help="of captions, scenes and noise (default: %(default)s)")
    add("--reference", metavar="PATH", help="what pictures are compared with: a folder of pictures, an .npz that this "
        "script wrote, or shapes (default: shapes where the captions are)")
    add("--n_reference", type=int, metavar="N", help="pictures of it that are drawn fresh (default: %(default)s)")
    add("--features", choices=FEATURES, help="of the distance; auto is inception where its weights are at hand "
        "(default: %(default)s)")
    add("--inception", metavar="FILE", help="the weights of torch-fidelity's Inception, which are never fetched")
    add("--clip", metavar="FOLDER", help="the CLIP that scores, as transformers keeps it (default: the model's own)")
    add("--outdir", metavar="DIR", help="(default: %(default)s)")
    add("--batch_size", type=int, metavar="N", help="pictures sampled together (default: %(default)s)")
    group.add_argument("-q", "--quiet", dest="verbosity", action="store_const", const=-1, default=0, help="only errors")
    arguments.add_model(parser)
    return parser.parse_args(argv)


def main() -> int:
    args = parse()
    set_up(args)
    given = {name: tuple(found) for name in ("measures", "scales", "samplers") if (found := getattr(args, name))}
    options = arguments.pick(EvaluationOptions, args, **{"measures": EvaluationOptions.measures, **given})

    from ldm.evaluation.evaluate import evaluate

    for line in evaluate(options, arguments.pick(ModelOptions, args)):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(execute(main))
