"""Train the model of the shapes world from nothing and put it together; run again, it goes on where it was interrupted.

    python scripts/train_shapes.py         # on two processor cores
    python scripts/train_shapes.py --gpu   # on a GPU, in larger batches

The stages are runs of main.py with the configs in configs/shapes: the autoencoder on crops, then on whole pictures and
at last at a low rate, both towers of CLIP and then that for pictures alone, and latent diffusion, then on what it draws
itself, put right, and at last on what guidance makes. What this command does not know is handed to each of them.
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("logs/shapes"), metavar="FOLDER",
                        help="where the logs of the stages are (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("models/ldm/shapes"), metavar="FOLDER",
                        help="where the finished model goes (default: %(default)s)")
    parser.add_argument("--configs", type=Path, default=ROOT / "configs" / "shapes", metavar="FOLDER",
                        help="the recipe (default: configs/shapes)")
    parser.add_argument("--gpu", action="store_true", help="merge the configs in the recipe's folder gpu over its own")
    return parser


def train(work: Path, stage: str, configs: list[Path], words: list[str]) -> Path:
    """Train a stage, or go on with it, and return its log folder."""
    begun = sorted(path.parent.parent for path in work.glob(f"*_{stage}/checkpoints/last.ckpt"))
    start = ["-r", begun[-1]] if begun else ["-n", stage, "-l", work, "-b", *configs]
    command = [sys.executable, ROOT / "main.py", "-t", "--no-test", *start, *words]
    code = subprocess.run([str(word) for word in command]).returncode
    if code:
        sys.exit(code)
    return max(work.glob(f"*_{stage}"))


def main() -> None:
    options, words = make_parser().parse_known_args()
    work, tower = options.work, options.work / "clip"

    def recipe(*names: str) -> list[Path]:
        files = [options.configs / f"{name}.yaml" for name in names]
        return [*files, *(options.configs / "gpu" / file.name for file in files)] if options.gpu else files

    logs = train(work, "autoencoder", recipe("autoencoder"), words)
    for later in (["autoencoder-whole"], ["autoencoder-whole", "autoencoder-fine"]):
        logs = train(work, later[-1], recipe("autoencoder", *later),
                     [f"model.params.ckpt_path={logs}/checkpoints/last.ckpt", *words])
    train(work, "clip", recipe("clip"), [f"model.params.folder={tower}", *words])
    train(work, "clip-pictures", recipe("clip", "clip-pictures"), [f"model.params.folder={tower}", *words])
    parts = [
        f"model.params.first_stage_config.params.ckpt_path={logs}/checkpoints/last.ckpt",
        f"model.params.cond_stage_config.params.version={tower}",
        f"data.params.validation.params.path={work}/latents-validation",
        *words,
    ]
    logs = train(work, "latent", recipe("latent"), [f"data.params.train.params.path={work}/latents", *parts])
    parts.append(f"data.params.train.params.path={work}/redrawn")
    for later in (["latent-redrawn"], ["latent-redrawn", "latent-guided"]):
        logs = train(work, later[-1], recipe("latent", *later),
                     [f"model.params.ckpt_path={logs}/checkpoints/last.ckpt", *parts])
    from ldm.training.assemble import assemble

    assemble(logs, options.out)
    print(options.out)


if __name__ == "__main__":
    main()
