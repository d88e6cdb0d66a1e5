"""What is trained, and what stays as it is."""

from ..model.quantized_layers import widen_linears

# A summary's MLP is fitted before, by `start_sound_summary`: no gradient comes through the choice that it makes.
TRAINED_PARTS = ("audio_norm", "sound_norm", "sound_summary.marker", "connector", "ctc_head")


def freeze_base_parts(
    model,
    freeze_language_model_lora: bool = False,
    freeze_encoder_lora: bool = False,
    freeze_speech_parts: bool = False,
):
    """
    Leave only what SALMONN trains with gradients: LayerNorms, Q-Former, projection, CTC head and LoRA, in float32; the
    encoders and the language model keep their precision. A connector that was quantised is dequantised: its 8 bits
    could not be trained.

    Args:
        model ([`SalmonnForConditionalGeneration`]): changed in place.
        freeze_language_model_lora (`bool`): as the alignment stage does.
        freeze_encoder_lora (`bool`): the frames of a clip then stay the same, and can be cached.
        freeze_speech_parts (`bool`): everything from the frames to the words, LoRA in the speech encoder included;
            LoRA in the language model and the marker of sounds' names alone are trained.
    """
    trained = ("sound_summary.marker",) if freeze_speech_parts else TRAINED_PARTS
    adapters = () if freeze_language_model_lora else ("language_model.",)
    adapters += () if freeze_encoder_lora or freeze_speech_parts else ("audio_tower.",)
    if "connector" in (model.config.quantization or {}):
        widen_linears(model.connector)
        model.config.quantization = {k: v for k, v in model.config.quantization.items() if k != "connector"}
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.startswith(trained) or (".lora_" in name and name.startswith(adapters)):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    model.train()  # puts the frozen encoders in evaluation mode
