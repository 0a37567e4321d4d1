"""A llama of plain dicts and arrays, its layers stacked for `lax.scan`; written by hand.

`project` is how a layer multiplies by a named matrix, so that a test can put its own low-rank
path there; the model itself knows of none.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LAYERS, D, HEADS, KV_HEADS, FF, VOCABULARY = 3, 8, 4, 2, 12, 17
WIDTHS = {
    "wq": (D, D),
    "wk": (D, D // HEADS * KV_HEADS),
    "wv": (D, D // HEADS * KV_HEADS),
    "wo": (D, D),
    "w1": (D, FF),
    "w2": (FF, D),
    "w3": (D, FF),
}


def make_params() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {
        "tokens": (VOCABULARY, D),
        "layers": {
            **{name: (LAYERS, *shape) for name, shape in WIDTHS.items()},
            "attention_norm": (LAYERS, D),
            "ffn_norm": (LAYERS, D),
        },
        "norm": (D,),
        "output": (D, VOCABULARY),
    }
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(0, 0.4, shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def plain(name, x, layer):
    return x @ layer[name]


def rms_norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale[None, None]


def layer_step(x, layer, project=plain):
    batch, time, _ = x.shape
    h = rms_norm(x, layer["attention_norm"])
    q = project("wq", h, layer).reshape(batch, time, KV_HEADS, -1, D // HEADS)
    k = project("wk", h, layer).reshape(batch, time, KV_HEADS, D // HEADS)
    v = project("wv", h, layer).reshape(batch, time, KV_HEADS, D // HEADS)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k) / (D // HEADS) ** 0.5
    scores = jnp.where(jnp.tril(jnp.ones((1, 1, 1, time, time))) > 0, scores, -1e9)
    mixed = jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(scores), v).reshape(batch, time, D)
    x = x + project("wo", mixed, layer)
    h = rms_norm(x, layer["ffn_norm"])
    gated = jax.nn.silu(project("w1", h, layer)) * project("w3", h, layer)
    return x + project("w2", gated, layer)


def forward(params, ids):
    x, _ = jax.lax.scan(
        lambda x, layer: (layer_step(x, layer), None), params["tokens"][ids], params["layers"]
    )
    return rms_norm(x, params["norm"]) @ params["output"]


def forward_unrolled(params, ids, project):
    """The same without scan, layer by layer; `project` is told the layer's index."""
    x = params["tokens"][ids]
    for i in range(LAYERS):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        x = layer_step(x, layer, lambda name, x, layer, i=i: project(name, x, layer, i))
    return rms_norm(x, params["norm"]) @ params["output"]
