"""
Linear and Embedding modules with weights of 4 and 8 bits, symmetric. 8 bits: one scale per row. 4 bits: two values per
byte, one scale per group of a row's columns. Products in bfloat16 run on torch's own kernels, 4 bits on a CPU and on
CUDA, 8 on a CPU; elsewhere weights are dequantised first. They are buffers, through which gradients pass at any time.
"""

from functools import cache

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

# Rows up to which torch's kernels beat widening the weights for an ordinary product (measured on AVX-512).
KERNEL_ROWS = {8: 12, 4: 128}
PACKED_ROWS = 4096  # at a time, whole blocks
BLOCK = 64  # rows and columns of which torch's kernels take whole multiples, on any processor
TILE_ROWS, INNER_TILES = 8, 4  # of the 4-bit CUDA kernel's layout; an inner tile has 16 columns, four make a block


def pack_nibbles(nibbles: torch.Tensor) -> torch.Tensor:
    """Values 0 to 15, one a byte, uint8 `(rows, columns)`, in the layout of torch's kernel for their device."""
    if nibbles.device.type == "cpu":
        return torch._convert_weight_to_int4pack_for_cpu(nibbles.to(torch.int32), 1)
    pairs = nibbles[:, ::2] << 4 | nibbles[:, 1::2]
    packed = torch._convert_weight_to_int4pack(pairs.contiguous(), INNER_TILES)
    return packed.view(torch.uint8).view(pairs.shape)


@cache
def kernel_layout(device: torch.device) -> torch.Tensor:
    """
    The layout of torch's 4-bit kernel, which keeps a matrix tile by tile: `(rows, columns)` of a tile, the byte of
    the tile that holds each value in its low half, or the tile's size and that byte for the high half. A tile has one
    column on a CPU, of 64 rows with AVX-512, 32 with AVX2: it is read off matrices whose values are their own places.
    """
    places = torch.arange(BLOCK * BLOCK, device=device).view(BLOCK, BLOCK)
    halves = torch.zeros(2, BLOCK * BLOCK // 2, dtype=torch.long, device=device)
    for shift in (0, 4, 8):
        packed = pack_nibbles((places >> shift & 15).to(torch.uint8)).flatten().long()
        halves += torch.stack([packed & 15, packed >> 4]) << shift
    columns = 1 if device.type == "cpu" else BLOCK
    # On a CPU the first tile ends where the second column begins.
    size = int((halves[0] % BLOCK).nonzero()[0]) if columns == 1 else TILE_ROWS * BLOCK // 2
    tile = halves[:, :size].flatten()
    layout = torch.empty(len(tile), dtype=torch.long, device=device)
    layout[tile // BLOCK * columns + tile % BLOCK] = torch.arange(len(tile), device=device)
    return layout.view(-1, columns)


def two_per_byte(values: torch.Tensor) -> torch.Tensor:
    """Values 0 to 15, uint8 `(..., columns)`, as bytes `(..., columns / 2)`: the even column in the low half."""
    return values[..., ::2] | values[..., 1::2] << 4


def one_per_byte(weight: torch.Tensor) -> torch.Tensor:
    """The inverse of `two_per_byte`."""
    return torch.stack([weight & 15, weight >> 4], -1).flatten(-2)


class QuantizedMatrix(nn.Module):
    r"""
    A matrix W of shape `(rows, columns)`.

    Args:
        bits (`int`): 8 or 4.
        group_size (`int`): with 4 bits, columns that share a scale; must divide `columns`.

    Attributes:
        weight: int8 of shape `(rows, columns)`; with 4 bits uint8 of shape `(rows, columns / 2)`, the even column in
            the low half of a byte, values offset by 8. After the first product on torch's kernel it has the kernel's
            layout instead; `state_dict` always gives this one.
        scales: `(rows,)`; with 4 bits `(rows, columns / group_size)`.

    Raises:
        ValueError: if `group_size` does not divide `columns`.
    """

    def __init__(self, rows: int, columns: int, bits: int, group_size: int = 64):
        nn.Module.__init__(self)
        if bits not in (4, 8):
            raise ValueError(f"bits is {bits}; weights are kept in 4 or 8 bits.")
        if bits == 4 and (columns % group_size or columns % 2):
            raise ValueError(f"group_size {group_size} does not divide {columns} columns; choose one that does.")
        self.rows, self.columns, self.bits, self.group_size = rows, columns, bits, group_size
        self.packed_scales = None
        if bits == 8:
            weight, scales = torch.zeros(rows, columns, dtype=torch.int8), torch.ones(rows)
        else:
            weight = torch.full((rows, columns // 2), 0x88, dtype=torch.uint8)
            scales = torch.ones(rows, columns // group_size)
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)
        self._is_hf_initialized = True  # a language model would draw its Linears from a normal distribution

    @torch.no_grad()
    def quantize(self, matrix: torch.Tensor, scales: torch.Tensor | None = None):
        """Take the nearest values to `matrix` (rows, columns); `scales` by default its extremes over 127, or 7.5."""
        groups = matrix.float().reshape(*self.scales.shape, -1)
        if scales is None:  # 4 bits reach from -8 to 7; half a step beyond 7 is no further off than between two values
            scales = groups.abs().amax(-1).clamp(min=1e-8) / (127 if self.bits == 8 else 7.5)
        self.scales = scales.reshape(self.scales.shape).to(matrix.dtype).contiguous()
        values = torch.round(groups / self.scales[..., None].float())
        if self.bits == 8:
            self.weight = values.clamp(-127, 127).to(torch.int8).view(self.rows, self.columns)
        else:
            self.weight = two_per_byte((values.clamp(-8, 7) + 8).to(torch.uint8).view(self.rows, self.columns))
        self.packed_scales = None
        return self

    def pack(self):
        """Bring the weights, in place, into the layout of torch's 4-bit kernel for their device."""
        # A CPU wants each value in 32 bits: of all rows of a vocabulary at once these would be gigabytes.
        self.unpack()
        packed = torch.empty_like(self.weight, device="cpu")  # beside which a device need not hold the matrix twice
        for start in range(0, self.rows, PACKED_ROWS):
            rows = slice(start, start + PACKED_ROWS)
            packed[rows] = pack_nibbles(one_per_byte(self.weight[rows]))
        device, self.weight = self.weight.device, packed
        self.weight = packed.to(device)
        self.packed_scales = torch.stack([self.scales.T, torch.zeros_like(self.scales.T)], -1).contiguous()
        self.scales = self.packed_scales[..., 0].T  # a view: the scales are kept once

    def unpack(self):
        """The inverse of `pack`: the layout on disk, in tensors of their own."""
        if self.packed_scales is not None:
            self.weight = two_per_byte(self.nibbles())
            self.scales = self.scales.clone(memory_format=torch.contiguous_format)
            self.packed_scales = None

    def nibbles(self) -> torch.Tensor:
        """The 4-bit values, 0 to 15, one a byte: uint8 of shape `(rows, columns)`."""
        if self.packed_scales is None:
            return one_per_byte(self.weight)
        layout = kernel_layout(self.weight.device)
        rows, columns = layout.shape
        tiles = self.weight.view(-1, self.columns // columns, layout.numel() // 2)
        values = torch.cat([tiles & 15, tiles >> 4], -1)[..., layout.flatten()]
        return values.view(*tiles.shape[:2], rows, columns).transpose(1, 2).contiguous().view(self.rows, self.columns)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """W, of shape `(rows, columns)`; in the precision of the scales by default."""
        scales = self.scales.to(dtype or self.scales.dtype)
        values = self.weight if self.bits == 8 else self.nibbles().to(torch.int8) - 8
        return (values.reshape(*scales.shape, -1).to(scales.dtype) * scales[..., None]).view(self.rows, self.columns)

    def select(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows `ids` of W: `(*ids.shape, columns)`."""
        flat = ids.flatten()
        scales = self.scales[flat]
        if self.bits == 8:
            values = self.weight[flat]
        elif self.packed_scales is None:
            values = one_per_byte(self.weight[flat]).to(torch.int8) - 8
        else:
            layout = kernel_layout(self.weight.device)
            (tile_rows, tile_columns), size = layout.shape, layout.numel() // 2
            places = layout[flat % tile_rows]
            tiles = self.weight.view(-1, self.columns // tile_columns, size)
            values = tiles[flat[:, None] // tile_rows, :, places % size]  # (ids, columns of a tile, tiles)
            values = (torch.where(places[..., None] >= size, values >> 4, values) & 15).to(torch.int8) - 8
            values = values.transpose(1, 2).contiguous()
        width = self.group_size if self.bits == 4 else self.columns  # which -1 could not tell for no ids at all
        rows = values.reshape(*scales.shape, width).to(scales.dtype) * scales[..., None]
        return rows.view(*ids.shape, self.columns)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x Wᵀ for `x` of shape `(..., columns)`."""
        flat = x.reshape(-1, self.columns)
        trained = torch.is_grad_enabled() and x.requires_grad  # the kernels have no gradient
        on_cpu = x.device.type == "cpu"
        has_kernel = on_cpu or x.device.type == "cuda" and self.bits == 4
        whole = self.rows % BLOCK == self.columns % BLOCK == 0  # the kernels read past the end of other shapes
        on_kernel = has_kernel and whole and not trained and len(flat) <= KERNEL_ROWS[self.bits]
        on_kernel = on_kernel and x.dtype == self.scales.dtype == torch.bfloat16
        if on_kernel and self.bits == 8:
            if self.weight.data_ptr() % 64 or self.scales.data_ptr() % 64:
                # A file may be mapped at any address; the kernel's aligned loads would end the process.
                self.weight, self.scales = self.weight.clone(), self.scales.clone()
            product = torch._weight_int8pack_mm(flat, self.weight, self.scales)
        elif on_kernel and self.group_size in (32, 64, 128, 256):
            if self.packed_scales is None:
                self.pack()
            if on_cpu:
                product = torch._weight_int4pack_mm_for_cpu(flat, self.weight, self.group_size, self.packed_scales)
            else:
                tiles = self.weight.view(torch.int32).view(self.rows // TILE_ROWS, self.columns // BLOCK, 32, -1)
                product = torch._weight_int4pack_mm(flat.contiguous(), tiles, self.group_size, self.packed_scales)
        elif trained:
            product = DequantizedProduct.apply(flat, self)
        elif self.bits == 8:
            product = F.linear(flat, self.weight.to(x.dtype)) * self.scales.to(x.dtype)
        else:
            product = F.linear(flat, self.dequantize(x.dtype))
        return product.view(*x.shape[:-1], self.rows)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed_scales is not None:
            destination[prefix + "weight"] = two_per_byte(self.nibbles())
            destination[prefix + "scales"] = self.scales.contiguous()

    def _load_from_state_dict(self, *args, **kwargs):
        self.unpack()  # what comes has the layout on disk, and is copied into these tensors
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn, recurse=True):
        self.unpack()  # another device or precision has another layout
        return super()._apply(fn, recurse)


class DequantizedProduct(torch.autograd.Function):
    """x Wᵀ for a `QuantizedMatrix` W. The backward pass dequantises anew: a copy would take what few bits save."""

    @staticmethod
    def forward(ctx, x, matrix):
        ctx.matrix, ctx.dtype = matrix, x.dtype
        return F.linear(x, matrix.dequantize(x.dtype))

    @staticmethod
    def backward(ctx, upstream):
        return (upstream @ ctx.matrix.dequantize(upstream.dtype)).to(ctx.dtype), None


class QuantizedLinear(QuantizedMatrix, nn.Linear):
    """A Linear over a `QuantizedMatrix`; also an `nn.Linear`, so that PEFT can put LoRA beside it."""

    def __init__(self, in_features: int, out_features: int, bias: bool, bits: int, group_size: int = 64):
        super().__init__(out_features, in_features, bits, group_size)
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features)) if bias else None)

    def forward(self, x):
        product = self.product(x)
        return product if self.bias is None else product + self.bias


class QuantizedEmbedding(QuantizedMatrix):
    """Token embeddings; `embed_scale` is Gemma's √hidden."""

    def __init__(self, rows: int, columns: int, bits: int, group_size: int = 64, embed_scale: float = 1.0):
        super().__init__(rows, columns, bits, group_size)
        self.num_embeddings, self.embedding_dim, self.embed_scale = rows, columns, embed_scale

    def forward(self, input_ids):
        return self.select(input_ids) * self.embed_scale


class TiedHead(nn.Module):
    """The language-model head that shares a `QuantizedEmbedding`."""

    def __init__(self, embedding: QuantizedEmbedding):
        super().__init__()
        self.__dict__["embedding"] = embedding  # not a submodule: its tensors are the embedding's

    def forward(self, x):
        return self.embedding.product(x)


def embedding_rows(embedding: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Rows of an embedding module's matrix, quantised or not, without Gemma's scale."""
    if isinstance(embedding, QuantizedMatrix):
        return embedding.select(ids)
    if embedding.weight.is_meta:  # offloaded: the module fetches its weights when it is called
        return embedding(ids).detach() / getattr(embedding, "embed_scale", 1.0)
    rows = nn.functional.embedding(
        ids.to(embedding.weight.device), embedding.weight.detach()
    )  # faster than by indices
    return rows.to(ids.device)


def linears(part: nn.Module) -> dict[str, nn.Linear]:
    """
    The Linears of a part that can be quantised, by name: not LoRA's own, nor a language model's head, nor what the
    part itself excludes as `modules_to_not_quantize`.
    """
    head = part.get_output_embeddings() if isinstance(part, PreTrainedModel) else None
    excluded = tuple(f"{name}." for name in getattr(part, "modules_to_not_quantize", ()))
    found = ((name, m) for name, m in part.named_modules() if isinstance(m, nn.Linear) and m is not head)
    return {name: m for name, m in found if ".lora_" not in name and not f"{name}.".startswith(excluded)}


def replace_module(root: nn.Module, name: str, module: nn.Module):
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)


def quantized_module(
    module: nn.Linear | nn.Embedding, bits: int, group_size: int = 64, scales: torch.Tensor | None = None
) -> QuantizedMatrix:
    """A Linear or an embedding with its weights rounded to their nearest values; what is quantised already stays."""
    if isinstance(module, QuantizedMatrix):
        return module
    weight = module.weight
    with torch.device(weight.device):
        if isinstance(module, nn.Linear):
            quantized = QuantizedLinear(
                module.in_features, module.out_features, module.bias is not None, bits, group_size
            )
            quantized.bias = module.bias
        else:
            scale = getattr(module, "scalar_embed_scale", 1.0)
            quantized = QuantizedEmbedding(*weight.shape, bits, group_size, embed_scale=scale)
    if weight.device.type != "meta":
        quantized.quantize(weight, scales)
    return quantized


def dequantize_linears(part: nn.Module):
    """Replace the quantised Linears of a part, in place, by ordinary ones of the same values, which can be trained."""
    for name, linear in linears(part).items():
        if isinstance(linear, QuantizedLinear):
            wide = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
            wide.weight, wide.bias = nn.Parameter(linear.dequantize()), linear.bias
            replace_module(part, name, wide)


def quantize_vocabulary(
    language_model: nn.Module, bits: int, group_size: int = 64, scales: torch.Tensor | None = None
):
    """Replace the token embeddings and the head, in place; where the model ties them they stay one matrix."""
    head = language_model.get_output_embeddings()
    quantized = quantized_module(language_model.get_input_embeddings(), bits, group_size, scales)
    language_model.set_input_embeddings(quantized)
    if language_model.config.tie_word_embeddings:
        language_model._tied_weights_keys, language_model.all_tied_weights_keys = None, {}  # nothing is left to tie
        language_model.set_output_embeddings(TiedHead(quantized))
    else:
        language_model.set_output_embeddings(quantized_module(head, bits, group_size))


def quantize_parts(model: nn.Module, quantization: dict[str, dict]):
    r"""
    Quantise a `SalmonnModel` in place.

    Args:
        quantization: part to `{"bits": 4 or 8, "group_size": int}`, as `SalmonnQuantizationConfig.parts`. A part is a
            submodule's name, e.g. "audio_tower", "projector" or "language_model", of which the Linears are quantised,
            or of an `nn.Embedding` or a Linear; or "embedding", the language model's token embeddings and its head.

    Raises:
        ValueError: for a part that the model does not have, or a matrix that `group_size` does not divide.
    """
    modules = dict(model.named_modules())
    for part, settings in quantization.items():
        if part == "embedding":
            if isinstance(model.get_input_embeddings(), nn.Embedding):
                quantize_vocabulary(model.language_model, **settings)
                model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        elif part not in modules:
            parts = [name for name, child in model.named_children() if linears(child)]
            raise ValueError(f"There is no part {part!r} to quantise; choose of embedding, {', '.join(parts)}.")
        else:
            is_one = isinstance(modules[part], (nn.Linear, nn.Embedding))
            for name in [part] if is_one else [f"{part}.{name}" for name in linears(modules[part])]:
                try:
                    replace_module(model, name, quantized_module(modules[name], **settings))
                except ValueError as error:
                    raise ValueError(f"{name} cannot be quantised: {error}") from error
