"""The dual-stream network: who sees whom, what costs nothing, and what it is at its first step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from filled import filled

from mmdiff import losses, matching, nets, schedules, times
from mmdiff.errors import UserError
from mmdiff.lazy_logits import LazyLogits
from mmdiff.processes import Gaussian, Given, Joint
from mmdiff.processes.gaussian import eps, x0
from mmdiff.training import sharding

B, D = 4, 6
IMAGE, TEXT = nets.Patches(4, 4, 1, 2), nets.Tokens(3, 6, 6)
X = {
    "image": normal(0, (B, 4, 4, 1)),
    "text": jnp.asarray([[1, 2, 0], [3, 4, 5], [2, 0, 0], [5, 1, 4]]),
    "query": normal(1, (B, D)),
}
ENDS = {"image": (0.1, 0.9), "text": (0, 0), "query": (0.8, 0.2)}
T = {name: jnp.asarray(np.linspace(*ends, B, dtype=np.float32)) for name, ends in ENDS.items()}
BOTH = pytest.mark.parametrize("fusion", ["mmdit", "shared"])


def net_of(fusion="mmdit", **options):
    return nets.DualStream(
        options.pop("patches", IMAGE), options.pop("text", TEXT), D,
        **{"depth": 3, "width": 16, "heads": 2, "shared": 2, "fusion": fusion, "head_depth": 1, "head_width": 8, **options})


@functools.cache
def weights(fusion="mmdit", **options):
    return filled(net_of(fusion, **options), X, T)


@functools.cache
def program(fusion, task, options=()):
    return jax.jit(functools.partial(net_of(fusion, **dict(options)).apply, tasks=(task,)))


def run(fusion, task, x=None, t=None, **options):
    out = program(fusion, task, tuple(options.items()))(weights(fusion, **options), {**X, **(x or {})}, {**T, **(t or {})})
    return out["image" if task == "generate" else "query"]


def differ(a, b, least=1e-4):
    return float(jnp.abs(a - b).max()) > least


def close(a, b, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


@BOTH
def test_outputs(fusion):
    image, out = run(fusion, "generate"), program(fusion, "align")(weights(fusion), X, T)
    assert image.shape == X["image"].shape and image.dtype == jnp.float32 and np.isfinite(image).all() and image.any()
    assert {name: value.shape for name, value in out.items()} == {"query": (B, D), "logit_scale": (B,), "logit_bias": (B,)}
    assert np.isfinite(out["query"]).all() and out["query"].any()


@BOTH
def test_generation_does_not_depend_on_the_query_nor_alignment_on_the_caption(fusion):
    """Bit for bit, whatever they hold and at any time."""
    queries, texts = [-3 * X["query"], jnp.full((B, D), 1e6)], [5 - X["text"], jnp.zeros_like(X["text"])]
    for query in queries:
        np.testing.assert_array_equal(run(fusion, "generate", {"query": query}, {"query": 1 - T["query"]}), run(fusion, "generate"))
    for text in texts:
        np.testing.assert_array_equal(run(fusion, "align", {"text": text}, {"text": jnp.ones(B)}), run(fusion, "align"))


@BOTH
def test_the_conditions_do_matter(fusion):
    assert differ(run(fusion, "generate", {"text": (X["text"] + 1) % 6}), run(fusion, "generate"))
    assert differ(run(fusion, "align", {"image": -X["image"]}), run(fusion, "align"))
    for task in ("generate", "align"):
        assert differ(run(fusion, task, t={"image": 0.5 * T["image"]}), run(fusion, task))
    assert differ(run(fusion, "align", {"query": -X["query"]}), run(fusion, "align"))
    assert differ(run(fusion, "align", t={"query": 0.5 * T["query"]}), run(fusion, "align"))


def test_padding_is_an_id_of_the_vocabularys_own():
    """The same caption in a vocabulary whose padding is the last id."""
    params = weights()["params"]
    params = params | {"text_in": {"embedding": jnp.roll(params["text_in"]["embedding"], -1, 0)}}
    other = program("mmdit", "generate", (("text", nets.Tokens(3, 6, 6, padding=5)),))
    close(other({"params": params}, {**X, "text": (X["text"] - 1) % 6}, T)["image"], run("mmdit", "generate"))


@BOTH
def test_an_absent_condition_is_hidden_bit_for_bit(fusion):
    gone = {"text": jnp.ones(B)}
    bare = run(fusion, "generate", t=gone)
    np.testing.assert_array_equal(run(fusion, "generate", {"text": 5 - X["text"]}, gone), bare)
    x, t = ({name: tree[name] for name in ("image",)} for tree in (X, T))
    close(program(fusion, "generate")(weights(fusion), x, t)["image"], bare)  # and it is as if the network had no captions
    gone = {"image": jnp.ones(B)}
    np.testing.assert_array_equal(run(fusion, "align", {"image": -9 * X["image"]}, gone), run(fusion, "align", t=gone))
    # By example: where it is there nothing has changed.
    close(run(fusion, "generate", t={"text": jnp.asarray([1.0, 0, 0, 1])})[1:3], run(fusion, "generate")[1:3])


@BOTH
def test_padding_is_hidden(fusion):
    """A text of two tokens says the same in three places as in two."""
    short = net_of(fusion, text=nets.Tokens(2, 6, 6))
    params = jax.tree.map(lambda a: a, weights(fusion))
    table = params["params"]["text_positions"]["embedding"]
    params["params"]["text_positions"] = {"embedding": table[:2]}
    text = jnp.asarray([[1, 2, 0]] * B)
    cut = jax.jit(functools.partial(short.apply, tasks=("generate",)))(params, {**X, "text": text[:, :2]}, T)["image"]
    close(run(fusion, "generate", {"text": text}), cut)


def plain(params, blocks):
    """The weights of a generator's blocks, stacked, split in those of the trunk and of the decoder."""
    return {"trunk": {"blocks": jax.tree.map(lambda a: a[:2], blocks)}, "decoder": {"blocks": jax.tree.map(lambda a: a[2:], blocks)}}


def merged(new, old):
    """`old` with the entries that `new` names, of the same shapes."""
    if not isinstance(old, dict):
        assert new.shape == old.shape
        return new
    assert set(new) <= set(old), (set(new) - set(old), set(old))
    return {name: merged(new[name], value) if name in new else value for name, value in old.items()}


def test_the_generator_is_an_mmdit_with_its_weights():
    """Whatever the query's weights are: the pass that draws is the pre-trained network."""
    net = nets.MMDiT({"image": IMAGE, "text": TEXT}, depth=3, width=16, heads=2, qk_norm=True)
    x, t = ({name: tree[name] for name in ("image", "text")} for tree in (X, {**T, "text": 0.3 + 0 * T["text"]}))
    x["text"] = jnp.maximum(x["text"], 1)  # for an MMDiT padding is a token
    base = filled(net, x, t, seed=1)["params"]
    of = {name: base[name] for name in ("image_in", "image_out", "image_adaln", "text_in", "text_positions")}
    for i, name in enumerate(("image", "text")):
        out = base["time"]["out"]
        of[f"{name}_time"] = {**base["time"], "out": {**out, "bias": out["bias"] + base["modality"][i]}}
    params = {"params": merged(of | plain(base, base["blocks"]), weights(qk_norm=True)["params"])}
    found = program("mmdit", "generate", (("qk_norm", True),))(params, {**X, **x}, {**T, **t})["image"]
    close(found, jax.jit(net.apply)({"params": base}, x, t)["image"])


def test_the_generator_starts_as_a_dit_with_its_weights():
    """The new cross-attention's gates are zero at first, so that a caption changes nothing yet."""
    net = nets.DiT(IMAGE, 1, depth=3, width=16, heads=2)
    label = jnp.zeros(B, jnp.int32)
    base = filled(net, X["image"], T["image"], label, seed=1)["params"]
    base["label"] = jax.tree.map(jnp.zeros_like, base["label"])
    blocks = base["blocks"]
    adaln = jax.tree.map(lambda a: jnp.concatenate([a, jnp.zeros_like(a[..., :48])], -1), blocks["adaln"])
    own = {f"image_{name}": blocks["attention"][name] for name in ("qkv", "out")} | {"image_mlp": blocks["mlp"], "image_adaln": adaln}
    of = {name: base[name] for name in ("image_in", "image_out")} | {"image_adaln": base["adaln"], "image_time": base["time"]}
    params = {"params": merged(of | plain(base, own), weights("shared")["params"])}
    close(program("shared", "generate")(params, X, T)["image"], jax.jit(net.apply)({"params": base}, X["image"], T["image"], label))


@pytest.mark.slow
def test_fresh_weights_have_closed_gates():
    fresh = jax.jit(net_of("shared", scan=False, shared=1, depth=2).init)(jax.random.key(0), X, T)["params"]
    for part in ("trunk", "decoder"):
        for block in fresh[part].values():
            assert not any(leaf.any() for name in block if name.endswith("adaln") for leaf in jax.tree.leaves(block[name]))
    assert not fresh["image_out"]["kernel"].any() and fresh["query_out"]["kernel"].any()
    np.testing.assert_allclose(np.exp(fresh["logit_scale"]), 1 / 0.07, rtol=1e-6)


@pytest.mark.slow
@BOTH
def test_each_loss_trains_its_own_parts_and_both_the_trunk(fusion):
    net, schedule = net_of(fusion), schedules.scaled_linear_beta()
    image, query = Gaussian(schedule, eps), Gaussian(schedules.scaled(schedule, 0.5), x0)
    generate, align = (functools.partial(net.apply, tasks=(task,)) for task in ("generate", "align"))
    noisy, given = times.uniform(), times.constant(0.0)
    parts = {
        "generate": (1.0, losses.diffusion(
            Joint(image=image, text=Given(0)), generate, times.joint(image=noisy, text=given),
            {"eps": (1.0, losses.on("image", image.loss))})),
        "align": (0.5, losses.diffusion(
            Joint(image=Given(0.0), query=query), align, times.joint(image=given, query=noisy),
            {"embedding": (1.0, matching.embedding_loss(query, "query"))})),
    }  # fmt: skip

    def gradients(params):
        of = (losses.combine(**{task: part}) for task, part in parts.items())
        return [jax.grad(loss, has_aux=True)(params, {**X, "index": jnp.arange(B)}, jax.random.key(0)) for loss in of]

    (by_generation, seen), (by_alignment, also_seen) = jax.jit(gradients)(weights(fusion))
    assert seen["generate/loss/eps"] > 0 and also_seen["align/loss/embedding"] > 0
    by_generation, by_alignment = (
        {jax.tree_util.keystr(path, simple=True, separator="/"): float(jnp.abs(leaf).max()) for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (by_generation, by_alignment))
    )
    alignment = [path for path in by_generation if "query" in path or "/head" in path or "logit" in path]
    own = ("/decoder/", "text", "cross", "params/image_out", "params/image_adaln")
    generation = [path for path in by_generation if any(part in path for part in own)]
    trunk = [path for path in by_generation if path not in alignment + generation and path.endswith("kernel")]
    assert len(alignment) > 20 and len(generation) > 10 and len(trunk) > 5
    assert not any(by_generation[path] for path in alignment) and not any(by_alignment[path] for path in generation)
    assert all(by_alignment[path] > 0 for path in alignment if path.endswith("kernel"))
    assert all(by_generation[path] > 0 for path in generation if path.endswith("kernel") and ("/image" in path or "cross" in path))
    assert all(by_generation[path] > 0 and by_alignment[path] > 0 for path in trunk)


@pytest.mark.slow
def test_a_pass_that_nobody_asks_for_costs_nothing():
    net = net_of(depth=4, scan=True)

    def flops(tasks, wanted):
        def value(params):
            return (net.apply(params, X, T, tasks=tasks)[wanted] ** 2).sum()

        return jax.jit(jax.grad(value)).lower(weights(depth=4)).compile().cost_analysis()["flops"]

    for task, wanted in (("generate", "image"), ("align", "query")):
        np.testing.assert_allclose(flops(("generate", "align"), wanted), flops((task,), wanted), rtol=0.02)


@BOTH
def test_kept_keys_and_values_give_the_same_names(fusion):
    options = {"two_way": False}
    net, params = net_of(fusion, **options), weights(fusion, **options)
    for when in (T["image"], jnp.asarray([0.0, 1.0, 0.0, 1.0])):
        cache = jax.jit(functools.partial(nets.image_kv_cache, net))(params, X["image"], when)
        step = jax.jit(lambda p, x, t, c: nets.with_image_cache(net, c)(p, x, t)["query"])
        for scale in (1.0, -2.0):
            x, t = {"query": scale * X["query"]}, {"query": abs(scale) / 2 * T["query"]}
            close(step(params, x, t, cache), run(fusion, "align", x, {**t, "image": when}, **options))
    assert differ(run(fusion, "align", **options), run(fusion, "align"))  # the image that reads the query is another one


def test_kept_keys_need_an_image_that_does_not_read_the_query():
    with pytest.raises(UserError, match="two_way=False"):
        nets.image_kv_cache(net_of(), weights(), X["image"])


@pytest.mark.slow
def test_one_step_beside_a_cache_is_one_token():
    """Each further step costs less than a tenth of alignment anew, on 64 patches."""
    patches = nets.Patches(16, 16, 1, 2)
    net, image = net_of(patches=patches, two_way=False), jnp.zeros((B, 16, 16, 1))
    params = filled(net, {**X, "image": image}, T)

    def flops(function, *args):
        return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]

    cache = jax.eval_shape(functools.partial(nets.image_kv_cache, net), params, image)
    step = flops(lambda p, c: nets.with_image_cache(net, c)(p, X, T), params, cache)
    assert step < 0.1 * flops(lambda p: net.apply(p, {**X, "image": image}, T, tasks=("align",)), params)


@BOTH
def test_reinjection(fusion):
    off = weights(fusion, reinject=False)["params"]
    assert "query_in" in off and "query_in" not in off["trunk"]["blocks"]
    on = weights(fusion)["params"]
    assert "query_in" not in on and on["trunk"]["blocks"]["query_in"]["kernel"].shape == (2, D, 16)
    assert differ(run(fusion, "align", reinject=False), run(fusion, "align"))


@BOTH
def test_examples_do_not_see_each_other(fusion):
    x, t = (jax.tree.map(lambda a: a[::-1], tree) for tree in (X, T))
    for task in ("generate", "align"):
        close(run(fusion, task, x, t)[::-1], run(fusion, task))


def test_scan_and_remat_are_the_loop():
    params = weights("shared")["params"]
    loop = {
        part: {f"block_{i}": jax.tree.map(lambda a, i=i: a[i], layers["blocks"]) for i in range(len(jax.tree.leaves(layers)[0]))}
        for part, layers in params.items()
        if isinstance(layers, dict) and "blocks" in layers
    }
    looped = net_of("shared", scan=False, remat="dots")
    out = jax.jit(looped.apply)({"params": {**params, **loop}}, X, T)
    close(out["image"], run("shared", "generate"))
    close(out["query"], run("shared", "align"))


def test_a_caption_may_be_what_is_told():
    """A third task of the pass that draws: the caption noisy, beside the image."""
    out = program("mmdit", "generate", (("captions", True),))
    params, t = weights(captions=True), {**T, "text": jnp.full(B, 0.7)}
    told = out(params, X, t)["text"]
    assert told.shape == (B, 3, 6) and told.any()
    assert differ(out(params, {**X, "image": -X["image"]}, t)["text"], told) and differ(out(params, X, T)["text"], told)
    with pytest.raises(UserError, match="fusion='mmdit'"):
        net_of("shared", captions=True).apply(params, X, T)
    chunked = program("mmdit", "generate", (("captions", True), ("text", nets.Tokens(3, 6, 6, logit_chunks=3))))
    lazily = chunked(params, X, t)["text"]
    assert isinstance(lazily, LazyLogits)
    close(lazily.whole(), told)


def test_without_captions():
    params = filled(net_of(text=None), X, T)
    out = jax.jit(net_of(text=None).apply)(params, {name: X[name] for name in ("image", "query")}, T)
    assert out["image"].any() and out["query"].any() and not [name for name in params["params"] if "text" in name]


def test_the_papers_head():
    """Six plain blocks of width 768, a projection of 1280 features and a linear predictor: 42.5, 1.0 and 0.6 million weights."""
    net = nets.DualStream(IMAGE, TEXT, 768, depth=1, width=1280, heads=20, shared=1, fusion="shared", head_width=768, head_heads=12)
    shapes = jax.eval_shape(net.init, jax.random.key(0), {**X, "query": jnp.zeros((B, 768))}, T)["params"]
    count = {name: sum(leaf.size for leaf in jax.tree.leaves(shapes[name])) for name in ("head", "head_in", "query_out")}
    assert count == {"head": 42_527_232, "head_in": 983_808, "query_out": 590_592}


@BOTH
def test_the_transformers_rules_split_every_block(fusion):
    mesh = sharding.make_mesh({"tensor": 2}, jax.devices()[:2])
    found = sharding.partition_specs(weights(fusion), sharding.TRANSFORMER_RULES, mesh)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): spec for path, spec in jax.tree_util.tree_leaves_with_path(found)}
    whole = [name for name, spec in named.items() if "/blocks/" in name and name.endswith("kernel") and "tensor" not in spec]
    assert whole == ["params/trunk/blocks/query_in/kernel"]  # a product for one token


def test_mistakes_are_named():
    with pytest.raises(KeyError, match="no input or time for .*query.*the tasks .*align"):
        net_of().apply(weights(), {"image": X["image"]}, T, tasks=("align",))
    with pytest.raises(UserError, match="no task 'draw'; choose generate, align or cache"):
        net_of().apply(weights(), X, T, tasks=("draw",))
    with pytest.raises(UserError, match="no fusion 'early'; choose mmdit or shared"):
        net_of("early").apply(weights(), X, T)
    with pytest.raises(UserError, match="of a depth of 3 blocks shared=4 cannot be shared"):
        net_of(shared=4).apply(weights(), X, T)
