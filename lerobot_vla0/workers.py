"""Worker processes that end with the process that started them."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing.connection import wait
from typing import Any


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """A pool of spawned processes: one with a GL context or threads must not be forked.

    Without `end_with_parent`, the workers of a killed process would wait for work for ever: each holds the
    other end of the queue that it reads from.
    """
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, initializer=end_with_parent)


def map_in_order(
    function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], workers: int
) -> Iterator[Any]:
    """`function(*job)` of each job, in the order of the jobs, in so many worker processes; 1 calls it in this
    process. Only a few results are made ahead of the reader: a recorded episode takes 50 MB and more."""
    if workers == 1:
        yield from (function(*job) for job in jobs)
        return
    with worker_pool(min(workers, len(jobs))) as pool:
        waiting, pending = iter(jobs), deque()
        pending.extend(pool.submit(function, *job) for job in islice(waiting, 2 * workers))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(function, *job) for job in islice(waiting, 1))
            yield result


def end_with_parent() -> None:
    """Ends this process when the one that started it is gone, also if that was killed."""

    def watch() -> None:
        wait([multiprocessing.parent_process().sentinel])
        os._exit(1)  # from a thread, sys.exit would end the thread only

    threading.Thread(target=watch, daemon=True).start()
