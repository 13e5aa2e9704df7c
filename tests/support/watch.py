"""What a run of the GPU tests does beside testing: it records reports, and leaves a lost GPU."""

import json
import os
import sys
import time

import pytest

# characters of a failure that a record keeps: its end says most
TEXT = 4000


def context_is_lost():
    """Return whether every further call of this process would fail on its GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class Watch:
    """Appends each report to files at once, and ends a process that has lost its GPU.

    A kernel that reads or writes where it must not ends the context of its process: each later
    test would fail too. xdist replaces a worker that ends, so the other tests run on a new context.
    """

    def __init__(self, config):
        self.files = config.getoption("record")
        self.is_worker = hasattr(config, "workerinput")

    # behind xdist, which sends the report
    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report):
        # with xdist all reports reach the process that has the workers
        if not self.is_worker and (report.when == "call" or not report.passed):
            self._write(report)
        if report.failed and context_is_lost():
            if not self.is_worker:
                pytest.exit("the GPU's context is lost; with pytest-xdist the rest would run", 1)
            os._exit(1)

    def _write(self, report):
        row = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "when": report.when,
            "seconds": round(getattr(report, "duration", 0.0), 3),
            "at": round(time.time(), 1),
        }
        if report.failed:
            row["text"] = report.longreprtext[-TEXT:]
        elif report.skipped and isinstance(report.longrepr, tuple):
            row["text"] = report.longrepr[-1]
        for path in self.files:
            with open(path, "a") as file:
                file.write(json.dumps(row) + "\n")
