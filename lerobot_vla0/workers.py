"""Worker processes that end with the process that started them."""

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """A pool of spawned processes: one with a GL context or threads must not be forked.

    Without `end_with_parent`, the workers of a killed process would wait for work for ever: each holds the
    other end of the queue that it reads from.
    """
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, initializer=end_with_parent)


def end_with_parent() -> None:
    """Ends this process when the one that started it is gone, also if that was killed."""

    def watch() -> None:
        wait([multiprocessing.parent_process().sentinel])
        os._exit(1)  # from a thread, sys.exit would end the thread only

    threading.Thread(target=watch, daemon=True).start()
