"""open_clip's tokenizer with a small vocabulary."""

import html
import pathlib
import tempfile
import unicodedata

import ftfy
import odd_captions
from open_clip.tokenizer import SimpleTokenizer


def clip_ids():
    texts = odd_captions.ODD + odd_captions.captions(30)
    with tempfile.TemporaryDirectory() as folder:
        path = odd_captions.write_vocabulary(pathlib.Path(folder) / "vocabulary.txt.gz")
        ids = SimpleTokenizer(str(path), context_length=77)(texts)
    # 0 where ftfy does more than to compose letters: without it these have other ids.
    plain = [_unescaped(ftfy.fix_text(text)) == _unescaped(unicodedata.normalize("NFC", text)) for text in texts]
    return {"ids": ids, "plain": plain}


def _unescaped(text):
    return html.unescape(html.unescape(text)).split()
