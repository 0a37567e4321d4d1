"""Signals that stop a process: they take effect after the training loop has saved its step.

A handler that raises in the middle of a step loses the work since the last checkpoint, and may
leave JAX or Orbax in an undefined state. While a loop trains, a signal is therefore only noted.
The loop saves its step, and then the signal acts. Importing this module installs nothing: entry
points and jobs enter `at_entry_point` or `in_a_job`.
"""

import contextlib
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

Act = Callable[[int, str], Any]  # called with a signal's number and a description of what is saved
NAMES = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
TOGETHER = 0.1  # seconds; a user cannot send two signals this fast


class Stopped(KeyboardInterrupt):
    """A signal has stopped the process at a point where nothing is lost.

    Attributes:
      number: of the signal.
      standing: a description of what is saved.
    """

    def __init__(self, number: int, standing: str):
        super().__init__(number, standing)
        self.number, self.standing = number, standing

    def __str__(self) -> str:
        return f"{NAMES[signal.Signals(self.number)]} {self.standing}"


class _Signals:
    """The state of this process's signals.

    Attributes:
      acts: the action of each handled signal.
      noted: distinct signals that wait for a loop, or whose first one is acting.
      loops: number of running training loops.
      has_trained: whether a training loop has run.
    """

    def __init__(self) -> None:
        self.acts: dict[int, Act] = {}
        self.noted: list[int] = []
        self.loops = 0
        self.has_trained = False

    def receive(self, number: int, frame: Any) -> None:
        """Note a signal, and act outside of a training loop; a handler for `signal.signal`."""
        is_alone = not self.noted
        if number not in self.noted:
            self.noted.append(number)
        if self.loops or not is_alone:
            return
        standing = _outside_of_training(self.has_trained)
        if self.acts[number] is _stop and _is_within_jax(frame):
            end(Stopped(number, standing))
        self.act(standing)

    def act(self, standing: str) -> None:
        """Run the actions of the noted signals in order; an action that returns may run again."""
        while self.noted:
            number = self.noted[0]
            self.acts[number](number, standing)
            self.noted.remove(number)


_SIGNALS = _Signals()


def is_asked() -> bool:
    """Whether a signal waits for the training loop."""
    return bool(_SIGNALS.noted)


def act(standing: str) -> None:
    """Run the actions of waiting signals, if any.

    Args:
      standing: a description of what is saved.
    """
    _SIGNALS.act(standing)


@contextlib.contextmanager
def training() -> Iterator[None]:
    """Mark a training loop: signals wait until it calls `act` or ends."""
    _SIGNALS.loops += 1
    _SIGNALS.has_trained = True
    try:
        yield
    finally:
        _SIGNALS.loops -= 1
    if not _SIGNALS.loops:
        _SIGNALS.act(_outside_of_training(True))


@contextlib.contextmanager
def at_entry_point() -> Iterator[None]:
    """In an entry point: SIGINT and SIGTERM raise `Stopped`; a second one ends the process at once.

    A thread handles the second one, since Python's own handlers wait until a compilation or a
    step returns. Signals within `TOGETHER` count as one: a parent program may signal both the
    process and its group.
    """
    with _handled(dict.fromkeys(NAMES, _stop)) as is_handled:
        if not is_handled or sys.platform == "win32":
            yield
            return
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=_watch, args=(reading,), daemon=True).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            os.close(writing)


@contextlib.contextmanager
def in_a_job() -> Iterator[None]:
    """In a job of submitit or Ray: their own handlers act after the step is saved.

    Submitit's handler of SIGUSR2 requeues the job; its handler of SIGTERM only logs the signal.
    """
    numbers = [signal.SIGTERM, *([signal.SIGUSR2] if hasattr(signal, "SIGUSR2") else [])]
    handlers = {number: signal.getsignal(number) for number in numbers}
    with _handled({n: _handler_act(h) for n, h in handlers.items() if callable(h)}):
        yield


def end(stopped: KeyboardInterrupt) -> NoReturn:
    """Print one line on what is saved, and end the process now.

    Exit handlers of libraries do not run: they could crash or print a traceback.
    """
    number = stopped.number if isinstance(stopped, Stopped) else signal.SIGINT
    opening = "\n" if sys.stderr.isatty() else ""  # below a progress bar
    print(f"{opening}{str(stopped) or 'interrupted'}", file=sys.stderr)
    with contextlib.suppress(Exception):
        logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status_of(number))


def status_of(number: int) -> int:
    """The exit status of a process that a signal has ended, by the convention of shells.

    >>> status_of(signal.SIGINT), status_of(signal.SIGTERM)
    (130, 143)
    """
    return 128 + number


@contextlib.contextmanager
def _handled(acts: Mapping[int, Act]) -> Iterator[bool]:
    """Handle these signals; False outside of the main thread, where Python has no handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield False
        return
    _SIGNALS.acts.update(acts)
    before = {number: signal.signal(number, _SIGNALS.receive) for number in acts}
    try:
        yield True
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
            del _SIGNALS.acts[number]
        _SIGNALS.noted.clear()


def _is_within_jax(frame: Any) -> bool:
    """Whether JAX's own code is running; its C++ may lose a handler's exception, or crash."""
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] in ("jax", "jaxlib"):
            return True
        frame = frame.f_back
    return False


def _stop(number: int, standing: str) -> NoReturn:
    raise Stopped(number, standing)


def _handler_act(handler: Callable[[int, Any], Any]) -> Act:
    return lambda number, _: handler(number, None)


def _watch(reading: int) -> None:
    """End the process at the second signal read from a pipe; return when the pipe closes."""
    first = math.inf  # time of the first signal
    while received := os.read(reading, 64):
        if numbers := [number for number in received if number in NAMES]:
            if time.monotonic() - first > TOGETHER:
                os._exit(status_of(numbers[-1]))
            first = min(first, time.monotonic())
    os.close(reading)


def _outside_of_training(has_trained: bool) -> str:
    if has_trained:
        return "outside of training: nothing is lost, and the same command goes on"
    return "before the first step of training: nothing is lost"
