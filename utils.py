"""Errors, help, atomic files, signals and cores, shared by all scripts."""

import argparse
import errno
import os
import shlex
import signal
import sys
import tempfile
import threading
import time
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import cv2

# OpenMP's threads wait for each other by spinning. Where another process needs the core, a spinning thread
# holds it for a whole slice of time, which makes small networks ten times slower on a busy machine
# (docs/performance.md). Here they soon sleep instead.
# OpenMP reads it when torch is imported: scripts that need it import this module first; own settings count.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000"

SOME_FAILED = 3  # exit status where some frames have no joints

# A second Ctrl-C so soon after the first is the same one, handed on by a launcher; a later one ends at once.
SAME_SIGNAL_S = 1.0

# Temporary files that nobody has written to for so long are nobody's.
SWEEP_S = 3600
_swept = {}


class UserError(Exception):
    """What the user can mend: the message says in one line what, where and what to do."""


class Stopped(Exception):
    """The run ended early, on request and in order; `status` is the exit status that says so."""

    def __init__(self, message, status):
        super().__init__(message)
        self.status = status


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keep a description's lines, and name the default of each option that has one."""

    def _get_help_string(self, action):
        unset = action.default in (None, [], argparse.SUPPRESS) or action.default is False
        return action.help if unset or "default" in action.help else super()._get_help_string(action)


def run(main):
    """Run a script's `main`; return its exit status: 1 with one line on stderr after a UserError.

    SIGTERM ends it by way of every `finally`, as Ctrl-C does; a second Ctrl-C ends it as it stands.
    """
    if not hasattr(signal, "SIGCHLD"):
        say("error: this runs on Linux and macOS; on Windows use WSL", sys.stderr)
        return 1
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")  # a path may hold what the terminal cannot show
    # What OpenCV has to say of a damaged picture is said in an error.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    before = _end_at_signals()
    try:
        status = main() or 0
        if sys.stdout:
            sys.stdout.flush()  # that nobody reads it is noticed here, not after the end
        return status
    except BrokenPipeError:
        discard(sys.stdout)
        return 128 + 13  # what the shell says of SIGPIPE
    except UserError as error:
        say(f"error: {error}", sys.stderr)
        return 1
    except Stopped as stop:
        say(stop, sys.stderr)
        return stop.status
    except KeyboardInterrupt:
        say("interrupted", sys.stderr)
        return 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_at_signals():
    """Let SIGTERM, and Ctrl-C unless it is ignored, end the program; return {number: handler before}."""
    began = []

    def interrupt(number, _):
        began.append(time.monotonic())
        if len(began) == 1:
            raise KeyboardInterrupt
        if began[-1] - began[0] > SAME_SIGNAL_S:
            os._exit(128 + number)

    handlers = {signal.SIGTERM: lambda number, _: sys.exit(128 + number)}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        handlers[signal.SIGINT] = interrupt
    return {number: signal.signal(number, handler) for number, handler in handlers.items()}


def say(text, stream=None):
    """Print a line, by default to standard output; where nobody reads it any more, go on in silence.

    Text and newline go out in one write, so that lines of several processes do not run into each other.
    Raises UserError where standard output is a file on a full disk.
    """
    stream = stream or sys.stdout
    try:
        if stream:  # a program without a console has none
            stream.write(f"{text}\n")
            stream.flush()
    except BrokenPipeError:  # `... | head -1`
        discard(stream)
    except OSError as error:
        discard(stream)
        if stream is sys.stdout:
            raise UserError(f"cannot write to standard output: {error.strerror}") from error


def discard(stream):
    """Send what is still written to a stream whose reader has left nowhere, also at the flush at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def one_line(error):
    """Return what an error says in one line of at most 160 characters."""
    return " ".join(str(error).split())[:160]


def start_worker(_=None):
    """Prepare a process that works for this one: one core, no signals, and no life after this one's.

    Ctrl-C and SIGTERM may come to the whole process group; the main process ends its workers, by SIGTERM too.
    """
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setpgid(0, 0)
    threading.Thread(target=_end_after, args=(os.getppid(),), daemon=True).start()


def _end_after(parent):
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)  # the results would wait for ever to be read


def usable_cores():
    """Return how many cores this process may use, which on a cluster are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def take_lock(lock, file, refusal):
    """Take fcntl's `lock` (flock or lockf) of an open file, where its file system has locks.

    The system releases it however the program ends. Raises UserError(refusal) where another has it.
    """
    import fcntl  # not where `run` ends every script

    try:
        getattr(fcntl, lock)(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(refusal) from None
    except OSError:
        pass


def require_file(path, advice):
    """Raise UserError, which ends in `advice`, where there is no file at `path`."""
    if not path.is_file():
        raise UserError(f"{path} {'is no file' if path.exists() else 'not found'}: {advice}")


def load_torch(path):
    """Return what a file of `torch.save` holds, on the CPU; nothing in it is executed.

    Raises pickle.UnpicklingError where it holds more than weights, errors of any kind where it is damaged.
    """
    import torch  # after this module has set its threads

    if zipfile.is_zipfile(path):  # torch itself does not compare the checksums; its old format has none
        damaged = zipfile.ZipFile(path).testzip()
        if damaged:
            raise ValueError(f"wrong checksum of {damaged}")
    return torch.load(path, map_location="cpu", weights_only=True)


def check_command(name, root):
    """Return the command that checks the data set in folder `root`, as error messages name it."""
    where = [] if Path(root) == Path("Data", name) else ["--data_dir", str(root)]
    return shlex.join(["python", "check_dataset.py", "--dataset", name, *where])


@contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`; on success it replaces `path`, on failure it is removed.

    Raises UserError where the folder cannot be written or the disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path.parent)
        naming = dict(prefix=f".{path.stem}.", suffix=f".part{path.suffix}")
        handle, name = tempfile.mkstemp(dir=path.parent, **naming)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            _flush_to_disk(temporary)
            umask = os.umask(0)
            os.umask(umask)
            with suppress(OSError):  # refused by some network and FUSE mounts, where a file may have no mode
                temporary.chmod(0o666 & ~umask)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def write_lines(path, lines):
    """Write a text file, a line each, atomically; names that are no text keep their bytes."""
    with atomic_path(path) as temporary:
        with temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            file.writelines(f"{line}\n" for line in lines)


def _flush_to_disk(path):
    """Wait until a file is on the disk, on file systems that can tell. Raises OSError where it is full."""
    with path.open("rb+") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise


def _remove_leftovers(folder):
    """Remove what killed writers left in a folder, looked for once in a while; one at work is younger."""
    now = time.time()
    if now - _swept.get(folder, 0) < SWEEP_S:
        return
    _swept[folder] = now
    for leftover in folder.glob(".*.????????.part*"):
        with suppress(OSError):  # gone meanwhile, or another user's
            if now - leftover.stat().st_mtime > SWEEP_S:
                leftover.unlink()
