"""Speech and audio: torchaudio, asteroid, speechbrain, pytorchcv, conformer and encodec."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.zoo_models.entry import Architecture, randn
from benchmarks.zoo_models.language import VOCABULARY, pairs

SPEECH = "speech and audio"


def _made(module: str, name: str, **settings: Any) -> nn.Module:
    return getattr(importlib.import_module(module), name)(**settings)


def _of(library: str, module: str, name: str, inputs: Callable[[int], Any], **settings: Any) -> Architecture:
    return Architecture(name, library, SPEECH, functools.partial(_made, module, name, **settings), inputs)


def _wave(length: int) -> Callable[[int], Any]:
    return lambda batch: randn(batch, length)


def _frames(*shape: int) -> Callable[[int], Any]:
    return lambda batch: randn(batch, *shape)


def _lengths(length: int, features: int) -> Callable[[int], Any]:
    return lambda batch: (randn(batch, length, features), torch.full((batch,), length))


_SEPARATOR = {"n_src": 2, "kernel_size": 16, "n_filters": 16, "stride": 8}


ARCHITECTURES = [
    _of(
        "torchaudio",
        "torchaudio.models",
        "ConvTasNet",
        _frames(1, 256),
        enc_kernel_size=16,
        enc_num_feats=16,
        msk_num_feats=16,
        msk_num_hidden_feats=32,
        msk_num_layers=2,
        msk_num_stacks=2,
    ),
    _of(
        "torchaudio",
        "torchaudio.models",
        "Conformer",
        _lengths(20, 32),
        input_dim=32,
        num_heads=2,
        ffn_dim=64,
        num_layers=2,
        depthwise_conv_kernel_size=5,
    ),
    _of("torchaudio", "torchaudio.models", "Wav2Letter", _frames(1, 2000), num_classes=10),
    _of("torchaudio", "torchaudio.models", "DeepSpeech", _frames(1, 20, 32), n_feature=32, n_hidden=32, n_class=10),
    _of(
        "torchaudio",
        "torchaudio.models",
        "Emformer",
        _lengths(12, 32),
        input_dim=32,
        num_heads=2,
        ffn_dim=64,
        num_layers=2,
        segment_length=4,
        right_context_length=0,
    ),
    _of(
        "torchaudio",
        "torchaudio.models",
        "WaveRNN",
        lambda batch: (randn(batch, 1, 32), randn(batch, 1, 8, 8)),
        upsample_scales=[2, 2, 2],
        n_classes=16,
        hop_length=8,
        n_res_block=1,
        n_rnn=16,
        n_fc=16,
        kernel_size=5,
        n_freq=8,
        n_hidden=16,
        n_output=16,
    ),
    _of(
        "asteroid",
        "asteroid.models",
        "ConvTasNet",
        _wave(256),
        **_SEPARATOR,
        n_blocks=2,
        n_repeats=1,
        bn_chan=16,
        hid_chan=32,
        skip_chan=16,
    ),
    _of("asteroid", "asteroid.models", "DPRNNTasNet", _wave(256), **_SEPARATOR, n_repeats=1, bn_chan=16, hid_size=16, chunk_size=10),
    _of("asteroid", "asteroid.models", "DPTNet", _wave(256), **_SEPARATOR, n_repeats=1, ff_hid=32, chunk_size=10),
    _of("asteroid", "asteroid.models", "SuDORMRFNet", _wave(320), n_src=2, bn_chan=16, num_blocks=2, upsampling_depth=2, n_filters=16),
    _of("asteroid", "asteroid.models", "LSTMTasNet", _wave(256), n_src=2, n_layers=1, hid_size=16, n_filters=16),
    _of("asteroid", "asteroid.models", "DCCRNet", _frames(1, 16000), architecture="mini"),
    _of(
        "speechbrain",
        "speechbrain.lobes.models.ECAPA_TDNN",
        "ECAPA_TDNN",
        _frames(20, 16),
        input_size=16,
        channels=[16, 16, 16, 16, 48],
        attention_channels=16,
        res2net_scale=4,
        se_channels=16,
        lin_neurons=16,
    ),
    _of(
        "speechbrain",
        "speechbrain.lobes.models.Xvector",
        "Xvector",
        _frames(30, 16),
        in_channels=16,
        tdnn_channels=[16, 16, 16, 16, 32],
        lin_neurons=16,
    ),
    _of(
        "speechbrain",
        "speechbrain.lobes.models.CRDNN",
        "CRDNN",
        _frames(20, 16),
        input_shape=[None, None, 16],
        cnn_channels=[8, 8],
        rnn_layers=1,
        rnn_neurons=16,
        dnn_neurons=16,
    ),
    _of(
        "speechbrain",
        "speechbrain.lobes.models.HifiGAN",
        "HifiganGenerator",
        _frames(16, 12),
        in_channels=16,
        out_channels=1,
        resblock_type="1",
        resblock_dilation_sizes=[[1, 3], [1, 3]],
        resblock_kernel_sizes=[3, 5],
        upsample_kernel_sizes=[4, 4],
        upsample_initial_channel=32,
        upsample_factors=[2, 2],
    ),
    _of(
        "speechbrain",
        "speechbrain.lobes.models.RNNLM",
        "RNNLM",
        lambda batch: pairs(batch)["input_ids"],
        output_neurons=VOCABULARY,
        embedding_dim=32,
        rnn_layers=1,
        rnn_neurons=32,
        dnn_neurons=32,
    ),
    _of("pytorchcv", "pytorchcv.models.quartznet", "quartznet5x5_en_ls", _lengths(64, 64), num_classes=29),
    _of("conformer", "conformer", "Conformer", _frames(20, 32), dim=32, depth=2, dim_head=16, heads=2),
    _of("encodec", "encodec.modules", "SEANetEncoder", _frames(1, 320), dimension=16, n_filters=4, ratios=[2, 2]),
]
