"""The decoder block that every autoregressive model here is made of.

Shapes: `R` rows (guidance branches times batch), `S` new tokens, `T` slots of a past segment, `H` query heads, `K`
key-value heads, `D` head size, `d` model width, `F` feed-forward width.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cascade_jax import mesh, platforms
from cascade_jax.cache import KV, Context, Segment, join
from cascade_jax.kernels import attention

HEAD_NORM_EPS = 1e-5  # of the LayerNorm over a head, whatever the block's other norms have
ACTIVATIONS = {"silu": jax.nn.silu, "gelu": functools.partial(jax.nn.gelu, approximate=True)}


@dataclass(frozen=True)
class BlockConfig:
    """Sizes and variants of a decoder block; a ValueError says which there is not.

    Attributes:
      rope: how rotary pairs lie in a head: "interleaved", (0, 1), (2, 3), ..., or "half", (0, D/2), (1, D/2 + 1), ...
      input_norm: whether attention's input is normalised.
      qk_norm: whether every head's queries and keys are normalised before they are rotated, by a LayerNorm (Chameleon).
      qk_rms: whether that norm is a root-mean-square one, with a scale alone and the other norms' epsilon (Qwen3).
      qkv_bias: whether queries, keys and values have a bias (Qwen2, GLM).
      activation: of the feed-forward network's gate: "silu" (SwiGLU), or "gelu", its tanh approximation (Gemma).
      rotary: the share of a head that is rotated, its first pairs (GLM: half of them); the rest has no position.
    """

    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    norm_eps: float = 1e-5
    rope: str = "interleaved"
    input_norm: bool = True
    qk_norm: bool = False
    qk_rms: bool = False
    qkv_bias: bool = False
    activation: str = "silu"
    rotary: float = 1.0

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}; known: {', '.join(ACTIVATIONS)}")
        if not 0 < self.rotary <= 1 or self.rotary * self.head_dim % 2:
            raise ValueError(f"a share of {self.rotary:g} of a head of {self.head_dim} is no number of rotary pairs")

    @property
    def head_eps(self) -> float:
        """Epsilon of the norm over a head."""
        return self.norm_eps if self.qk_rms else HEAD_NORM_EPS


def rope_2d(grid: int, head_dim: int, condition_slots: int, base: float) -> np.ndarray:
    """LlamaGen's rotary table, float32 [condition_slots + grid**2, head_dim / 2, 2]: cosine and sine by slot.

    Half of a head turns with the code's row, half with its column; condition slots have neither cosine nor sine.
    """
    places = np.stack(np.meshgrid(np.arange(grid), np.arange(grid), indexing="ij"), axis=-1).reshape(-1, 2)
    table = rope_at(places, head_dim, base)
    return np.concatenate([np.zeros((condition_slots, *table.shape[1:]), np.float32), table])


def rope_at(places: np.ndarray, head_dim: int, base: float) -> np.ndarray:
    """Two-dimensional rotary cosines and sines, float32 [n, head_dim / 2, 2], of rows and columns [n, 2]."""
    half = head_dim // 2
    frequencies = 1.0 / base ** (np.arange(0, half, 2, dtype=np.float32)[: half // 2] / half)
    angles = (places.astype(np.float32)[..., None] * frequencies).reshape(len(places), half)
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1)


def rope_1d(positions: jax.Array, head_dim: int, base: float, rotary: float = 1.0) -> jax.Array:
    """The usual rotary cosines and sines [..., head_dim / 2, 2] of `positions` int [...], see `BlockConfig.rotary`."""
    turning = int(rotary * head_dim)
    frequencies = 1.0 / base ** (np.arange(0, turning, 2, dtype=np.float32) / turning)
    frequencies = np.pad(frequencies, (0, (head_dim - turning) // 2))
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["rows"], meta_fields=["shape"])
@dataclass(frozen=True)
class OutputMajor:
    """A large kernel [n, *out] that lies as its transpose, which XLA's CPU backend multiplies with few rows sooner.

    It stands where the array would in a state, and NumPy reads it as that array; on disk and on a mesh it is one.

    Attributes:
      rows: [prod(out), n].
      shape: (n, *out).
    """

    rows: jax.Array
    shape: tuple[int, ...]

    @property
    def dtype(self):
        return self.rows.dtype

    def __getitem__(self, index) -> "OutputMajor":
        if index is not Ellipsis:
            raise TypeError("a kernel that lies output-major is read whole: see models.transformer.straight")
        return self

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.rows, dtype).T.reshape(self.shape)


@jax.jit
def output_major(kernel: jax.Array) -> OutputMajor:
    """The kernel [n, *out], laid out anew."""
    return OutputMajor(kernel.reshape(kernel.shape[0], -1).T, kernel.shape)


def straight(tree):
    """The tree with arrays in place of kernels that lie output-major."""

    def back(leaf):
        return leaf.rows.T.reshape(leaf.shape) if isinstance(leaf, OutputMajor) else leaf

    return jax.tree.map(back, tree, is_leaf=lambda leaf: isinstance(leaf, OutputMajor))


def _product(x: jax.Array, kernel: jax.Array | OutputMajor) -> jax.Array:
    """`x` [m, n] times `kernel` [n, *out], summed in float32: float32 [m, prod(out)]."""
    if not isinstance(kernel, OutputMajor):
        matrix = kernel.astype(x.dtype).reshape(kernel.shape[0], -1)
        return jnp.matmul(x, matrix, preferred_element_type=jnp.float32)
    # The product's own columns are the rows of x, filled up to what its vectors hold; the barrier keeps XLA from
    # turning it around again.
    rows = len(x)
    filled = 8 if rows <= 8 else -(-rows // 16) * 16
    x = jnp.pad(x, ((0, filled - rows), (0, 0)))
    out = jnp.matmul(kernel.rows.astype(x.dtype), x.T, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(out)[:, :rows].T


def matmul(x: jax.Array, kernel: jax.Array | OutputMajor) -> jax.Array:
    """`x` [..., n] times `kernel` [n, *out], accumulated in float32, in x's dtype.

    As one plain matrix product: with more axes XLA's CPU backend leaves the fast path. On a mesh the kernel keeps its
    axes, for one that is divided may not be merged with another.
    """
    if mesh.shards() > 1:
        contracted = (((x.ndim - 1,), (0,)), ((), ()))
        out = jax.lax.dot_general(x, straight(kernel).astype(x.dtype), contracted, preferred_element_type=jnp.float32)
        return out.astype(x.dtype)
    out = _product(x.reshape(-1, x.shape[-1]), kernel)
    return out.astype(x.dtype).reshape(*x.shape[:-1], *kernel.shape[1:])


def to_logits(features: jax.Array, kernel: jax.Array | OutputMajor) -> jax.Array:
    """Features [..., d] times a head's kernel [d, V]: float32 logits [..., V]."""
    logits = _product(features.reshape(-1, features.shape[-1]), kernel)
    return mesh.divided(logits.reshape(*features.shape[:-1], -1), -1)


def rotate(x: jax.Array, rope: jax.Array, style: str) -> jax.Array:
    """Rotary embedding of `x` [R, S, H, D] by `rope` [R, S, D/2, 2]; zero cosines and sines give zero vectors."""
    cos, sin = rope[:, :, None, :, 0], rope[:, :, None, :, 1]
    if style == "interleaved":
        pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        rotated = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
        return rotated.reshape(x.shape).astype(x.dtype)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def head_norm(x: jax.Array, scale: jax.Array, shift: jax.Array | None, epsilon: float) -> jax.Array:
    """LayerNorm over each head of `x` [..., H, D] in float32, with a scale and a shift of its own [H, D] per head; the
    root-mean-square norm without a shift."""
    y = x.astype(jnp.float32)
    if shift is not None:
        y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + epsilon)
    y = y.astype(x.dtype) * scale.astype(x.dtype)
    return y if shift is None else y + shift.astype(x.dtype)


def attend(config: BlockConfig, qkv, rope, norms, past: tuple[KV, ...], biases, filled) -> tuple[jax.Array, KV]:
    """Attention between its two products.

    Args:
      qkv: [R, S, K, H/K + 2, D]: per key-value head its query heads, its key and its value.
      rope: [R, S, D/2, 2].
      norms: scale and shift of queries [H, D] and of keys [K, D] with `config.qk_norm`; with `qk_rms` shifts are None.
      past: segments.
      biases: every past segment's mask, and the new tokens' last, see `cache.Context`.
      filled: what every past segment's mask shows, see `cache.Context`.

    Returns:
      [R, S, H D], and the new tokens' keys and values.
    """

    def general(qkv, rope, norms, past, biases, filled):
        del filled  # the masks say as much
        return attend_by_products(config, qkv, rope, norms, *_beside(past, biases))

    def at_once(qkv, rope, norms, past, biases, filled, interpret=False):
        lengths = tuple(None if own is None else own.length for own in filled)
        plain = (own is not None and own.holes is None for own in (*filled, None))
        masks = tuple(None if known else mask for mask, known in zip(biases, plain))
        pairs = [(segment.key, segment.value) for segment in past]
        out, key, value = attention.attention(
            qkv, rope, norms, pairs, masks, lengths, style=config.rope, epsilon=config.head_eps, interpret=interpret
        )
        return out, KV(key, value)

    function = general
    if past and attention.fits(qkv.shape[1], qkv.shape[4], biases):
        function = platforms.by_lowering(general, at_once)
    return function(qkv, rope, norms, past, biases, filled)


def _beside(past, biases):
    """Segments behind the first that have masks, joined: a product each would cost more than the copy."""
    if len(past) <= 2 or any(bias is None for bias in biases):
        return past, biases
    axes = [max(bias.shape[i] for bias in biases[1:-1]) for i in (0, 2)]
    masks = [jnp.broadcast_to(bias, (axes[0], 1, axes[1], bias.shape[3])) for bias in biases[1:-1]]
    joined = functools.reduce(join, ((segment,) for segment in past[1:]))
    return (past[0], *joined), (biases[0], jnp.concatenate(masks, axis=-1), biases[-1])


def attend_by_products(config: BlockConfig, qkv, rope, norms, past, biases) -> tuple[jax.Array, KV]:
    """`attend` on any platform.

    Softmax by hand: its sum divides once, behind the values, and no segment is copied to be joined with another.
    """
    rows, new, heads, groups, size = qkv.shape[0], qkv.shape[1], config.kv_heads, qkv.shape[3] - 2, config.head_dim
    query, key = qkv[..., :groups, :].reshape(rows, new, config.heads, size), qkv[..., groups, :]
    if norms is not None:
        query, key = head_norm(query, *norms[:2], config.head_eps), head_norm(key, *norms[2:], config.head_eps)
    query, key = rotate(query, rope, config.rope), rotate(key, rope, config.rope)
    fresh = KV(key.transpose(0, 2, 3, 1), jnp.swapaxes(qkv[..., groups + 1, :], 1, 2))

    # query heads that share a key head are further rows of the same product: [R, K, H/K * S, D]
    query = query.reshape(rows, new, heads, groups, size).transpose(0, 2, 3, 1, 4)
    query = query.reshape(rows, heads, groups * new, size) * jnp.asarray(size**-0.5, query.dtype)

    segments, scores = (*past, fresh), []
    query = query.astype(jnp.result_type(query, *(segment.key for segment in segments)))  # a cache is not converted
    for segment, bias in zip(segments, biases, strict=True):
        if bias is None:
            own = jnp.tile(jnp.swapaxes(segment.key, 2, 3), (1, 1, groups, 1)).astype(query.dtype)
            scores.append(jnp.sum((query * own).astype(jnp.float32), axis=-1, keepdims=True))
            continue
        s = jnp.einsum("rkqd,rkdt->rkqt", query, segment.key.astype(query.dtype), preferred_element_type=jnp.float32)
        scores.append(s + (bias if bias.shape[2] == 1 else jnp.tile(bias, (1, 1, groups, 1))))
    top = functools.reduce(jnp.maximum, [jnp.max(s, axis=-1, keepdims=True) for s in scores])
    top = jax.lax.stop_gradient(top)
    out, total = 0.0, 0.0
    for segment, bias, s in zip(segments, biases, scores, strict=True):
        weights = jnp.exp(s - top)
        total += jnp.sum(weights, axis=-1, keepdims=True)
        values = segment.value.astype(query.dtype)
        if bias is None:
            out += weights * jnp.tile(values, (1, 1, groups, 1)).astype(jnp.float32)
            continue
        out += jnp.einsum("rkqt,rktd->rkqd", weights.astype(query.dtype), values, preferred_element_type=jnp.float32)
    out = (out / total).reshape(rows, heads, groups, new, size).transpose(0, 3, 1, 2, 4)
    return out.reshape(rows, new, -1).astype(qkv.dtype), fresh


class Linear(nnx.Module):
    """A matrix [in, *out] and an optional bias [*out]."""

    def __init__(self, in_dim: int, *out_dim: int, use_bias: bool = False, std: float = 0.02, rngs: nnx.Rngs):
        shape = (in_dim, *out_dim)
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape) * std)
        self.bias = nnx.Param(jnp.zeros(out_dim)) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = matmul(x, self.kernel[...])
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation in float32, scaled in the input's dtype."""

    def __init__(self, dim: int, eps: float):
        self.scale, self.eps = nnx.Param(jnp.ones(dim)), eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * self.scale[...].astype(x.dtype)


class HeadNorm(nnx.Module):
    """Scale and shift [H, D] of `head_norm`, the latter unless the norm is a root-mean-square one."""

    def __init__(self, heads: int, config: BlockConfig):
        self.scale = nnx.Param(jnp.ones((heads, config.head_dim)))
        self.bias = None if config.qk_rms else nnx.Param(jnp.zeros((heads, config.head_dim)))


class Attention(nnx.Module):
    """Grouped-query attention over the cache and the new tokens.

    The query, key and value projections are one kernel [d, K, H/K + 2, D]: per key-value head its query heads, its key
    and its value. One matrix product feeds all three, and the kernel still shards over heads.
    """

    def __init__(self, config: BlockConfig, rngs: nnx.Rngs, inputs: int | None = None):
        self.config, self.groups = config, config.heads // config.kv_heads
        out_dim = config.kv_heads, self.groups + 2, config.head_dim
        self.qkv = Linear(inputs or config.dim, *out_dim, use_bias=config.qkv_bias, rngs=rngs)
        self.query_norm = HeadNorm(config.heads, config) if config.qk_norm else None
        self.key_norm = HeadNorm(config.kv_heads, config) if config.qk_norm else None
        self.out = Linear(config.heads * config.head_dim, config.dim, rngs=rngs)

    def __call__(self, x: jax.Array, context: Context, past: tuple[KV, ...]) -> tuple[jax.Array, KV]:
        norms = None
        if self.config.qk_norm:
            params = (param for norm in (self.query_norm, self.key_norm) for param in (norm.scale, norm.bias))
            norms = tuple(None if param is None else param[...] for param in params)
        biases = (*context.past_bias, context.new_bias)
        filled = context.past_filled or (None,) * len(past)
        out, fresh = attend(self.config, mesh.divided(self.qkv(x), 2), context.rope, norms, past, biases, filled)
        return mesh.whole(self.out(out)), fresh


class FeedForward(nnx.Module):
    """SwiGLU or GeGLU, in float32, in half a CPU's time; gate and up projection are one kernel [d, 2, F]."""

    def __init__(self, config: BlockConfig, rngs: nnx.Rngs):
        self.activation = config.activation
        self.gate_up = Linear(config.dim, 2, config.ffn_dim, rngs=rngs)
        self.down = Linear(config.ffn_dim, config.dim, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = mesh.divided(self.gate_up(x), 3).astype(jnp.float32)
        hidden = ACTIVATIONS[self.activation](hidden[..., 0, :]) * hidden[..., 1, :]
        return mesh.whole(self.down(hidden.astype(x.dtype)))


class Block(nnx.Module):
    """Pre-norm decoder block: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: BlockConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.dim, config.norm_eps) if config.input_norm else None
        self.attention = Attention(config, rngs)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = FeedForward(config, rngs)

    def __call__(self, x: jax.Array, context: Context, past: tuple[KV, ...] = ()) -> tuple[jax.Array, KV]:
        """Maps `x` [R, S, d] to [R, S, d] and returns the new tokens' keys and values."""
        h = x if self.attention_norm is None else self.attention_norm(x)
        h, fresh = self.attention(h, context, past)
        x = x + h
        return x + self.ffn(self.ffn_norm(x)), fresh


def run_blocks(blocks, x: jax.Array, context: Context, past: tuple[Segment, ...] = ()) -> tuple[jax.Array, Segment]:
    """Applies `blocks` in turn to `x` [R, S, d]; returns the output and the new tokens' segment.

    Unrolled: on CPU a scan over stacked layers copies each layer's weights out of the stack, which costs more.
    """
    outputs, fresh = _run(blocks, x, context, past)
    return outputs[-1], fresh


def run_target(
    blocks, norm, x: jax.Array, context: Context, past: tuple[Segment, ...], taps: tuple[int, ...]
) -> tuple[jax.Array, Segment]:
    """A target's pass: `run_blocks`, then its last norm.

    Args:
      taps: what an EAGLE-3 drafter reads beside the features: the outputs of so many blocks, each from 1 to all.

    Returns:
      Features [R, S, d], or [R, S, (1 + taps) d] with the tapped outputs behind them; and the new tokens' segment.
    """
    outputs, fresh = _run(blocks, x, context, past)
    features = norm(outputs[-1])
    if taps:
        features = jnp.concatenate([features, *(outputs[tap] for tap in taps)], axis=-1)
    return features, fresh


def _run(blocks, x, context, past):
    """The input and the outputs of all blocks, and the new tokens' segment."""
    x = mesh.whole(x)
    outputs, fresh = [x], []
    for i, block in enumerate(blocks):
        x, kv = block(x, context, tuple(segment[i] for segment in past))
        outputs.append(x)
        fresh.append(kv)
    return outputs, tuple(fresh)
