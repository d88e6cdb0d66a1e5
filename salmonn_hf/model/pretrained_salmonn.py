"""Loading and saving of SALMONN: whole checkpoints, adapter checkpoints around base parts, and adapters of PEFT."""

import copy
import os
from pathlib import Path

import torch
from transformers import GenerationConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME

from .adapters import AdapterMixin, adapter_weights, base_of_adapter, find_file
from .checkpoint import (
    adapter_state_dict,
    base_state_dict,
    check_loaded,
    check_weight_files,
    round_matrices,
    without_base_parts,
)
from .configuration_salmonn import SalmonnConfig
from .lora import OWN
from .processing_salmonn import keep_transcription_ids
from .quantizer_salmonn import SalmonnQuantizationConfig
from .remote_code import save_code

# Of `from_pretrained`, what also says how base parts are fetched; a revision is the checkpoint's own.
BASE_PART_KWARGS = ("cache_dir", "token", "local_files_only")


class SalmonnPreTrainedModel(AdapterMixin, PreTrainedModel):
    config: SalmonnConfig
    config_class = SalmonnConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    # The embeddings of the language model are a module, which stays on its own device where the parts have several.
    _skip_keys_device_placement = ["past_key_values", "token_embedding"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    # Loading an adapter checkpoint must not ask for what its base parts bring, nor a saved one for derived buffers.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """
        As `PreTrainedModel.from_pretrained`. A checkpoint whose config names `base_parts` holds only what was trained;
        the frozen parts are then found by [`resolve_base_part`] and put together with it. Of an adapter of PEFT the
        checkpoint that it was made for is loaded, and the adapter into it.

        Raises:
            OSError: if the checkpoint or one of its base parts cannot be had, or a file was cut off; the message says
                what was tried, or names the file.
            ValueError: if the files lack tensors, naming them; with `output_loading_info` a full checkpoint's report
                names them instead. If an adapter's checkpoint is none.
        """
        if pretrained_model_name_or_path is None:
            return cls.from_files(None, *model_args, config=config, **kwargs)
        base_kwargs = {name: kwargs[name] for name in BASE_PART_KWARGS if name in kwargs}
        # The Auto classes come with an adapter's base, and name the adapter beside it.
        of_adapter = kwargs.pop("adapter_kwargs", None) or {}
        asked, base = of_adapter.get("_adapter_model_path"), str(pretrained_model_name_or_path)
        revision = (
            kwargs.get("revision") if asked in (None, pretrained_model_name_or_path) else of_adapter.get("revision")
        )
        asked = str(asked or pretrained_model_name_or_path)
        hub_kwargs = base_kwargs | ({} if revision is None else {"revision": revision})
        hub_kwargs |= {"subfolder": subfolder} if (subfolder := kwargs.get("subfolder")) else {}
        if found := base_of_adapter(asked, **hub_kwargs):
            base = found if base == asked else base
            kwargs.pop("revision", None)  # the adapter's own
            kwargs.pop("subfolder", None)
            subfolder = None
        elif base != asked:  # a checkpoint itself, whose adapter_config.json names another place
            base, config, kwargs["revision"] = asked, None, revision
        name, with_report = kwargs.pop("adapter_name", None), kwargs.pop("output_loading_info", False)
        model, report = cls.from_files(base, *model_args, config=config, output_loading_info=True, **kwargs)
        if not (with_report or model.config.base_parts):
            check_loaded(base, report)
        if subfolder:  # what an adapter can name as its base: of a hub repository there is no name for it
            base = os.path.join(base, subfolder) if os.path.isdir(base) else ""
            model.name_or_path = model.config.name_or_path = base
        if found or (find_file(asked, ADAPTER_CONFIG_NAME, **hub_kwargs) and adapter_weights(asked, **hub_kwargs)):
            name = name or ("adapter" if OWN in getattr(model, "peft_config", {}) else OWN)
            model.load_adapter(asked, name, adapter_kwargs=hub_kwargs)
        return (model, report) if with_report else model

    @classmethod
    def from_files(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """`from_pretrained` of a checkpoint, without another adapter that may lie there."""
        base_kwargs = {name: kwargs[name] for name in BASE_PART_KWARGS if name in kwargs}
        hub_kwargs = base_kwargs | {name: kwargs[name] for name in ("revision", "subfolder") if kwargs.get(name)}
        if hasattr(settings := getattr(config, "quantization_config", None), "to_dict"):
            config = copy.deepcopy(config)  # a loaded model has the object, the loader takes a dict
            config.quantization_config = settings.to_dict()
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        if not isinstance(config, SalmonnConfig):
            config = SalmonnConfig.from_pretrained(pretrained_model_name_or_path, **hub_kwargs)
        check_weight_files(Path(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
        if not config.base_parts:
            nowhere = {"subfolder": "none"}  # where it looks for an adapter, and finds none
            kwargs |= {"config": config, "adapter_kwargs": nowhere}
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

        with torch.device("meta"):
            skeleton = cls(config)
            skeleton.quantize_parts(config.quantized_parts)
        state_dict = adapter_state_dict(
            pretrained_model_name_or_path, skeleton, variant=kwargs.pop("variant", None), **hub_kwargs
        )
        settings = kwargs.get("quantization_config")
        if isinstance(settings, SalmonnQuantizationConfig) and not (settings.language_model or config.quantized_parts):
            # Rounded as they are in their files, as base parts will be when what is saved of this model is loaded.
            config = copy.deepcopy(config)
            config.quantization_config = kwargs.pop("quantization_config").to_dict()
            skeleton.quantize_parts(settings.parts)
            state_dict = round_matrices(state_dict, skeleton)
        state_dict |= base_state_dict(skeleton, **base_kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in (*hub_kwargs, "revision", "subfolder")}
        model, report = super().from_pretrained(None, *model_args, config=config, state_dict=state_dict, **kwargs)
        model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
        if model.can_generate():
            model.generation_config = GenerationConfig.from_pretrained(pretrained_model_name_or_path, **hub_kwargs)
        return model, report

    def save_pretrained(self, save_directory, *args, state_dict=None, **kwargs):
        """
        As `PreTrainedModel.save_pretrained`, but a model with `config.base_parts` leaves those frozen parts out. With
        another adapter beside the checkpoint's own LoRA, that adapter alone is saved, as transformers does.

        Raises:
            ValueError: if what would be loaded again is not this model; the message says what to do.
        """
        with self.adapter_to_save() as is_adapter:
            if is_adapter and kwargs.get("variant"):
                raise ValueError(
                    f"An adapter alone has no variant {kwargs['variant']!r}, by which PEFT would not find it: leave "
                    "variant out; or call merge_lora() to save the whole model."
                )
            if is_adapter:
                kwargs["max_shard_size"] = "1TB"  # in one file, where PEFT looks
            if not is_adapter and getattr(self, "hf_quantizer", None) is not None:
                # In a library's format the base parts have other weights, and transformers writes all of them; from
                # nf4 that was loaded it has no way back to what it takes for the original format.
                self.config.base_parts = None
                kwargs = {"save_original_format": False} | kwargs
            if not is_adapter:
                state_dict = without_base_parts(self.state_dict() if state_dict is None else state_dict, self.config)
                if self.can_generate():
                    keep_transcription_ids(self.generation_config, save_directory)
            super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)
        if kwargs.get("is_main_process", True) and not is_adapter:
            self.save_own_adapter_config(save_directory)
            save_code(save_directory)
