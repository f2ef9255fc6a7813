"""What is retrieved of scenes: what captions say counts, and nothing else gives it away."""

import numpy as np

from mmdiff.data.sources import load_all
from mmdiff.projects.scenes import scene_alignment, scenes


def test_scene_retrieval_counts_what_captions_say(monkeypatch):
    monkeypatch.setattr(scene_alignment, "AMONG", 4)
    said = {name: np.zeros(8, int) for name in scenes.ATTRIBUTES}
    said["digit"], said["background"] = np.array([1, 2, 3, 3, 1, 2, 3, 4]), np.array([0, 0, 0, 1, 0, 0, 0, 0])
    captions = np.eye(8)
    right = scene_alignment.scene_retrieval(captions, captions, said)
    assert right["r1"] == right["image_to_text_r1"] == right["text_to_image_r1"] == 1
    swapped = captions[[1, 0, 3, 2, 4, 5, 6, 7]]  # rows 2 and 3 differ in the background alone
    found = scene_alignment.scene_retrieval(swapped, captions, said)
    assert found["r1"] == 6 / 8 and found["image_to_text_r1"] == 4 / 8 and found["image_to_text_r5"] == 1


def test_colour_and_place_do_not_give_held_out_digits_away():
    """They do among held-out captions alone, where each digit has a colour and a place of its own."""
    data = load_all(scenes.Scenes("held_out", count=200))
    words = {word: i for i, word in enumerate(word for name in ("digit", "colour", "position") for word in scenes.ATTRIBUTES[name])}

    def encode(texts, blind=False):
        # Backgrounds and sizes are left out, so that the first colour is the digit's.
        found = np.zeros((len(texts), len(words)))
        for row, text in zip(found, texts):
            _, _, colour, digit, rest = text.split(" ", 4)
            row[[words[colour], words[text.split(", ")[-1].replace("in the ", "")]]] = 1
            row[words[digit]] = 0 if blind else 1
        return found

    captions = scenes.captions(data)
    assert scene_alignment.held_out_retrieval(encode(captions), encode, data) == 1
    blind = encode(captions, blind=True)
    assert scene_alignment.scene_retrieval(blind, encode(captions), data)["r1"] > 0.95
    assert scene_alignment.held_out_retrieval(blind, encode, data) < 0.25


def test_zero_shot_knows_classes_by_the_mean_of_their_wordings():
    data = load_all(scenes.Scenes("test", count=60))

    def encode(texts):
        # Words count, the attribute's as much as the others: only the mean over wordings tells the classes apart.
        words = sorted({word for values in scenes.ATTRIBUTES.values() for value in values for word in value.split()})
        return np.array([[text.replace(",", "").split().count(word) for word in words] for text in texts], float)

    vectors = encode(scenes.captions(data))
    found = scene_alignment.zero_shot(vectors, encode, data)
    assert set(found) == {"digit", "colour", "position"}
    assert found["digit"] == 1 and found["position"] == 1
    shuffled = scene_alignment.zero_shot(vectors, encode, {name: np.roll(array, 7) for name, array in data.items()})
    assert shuffled["digit"] < 0.4
    for wordings in scene_alignment.prompts("digit", 5):
        assert len(wordings) == 5
    one, other = scene_alignment.prompts("digit", 5)[:2]
    assert [text.replace("zero", "one") for text in one] == other
