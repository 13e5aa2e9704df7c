"""A group of processes that talk by gloo, started once for all tests."""

import datetime
import multiprocessing
import pickle
import tempfile
import traceback
import warnings

import torch
import torch.distributed as dist

SIZES = (1, 2, 4)  # groups of the first so many


class Ranks:
    """Workers that run a function at the same time, each as one rank of a group."""

    def __init__(self):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch"])
        self._folder = tempfile.TemporaryDirectory()
        store = f"file://{self._folder.name}/store"
        self._workers, self._pipes = [], []
        for rank in range(max(SIZES)):
            here, there = context.Pipe()
            worker = context.Process(target=_work, args=(rank, store, there), daemon=True)
            worker.start()
            self._workers.append(worker)
            self._pipes.append(here)

    def __call__(self, size, function, *args):
        """Return what function(group, *args) returns on each rank; raise where it raises.

        Arguments and results are pickled, so a function is one of a module.
        """
        for pipe in self._pipes[:size]:
            pipe.send_bytes(pickle.dumps((size, function, args)))
        answers = [pickle.loads(pipe.recv_bytes()) for pipe in self._pipes[:size]]
        failures = [f"rank {i}:\n{text}" for i, (_, text) in enumerate(answers) if text]
        if failures:
            raise RuntimeError("\n".join(failures))
        return [result for result, _ in answers]

    def close(self):
        for pipe in self._pipes:
            pipe.send_bytes(b"")
        for worker in self._workers:
            worker.join()
        self._folder.cleanup()


def _work(rank, store, pipe):
    torch.set_num_threads(1)
    minute = datetime.timedelta(minutes=1)
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=max(SIZES), timeout=minute
    )
    groups = {size: dist.new_group(range(size)) for size in SIZES}
    while task := pipe.recv_bytes():
        answer = None, None
        try:
            size, function, args = pickle.loads(task)
            torch.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                answer = function(groups[size], *args), None
        except Exception:
            answer = None, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()
