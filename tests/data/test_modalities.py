import re

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmdiff.data.modalities import Features, Images, Labels, Latents
from mmdiff.data.sources import RandomSource
from mmdiff.data.token_modalities import ClassMaps, Sequences, TokenImages
from mmdiff.errors import UserError
from mmdiff.projects.dance import aist
from mmdiff.projects.dance.dance import DanceMusic
from mmdiff.projects.dance.skeleton import PARENTS
from mmdiff.projects.dance.sounds import Motion, TokenAudio, Waveforms

IMAGES = Images(8, 8, 1, levels=17)
COLOUR = Images(4, 6, 3)
LABELS = Labels(10)
LATENTS = Latents(8, 6, 4)
PIXELS = TokenImages(8, 8, 17)
ROWS = Sequences(3, 5)
MOTION = Motion(90, 24, PARENTS)
MUSIC = TokenAudio(10, 5)
MAPS = ClassMaps(4, 6, ((0, 0, 0), (255, 0, 0), (0, 128, 255)))


def digit(seed=0):
    return np.random.default_rng(seed).integers(0, 17, (8, 8, 1)) / np.float32(8) - 1


def refusal(call, *args):
    """The message of the UserError that a call raises: one line."""
    with pytest.raises(UserError) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300
    return message


@pytest.mark.parametrize("name", ["d.png", "d.bmp", "d.npy", "d.npz", "batch.npz", "uint8.npy", "rgb.png", "deep.png", "flat.npy"])
def test_an_image_comes_back_exactly(name, tmp_path):
    image, path = digit(), tmp_path / name
    shown = IMAGES.show(image[None])[0]
    if name in ("d.png", "d.bmp"):
        Image.fromarray(shown[..., 0]).save(path)
    elif name == "rgb.png":
        Image.fromarray(np.repeat(shown, 3, -1)).save(path)
    elif name == "deep.png":
        Image.fromarray(shown[..., 0].astype(np.uint16) * 257).save(path)
    elif name == "uint8.npy":
        np.save(path, shown)
    elif name == "batch.npz":
        np.savez(path, image=image[None], label=np.array([3]))
    elif name == "d.npz":
        np.savez(path, image)
    else:
        np.save(path, image[..., 0] if name == "flat.npy" else image)
    parsed = IMAGES.parse(str(path))
    assert parsed.dtype == np.float32
    np.testing.assert_allclose(parsed, image[None], atol=1e-6)
    IMAGES.check(parsed)


def test_jpeg_and_colour(tmp_path):
    ramp = np.linspace(0, 255, 6).astype(np.uint8) * np.ones((4, 1), np.uint8)
    Image.fromarray(ramp).save(tmp_path / "ramp.jpg", quality=100)
    parsed = COLOUR.parse(str(tmp_path / "ramp.jpg"))
    assert parsed.shape == (1, 4, 6, 3)
    np.testing.assert_allclose(parsed[0, 0, :, 0], np.linspace(-1, 1, 6), atol=0.05)


def test_several_examples(tmp_path):
    images = np.stack([digit(seed) for seed in range(3)])
    np.savez(tmp_path / "samples.npz", image=images * 1.1, label=np.array([3, 1, 4]))  # what a sampler leaves: a little too far
    np.testing.assert_allclose(IMAGES.parse(str(tmp_path / "samples.npz"))[images == 1], 1)
    np.testing.assert_array_equal(LABELS.parse(str(tmp_path / "samples.npz")), [3, 1, 4])
    for i, image in enumerate(IMAGES.show(images)):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{i}.png")
    np.testing.assert_allclose(IMAGES.parse(str(tmp_path)), images, atol=1e-6)


def test_files_that_are_no_image(tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "pickle.npy").write_bytes(b"\x80\x04]\x94.")
    (tmp_path / "zip.npz").write_bytes(b"PK\x03\x04 but no more")
    for name in ("text.png", "cut.png"):
        assert re.search(f"{name} cannot be read as an image", refusal(IMAGES.parse, str(tmp_path / name)))
    for name in ("empty.npz", "pickle.npy", "zip.npz"):
        assert re.search(f"{name} is not a NumPy file", refusal(IMAGES.parse, str(tmp_path / name)))
    for name in ("gone.png", "gone.npz"):
        assert "no such file" in refusal(IMAGES.parse, str(tmp_path / name))
    (tmp_path / "folder").mkdir()
    assert "holds no images" in refusal(IMAGES.parse, str(tmp_path / "folder"))


def test_images_of_the_wrong_size_or_range(tmp_path):
    Image.fromarray(np.zeros((28, 20), np.uint8)).save(tmp_path / "big.png")
    message = refusal(IMAGES.parse, str(tmp_path / "big.png"))
    assert "big.png" in message and "28 x 20" in message and "8 x 8" in message
    np.save(tmp_path / "a.npy", np.zeros((2, 7, 8, 1)))
    assert "[2, 7, 8, 1]" in refusal(IMAGES.parse, str(tmp_path / "a.npy"))
    np.save(tmp_path / "a.npy", np.full((8, 8), 16.0))
    assert "from 16 to 16" in refusal(IMAGES.parse, str(tmp_path / "a.npy"))
    np.save(tmp_path / "a.npy", np.full((8, 8), np.nan))
    assert "not finite" in refusal(IMAGES.parse, str(tmp_path / "a.npy"))
    np.save(tmp_path / "a.npy", np.full((8, 8), "x"))
    assert "<U1 values" in refusal(IMAGES.parse, str(tmp_path / "a.npy"))
    np.savez(tmp_path / "two.npz", a=digit(), b=digit())
    assert "no entry 'image': it holds a, b" in refusal(IMAGES.parse, str(tmp_path / "two.npz"))
    np.save(tmp_path / "none.npy", np.zeros((0, 8, 8, 1)))
    assert "none.npy" in refusal(IMAGES.parse, str(tmp_path / "none.npy"))


@pytest.mark.parametrize("array", [np.zeros((8, 8, 1)), np.zeros((1, 8, 8, 3)), np.full((1, 8, 8, 1), 1.01), np.full((1, 8, 8, 1), np.nan)])
def test_image_check(array):
    assert refusal(IMAGES.check, array).startswith("image: ")


def test_quantize_and_show():
    image = digit()[None]
    np.testing.assert_array_equal(IMAGES.quantize(image + np.float32(0.05)), IMAGES.quantize(image))
    np.testing.assert_array_equal(IMAGES.quantize(image), image)
    np.testing.assert_array_equal(COLOUR.quantize([-3.0, 0.123, 3.0]), np.float32([-1, 0.123, 1]))
    np.testing.assert_array_equal(IMAGES.show([-1.0, 0.0, 1.0, np.nan]), [0, 128, 255, 0])
    assert IMAGES.show(image).dtype == np.uint8 and IMAGES.show(image).shape == (1, 8, 8, 1)


def test_labels():
    np.testing.assert_array_equal(LABELS.parse("7"), [7])
    np.testing.assert_array_equal(LABELS.parse("3, 1,4"), [3, 1, 4])
    assert LABELS.parse("7").dtype == np.int32
    named = Labels(3, ("cat", "dog", "3"))
    np.testing.assert_array_equal(named.parse("dog,0,3"), [1, 0, 2])  # a name goes before a number
    assert named.show(np.array([0, 1, 2, 3])) == ["cat", "dog", "3", "-"]
    assert "one of cat, dog, 3" in refusal(named.parse, "bird")
    numbered = Labels(3, ("1", "10", "2"))  # as folders of these names are ordered
    np.testing.assert_array_equal(numbered.parse("2,1,10"), [2, 0, 1])
    assert "0 is the name of no class, and the classes have numbers for names: write one of 1, 10, 2" in refusal(numbered.parse, "0")
    cranes = Labels(3, ("crane", "dog", "crane"))
    assert "'crane' is the name of several classes: write the number of one, [0, 2]" in refusal(cranes.parse, "crane")
    np.testing.assert_array_equal(cranes.parse("dog,2"), [1, 2])


@pytest.mark.parametrize("text", ["10", "-1", "seven", "", "1,10", "1.5"])
def test_a_label_that_does_not_exist(text):
    assert "labels are 0..9" in refusal(LABELS.parse, text)


def test_label_check():
    np.testing.assert_array_equal(LABELS.check(np.array([0, 9], np.uint8)), [0, 9])
    for wrong in ([10], [-1]):
        assert "labels are 0..9" in refusal(LABELS.check, np.array(wrong))
    for wrong in (np.array([1.0]), np.array(3), np.array([[3]])):
        assert "integers of shape [n]" in refusal(LABELS.check, wrong)


def test_latents(tmp_path):
    latents = LATENTS.random(np.random.default_rng(0), 5)
    np.savez(tmp_path / "samples.npz", image=latents, label=np.arange(5))
    np.testing.assert_array_equal(LATENTS.parse(str(tmp_path / "samples.npz")), latents)
    np.save(tmp_path / "one.npy", latents[0].astype(np.float16))
    parsed = LATENTS.parse(str(tmp_path / "one.npy"))
    assert parsed.shape == (1, 8, 6, 4) and parsed.dtype == np.float32
    assert LATENTS.show(latents).shape == (5, 8, 6, 3) and Latents(8, 6, 2).show(latents[..., :2]).shape == (5, 8, 6, 1)
    edges = LATENTS.show(np.float32([[[[-9, 0, 3, 0]]], [[[np.nan, 1, -3, 0]]]]))
    np.testing.assert_array_equal(edges[:, 0, 0], [[0, 128, 255], [128, 170, 0]])
    assert "encode the images first" in refusal(LATENTS.parse, "cat.png")
    assert "no such file" in refusal(LATENTS.parse, str(tmp_path / "none.npy"))
    assert "need the shape [n, 8, 6, 4], got [1, 6, 8, 4]" in refusal(LATENTS.check, np.zeros((1, 6, 8, 4), np.float32))
    assert "not finite" in refusal(LATENTS.check, np.full((1, 8, 6, 4), np.inf, np.float32))
    assert "uint8" in refusal(LATENTS.check, np.zeros((1, 8, 6, 4), np.uint8))


def test_token_images(tmp_path):
    image = digit()
    tokens = np.rint((image + 1) * 8).astype(np.int32).reshape(1, 64)
    np.testing.assert_array_equal(PIXELS.images(tokens)[0], image)
    np.testing.assert_array_equal(PIXELS.show(tokens), IMAGES.show(image[None]))
    np.testing.assert_array_equal(PIXELS.show(np.full((1, 64), 17)), np.full((1, 8, 8, 1), 255))  # a mask
    Image.fromarray(PIXELS.show(tokens)[0, ..., 0]).save(tmp_path / "d.png")
    np.save(tmp_path / "tokens.npy", tokens[0])
    np.save(tmp_path / "image.npy", image)
    np.savez(tmp_path / "samples.npz", tokens=np.repeat(tokens, 3, 0), label=np.arange(3))
    for name, count in {"d.png": 1, "tokens.npy": 1, "image.npy": 1, "samples.npz": 3}.items():
        parsed = PIXELS.parse(str(tmp_path / name))
        np.testing.assert_array_equal(parsed, np.repeat(tokens, count, 0))
        assert parsed.dtype == np.int32


def test_tokens_with_a_decoder(tmp_path):
    codes = np.float32([[-1, 0, 1], [1, 1, -3]])
    drawn = TokenImages(2, 3, 2, decode=lambda tokens: codes[tokens].reshape(-1, 2, 3, 3))
    tokens = np.array([[0, 1, 1, 0, 0, 2]])
    np.testing.assert_array_equal(drawn.images(tokens)[0, 0], [[-1, 0, 1], [1, 1, -1], [1, 1, -1]])
    np.testing.assert_array_equal(drawn.show(tokens)[0, 1, 2], [255, 255, 0])
    np.save(tmp_path / "a.npy", tokens % 2)
    np.testing.assert_array_equal(drawn.parse(str(tmp_path / "a.npy")), tokens % 2)
    assert "give tokens in a .npy" in refusal(drawn.parse, "cat.png")
    assert "ids are 0..1" in refusal(drawn.check, tokens)


def test_class_maps(tmp_path):
    maps = MAPS.random(np.random.default_rng(0), 3)
    shown = MAPS.show(maps)
    assert shown.shape == (3, 4, 6, 3) and shown.dtype == np.uint8
    for number, colour in enumerate(MAPS.palette):
        np.testing.assert_array_equal((shown == colour).all(-1), maps == number)
    np.testing.assert_array_equal(MAPS.show(np.full((1, 4, 6), 3)), np.full((1, 4, 6, 3), 128))  # a mask
    noise = np.random.default_rng(1).integers(-60, 60, shown.shape)  # less than half of what is between two colours
    for i, picture in enumerate(np.clip(shown.astype(int) + noise, 0, 255).astype(np.uint8)):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    np.save(tmp_path / "one.npy", maps[0])
    np.savez(tmp_path / "samples.npz", image=np.zeros(3), segmentation=maps)
    for name, count in {".": 3, "0.png": 1, "one.npy": 1, "samples.npz": 3}.items():
        parsed = MAPS.parse(str(tmp_path / name))
        np.testing.assert_array_equal(parsed, maps[:count])
        assert parsed.dtype == np.int32
    assert "[n, 4, 6]" in refusal(MAPS.check, maps[0]) and "ids are 0..2" in refusal(MAPS.check, maps + 1)
    np.save(tmp_path / "one.npy", np.zeros((4, 6, 3)))
    assert refusal(MAPS.parse, str(tmp_path / "one.npy")).startswith("segmentation: needs integers")


def test_sequences(tmp_path):
    np.testing.assert_array_equal(ROWS.parse("3, 1 4"), [[3, 1, 4]])
    np.save(tmp_path / "a.npy", [[0, 1, 2], [3, 4, 4]])
    np.testing.assert_array_equal(ROWS.parse(str(tmp_path / "a.npy")), [[0, 1, 2], [3, 4, 4]])
    assert ROWS.show(np.array([[3, 1, 5]])) == ["3 1 -"]
    assert "not a row of numbers" in refusal(ROWS.parse, "3 one 4") and "not a row of numbers" in refusal(ROWS.parse, f"1 2 {10**30}")
    assert "[n, 3]" in refusal(ROWS.parse, "1 2") and "ids are 0..4" in refusal(ROWS.parse, "1 2 5")
    for modality in (ROWS, PIXELS):
        for wrong in (np.full((1, *modality.shape), -1), np.zeros((1, *modality.shape)), np.zeros(modality.shape, int)):
            assert refusal(modality.check, wrong).startswith("tokens: ")


def test_motion(tmp_path):
    source = DanceMusic("test", count=3)
    aist.write_motion(tmp_path / "dance.pkl", *source.poses(2))
    parsed = MOTION.parse(str(tmp_path / "dance.pkl"))
    dances = source.take(np.arange(3))["motion"][:, :90]
    np.testing.assert_allclose(parsed[0], dances[2] - dances[2, :, 0].mean(0), atol=1e-5)
    np.save(tmp_path / "one.npy", dances[1])
    np.savez(tmp_path / "samples.npz", motion=dances, genre=np.arange(3))
    np.testing.assert_array_equal(MOTION.parse(str(tmp_path / "one.npy")), dances[1:2])
    np.testing.assert_array_equal(MOTION.parse(str(tmp_path / "samples.npz")), dances)
    np.save(tmp_path / "segment.npy", dances[1].reshape(90, 72))  # as segments are released
    np.testing.assert_array_equal(MOTION.parse(str(tmp_path / "segment.npy")), dances[1:2])
    assert "120 frames of 24 joints, but the model needs 121" in refusal(Motion(121, 24).parse, str(tmp_path / "dance.pkl"))
    assert "of 17" in refusal(Motion(90, 17).parse, str(tmp_path / "dance.pkl"))
    assert "a motion file of AIST++ (.pkl)" in refusal(MOTION.parse, "dance.mp4")
    assert "no such file" in refusal(MOTION.parse, str(tmp_path / "gone.pkl"))
    for wrong in (dances[0], dances[:, :89], np.full_like(dances, np.nan), np.zeros(dances.shape, int)):
        assert refusal(MOTION.check, wrong).startswith("motion: ")
    assert MOTION.check(MOTION.random(np.random.default_rng(0), 4)).shape == (4, *MOTION.shape)


def test_a_dancer_is_drawn_from_the_front():
    still = np.zeros((1, 90, 24, 3))
    still[..., 1:, 1] = 0.5  # one bone, from the centre upwards
    still[..., 1:, 0] = 0.25
    shown = Motion(90, 24, (-1, *[0] * 23)).show(still)
    assert shown.shape == (1, 64, 384, 3) and shown.dtype == np.uint8
    figures = shown.reshape(64, 6, 64, 3).transpose(1, 0, 2, 3).min(-1) < 200
    rows, columns = np.nonzero(figures[0])
    assert (figures == figures[0]).all()
    np.testing.assert_allclose([rows.min(), rows.max(), columns.min(), columns.max()], [19, 32, 32, 38], atol=2)
    assert (np.diff([columns[rows == row].mean() for row in range(rows.min(), rows.max())]) <= 0.5).all()  # leaning to the right
    dots = Motion(90, 24).show(still)
    assert 0 < (dots < 200).sum() < (shown < 200).sum()
    assert (MOTION.show(np.full((1, 90, 24, 3), np.nan)) < 200).any()


def test_music_as_tokens(tmp_path):
    tokens = np.array([[0, 1, 2, 3, 4, 4, 3, 2, 1, 0]])
    np.save(tmp_path / "a.npy", tokens[0])
    np.testing.assert_array_equal(MUSIC.parse(str(tmp_path / "a.npy")), tokens)
    np.testing.assert_array_equal(MUSIC.sounds(tokens).reshape(10, 128), np.repeat(tokens.T, 128, 1) / 2 - 1)
    np.testing.assert_array_equal(MUSIC.sounds(np.full((1, 10), 5)), 1)  # masks
    decoded = TokenAudio(10, 5, lambda ids: np.repeat(ids - 3.0, 200, axis=1))
    assert decoded.sounds(tokens).shape == (1, 2000) and np.abs(decoded.sounds(tokens)).max() == 1
    paths = MUSIC.write(np.repeat(tokens, 3, 0), tmp_path)
    assert [path.name for path in paths] == ["music_0.wav", "music_1.wav", "music_2.wav"]
    sound, rate = soundfile.read(paths[2])
    assert rate == 22_050
    np.testing.assert_allclose(sound, MUSIC.sounds(tokens)[0], atol=1e-4)
    written = Waveforms(1280).write(MUSIC.sounds(tokens), tmp_path)
    np.testing.assert_array_equal(soundfile.read(written[0])[0], sound)
    assert "[n, 10]" in refusal(MUSIC.parse, "song.wav") and "ids are 0..4" in refusal(MUSIC.check, tokens + 1)


@pytest.mark.slow
def test_tokens_are_shown_as_the_music_that_they_are():
    music = TokenAudio(10, 5, lambda ids: np.sin(np.arange(1, 3)[:, None] * np.arange(2000) * ids.mean() / 10))
    tokens = np.array([[0, 1, 2, 3, 4, 4, 3, 2, 1, 0], [1] * 10])
    shown = music.show(tokens)
    np.testing.assert_array_equal(shown, Waveforms(2000).show(music.sounds(tokens)))
    assert shown.shape == (2, 128, 8, 1) and shown[0].sum(-1).sum(-1).argmax() > shown[1].sum(-1).sum(-1).argmax()  # twice as high a tone


@pytest.mark.parametrize("modality", [IMAGES, COLOUR, LABELS, LATENTS, Labels(3, ("a", "b", "c")), PIXELS, ROWS, MAPS, MUSIC])
def test_random_examples_are_examples(modality):
    drawn, again = (modality.random(np.random.default_rng(1), 300) for _ in range(2))
    checked = modality.check(drawn)  # shape and range
    assert checked.dtype == drawn.dtype and drawn.shape == (300, *modality.shape)
    np.testing.assert_array_equal(drawn, again)
    if modality is LATENTS:
        assert abs(drawn.mean()) < 0.01 and abs(drawn.std() - 1) < 0.01
    elif isinstance(modality, Images):
        np.testing.assert_array_equal(modality.quantize(drawn), drawn)
    else:
        classes = modality.count if isinstance(modality, Labels) else len(MAPS.palette) if modality is MAPS else modality.states
        np.testing.assert_array_equal(np.unique(drawn), np.arange(classes))


def test_a_random_source_is_a_function_of_the_index():
    source, other = (RandomSource({"image": LATENTS, "label": LABELS}, size=10**9) for _ in range(2))
    taken = source.take(np.array([5, 999_999_999, 5]))
    assert len(source) == 10**9 and {name: array.shape for name, array in taken.items()} == {"image": (3, 8, 6, 4), "label": (3,)}
    np.testing.assert_array_equal(taken["image"][0], taken["image"][2])
    assert np.abs(taken["image"][0] - taken["image"][1]).max() > 1
    for name, array in other.take(np.array([999_999_999])).items():
        np.testing.assert_array_equal(array[0], taken[name][1])
    taken["image"][:] = 0  # the caller's own
    assert source.take(np.array([5]))["image"].any()
    for wrong in (-1, 10**9):
        with pytest.raises(IndexError):
            source.take(np.array([wrong]))


def test_what_is_finite_in_float64_alone_is_refused():
    for modality in (LATENTS, Features(3), Motion(2, 24)):
        with pytest.raises(UserError, match="finite floats"):
            modality.check(np.full((1, *modality.shape), 1e300))
    assert "integers of shape [n]" in refusal(LABELS.check, np.array([], int))
