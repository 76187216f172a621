"""Speech and series over time of transformers, of 32 channels and two layers."""

from collections.abc import Callable
from typing import Any

from benchmarks.zoo_models.entry import randn
from benchmarks.zoo_models.language import BODY, SEQ2SEQ, TEXT, VOCABULARY, pairs, tiny
from benchmarks.zoo_models.speech import SPEECH

SERIES = "series over time"


def _values(length: int) -> Callable[[int], Any]:
    return lambda batch: {"input_values": randn(batch, length)}


_CONVOLUTIONS = {"conv_dim": (8, 8), "conv_stride": (4, 4), "conv_kernel": (8, 4), "num_feat_extract_layers": 2}
_WAV = {
    **_CONVOLUTIONS,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
    "vocab_size": VOCABULARY,
}
_CODEC = {"hidden_size": 16, "num_filters": 4, "codebook_size": 16}
_SEQ2SEQ = {**SEQ2SEQ, "decoder_start_token_id": 1}
_PAST = {"prediction_length": 4, "context_length": 16, "num_input_channels": 2}


def _heard(length: int, bins: int, *, by_bin: bool = False) -> Callable[[int], Any]:
    shape = (bins, length) if by_bin else (length, bins)
    return lambda batch: {"input_features": randn(batch, *shape), "decoder_input_ids": pairs(batch)["decoder_input_ids"]}


def _past(batch: int) -> Any:
    return {"past_values": randn(batch, 16, 2)}


ARCHITECTURES = [
    tiny("Wav2Vec2ForCTC", "Wav2Vec2Config", SPEECH, _values(400), **_WAV),
    tiny("HubertForCTC", "HubertConfig", SPEECH, _values(400), **_WAV),
    tiny("WavLMForCTC", "WavLMConfig", SPEECH, _values(400), **_WAV),
    tiny("SEWForCTC", "SEWConfig", SPEECH, _values(400), **_WAV, squeeze_factor=2),
    tiny("UniSpeechSatForCTC", "UniSpeechSatConfig", SPEECH, _values(400), **_WAV, num_codevectors_per_group=4, codevector_dim=16),
    tiny("Wav2Vec2ConformerForCTC", "Wav2Vec2ConformerConfig", SPEECH, _values(400), **_WAV),
    tiny(
        "Data2VecAudioForCTC",
        "Data2VecAudioConfig",
        SPEECH,
        _values(400),
        **_CONVOLUTIONS,
        vocab_size=VOCABULARY,
        mask_time_prob=0.0,
        layerdrop=0.0,
        num_conv_pos_embeddings=2,
        conv_pos_kernel_size=3,
        num_conv_pos_embedding_groups=2,
    ),
    tiny(
        "ASTForAudioClassification",
        "ASTConfig",
        SPEECH,
        lambda batch: {"input_values": randn(batch, 64, 32)},
        max_length=64,
        num_mel_bins=32,
        patch_size=16,
    ),
    tiny(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        SPEECH,
        _heard(40, 8, by_bin=True),
        **TEXT,
        **_SEQ2SEQ,
        **dict.fromkeys(BODY),
        max_source_positions=20,
        max_target_positions=16,
        num_mel_bins=8,
        suppress_tokens=[],
        begin_suppress_tokens=[],
    ),
    tiny(
        "Speech2TextForConditionalGeneration",
        "Speech2TextConfig",
        SPEECH,
        _heard(40, 8),
        **TEXT,
        **_SEQ2SEQ,
        **dict.fromkeys(BODY),
        input_feat_per_channel=8,
        conv_channels=16,
        max_source_positions=64,
        max_target_positions=64,
    ),
    tiny(
        "MoonshineForConditionalGeneration",
        "MoonshineConfig",
        SPEECH,
        lambda batch: {"input_values": randn(batch, 4000), "decoder_input_ids": pairs(batch)["decoder_input_ids"]},
        **TEXT,
        num_hidden_layers=None,
        num_attention_heads=None,
        encoder_num_hidden_layers=1,
        decoder_num_hidden_layers=1,
        encoder_num_attention_heads=2,
        decoder_num_attention_heads=2,
        decoder_start_token_id=1,
    ),
    tiny(
        "EncodecModel",
        "EncodecConfig",
        SPEECH,
        lambda batch: {"input_values": randn(batch, 1, 640)},
        **{**dict.fromkeys(BODY), **_CODEC},
        codebook_dim=16,
        upsampling_ratios=[4, 2],
        target_bandwidths=[24.0],  # of two codebooks
    ),
    tiny(
        "VitsModel",
        "VitsConfig",
        SPEECH,
        lambda batch: {"input_ids": pairs(batch)["input_ids"]},
        vocab_size=VOCABULARY,
        ffn_dim=64,
        intermediate_size=None,
        flow_size=16,
        spectrogram_bins=9,
        upsample_initial_channel=16,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1]],
        prior_encoder_num_flows=1,
        depth_separable_num_layers=1,
        duration_predictor_flow_bins=4,
    ),
    tiny(
        "SpeechT5HifiGan",
        "SpeechT5HifiGanConfig",
        SPEECH,
        lambda batch: {"spectrogram": randn(batch, 12, 16)},
        **dict.fromkeys(BODY),
        model_in_dim=16,
        upsample_initial_channel=16,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1]],
    ),
    tiny(
        "ClapAudioModel",
        "ClapAudioConfig",
        SPEECH,
        lambda batch: {"input_features": randn(batch, 1, 64, 16)},
        spec_size=32,
        num_mel_bins=16,
        patch_size=4,
        patch_stride=[4, 4],
        patch_embeds_hidden_size=16,
        hidden_size=32,
        depths=[1, 1],
        num_attention_heads=[2, 2],
        window_size=4,
        num_hidden_layers=None,
    ),
    tiny(
        "PatchTSTForPrediction",
        "PatchTSTConfig",
        SERIES,
        _past,
        **_PAST,
        hidden_size=None,
        intermediate_size=None,
        d_model=32,
        ffn_dim=64,
        patch_length=4,
        patch_stride=4,
    ),
    tiny(
        "PatchTSMixerForPrediction",
        "PatchTSMixerConfig",
        SERIES,
        _past,
        **_PAST,
        **dict.fromkeys(BODY),
        d_model=16,
        num_layers=2,
        patch_length=4,
        patch_stride=4,
    ),
]
