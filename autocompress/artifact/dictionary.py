"""What headers of files tend to say: the text model learns it before it codes. Part of the format."""

from __future__ import annotations

import numpy as np

DICTIONARY = np.frombuffer(
    b"encoder.layers.0.self_attn.in_proj_weight\nencoder.layers.0.self_attn.in_proj_bias\nout_proj.weight\n"
    b"out_proj.bias\nlinear1.weight\nlinear1.bias\nlinear2.weight\nlinear2.bias\nlstm.weight_ih_l0\nweight_hh_l0\n"
    b"bias_ih_l0\nembedding.weight\nfc1.weight\nfc1.bias\nfc2.weight\nfeatures.0.conv.weight\nfeatures.0.norm.bias\n"
    b"classifier.weight\nlayer1.0.conv1.weight\nlayer1.0.bn1.weight\nlayer1.0.bn1.bias\nlayer1.0.conv2.weight\n"
    b"layer1.0.bn2.weight\nlayer1.0.bn2.bias\ndownsample.0.weight\nstem.conv.weight\nstem.norm.weight\n"
    b"stem.norm.bias\nblock1.conv1.weight\nblock1.norm1.weight\nblock1.norm1.bias\nshortcut.conv.weight\n"
    b"shortcut.norm.weight\nshortcut.norm.bias\nhead.weight\nhead.bias\n"
    b"activation\0shardtanh\0activation\0srelu\0activation_bits\0i8\0activation_bits\0i6\0channels\0f0.5\0"
    b"model\0precision\0sbfloat16\0rate_penalty\0f0.05\0vectors\0se8m3\0weights\0sint4\0weights\0sint3\0"
    b"weights\0sint2\0weights\0sint8\0weights\0sfloat16\0sparsity\0f0.9\0sparsity\0f0.95\0sparsity\0f0.7\0",
    np.uint8,
)
