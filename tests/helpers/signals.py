"""A signal to the test's own process, at a moment of a trial's training."""

import os
import threading

from lorax.runs.trial_id import trial_dir


def lines(trial):
    path = trial_dir(trial) / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


class SignalAt:
    """Sends a signal to this process once a trial has written some lines of its metrics."""

    def __init__(self, number, trial, count):
        self.number, self.trial, self.count = number, trial, count
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.run)

    def run(self):
        while not self.over.wait(0.001):
            if lines(self.trial) >= self.count:
                os.kill(os.getpid(), self.number)
                return

    def __enter__(self):
        self.thread.start()

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()
