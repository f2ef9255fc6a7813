import pytest

from mmdiff.projects.digits.digits import digits_source


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    digits_source("train", folder)
    return folder


@pytest.fixture(scope="session")
def train(data_dir):
    return digits_source("train", data_dir)


@pytest.fixture(scope="session")
def test(data_dir):
    return digits_source("test", data_dir)
