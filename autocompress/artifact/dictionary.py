"""What headers of files tend to contain: the text model learns it before it codes. Part of the format."""

from __future__ import annotations

import numpy as np

_NAMES = (
    b"encoder.layers.0.self_attn.in_proj_weight\nencoder.layers.0.self_attn.in_proj_bias\nout_proj.weight\n"
    b"out_proj.bias\nlinear1.weight\nlinear1.bias\nlinear2.weight\nlinear2.bias\nlstm.weight_ih_l0\nweight_hh_l0\n"
    b"bias_ih_l0\nbias_hh_l0\nembedding.weight\nfc1.weight\nfc1.bias\nfc2.weight\nfc2.bias\n"
    b"features.0.conv.weight\nfeatures.0.norm.bias\nclassifier.weight\nlayer1.0.conv1.weight\nlayer1.0.bn1.weight\n"
    b"layer1.0.bn1.bias\nlayer1.0.conv2.weight\nlayer1.0.bn2.weight\nlayer1.0.bn2.bias\ndownsample.0.weight\n"
    b"stem.conv.weight\nstem.norm.weight\nstem.norm.bias\nblock1.conv1.weight\nblock1.norm1.weight\n"
    b"block1.norm1.bias\nblock1.conv2.weight\nblock1.norm2.weight\nblock1.norm2.bias\nblock2.shortcut.conv.weight\n"
    b"block2.shortcut.norm.weight\nblock2.shortcut.norm.bias\nhead.weight\nhead.bias\n"
    b"0.weight\n0.bias\n1.weight\n1.bias\n2.weight\n2.bias\n3.weight\n3.bias\n5.weight\n5.bias\n7.weight\n7.bias"
)
_RECIPES = b"\x01\x13activation\0shardtanh\x0factivation\0srelu\x13activation_bits\0i8\x13activation_bits\0i6"
_RANKS = (b"\x04\x01\x01" * 5 + b"\x02\x01", b"\x04\x01\x04\x01\x02\x01\x02\x01", b"\x02\x01\x02\x01\x02\x01")
_SIZES = (b"\x11\0\0\0\0\0\x21\0\0\0\0\0\x0b\0", b"\x15\0\x33\0\x0b\0", b"\x0b\0")
_KINDS = (b"\x27\x07\x07\x28\x07\x07\x28\x07\x07\x26\x07", b"\x28\x07\x28\x07\x27\x07")
_PARAMETERS = (bytes(12) + b"\0\0\x40\x80" + b"\xc0" * 6 + b"\0", bytes(6) + b"\xc0" * 3 + b"\0")

DICTIONARY = np.frombuffer(
    _RECIPES
    + b"".join(ranks + sizes for ranks, sizes in zip(_RANKS, _SIZES, strict=True))
    + b"\x02\x04\0\0\x04\0\0\x04\0\0"
    + b"".join(kinds + planes for kinds, planes in zip(_KINDS, _PARAMETERS, strict=True))
    + _NAMES
    + _RANKS[0]
    + _SIZES[0]
    + _KINDS[0]
    + _PARAMETERS[0],
    np.uint8,
)
