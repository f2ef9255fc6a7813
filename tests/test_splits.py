"""Every config that reports on digits, scenes, chains or dances trains, chooses and reports on examples of which none is shared."""

import itertools
import pathlib

import pytest

from mmdiff import config as configs
from mmdiff.data.sources import Subset, load_all
from mmdiff.data.tower_cache import WithTextEmbedding
from mmdiff.projects.digits import digit_features

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
EMBEDDED = (
    "digits_fewstep", "digits_joint", "cdcd/digits_class", "cdcd/markov_class", "cdcd/scenes_text", "cdcd/scenes_tokenizer",
    "cdcd/dance_music", "cdcd/music_tokenizer", "diffdis/digits", "diffdis/scenes", "diffdis/scenes_towers", "mtdiffusion/digits_label",
    "mtdiffusion/digits_masked", "mtdiffusion/digits_representation", "mtdiffusion/digits_transition",
)  # fmt: skip
SPLITS = ("train", "validation", "test")


def test_no_config_of_an_embedded_set_is_left_out():
    imports = (
        "digits.digits", "digits import digits", "scenes.scenes", "scenes import scenes", "scenes.paired_scenes", "markov.markov_chains",
        "dance.dance")  # fmt: skip
    found = set()
    for path in CONFIGS.rglob("*.py"):
        text = path.read_text()
        if any(f"mmdiff.projects.{name}" in text for name in imports):
            found.add(str(path.relative_to(CONFIGS).with_suffix("")))
    assert found - {"cdcd/aist_music"} == set(EMBEDDED)  # which have data of their own


@pytest.mark.parametrize("name", EMBEDDED)
def test_train_validation_and_test_share_no_example(name, monkeypatch):
    config, module = configs.load(str(CONFIGS / f"{name}.py"), [])
    opened = []

    def cached(_, split, *args):
        opened.append(split)
        return ()

    if name in ("cdcd/scenes_text", "cdcd/dance_music"):  # which read caches: of which split is all that there is to see
        monkeypatch.setattr(module, "token_source" if "scenes" in name else "open_tokens", cached)
    monkeypatch.setattr(digit_features, "represented", lambda source: source)
    monkeypatch.setattr(digit_features, "digit_features", lambda: None)  # which are trained
    monkeypatch.setattr(WithTextEmbedding, "__init__", lambda self, source, towers, size: vars(self).update(source=source))
    experiment = module.build(config)
    sources = [experiment.train_data(), experiment.validation_data(), experiment.test_data()]
    if opened:
        assert opened == list(SPLITS)
        return
    sources = [getattr(source, "source", source) for source in sources]
    few = 6 if name == "cdcd/music_tokenizer" else 3000
    examples = [examples_of(source, few) for source in sources]
    for one, other in itertools.combinations(examples, 2):
        assert not one & other


def examples_of(source, count):
    arrays = load_all(Subset(source, count))
    name = next(name for name in ("image", "audio", "tokens") if name in arrays)
    return {example.tobytes() for example in arrays[name]}
