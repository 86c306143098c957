"""What `nn.MultiheadAttention` does, made of linear layers.

torch's own keeps three matrices in one tensor and computes past the modules that it has, and its heads are as wide as
its inputs are. Here each matrix is a layer like any other, and heads can lose channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.MultiheadAttention):
    """Scaled dot-product attention of several heads (Vaswani et al., NeurIPS 2017), with the weights of `torchs`, and
    to be used as it is, which has no keys and values of its own."""

    def __init__(self, torchs: nn.MultiheadAttention) -> None:
        nn.Module.__init__(self)
        told = {name: value for name, value in vars(torchs).items() if name not in vars(self)}
        vars(self).update(told, _qkv_same_embed_dim=False)  # so torch's encoders compute past no module
        apart = (torchs.q_proj_weight, torchs.k_proj_weight, torchs.v_proj_weight)
        weights = apart if torchs.in_proj_weight is None else torchs.in_proj_weight.chunk(3)
        biases = (None,) * 3 if torchs.in_proj_bias is None else torchs.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = map(linear, weights, biases)
        self.add_module("out_proj", linear(torchs.out_proj.weight, torchs.out_proj.bias))
        self.train(torchs.training)

    @property
    def in_proj_weight(self) -> Tensor:  # type: ignore[override]
        """[3 x channels, inputs]: as torch's has it, for code that asks."""
        return torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])

    @property
    def in_proj_bias(self) -> Tensor | None:  # type: ignore[override]
        biases: list[Tensor] = [b for b in (self.q_proj.bias, self.k_proj.bias, self.v_proj.bias) if b is not None]
        return torch.cat(biases) if biases else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`: (output, weights or None). is_causal: what attn_mask has, too."""
        single, turned = query.ndim == 2, query.ndim == 3 and not self.batch_first
        inputs = [x[None] if single else x.transpose(0, 1) if turned else x for x in (query, key, value)]
        layers = (self.q_proj, self.k_proj, self.v_proj)
        # [samples, heads, places, channels of a head]
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer, x in zip(layers, inputs, strict=True)
        )
        mask = None if attn_mask is None else _added(attn_mask, q)
        if mask is not None and mask.ndim == 3:
            mask = mask.reshape(-1, self.num_heads, *mask.shape[1:])
        if key_padding_mask is not None:
            padding = _added(key_padding_mask, q).view(-1, 1, 1, k.shape[-2])
            mask = padding if mask is None else mask + padding
        dropout, scale = self.dropout if self.training else 0.0, self.head_dim**-0.5
        weights = None
        if need_weights:
            scores = scale * q @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if single:
            return output[0], weights if weights is None else weights[0]
        return output.transpose(0, 1) if turned else output, weights


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """What is added to the scores: minus infinity where a mask of booleans forbids to look."""
    if mask.is_floating_point():
        return mask.to(like.dtype)
    return torch.zeros(mask.shape, dtype=like.dtype, device=mask.device).masked_fill(mask, -torch.inf)


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """The layer that has copies of these, and learns what they do."""
    made = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    for name, tensor in (("weight", weight), ("bias", bias)):
        copied = tensor if tensor is None else tensor.detach().clone(memory_format=torch.contiguous_format)
        made.register_parameter(name, copied if copied is None else nn.Parameter(copied, weight.requires_grad))
    return made
