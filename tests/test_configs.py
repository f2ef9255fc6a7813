"""The shipped configs: each can be built, has as many parameters as ever, and says nothing that others say as well."""

import ast
import collections
import pathlib

import jax
import pytest

from mmdiff import config as configs

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
PARAMETERS = {
    "cdcd/aist_music": 434_800_384, "cdcd/coco_text": 35_798_407, "cdcd/cub200_text": 35_798_407, "cdcd/dance_music": 2_498_272,
    "cdcd/digits_class": 1_080_132, "cdcd/emoji_tokenizer": 212_468, "cdcd/imagenet256_class": 517_792_206, "cdcd/markov_class": 254_352,
    "cdcd/music_tokenizer": 552_440, "cdcd/images_tokenizer": 6_893_956, "cdcd/scenes_text": 1_666_720,
    "cdcd/scenes_tokenizer": 131_604, "cdcd/tiktok_music": 433_826_816, "diffdis/digits": 1_976_006, "diffdis/scenes": 3_547_986,
    "diffdis/scenes_towers": 424_322, "diffdis/sd_scale": 1_254_083_730, "digits_fewstep": 777_614, "digits_joint": 743_630,
    "fashion/fewstep": 1_396_698, "fashion/joint": 1_347_290, "fashion/vq_class": 2_774_656, "fashion/vq_tokenizer": 209_900,
    "imagenet256/dit_xl2": 674_834_720,
    "imagenet256/joint_xl2": 678_628_088, "imagenet256/sit_xl2": 674_834_720,
    "imagenet256/jit_b16": 131_123_712, "imagenet256/lightning_xl1": 674_961_824, "imagenet256/meanflow_xl2": 711_113_760,
    "imagenet256/redi_xl2": 678_894_400, "imagenet256/repa_xl2": 682_966_048,
    "joint/coco_tokens": 790_286_288, "joint/coco_vectors": 680_403_472,
    "joint/unidiffuser": 952_509_520,
    "mtdiffusion/digits_label": 744_686, "mtdiffusion/digits_masked": 743_336,
    "mtdiffusion/digits_representation": 760_356, "mtdiffusion/digits_transition": 784_256, "mtdiffusion/imagenet64_label": 462_041_112,
    "mtdiffusion/imagenet64_masked": 459_086_944, "mtdiffusion/imagenet_representation": 680_307_472,
    "mtdiffusion/pairs_transition": 130_841_952,
}  # fmt: skip
SLOW = ("mtdiffusion/digits_representation", "mtdiffusion/imagenet_representation")  # a classifier, a large orthogonal matrix
FILES = {str(path.relative_to(FOLDER).with_suffix("")): path for path in sorted(FOLDER.rglob("*.py"))}


def test_every_config_is_counted():
    need_data = ("own/", "joint/emoji", "cdcd/emoji_text", "text/")
    assert {name for name in FILES if not name.startswith(need_data)} == set(PARAMETERS)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in PARAMETERS])
def test_a_config_builds_and_keeps_its_number_of_parameters(name):
    experiment = configs.build(*configs.load(str(FILES[name])))
    found = jax.eval_shape(experiment.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(found)) == PARAMETERS[name]
    assert {*experiment.process.parts} <= {*experiment.shape} <= {*experiment.modalities}
    assert all(experiment.modalities[part].shape == shape for part, shape in experiment.shape.items())


def test_no_statement_stands_in_four_configs():
    where = collections.defaultdict(set)
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.stmt) and not isinstance(node, (ast.Import, ast.ImportFrom)):
                where[ast.dump(node)].add(name)
    found = {text: names for text, names in where.items() if len(names) > 3}
    assert not found
