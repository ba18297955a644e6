"""Vision by early fusion: tiles through a vision tower, an adapter and a projector, into rows of the embedding.

N tiles of G x G patches; Q = G * G + 1 rows of the tower, patch after patch, row-major, the class token last; P tokens
per tile after the pixel shuffle; O channels out of the adapter. All products are a precision's `Plain` ones: those in
FP8 are for the text model alone.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distill.config.errors import DataError
from distill.config.schema import VisionConfig
from distill.model.images import Images
from distill.model.linear import Linear, Plain
from distill.model.rope import Rotation, cos_sin, frequencies, rotate
from distill.model.transfer import sent


class Affine(Linear):
    """x -> x weight^T + bias."""

    def __init__(self, inputs: int, outputs: int, plain: Plain):
        super().__init__(inputs, outputs, plain.linear)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fn(x, self.weight, self.bias)


class VisionAttention(nn.Module):
    """Every row of a tile attends to every other; q and k are rotated by their patch's column and row."""

    def __init__(self, config: VisionConfig, plain: Plain):
        super().__init__()
        self.heads, self.attend = config.heads, plain.attend
        self.q_proj = Affine(config.hidden_size, config.hidden_size, plain)
        self.k_proj = Affine(config.hidden_size, config.hidden_size, plain)
        self.v_proj = Affine(config.hidden_size, config.hidden_size, plain)
        self.o_proj = Affine(config.hidden_size, config.hidden_size, plain)

    def forward(self, hidden_NQD: Tensor, rotation: Rotation) -> Tensor:
        q_NQHC = rotate(self.q_proj(hidden_NQD).unflatten(-1, (self.heads, -1)), *rotation)
        k_NQHC = rotate(self.k_proj(hidden_NQD).unflatten(-1, (self.heads, -1)), *rotation)
        v_NQHC = self.v_proj(hidden_NQD).unflatten(-1, (self.heads, -1))
        q, k, v = (x.transpose(1, 2) for x in (q_NQHC, k_NQHC, v_NQHC))
        return self.o_proj(self.attend(q, k, v).transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    """fc2(gelu(fc1 x)), both with bias in the tower, without in the adapter."""

    def __init__(self, inputs: int, hidden: int, outputs: int, layer: Callable[[int, int], Affine | Linear]):
        super().__init__()
        self.fc1, self.fc2 = layer(inputs, hidden), layer(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class VisionBlock(nn.Module):
    """Pre-norm attention, then a pre-norm feed-forward."""

    def __init__(self, config: VisionConfig, plain: Plain):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.self_attn = VisionAttention(config, plain)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = VisionMLP(config.hidden_size, config.mlp_hidden, config.hidden_size, partial(Affine, plain=plain))

    def forward(self, hidden_NQD: Tensor, rotation: Rotation) -> Tensor:
        hidden_NQD = hidden_NQD + self.self_attn(self.input_layernorm(hidden_NQD), rotation)
        return hidden_NQD + self.mlp(self.post_attention_layernorm(hidden_NQD))


def named(**modules: nn.Module) -> nn.Sequential:
    """The modules one after the other, under names of the released checkpoints."""
    return nn.Sequential(OrderedDict(modules))


class VisionModel(nn.Module):
    """The tower and its adapter, with the released checkpoints' names.

    Weights are drawn from torch's global generator: matrices normal with `init_std`, class and positional embeddings
    normal with hidden_size ** -0.5, biases 0, norms 1.
    """

    def __init__(self, config: VisionConfig, init_std: float, plain: Plain):
        super().__init__()
        self.config = config
        size, grid = config.hidden_size, config.tile_size // config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(size))
        self.positional_embedding_vlm = nn.Parameter(torch.empty(grid * grid + 1, size))
        self.patch_embedding = named(linear=Linear(3 * config.patch_size**2, size, plain.linear))
        self.layernorm_pre = nn.LayerNorm(size, config.norm_eps)
        self.model = nn.ModuleDict({"layers": nn.ModuleList(VisionBlock(config, plain) for _ in range(config.layers))})
        self.layernorm_post = nn.LayerNorm(size, config.norm_eps)
        shuffled = size * config.shuffle**2
        layer = partial(Linear, linear_fn=plain.linear)
        self.vision_adapter = named(mlp=VisionMLP(shuffled, config.adapter_hidden, config.adapter_out, layer))
        self._rotation = grid_rotation(grid, size // config.heads, config.rope_theta)
        for name, parameter in self.named_parameters():
            if name in ("class_embedding", "positional_embedding_vlm"):
                nn.init.normal_(parameter, std=size**-0.5)
            elif parameter.ndim > 1:
                nn.init.normal_(parameter, std=init_std)

    def forward(self, tiles_NCHW: Tensor, activation_checkpointing: bool = False) -> Tensor:
        """Tokens [N, P, O], row-major within a tile, of tiles [N, 3, tile_size, tile_size] as `Images` holds them."""
        pixels_NGP = pixels(patches(tiles_NCHW, self.config.patch_size), self.class_embedding.dtype)
        patches_NGD = self.patch_embedding(pixels_NGP)
        class_N1D = self.class_embedding.expand(len(patches_NGD), 1, -1)
        hidden_NQD = self.layernorm_pre(torch.cat([patches_NGD, class_N1D], 1) + self.positional_embedding_vlm)
        rotation = self._rotation_on(hidden_NQD.device)
        for block in self.model["layers"].children():
            if activation_checkpointing and torch.is_grad_enabled():
                hidden_NQD = checkpoint(block, hidden_NQD, rotation, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden_NQD = block(hidden_NQD, rotation)
        patches_NGD = self.layernorm_post(hidden_NQD)[:, :-1]
        # The released adapter ends with an activation.
        return F.gelu(self.vision_adapter(pixel_shuffle(patches_NGD, self.config.shuffle)))

    def _rotation_on(self, device: torch.device) -> Rotation:
        cos, sin = self._rotation
        if cos.device != device:
            with torch.inference_mode(False):  # kept, and may be saved for a later backward pass
                self._rotation = Rotation(sent(cos, device), sent(sin, device))
        return self._rotation


def projector(config: VisionConfig, size: int, init_std: float, plain: Plain) -> nn.Module:
    """The matrix, without bias, from the adapter's channels to the text model's."""
    linear = Linear(config.adapter_out, size, plain.linear)
    nn.init.normal_(linear.weight, std=init_std)
    return named(linear_1=linear)


def patches(tiles_NCHW: Tensor, patch_size: int) -> Tensor:
    """Patches [N, G * G, 3 * patch_size ** 2], row-major; a patch's values by channel, row, column."""
    cut = tiles_NCHW.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # [N, 3, G, row, G, column]
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def pixels(x: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 values to [-1, 1]: (x / 255 - 0.5) / 0.5 in fp32, then cast; floating-point ones are cast alone."""
    return x.to(dtype) if x.is_floating_point() else x.float().div_(255).sub_(0.5).div_(0.5).to(dtype)


def pixel_shuffle(patches_NGD: Tensor, shuffle: int) -> Tensor:
    """Each square of shuffle x shuffle patches as one token, by row, column, channel; [N, P, shuffle ** 2 * D]."""
    grid = round(patches_NGD.shape[1] ** 0.5)
    squares = patches_NGD.unflatten(1, (grid // shuffle, shuffle, grid // shuffle, shuffle))
    return squares.transpose(2, 3).flatten(3).flatten(1, 2)


def grid_rotation(grid: int, head_dim: int, theta: float) -> Rotation:
    """For `rotate`, [Q, 1, C]: half the channel pairs turn with column + 1, the other half with row + 1, at the same
    frequencies; the class token does not turn."""
    place_Q = torch.arange(grid * grid, device="cpu")
    turns_P = frequencies(head_dim // 2, theta, None)
    angle_QP = torch.cat([(place_Q % grid + 1)[:, None] * turns_P, (place_Q // grid + 1)[:, None] * turns_P], 1)
    cos_QC, sin_QC = cos_sin(F.pad(angle_QP, (0, 0, 0, 1)))
    return Rotation(cos_QC[:, None], sin_QC[:, None])


def place(hidden_TD: Tensor, features_NPD: Tensor, patch_BS: Tensor) -> Tensor:
    """`hidden_TD` with the features that `patch_BS` names in place of its rows; gradients go to the rows in use."""
    patch_T = patch_BS.flatten()
    own_T = torch.arange(len(hidden_TD), device=hidden_TD.device)
    row_T = torch.where(patch_T >= 0, patch_T + len(hidden_TD), own_T)
    return torch.cat([hidden_TD, features_NPD.flatten(0, 1)]).index_select(0, row_T)


def check_images(images: Images, config: VisionConfig | None, ids_BS: Tensor) -> None:
    """Checks that images fit the model and the batch.

    The range of `patch_BS` is checked on the CPU only, where that costs no wait for a device; elsewhere an index that
    is too large ends the run in `place`.

    Raises:
        DataError: naming everything that does not fit.
    """
    if config is None:
        raise DataError("images were given to a model without vision (model.vision is null)")
    (tiles, patch_BS), size, problems = images, config.tile_size, []
    allowed = tiles.dtype == torch.uint8 or tiles.is_floating_point()
    if not allowed or tiles.ndim != 4 or tiles.shape[1:] != (3, size, size):
        problems.append(
            f"tiles are {tiles.dtype} {list(tiles.shape)}; the model takes uint8 (or scaled floating-point) "
            f"[N, 3, {size}, {size}]"
        )
    if patch_BS.dtype != torch.int64 or patch_BS.shape != ids_BS.shape:
        problems.append(f"patch_BS is {patch_BS.dtype} {list(patch_BS.shape)}; it must be int64 {list(ids_BS.shape)}")
    elif patch_BS.device.type == "cpu" and patch_BS.numel():
        least, most, tokens = int(patch_BS.min()), int(patch_BS.max()), len(tiles) * config.tile_tokens
        if least < -1 or most >= tokens:
            problems.append(
                f"patch_BS holds {least} to {most}; {len(tiles)} tiles of {config.tile_tokens} tokens allow -1 to "
                f"{tokens - 1}"
            )
    if problems:
        raise DataError("images: " + "; ".join(problems))


class ZeroGradients(torch.autograd.Function):
    """Returns its first argument; the others get a zero gradient.

    For a batch without images: every rank needs a gradient for every parameter. The zeros are an expanded
    scalar, so a gradient that is there already is added to without another tensor of its size. Their order is not
    that of the tower's own gradients: fit for ZeRO 0 and 1, which reduce in the order of parameters.
    """

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return hidden_TD.view_as(hidden_TD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        zeros = (p.new_zeros(()).expand_as(p) for p in ctx.saved_tensors)
        needed = ctx.needs_input_grad[1:]
        return grads[0], *(zero if need else None for zero, need in zip(zeros, needed))
