"""A program with a job that does nothing and says nothing: `python -m tests.cardiocaps.experiments.waiting_job` prints
the number of the job's process."""

import multiprocessing
import os
import time

from cardiocaps.runtime.processes import die_with_parent


def job() -> None:
    die_with_parent()
    print(os.getpid(), flush=True)
    time.sleep(600)


if __name__ == "__main__":
    process = multiprocessing.get_context("forkserver").Process(target=job)
    process.start()
    process.join()
