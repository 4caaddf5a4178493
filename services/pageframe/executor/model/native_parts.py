"""Parts that layers of the native runner are put together from; what differs is data.

kind of norm      root mean square, or centred with a bias
feed-forward      gate and up, or one product and an activation
positions         rotary heads, or scores that fall with distance
halves of a layer one after the other, or both from what came in
"""

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import gelu, layer_norm, rms_norm, silu

from pageframe.executor.model.decoder_config import Activation, DecoderConfig, NormKind
from pageframe.executor.model.linear import Linear
from pageframe.executor.model.weights import WeightReader
from pageframe.kernels.ops.alibi import Alibi
from pageframe.kernels.scratch import Scratch


@dataclass(frozen=True, slots=True)
class Norm:
    """Normalises channels, in float32 inside.

    Attributes:
        kind: Which norm.
        weight: shape (size,).
        bias: shape (size,), of a centred norm alone; or None.
        epsilon: Added to the mean square, or to the variance.
    """

    kind: NormKind
    weight: torch.Tensor
    bias: torch.Tensor | None
    epsilon: float

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Normalise ``rows``, shape (T, size), into fresh memory."""
        shape = self.weight.shape
        if self.kind is NormKind.CENTRED:
            return layer_norm(rows, shape, self.weight, self.bias, self.epsilon)
        return rms_norm(rows, shape, self.weight, self.epsilon)


def read_norm(reader: WeightReader, config: DecoderConfig, name: str) -> Norm:
    """The norm ``name`` over the channels between layers.

    Raises:
        InvalidRequestError: MODEL_WEIGHTS_INVALID.
    """
    weight = reader.read(f"{name}.weight", config.hidden_size)
    bias = None
    if config.norm is NormKind.CENTRED:
        bias = reader.read(f"{name}.bias", config.hidden_size)
    return Norm(config.norm, weight, bias, config.norm_epsilon)


class LayerReader:
    """Where one layer is read from; a family's own knows what its tensors are called.

    Args:
        reader: Open.
        config: Sizes that the tensors must have.
        scratch: Memory that linear layers give their results in.
        index: Which layer.
        prefix: What the names of all layers begin with.
    """

    def __init__(
        self, reader: WeightReader, config: DecoderConfig, scratch: Scratch, index: int, prefix: str
    ) -> None:
        self._reader = reader
        self._config = config
        self._scratch = scratch
        self._index = index
        self._prefix = f"{prefix}.{index}"

    def _norm(self, name: str) -> Norm:
        return read_norm(self._reader, self._config, f"{self._prefix}.{name}")


@dataclass(frozen=True, slots=True)
class FeedForward:
    """The feed-forward part of a layer; I is the intermediate size.

    Attributes:
        activation: What is between the products.
        up: hidden to I; of a gated one to 2 * I, the gate first.
        down: I to hidden.
        scratch: Memory for what is between them.
    """

    activation: Activation
    up: Linear
    down: Linear
    scratch: Scratch

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Apply to ``rows``, shape (T, hidden); valid until the next call of any layer's."""
        wide = self.up(rows)
        if self.activation is Activation.GELU:
            return self.down(gelu(wide))
        gate, up = wide.chunk(2, dim=-1)
        activated = self.scratch.take("activated", *gate.shape)
        return self.down(torch.mul(silu(gate, inplace=True), up, out=activated))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Weights of one layer; D is the head size.

    Attributes:
        attention_norm: Before attention.
        query_key_value: hidden to (num_heads + 2 * num_kv_heads) * D, all queries first, then all
            keys.
        query_key_norm: shape (num_heads + num_kv_heads, D), or None.
        attention_output: num_heads * D to hidden.
        feed_forward_norm: Before the feed-forward part; None where that reads what attention reads.
        feed_forward: That part.
        window: Positions that a token sees; None for all.
    """

    attention_norm: Norm
    query_key_value: Linear
    query_key_norm: torch.Tensor | None
    attention_output: Linear
    feed_forward_norm: Norm | None
    feed_forward: FeedForward
    window: int | None


def alibi_of(config: DecoderConfig, device: torch.device) -> Alibi | None:
    """How scores of the model fall with distance; None if they do not.

    Slopes and biases are rounded to bfloat16, as transformers does in ``build_alibi_tensor``: a
    float32 answer is only the same with the same rounding.
    """
    if not config.has_alibi:
        return None
    slopes = alibi_slopes(config.num_heads).to(device, torch.bfloat16)
    return Alibi(slopes, config.head_dim**-0.5)


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """Slope of each head, float32, shape (num_heads,): powers of ``2 ** (-8 / num_heads)``.

    Where that is no power of two, heads beyond it take every other slope of twice as many.
    """
    whole = 1 << (num_heads.bit_length() - 1)
    slopes = [_powers(whole, torch.arange(1, whole + 1))]
    if whole != num_heads:
        slopes.append(_powers(2 * whole, torch.arange(1, 2 * (num_heads - whole) + 1, 2)))
    return torch.cat(slopes)


def _powers(num_heads: int, exponents: torch.Tensor) -> torch.Tensor:
    base = 2.0 ** -(2.0 ** -(math.log2(num_heads) - 3))
    return torch.pow(torch.tensor(base, dtype=torch.float32), exponents.int())
