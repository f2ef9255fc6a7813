"""What a run writes of itself where it cannot be written."""

import json
import os

import pytest

from mmdiff.errors import UserError
from mmdiff.training.metrics_logger import MetricsLogger, _lines_until

FULL = "/dev/full"
needs_full = pytest.mark.skipif(not os.path.exists(FULL), reason="there is no /dev/full here")


@pytest.fixture
def logger(config, tmp_path):
    with MetricsLogger(tmp_path, config.train, start=0, seconds=0.0) as logger:
        yield logger


@needs_full
def test_metrics_on_a_full_disk_end_the_run_with_a_sentence(logger, tmp_path):
    logger.write(4, {"loss": 1.0})
    logger._file.close()
    logger._file = open(FULL, "w")
    with pytest.raises(UserError, match=rf"{tmp_path}/metrics.jsonl cannot be written \(No space left on device\): fix this"):
        logger.write(8, {"loss": 0.5})
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [{"step": 4, "loss": 1.0}]


@needs_full
def test_curves_on_a_full_disk_end_nothing(config, tmp_path):
    config.train.tensorboard = True
    with MetricsLogger(tmp_path, config.train, start=0, seconds=0.0) as logger:
        logger.write(4, {"loss": 1.0})
        logger._events._records.close()
        from tensorboard.summary.writer.record_writer import RecordWriter

        logger._events._records = RecordWriter(open(FULL, "wb"))
        logger.write(8, {"loss": 0.5})
        logger._events._records = RecordWriter(open(FULL, "wb"))
        logger._events._records.write(b"never flushed")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_the_progress_of_a_closed_terminal_ends_nothing(logger, monkeypatch):
    class Gone:
        def __getattr__(self, name):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr("sys.stderr", Gone())
    logger.say("a line")
    logger._progress(4)


def test_damaged_lines_of_the_metrics_do_not_stop_a_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"[" * 10_000 + b'\n')
    assert _lines_until(path, 5) == []
    path.write_bytes(b'{"step": 2, "loss": 1.0}\n\xff\xfe\n[1]\n3\n{"loss": 2}\n{"step": "x"}\n\n{"step": 4}\n{"step": 9}\n{"step": 5')
    assert _lines_until(path, 5) == ['{"step": 2, "loss": 1.0}\n', '{"step": 4}\n']
