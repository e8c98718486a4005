"""Learning-rate multipliers for torch.optim.lr_scheduler.LambdaLR: a linear warm-up, then a fall, in cycles."""

import logging
import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

logger = logging.getLogger(__name__)


class LambdaWarmUpCosineScheduler2:
    """In each cycle rise linearly from f_start to f_max over warm_up_steps, then fall along half a cosine to f_min.

    Each argument holds one entry a cycle; lengths are in optimizer steps. After the last cycle its final value stays.
    The multiplier is logged every `verbosity_interval` steps; 0 is never.
    """

    def __init__(
        self,
        warm_up_steps: Sequence[int],
        f_min: Sequence[float],
        f_max: Sequence[float],
        f_start: Sequence[float],
        cycle_lengths: Sequence[int],
        verbosity_interval: int = 0,
    ):
        counts = {len(entries) for entries in (warm_up_steps, f_min, f_max, f_start, cycle_lengths)}
        if len(counts) != 1 or 0 in counts:
            raise ValueError("warm_up_steps, f_min, f_max, f_start and cycle_lengths must have one entry a cycle each")
        self.lr_warm_up_steps = list(warm_up_steps)
        self.f_min, self.f_max, self.f_start = list(f_min), list(f_max), list(f_start)
        self.cycle_lengths = list(cycle_lengths)
        self.cum_cycles = [0, *accumulate(self.cycle_lengths)]
        self.verbosity_interval = verbosity_interval
        self.last_f = 0.0

    def find_in_interval(self, n: int) -> int:
        """The cycle that step n falls in; a boundary belongs to the cycle that it ends."""
        return min(bisect_left(self.cum_cycles[1:], n), len(self.cycle_lengths) - 1)

    def schedule(self, n: int) -> float:
        """The multiplier at step n."""
        cycle = self.find_in_interval(n)
        step, warm_up = n - self.cum_cycles[cycle], self.lr_warm_up_steps[cycle]
        if step < warm_up:
            start = self.f_start[cycle]
            self.last_f = (self.f_max[cycle] - start) / warm_up * step + start
        else:
            low = self.f_min[cycle]
            self.last_f = low + (self.f_max[cycle] - low) * self.remaining(step, warm_up, self.cycle_lengths[cycle])
        if self.verbosity_interval and n % self.verbosity_interval == 0:
            logger.info("step %d: learning-rate multiplier %g, cycle %d", n, self.last_f, cycle)
        return self.last_f

    def remaining(self, step: int, warm_up: int, length: int) -> float:
        """The share of the fall that is still ahead: 1 at the top, 0 at the end of the cycle."""
        done = min((step - warm_up) / max(length - warm_up, 1), 1.0)
        return 0.5 * (1.0 + math.cos(math.pi * done))

    def __call__(self, n: int) -> float:
        return self.schedule(n)


class LambdaLinearScheduler(LambdaWarmUpCosineScheduler2):
    """Warm up linearly, then fall on the straight line from (0, f_max) to (cycle_length, f_min)."""

    def remaining(self, step: int, warm_up: int, length: int) -> float:
        return max((length - step) / length, 0.0)


class LambdaWarmUpCosineScheduler(LambdaWarmUpCosineScheduler2):
    """One cycle: from lr_start to lr_max in warm_up_steps, then along half a cosine to lr_min at max_decay_steps."""

    def __init__(
        self,
        warm_up_steps: int,
        lr_min: float,
        lr_max: float,
        lr_start: float,
        max_decay_steps: int,
        verbosity_interval: int = 0,
    ):
        super().__init__([warm_up_steps], [lr_min], [lr_max], [lr_start], [max_decay_steps], verbosity_interval)

    @property
    def last_lr(self) -> float:
        return self.last_f
