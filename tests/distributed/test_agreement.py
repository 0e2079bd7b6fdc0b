import os
import signal

import pytest
import torch.distributed as dist
from ranks import run_ranks

from flame.parallel.agreement import Agreement, StopRequest

pytestmark = pytest.mark.distributed


def decide(rank):
    request = StopRequest()
    agreement = Agreement(dist.new_group(backend="gloo"), 2)
    decisions = []
    for step in range(4):
        if step == 1 and rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        agreement.begin([request.received, rank == 0 and step == 2])
        decisions.append(agreement.result())
    return decisions, request.signal


def test_a_signal_to_one_rank_stops_all_at_the_same_step():
    first, second = run_ranks(decide, 2)
    assert first[0] == second[0] == [[False, False], [True, False], [True, True], [True, False]]
    assert first[1] is None and second[1] == signal.SIGUSR1


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    request = StopRequest()
    assert signal.getsignal(signal.SIGTERM) == request._remember
    request.restore()
    assert signal.getsignal(signal.SIGTERM) == before
