"""Which failed calls are tried again, and when: those that the server asks to come back, while a budget lasts."""

from __future__ import annotations

import random
import threading
import time

import grpc

from lockstep.errors import Error

RETRIED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)

# Every call earns a tenth of a retry, up to a purse that is full at first: when everything fails, retries add at most a
# tenth to the load.
EARNED = 0.1
PURSE = 10.0

# Clients that were turned away together come back at different times: after up to half as long again as they were told.
JITTER = 0.5


class Budget:
    """The retries that the calls of one client have earned."""

    def __init__(self) -> None:
        self._saved = PURSE
        self._lock = threading.Lock()

    def earn(self) -> None:
        """Say that a call is made."""
        with self._lock:
            self._saved = min(self._saved + EARNED, PURSE)

    def spend(self) -> bool:
        """Whether one more retry is granted."""
        with self._lock:
            granted = self._saved >= 1
            self._saved -= granted
            return granted


class Attempts:
    """The tries of one call, all of them within its deadline."""

    def __init__(self, budget: Budget, tries: int, timeout: float | None) -> None:
        budget.earn()
        self._budget = budget
        self._retries_left = tries - 1
        self._deadline = None if timeout is None else time.monotonic() + timeout

    def remaining(self) -> float | None:
        """What is left until the deadline. Unit: seconds."""
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0)

    def pause_after(self, error: Error) -> float | None:
        """How long to wait before another try; None where there must be none. Unit: seconds."""
        if error.code not in RETRIED or error.retry_after is None or self._retries_left <= 0:
            return None
        pause = error.retry_after * random.uniform(1, 1 + JITTER)
        remaining = self.remaining()
        if (remaining is not None and pause >= remaining) or not self._budget.spend():
            return None
        self._retries_left -= 1
        return pause
