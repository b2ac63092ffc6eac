"""Signals end a command as exceptions do, and only the command itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nemo_diffgemma.repository import ROOT

BEGIN = """
import ctypes, os, signal, time, weakref
from nemo_diffgemma.cli import signals
from nemo_diffgemma.cli.signals import leaving_at_signals
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup's, too
"""


def outcome(code: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-c", BEGIN + code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr or "Exception ignored" in done.stderr, done.stderr
    return done.returncode, done.stdout


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_a_second_signal_does_not_disturb_the_cleaning_up(name, code):
    work = f"""
with leaving_at_signals():
    try:
        os.kill(os.getpid(), signal.{name})
        time.sleep(30)
    finally:
        for other in signals.SIGNALS:
            os.kill(os.getpid(), other)
        time.sleep(0.3)
        try:
            open("/nowhere/at/all")
        except OSError:
            time.sleep(0.3)  # while another error is handled
        print("cleaned up")
"""
    assert outcome(work) == (code, "cleaned up\n")


def test_a_signal_is_not_lost_in_a_callback_that_swallows_exceptions():
    work = """
class Anything: pass
with leaving_at_signals():
    try:
        anything = Anything()
        reference = weakref.ref(anything, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        del anything
        time.sleep(30)
    finally:
        time.sleep(0.5)
        print("cleaned up")
"""
    assert outcome(work) == (143, "cleaned up\n")


def test_what_is_ignored_or_handled_by_the_command_stays_so():
    work = """
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup and shells do in the background
signal.signal(signal.SIGTERM, lambda *_: print("kept"))
signals._STUCK_SECONDS = 0.1
with leaving_at_signals():
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    print("worked")
"""
    assert outcome(work) == (0, "kept\nworked\n")


def test_a_forked_child_ends_as_usual_and_alone():
    work = """
signals._STUCK_SECONDS = 0.1
with leaving_at_signals():
    child = os.fork()
    if child == 0:
        try:
            time.sleep(30)
        finally:
            os.write(1, b"cleaned up what is the parent's")
    time.sleep(0.3)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    time.sleep(0.5)
    print("worked")
"""
    assert outcome(work) == (0, "worked\n")


def test_a_library_that_never_returns_does_not_keep_the_process():
    work = """
signals._STUCK_SECONDS = 0.2
library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
library.pthread_mutex_lock(mutex)
signal.setitimer(signal.ITIMER_REAL, 0)
with leaving_at_signals():
    import threading
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    library.pthread_mutex_lock(mutex)
"""
    assert outcome(work) == (143, "")


def test_handlers_are_as_before_afterwards():
    work = """
before = [signal.getsignal(number) for number in signals.SIGNALS]
for _ in range(3):
    with leaving_at_signals():
        pass
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before
assert signal.set_wakeup_fd(-1) == -1
"""
    assert outcome(work) == (0, "")
