"""Processes of their own, as a user starts them: anew, or forked from a server that has imported everything.

A new process spends six seconds of a core on imports; a forked one begins at once.
"""

import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple
from unittest import mock

TESTS = Path(__file__).resolve().parent
REPO = TESTS.parent
# What scripts import when they start and later: with the first optimiser, logs and figures, .mat files.
IMPORTED = (
    "processes training check_dataset evaluate predict synthetic "
    "torch._dynamo torch.utils.tensorboard matplotlib.figure matplotlib.backends.backend_agg scipy.io"
).split()
LIMIT_S = 300


class Finished(NamedTuple):
    """How a script ended: exit status, standard output and standard error."""

    status: int
    out: str
    err: str


def run_process(script, *arguments, cwd):
    """Run a script of the repository in a new Python, as a user does."""
    command = [sys.executable, REPO / script, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=LIMIT_S)
    return Finished(done.returncode, done.stdout, done.stderr)


def run_forked(script, *arguments, cwd):
    """Run a script of the repository in a forked process."""
    return run_function(_run_script, str(REPO / script), *map(str, arguments), cwd=cwd)


def run_function(function, *arguments, cwd):
    """Call a module's function in a forked process."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "out"), Path(folder, "err")
        process = start(function, *arguments, cwd=cwd, output=output)
        process.join(LIMIT_S)
        process.kill()
        process.join()
        return Finished(process.exitcode, *(path.read_text() for path in output))


def start(function, *arguments, cwd, output, environment=(), limit_bytes=None, new_session=False):
    """Start a forked process that calls function(*arguments) in the folder `cwd`; return it.

    It appends what it prints to the two files `output`, has the variables `environment` besides this
    process's, and can write no file larger than `limit_bytes`.
    """
    surroundings = str(cwd), tuple(map(str, output)), dict(environment), limit_bytes, new_session
    process = server().Process(target=_call, args=(surroundings, function, arguments))
    process.start()
    return process


def server():
    """Return the context of multiprocessing whose processes are forked from the server, which runs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    # The server does not get sys.path, and passes over in silence what it cannot import.
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join([str(TESTS), str(REPO)])):
        forkserver.ensure_running()
    return context


def start_script(script, *arguments, **how):
    """Start a script of the repository in a forked process, in a session of its own; return it."""
    return start(_run_script, str(REPO / script), *map(str, arguments), new_session=True, **how)


def end_together(processes, limit_s):
    """Wait for processes to end; where one fails, end the others, as torchrun does. Return the statuses."""
    running = list(processes)
    while running and wait([process.sentinel for process in running], limit_s):
        running = [process for process in running if process.is_alive()]
        if any(process.exitcode for process in processes):
            for process in running:
                process.terminate()
    for process in processes:
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def _call(surroundings, function, arguments):
    folder, output, environment, limit_bytes, new_session = surroundings
    os.chdir(folder)
    os.environ.update(environment)
    if new_session:
        os.setsid()
    # As in a process that a user starts; the server would hand on its own way and its own handlers.
    multiprocessing.set_start_method("fork", force=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if limit_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))
    for number, path in enumerate(output, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    raise SystemExit(function(*arguments))


def _run_script(*words):
    sys.argv = list(words)
    runpy.run_path(words[0], run_name="__main__")
