"""Pictures for an evaluation, drawn as the scripts draw them: what is there from an earlier run is not drawn again."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ldm.errors import ConfigError, LdmError
from ldm.evaluation.clip_score import has_both_towers
from ldm.generation.batch import Run
from ldm.generation.ledger import NAME, Ledger, settings_hash
from ldm.generation.loading import Chosen, open_run
from ldm.generation.options import ModelOptions, RunOptions
from ldm.generation.request import Request
from ldm.generation.rows import Row
from ldm.generation.stages import decode, first_latent
from ldm.image.io import from_array, to_array
from ldm.modules.encoders.files import WEIGHTS, find_folder, local_folder

logger = logging.getLogger(__name__)

OPENAI_CLIP = "openai/clip-vit-large-patch14"


class Studio:
    """A model that is loaded once and draws each list of requests into a folder of its own.

    Pictures have a seed each, the k-th of a list that of its request plus k, drawn on the CPU, so that neither the
    device nor the size of a batch matters; no watermark is written into them. Raises RequestError, ModelError.
    """

    def __init__(self, model: ModelOptions, chosen: Chosen, outdir: Path, batch_size: int):
        self.outdir, self.chosen = outdir, chosen
        options = RunOptions(str(outdir), batch_size, skip_grid=True, watermark="", safety="off")
        self.run = open_run([], model, options, lambda event, **facts: None, chosen)

    @property
    def side(self) -> int:
        """The native side of pictures, in pixels."""
        return self.chosen.geometry.side

    @property
    def facts(self) -> dict[str, Any]:
        """What tells this model, and how it was run, from any other."""
        recorder = self.run.recorder
        return {
            "checkpoint": str(recorder.checkpoint), "sha256": recorder.sha256, "config": str(recorder.config),
            "side": self.side, "run": recorder.how, "versions": recorder.versions,
        }  # fmt: skip

    def draw(self, name: str, requests: Sequence[Request]) -> list[Path]:
        """The file of each request, in order, under the folder `name`; those that lack are drawn.

        Raises LdmError where one could not be drawn, KeyboardInterrupt where it was interrupted: the same call goes on.
        """
        folder, run = self.outdir / name, self.run
        requests = [replace(request, seed_mode="image") for request in requests]
        options = replace(run.options, outdir=str(folder), go_on=(folder / NAME).exists())
        logger.info("%s: %d pictures", folder, len(requests))
        summary = Run(run.pipeline, options, run.finish, run.recorder, run.tell).draw(list(map(Row, requests)))
        if summary.interrupted:
            logger.warning("%s: stopped after %d pictures; the same command goes on", folder, summary.made)
            raise KeyboardInterrupt
        if summary.failed:
            raise LdmError(f"{summary.failed} of {len(requests)} pictures in {folder} could not be drawn")
        numbered = [replace(request, seed=request.seed + index) for index, request in enumerate(requests)]
        past = Ledger(folder).find([settings_hash(request, run.recorder) for request in numbered])
        return [folder / "samples" / past.entries[index].file for index in range(len(requests))]

    @torch.inference_mode()
    def round_trip(self, picture: Image.Image) -> Image.Image:
        """The picture, encoded and decoded."""
        model = self.run.pipeline.model
        pixels = torch.from_numpy(to_array(picture)).permute(2, 0, 1)[None]  # (1, 3, h, w)
        return from_array(decode(model, first_latent(model, pixels.to(model.device))).numpy())


def clip_of(chosen: Chosen) -> Path:
    """The folder of a model's own CLIP, or of OpenAI's, which Stable Diffusion 1 reads with, where it has both towers.

    Raises ConfigError where it is not at hand.
    """
    stage = chosen.section.params.get("cond_stage_config")
    named = stage.get("params", {}).get("version") if isinstance(stage, Mapping) else None
    folder = find_folder(named or OPENAI_CLIP) or local_folder(named or OPENAI_CLIP, WEIGHTS)
    if folder is None or not has_both_towers(folder):
        raise ConfigError("the CLIP of this model is not at hand with both towers: name one with --clip FOLDER, which "
                          "holds config.json, the weights and the tokenizer as transformers keeps them")
    return folder
