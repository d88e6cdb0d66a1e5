"""What is trained, and what stays as it is."""

from ..model.quantized_layers import dequantize_linears
from ..model.quantizer_salmonn import set_quantized_parts


def freeze_base_parts(
    model, freeze_language_model_lora: bool = False, freeze_encoder_lora: bool = False, freeze_speech_parts=False
):
    """
    Leave only what SALMONN trains with gradients: the projector (without its `frozen_parameters`) and LoRA, in
    float32; the rest keeps its precision. A projector that was quantised is dequantised, so that it can be trained.

    Args:
        model ([`SalmonnForConditionalGeneration`]): changed in place.
        freeze_language_model_lora (`bool`): as the alignment stage does.
        freeze_encoder_lora (`bool`): the frames of a clip then stay the same, and can be cached.
        freeze_speech_parts (`bool`): everything from the frames to the words, LoRA in the speech encoder included;
            LoRA in the language model and the projector's `sound_parameters` alone are trained.
    """
    projector = model.projector
    trained = tuple(f"projector.{name}" for name in (projector.sound_parameters if freeze_speech_parts else ("",)))
    frozen = tuple(f"projector.{name}" for name in projector.frozen_parameters)
    adapters = () if freeze_language_model_lora else ("language_model.",)
    adapters += () if freeze_encoder_lora or freeze_speech_parts else ("audio_tower.",)
    frozen_parts = tuple(f"projector.{name}" for name in projector.config.base_parts)
    parts = model.config.quantized_parts
    trained_parts = [part for part in parts if part.startswith("projector") and part not in frozen_parts]
    if trained_parts:
        dequantize_linears(projector)
        rest = {part: settings for part, settings in parts.items() if part not in trained_parts}
        set_quantized_parts(model.config, rest)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        is_trained = trained and name.startswith(trained) and not (frozen and name.startswith(frozen))
        if is_trained or (".lora_" in name and name.startswith(adapters)):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    model.train()  # puts the frozen encoders in evaluation mode
