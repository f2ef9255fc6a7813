"""Signals that ask a run to stop are noted once; the second one is obeyed; what is ignored stays ignored."""

import signal

import pytest

from mmdiff.training import signals


@pytest.fixture
def ended(monkeypatch):
    """Instead of ending this process, a signal that is obeyed is noted here."""
    got = []
    before = {number: signal.signal(number, lambda number, frame: got.append(number)) for number in signals.SAVING}
    yield got
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", signals.SAVING)
def test_the_first_saves_and_the_second_stops_at_once(number, ended):
    with signals.Signals() as stop:
        signal.raise_signal(number)
        assert stop.signal == number and stop.status == 128 + number and stop.name == signal.Signals(number).name and not ended
        signal.raise_signal(signal.SIGINT if number != signal.SIGINT else signal.SIGTERM)
        assert len(ended) == 1 and stop.signal == number
    assert len(ended) == 1


def test_one_signal_that_is_delivered_twice_counts_once(ended, monkeypatch):
    monkeypatch.setattr(signals, "REPEATED", 600.0)
    with signals.Signals() as stop:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)  # from the terminal and from the shell
        assert stop.signal == signal.SIGHUP and not ended
        monkeypatch.setattr(signals, "REPEATED", -1.0)
        signal.raise_signal(signal.SIGHUP)
        assert ended == [signal.SIGHUP]
    with signals.Signals():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # a person is impatient
    assert ended == [signal.SIGHUP, signal.SIGINT]


def test_what_is_ignored_stays_ignored(ended):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with signals.Signals() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop.signal is None
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
