"""One thread that finishes and writes pictures while the next batch is drawn, and the first Ctrl-C."""

import logging
import signal
import threading
from collections.abc import Callable
from queue import Queue
from typing import Any

logger = logging.getLogger(__name__)

WAITING = 8  # pieces of work, each with its picture, before whoever brings more has to wait


class Background:
    """Does what it is given, in order, in a thread of its own. An error there is raised at the next call here.

    On leaving the block all is done; after a KeyboardInterrupt, only what had begun.
    """

    def __init__(self):
        self._work: Queue[Callable[[], None] | None] = Queue(WAITING)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Background":
        self._thread.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is KeyboardInterrupt:
            self._error = error
        self._work.put(None)
        self._thread.join()
        if kind is None:
            self.check()

    def do(self, work: Callable[..., None], *arguments: Any) -> None:
        self.check()
        self._work.put(lambda: work(*arguments))

    def wait(self) -> None:
        """Until all that was given so far is done."""
        self._work.join()
        self.check()

    def check(self) -> None:
        if self._error:
            raise self._error

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                if not self._error:
                    work()
            except BaseException as error:  # raised again where the work came from
                self._error = error
            finally:
                self._work.task_done()


class Interrupt:
    """The first Ctrl-C inside the block is `asked`; the second, or one outside of `busy`, is a KeyboardInterrupt."""

    def __init__(self):
        self.asked = False
        self.busy = False
        self._before: Any = None

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._first)
        return self

    def __exit__(self, *error) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _first(self, number, frame) -> None:
        if self.asked or not self.busy:
            raise KeyboardInterrupt
        self.asked = True
        logger.warning("finishing the current batch; Ctrl-C again stops at once")
