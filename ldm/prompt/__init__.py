"""Prompts as text: nothing here knows a tokenizer or a model."""

from ldm.prompt.braces import expand_braces
from ldm.prompt.chunks import split
from ldm.prompt.editing import merge_schedules, prompt_schedule
from ldm.prompt.weights import Weighted, parse_weights, plain_text

__all__ = ["Weighted", "expand_braces", "merge_schedules", "parse_weights", "plain_text", "prompt_schedule", "split"]
