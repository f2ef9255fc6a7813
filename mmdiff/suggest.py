"""What was meant by a name that does not exist: found by the field's other words for it, then by its words, then by its letters."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

# What other programs call the keys of a config, without underscores: the ends of ours, the likeliest first.
SYNONYMS = {
    "train.learning_rate": "lr eta baselr maxlr peaklr initlr stepsize",
    "train.global_batch": "bs batchsize batch minibatch globalbatchsize trainbatchsize totalbatchsize perdevicebatchsize ngpubatch",
    "train.steps": "epoch epochs numepochs nepochs maxepochs iter iters maxiter iterations numiterations maxiters niter numsteps nsteps "
    "maxsteps totalsteps trainsteps numtrainsteps maxtrainsteps trainingsteps numupdates kimg",
    "train.microbatches": "accum accumulation accumsteps gradaccum gradaccumsteps gradientaccumulation gradientaccumulationsteps "
    "accumulategradbatches accumulate microbatch microbatchsize",
    "train.warmup_steps": "warmup warm warmuplen warmupiters numwarmupsteps lrwarmup warmupepochs",
    "train.weight_decay": "wd decay l2 regularization adamwd",
    "train.clip": "gradclip gradnorm clipnorm clipgrad gradclipnorm gradientclip gradientclipping maxgradnorm maxnorm clipping",
    "train.ema": "emadecay emarate emabeta averaging polyak average momentumema",
    "train.log_every": "logsteps loggingsteps logfreq logfrequency loginterval logeverynsteps printevery printfreq",
    "train.eval_every": "evalsteps evalfreq evalinterval valevery validateevery valinterval evaluationsteps testevery",
    "train.checkpoint_every": "saveevery savesteps savefreq saveinterval ckptevery ckptsteps checkpointsteps snapshot checkpointfreq",
    "train.keep": "savetotallimit maxtokeep keeplast numcheckpoints",
    "train.start": "init initfrom pretrained pretrain finetune resume resumefrom loadfrom fromcheckpoint weights ckpt checkpoint",
    "train.prefetch": "workers numworkers prefetchfactor buffersize nworkers",
    "train.mesh.data": "dp dataparallel gpus numgpus ngpus devices numdevices",
    "train.mesh.tensor": "tp tensorparallel modelparallel mp",
    "train.mesh.fsdp": "zero sharded sharding",
    "sample.guidance": "cfg cfgscale cfgweight guidancescale guidanceweight guidancestrength classifierfreeguidance",
    "sample.steps": "nfe samplingsteps samplesteps numsamplingsteps numinferencesteps inferencesteps ddimsteps samplersteps nsamplesteps",
    "sample.top_p": "topp nucleus topk truncation truncationrate",
    "chain.steps": "timesteps diffusionsteps numtimesteps ntimesteps numdiffusionsteps",
    "model.width": "dim hidden hiddensize hiddendim dmodel embeddim embed modeldim nembd channels basechannels features units",
    "model.size": "width dim hidden hiddensize hiddendim dmodel embeddim depth layers variant modelsize preset",
    "model.depth": "layers nlayers numlayers nlayer numlayer numhiddenlayers blocks nblocks numblocks",
    "model.heads": "nheads numheads nhead numhead attentionheads numattentionheads",
    "model.patch": "patchsize ps",
    "model.dtype": "precision bf16 fp16 half mixedprecision amp datatype",
    "model.remat": "checkpointing gradcheckpoint gradientcheckpointing gradientcheckpoint rematerialize recompute",
    "model.mlp_ratio": "mlp ffratio mlpmult ffnmult feedforward",
    "seed": "randomseed rngseed rng manualseed",
    "data.name": "dataset datasetname",
    "data.dir": "dataset datadir datapath dataroot root path traindir folder datafolder",
    "eval.batch": "evalbatchsize evalbatch valbatchsize testbatchsize",
    "label_dropout": "classdropout conddropout cfgdropout uncondprob classdropoutprob labeldrop",
    "text_dropout": "captiondropout conddropout cfgdropout uncondprob textdrop",
}
# Keys of other programs that no config here has.
ELSEWHERE = (
    "beta beta1 beta2 betas adambeta1 adambeta2 adambetas momentum nesterov eps epsilon adameps adamepsilon optimizer optim scheduler "
    "lrscheduler wandb project runname device gpu cuda backend compile debug verbose profile tags notes")
_SYNONYMS: dict[str, list[str]] = {}
for _key, _words in SYNONYMS.items():
    for _word in _words.split():
        _SYNONYMS.setdefault(_word, []).append(_key)


def key(asked: str, known: Sequence[str]) -> str | None:
    """The dotted key that a person most likely meant, or None: "train.lr" -> "train.learning_rate", "bs" -> "train.global_batch"."""
    section, _, last = asked.rpartition(".")

    def by_letters(names, cutoff):
        return next(iter(difflib.get_close_matches(asked.lower(), names, n=1, cutoff=cutoff)), None)

    parent = next((name for name in known if asked.startswith(f"{name}.")), None)
    if parent:
        return parent
    same = [name for name in known if name.rpartition(".")[2] == last.lower()]
    if same and section:
        return by_letters(same, 0.0)
    # Another program's word for it, with its section or without: "eval.batch_size", "optimizer.lr", "lr.base".
    for spelt in (_letters(asked), _letters(last), _letters(asked.partition(".")[0])):
        targets = _SYNONYMS.get(spelt, ())
        found = [name for target in targets for name in known if name.rpartition(".")[2] == target.rpartition(".")[2]]
        inside = [name for name in found if section and name.startswith(f"{section.lower()}.")]
        if found:
            return (inside or [name for name in found if name in targets] or found)[0]
    if same:
        return by_letters(same, 0.0)
    if not {_letters(asked), _letters(last)}.isdisjoint({*_SYNONYMS, *ELSEWHERE.split()}):
        return None  # it means something that this config does not have: what is spelt like it means something else
    # A slip of the finger ("stpes"), within the section that is named; then its words, of which "learn_rate" and "train.learning_rate"
    # share two.
    words = _words(last)
    inside = [name for name in known if name.startswith(f"{section.lower()}.")] or known if section else known
    ends = [name.rpartition(".")[2] for name in inside]
    shared = {name: _shared(words, _words(name.rpartition(".")[2])) for name in known}
    likest = [name for name in known if shared[name] == max(shared.values()) >= 0.5]
    close = difflib.get_close_matches(last.lower(), ends, n=1, cutoff=0.75)
    if close:
        return by_letters([name for name, end in zip(inside, ends) if end == close[0]], 0.0)
    return by_letters(likest, 0.0) if likest else None


def word(asked: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The name that is nearest in letters, without regard to case, hyphens and underscores; None if none is near."""
    plain = {_letters(name): name for name in known}
    found = difflib.get_close_matches(_letters(asked), list(plain), n=1, cutoff=cutoff)
    return plain[found[0]] if found else None


def meant(found: str | None, prefix: str = " ") -> str:
    """", did you mean ...?" or nothing: what goes at the end of a sentence."""
    return f"{prefix}did you mean {found!r}?" if found else ""


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _words(text: str) -> list[str]:
    parts = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", text).lower()
    return [part for part in re.split(r"[^a-z0-9]+", parts) if part]


def _shared(asked: Sequence[str], name: Sequence[str]) -> float:
    """The share of words that two names have in common; a beginning of three letters or more stands for a word, "learn" for "learning"."""
    if not asked or not name:
        return 0.0
    rest, hits = list(name), 0
    for part in asked:
        same = next((other for other in rest if part == other), None) or next(
            (other for other in rest if min(len(part), len(other)) >= 3 and (other.startswith(part) or part.startswith(other))), None)
        if same:
            rest.remove(same)
            hits += 1
    return 2 * hits / (len(asked) + len(name))
