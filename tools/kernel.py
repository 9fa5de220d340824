"""One notebook's kernel: runs it so that it can be stopped, and watches its memory."""

import contextlib
import signal
import threading

import psutil


def watch_memory(client, peak, done):
    """Until `done` is set, stores in peak[0] the most bytes that the kernel and its children held at once."""
    while not done.wait(0.2):
        with contextlib.suppress(psutil.Error):  # a child has just ended
            peak[0] = max(peak[0], sum(process.memory_info().rss for process in kernel_processes(client)))


class Stopped(BaseException):
    """Ctrl-C or SIGTERM was received; no Exception, so it is not reported as a notebook's error."""


def stop_on_signals():
    """From here on Ctrl-C and SIGTERM raise Stopped, once only: the clean-up then takes some seconds."""

    def stop(*_):
        ignore_signals()
        raise Stopped

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def ignore_signals():
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def execute(client, folder):
    """Runs the notebook of an nbclient; on Ctrl-C or SIGTERM its kernel ends and Stopped goes on.

    nbclient replaces the handlers of both signals while it runs in the main thread, so it is given another one.
    """
    problem = []

    def run():
        try:
            client.execute(cwd=str(folder))
        except Exception as error:  # an error in one notebook does not stop the others
            problem.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.2)
    except Stopped:
        for _ in range(100):  # 20 s at most; a kernel that is just starting has no process yet
            kill_kernel(client)
            thread.join(0.2)
            if not thread.is_alive():
                break
        raise
    return problem[0] if problem else None


def kernel_processes(client):
    """The kernel and the processes that it started, or none before its start and after its end."""
    pid = getattr(getattr(client.km, "provisioner", None), "pid", None)
    if pid is None:  # psutil takes None for this process
        return []
    try:
        return [kernel := psutil.Process(pid), *kernel.children(recursive=True)]
    except psutil.Error:
        return []


def kill_kernel(client):
    for process in kernel_processes(client):
        with contextlib.suppress(psutil.Error):
            process.kill()
