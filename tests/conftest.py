import json
import os
import signal
import subprocess

import pytest
import torch


@pytest.fixture(autouse=True)
def float64_and_a_fixed_seed():
    """Mathematics is tested in float64; tests that are about float32 say so."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def float32():
    """For tests of training, which runs in torch's own default."""
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def in_a_session():
    """Start a command in a session of its own, which is killed when the test is over, if it lives.

    The child heeds Ctrl-C. What runs in the background, as tests may, starts with SIGINT ignored.
    """
    import psutil  # here, as the tests of the core need torch alone

    started = []

    def start(command, **options):
        heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
        head = subprocess.Popen(
            command, start_new_session=True, preexec_fn=heed, text=True, **options
        )
        started.append(head)
        return head

    yield start
    for head in started:
        if head.poll() is None:
            family = psutil.Process(head.pid).children(recursive=True)
            for process in (head, *family):
                process.kill()
        head.communicate()


@pytest.fixture
def signal_session():
    """Send a signal to a session, as a terminal does, and return what it has written at its end.

    Nothing that it had started may be left.
    """

    import psutil

    def send(head, how, family):
        os.killpg(head.pid, how)
        texts = head.communicate(timeout=60)
        _, left = psutil.wait_procs(family, timeout=20)
        assert not [p for p in left if p.status() != psutil.STATUS_ZOMBIE]
        return texts

    return send


@pytest.fixture
def without_times():
    """A record as text, without what differs between two runs of the same numbers."""

    def text(record):
        history = [
            {k: v for k, v in entry.items() if k != "seconds"} for entry in record["history"]
        ]
        kept = {k: v for k, v in record.items() if k != "wall_time_s"}
        return json.dumps(kept | {"history": history})

    return text
