"""T5's encoder and BERT, as transformers has them."""

import numpy as np
import published
import torch
import transformers


def _bert(**changes):
    return published.torch_model(transformers.BertModel(transformers.BertConfig(**published.SMALL["bert"] | changes)))


def _t5(**changes):
    return published.torch_model(transformers.T5EncoderModel(transformers.T5Config(**published.SMALL["t5"] | changes)))


def _states(model, name, length=40, padding=15):
    """Token ids, mask, and the last states of a model."""
    ids, mask = published.token_ids(name, (2, length), 100), published.masked((2, length), padding)
    with torch.no_grad():
        return ids, mask, model(torch.tensor(ids), torch.tensor(mask)).last_hidden_state.numpy()


def _sentence(states, mask):
    mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def bert():
    _, mask, states = _states(_bert(), "bert")
    return {"states": states, "sentence": _sentence(states, mask)}


def t5():
    return {"states": _states(_t5(), "t5")[2]}
