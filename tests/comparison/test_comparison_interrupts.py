import signal

import pytest

from glai_lightning.comparison.interrupts import interrupts_deferred


@pytest.fixture
def _interrupts_raise():
    # What is started in the background of a shell ignores interrupts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Finalised:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)


def finalise_with_interrupts_deferred(reached):
    with interrupts_deferred():
        finalised = Finalised()
        del finalised
        reached.append("the end of the context")


@pytest.mark.usefixtures("_interrupts_raise")
def test_an_interrupt_in_a_finaliser_is_raised_once_the_context_ends():
    reached = []
    with pytest.raises(KeyboardInterrupt):
        finalise_with_interrupts_deferred(reached)
    assert reached == ["the end of the context"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
