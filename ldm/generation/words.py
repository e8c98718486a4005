"""The prompts of a batch as the denoiser is told them, from step to step."""

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any

from ldm.errors import RequestError
from ldm.generation.request import Request
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.prompt import Weighted, merge_schedules, parse_weights, plain_text, prompt_schedule
from ldm.sampling.guidance import stack

KEPT = 256  # texts: those that were wanted last

# (text, prompt_weights, chunks) -> states, in the order in which they were wanted.
Known = dict[tuple[str, bool, int | None], Any]


def script(batch: Sequence[Request], steps: int) -> dict[int, tuple[str, ...]]:
    """The prompts under the first step they hold for, and behind them, where guidance needs them, the negative ones and
    the concepts to keep away from."""
    texts = [request.prompt for request in batch]
    if batch[0].steers:
        texts += [request.negative_prompt for request in batch]
    if batch[0].safe:
        texts += [request.safe_concept for request in batch]
    if not batch[0].prompt_weights:
        return {0: tuple(texts)}
    return dict(merge_schedules([prompt_schedule(text, steps) for text in texts]))


class Words:
    """Prompts as states; each text is encoded once, by itself, so that they do not depend on its neighbours.

    texts: all that will be asked for. request: how they are read (`prompt_weights`) and encoded (`long_prompt`); in
    chunks, all have as many as the longest needs. known: the states of earlier batches, to which these are added.
    Raises RequestError where the encoder cannot weigh words.
    """

    def __init__(self, model: LatentDiffusion, texts: Iterable[str], request: Request, known: Known | None = None):
        self.model, self.encoder = model, model.cond_stage_model
        read = {text: parse_weights(text) if request.prompt_weights else [(text, 1.0)] for text in texts}
        self.plain = {text: plain_text(prompt) for text, prompt in read.items()}
        chunked = request.long_prompt == "chunk"
        self.count = max(len(self.encoder.chunks(text)) for text in self.plain.values()) if chunked else None
        known = {} if known is None else known
        self.states = {}
        for text, prompt in read.items():
            key = text, request.prompt_weights, self.count
            self.states[text] = known.pop(key) if key in known else self._encode(self.plain[text], prompt)
            known[key] = self.states[text]
        while len(known) > KEPT:
            del known[next(iter(known))]

    def _encode(self, text: str, prompt: Sequence[Weighted]) -> Any:
        if self.count is None:
            states = self.model.get_learned_conditioning([text])
        else:
            states = self.encoder.encode_long([text], self.count)
        if all(weight == 1 for _, weight in prompt):
            return states
        if not hasattr(self.encoder, "weigh"):
            raise RequestError(f"{type(self.encoder).__name__} cannot weigh words: leave --prompt_weights out")
        return self.encoder.weigh(states, prompt, self.count)

    def __call__(self, texts: Sequence[str]) -> Any:
        """The states of a batch of texts: (b, tokens, channels), or several such as the encoder gives them."""
        return reduce(stack, (self.states[text] for text in texts))

    def against(self, texts: Sequence[str]) -> Any:
        """As a call, of negative prompts: an empty one is nothing to models that were trained so."""
        if not getattr(self.encoder, "zero_empty", False):
            return self(texts)
        nothing = self.encoder.nothing
        return reduce(stack, (self.states[text] if text else nothing(self.states[text]) for text in texts))

    def cut(self, text: str) -> str:
        """The words of a text that the encoder does not take."""
        if self.count is not None or not hasattr(self.encoder, "dropped"):
            return ""
        return self.encoder.dropped(self.plain[text])
