"""
Adapters of PEFT, beside the checkpoint's own LoRA or alone, and their directories: `adapter_config.json` and
`adapter_model.safetensors`, as `PeftModel.save_pretrained` and `save_pretrained` of a model with such an adapter write
them. A checkpoint with LoRA of its own has an `adapter_config.json` as well, which says what that is.
"""

import copy
import json
import os
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedConfig
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME, cached_file
from transformers.utils.loading_report import LoadStateDictInfo

from .checkpoint import checkpoint_weights
from .configuration_salmonn import SalmonnConfig
from .lora import (
    LORA_FIELDS,
    OWN,
    OWN_MARK,
    LoraMixin,
    adapted_parts,
    option_that_changes_weights,
    require_peft,
    switched_off,
    tuner_layers,
)
from .quantized_layers import replace_module


def find_file(name_or_path, file: str, **hub_kwargs) -> str | None:
    """A file of a directory or hub repository; `None` where there is no such file."""
    try:
        return cached_file(name_or_path, file, **hub_kwargs)
    except OSError:
        return None


def adapter_weights(name_or_path, **hub_kwargs) -> dict[str, torch.Tensor] | None:
    """The tensors of an adapter that lies alone, or beside its checkpoint; `None` where none does."""
    if file := find_file(name_or_path, ADAPTER_SAFE_WEIGHTS_NAME, **hub_kwargs):
        return load_file(file)
    if file := find_file(name_or_path, ADAPTER_WEIGHTS_NAME, **hub_kwargs):
        return torch.load(file, map_location="cpu", weights_only=True)
    return None


def base_of_adapter(name_or_path, **hub_kwargs) -> str | None:
    """
    The checkpoint that an adapter was made for; `None` if this is a checkpoint itself.

    Raises:
        ValueError: if an adapter does not say, or names a model of another kind.
    """
    if find_file(name_or_path, "config.json", **hub_kwargs):
        return None
    if not (file := find_file(name_or_path, ADAPTER_CONFIG_NAME, **hub_kwargs)):
        return None
    base = json.loads(Path(file).read_text()).get("base_model_name_or_path")
    remedy = (
        f"Load that with from_pretrained, then the adapter with model.load_adapter({str(name_or_path)!r}); or name "
        f"the checkpoint as base_model_name_or_path in {ADAPTER_CONFIG_NAME}."
    )
    if not base:
        raise ValueError(f"{name_or_path} is an adapter that does not say for which checkpoint. {remedy}")
    of_base = {name: value for name, value in hub_kwargs.items() if name not in ("revision", "subfolder")}
    if not find_file(base, "config.json", **of_base):
        raise ValueError(f"{name_or_path} is an adapter for {base!r}, which is not there. {remedy}")
    kind = PreTrainedConfig.get_config_dict(base, **of_base)[0].get("model_type")
    if kind != SalmonnConfig.model_type:
        raise ValueError(
            f"{name_or_path} is an adapter for {base!r}, a model of type {kind!r}, not 'salmonn'. {remedy}"
        )
    return base


def name_adapter_base(directory: str | os.PathLike, checkpoint: str):
    """
    Write into a checkpoint's `adapter_config.json`, if it has one, where the checkpoint lies. From a hub, transformers
    loads what the file names, for which reason it must be the repository itself.
    """
    file = Path(directory, ADAPTER_CONFIG_NAME)
    if file.exists() and file.with_name("config.json").exists():
        settings = json.loads(file.read_text()) | {"base_model_name_or_path": checkpoint}
        file.write_text(json.dumps(settings, indent=2, sort_keys=True))


def without_mark(config):
    """A config that `PeftConfig.from_pretrained` has read of a checkpoint, to be used for an adapter elsewhere."""
    if getattr(config, "auto_mapping", None) == OWN_MARK:
        config = copy.copy(config)
        config.auto_mapping = None
    return config


class AdapterMixin(LoraMixin):
    """
    transformers' methods for adapters, with two differences: an adapter that is added or loaded is heard beside those
    that are active already, where transformers would switch these off without a word; and what cannot be saved or
    loaded rightly is refused.
    """

    def adapters_beside(self) -> list[str]:
        """The adapters other than the checkpoint's own LoRA."""
        own = {OWN} if adapted_parts(self.config) else set()
        return [name for name in getattr(self, "peft_config", {}) if name not in own]

    @contextmanager
    def beside_active(self, name: str, config, is_trainable: bool):
        """The adapter `name`, that is put in within, is trained, if any; those that were active stay active."""
        configs, functional = dict(getattr(self, "peft_config", {})), require_peft().functional
        if name in configs:
            raise ValueError(f"Adapter with name {name} already exists. Please use a different name.")
        self.check_base_parts_stay(config)
        if configs and getattr(config, "trainable_token_indices", None):
            raise ValueError(
                "trainable_token_indices cannot be trained beside another adapter: PEFT's layer knows one alone. "
                "Leave them out, or call merge_lora() first."
            )
        active = self.active_adapters() if configs else []
        trainable = [(parameter, parameter.requires_grad) for parameter in self.parameters()]
        if configs:
            self.__dict__["_adapter_configs"] = dict(configs)  # to which PEFT may add
        self.requires_grad_(False)
        try:
            yield
            for module in switched_off(self):  # all or none: the new one is on
                module.enable_adapters(True)
            functional.set_adapter(self, [*active, name], inference_mode=not is_trainable)
            functional.set_requires_grad(self, active, False)
            configs = self.peft_config
        except Exception:  # the model is as it was
            functional.delete_adapter(self, name, "lora_")
            self.take_out_empty_layers()
            if active:
                functional.set_adapter(self, active)
            for parameter, was_trainable in trainable:
                parameter.requires_grad_(was_trainable)
            raise
        finally:
            self.peft_config = configs
            self._hf_peft_config_loaded = bool(configs)
            if not configs:
                del self.__dict__["_adapter_configs"]

    def add_adapter(self, adapter_config, adapter_name: str | None = None):
        """
        As in transformers: a new adapter, which alone is trained from now on. Adapters that were active stay active;
        if they were disabled, they are enabled.

        Raises:
            ValueError: if there is an adapter of that name; if it would change base parts.
        """
        with self.beside_active(adapter_name or OWN, adapter_config, is_trainable=True):
            super().add_adapter(without_mark(adapter_config), adapter_name)

    def load_adapter(
        self,
        peft_model_id: str | os.PathLike | None = None,
        adapter_name: str | None = None,
        peft_config=None,
        adapter_state_dict: dict[str, torch.Tensor] | None = None,
        low_cpu_mem_usage: bool = False,
        is_trainable: bool = False,
        *,
        adapter_kwargs: dict | None = None,
        **hub_kwargs,
    ) -> LoadStateDictInfo:
        """
        As in transformers, also LoRA alone of a SALMONN checkpoint, and all that PEFT can save. Adapters that were
        active stay active; if they were disabled, they are enabled.

        Args:
            hub_kwargs: `token`, `revision`, `cache_dir`, `local_files_only` and `subfolder`, here or as
                `adapter_kwargs`.

        Raises:
            OSError: if there is no adapter.
            ValueError: if there is an adapter of that name; if it does not fit the model, naming a tensor.
        """
        name, hub_kwargs = adapter_name or OWN, hub_kwargs | (adapter_kwargs or {})
        if unknown := sorted(set(hub_kwargs) - {"token", "revision", "cache_dir", "local_files_only", "subfolder"}):
            raise ValueError(f"load_adapter of SALMONN has no {unknown[0]}; leave it out.")
        peft = require_peft()
        if peft_model_id is None and (peft_config is None or adapter_state_dict is None):
            raise ValueError("Give the directory of an adapter, or its peft_config and adapter_state_dict.")
        if adapter_state_dict is None:
            adapter_state_dict = adapter_weights(peft_model_id, **hub_kwargs)
            if adapter_state_dict is None and find_file(peft_model_id, "config.json", **hub_kwargs):
                peft_config, adapter_state_dict = self.own_adapter_of(peft_model_id, **hub_kwargs)
            elif adapter_state_dict is None:
                raise OSError(f"{peft_model_id} holds no adapter_model.safetensors; save the adapter there.")
        if peft_config is None:
            peft_config = peft.PeftConfig.from_pretrained(str(peft_model_id), **hub_kwargs)
        config = without_mark(peft_config)
        config.inference_mode = not is_trainable
        with self.beside_active(name, config, is_trainable):
            peft.inject_adapter_in_model(config, self, name, low_cpu_mem_usage)
            weights = {key.removeprefix("base_model.model."): value for key, value in adapter_state_dict.items()}
            expected = peft.get_peft_model_state_dict(self, adapter_name=name, save_embedding_layers=False)
            unfit = sorted(set(expected) - set(weights))
            try:
                if not unfit:
                    unfit = peft.set_peft_model_state_dict(
                        self, weights, name, False, low_cpu_mem_usage
                    ).unexpected_keys
            except RuntimeError as error:  # of another shape
                unfit = [line.strip() for line in str(error).splitlines()[1:]]
            if unfit:
                raise ValueError(
                    f"The adapter does not fit this model, {len(unfit)} tensors are missing, left over or of another "
                    f"shape: {unfit[0]}. Load it into the checkpoint that it was made for."
                )
        if not is_trainable:
            self.eval()
        return LoadStateDictInfo(set(), set(), set(), [], {}, set())

    def own_adapter_of(self, name_or_path, **hub_kwargs) -> tuple:
        """Config and weights of the LoRA in a SALMONN checkpoint."""
        config = SalmonnConfig.from_pretrained(name_or_path, **hub_kwargs)
        if not adapted_parts(config):
            raise ValueError(f"{name_or_path} has no LoRA; load it with from_pretrained.")
        with torch.device("meta"):
            own = type(self)(config).peft_config[OWN]
        weights = checkpoint_weights(name_or_path, **hub_kwargs)
        return own, {key.replace(f".{OWN}.", "."): value for key, value in weights.items() if ".lora_" in key}

    def enable_adapters(self):
        """As in transformers, which forgets the modules that are trained as a whole."""
        super().enable_adapters()
        for module in switched_off(self):
            module.enable_adapters(True)

    def delete_adapter(self, adapter_names):
        """
        As in transformers; layers that have no adapter any more are as they were before.

        Raises:
            ValueError: if that cannot be, since the adapter has changed weights of the model.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self.check_unmerged("deleted")
        for name in names:
            if option := option_that_changes_weights(getattr(self, "peft_config", {}).get(name)):
                raise ValueError(
                    f"Without the adapter {name!r} the model would not be as it was before: {option} has changed its "
                    "weights. Load the checkpoint again; or call merge_lora() to keep what the adapter learnt."
                )
        own = adapted_parts(self.config) if OWN in names else []
        checkpoint, base_parts = self.name_or_path, self.config.base_parts
        super().delete_adapter(names)
        self.take_out_empty_layers()
        for part in own:
            getattr(self, part).__dict__.pop("peft_config", None)
            setattr(self.config, LORA_FIELDS[part], None)
            checkpoint = ""  # has the LoRA still: nothing can be an adapter for it
        self.config.base_parts = base_parts  # whose weights are not changed
        self.name_or_path = self.config.name_or_path = checkpoint
        if hasattr(self, "peft_config"):
            self.peft_config = dict(self.peft_config)

    def take_out_empty_layers(self):
        """Put the layers back that PEFT has wrapped for adapters of which none is left."""
        for name, module in list(self.named_modules()):
            if hasattr(module, "_get_available_adapters") and not module._get_available_adapters():
                layer = module.original_module if hasattr(module, "original_module") else module.base_layer
                replace_module(self, name, layer)

    def check_unmerged(self, what: str):
        """
        Raises:
            ValueError: if adapters are merged into weights of which they can be taken out again.
        """
        if any(layer.merged for layer in tuner_layers(self).values()):
            raise ValueError(
                f"Adapters are merged into the weights: they cannot be {what}. Call unmerge_adapter() first, or "
                "merge_and_unload() to have them merged for good."
            )

    @contextmanager
    def adapter_to_save(self):
        """
        Within, transformers' `save_pretrained` finds one adapter, which it saves alone, or none and saves the model.

        Raises:
            ValueError: if what would be loaded again is not this model.
        """
        self.check_unmerged("saved")
        known = getattr(self, "peft_config", {})
        if unknown := {n for m in tuner_layers(self).values() for n in m._get_available_adapters()} - set(known):
            raise ValueError(
                f"The adapters {sorted(unknown)} were put into a part of the model, and would be lost. Put them into "
                "the whole, with model.add_adapter, or call model.merge_lora(), and save that."
            )
        beside, is_loaded = self.adapters_beside(), self._hf_peft_config_loaded
        before = [(layer, layer._active_adapter) for layer in tuner_layers(self).values()]
        active = before[0][0].active_adapters if before else []
        own = [OWN] if adapted_parts(self.config) else []
        saved = [name for name in active if name in beside]
        if beside and (len(saved) != 1 or sorted(active) != sorted(own + saved)):
            names = ", ".join(map(repr, beside))
            raise ValueError(
                f"The adapters {names} are here, {list(active)} active: save_pretrained saves one that is active"
                + " beside the checkpoint's own" * bool(own)
                + f". Call set_adapter({own + beside[:1]!r}) to save {beside[0]!r}, delete_adapter for those not "
                "wanted, or merge_lora() to save the whole model."
            )
        if beside and not self.name_or_path:
            raise ValueError(
                f"The adapter {saved[0]!r} would be saved without its base: this model is no checkpoint that could be "
                "named. Call merge_lora() to save the whole; or save the model before the adapter is put in, and put "
                "it into the one that is loaded from there."
            )
        try:
            self._hf_peft_config_loaded = bool(beside)
            for layer, _ in before if beside else ():
                layer._active_adapter = saved
            if beside:
                self.peft_config[saved[0]].base_model_name_or_path = self.name_or_path
            yield bool(beside)
        finally:
            self._hf_peft_config_loaded = is_loaded
            for layer, names in before:
                layer._active_adapter = names

    def save_own_adapter_config(self, directory: str | os.PathLike):
        """Say in a checkpoint's `adapter_config.json`, for PEFT, which LoRA it has; without LoRA there is none."""
        Path(directory, ADAPTER_CONFIG_NAME).unlink(missing_ok=True)
        if adapted_parts(self.config):
            self.describe_lora()
            self.peft_config[OWN].save_pretrained(directory, auto_mapping_dict=OWN_MARK)
            name_adapter_base(directory, os.path.abspath(directory))

    def _upload_modified_files(self, working_dir, repo_id: str, *args, **kwargs):
        name_adapter_base(working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)
