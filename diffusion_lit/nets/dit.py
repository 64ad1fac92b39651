"""DiT: a transformer over patches of the noisy image, modulated by the noise level and the class through adaLN-Zero.

The image is cut into squares of patch_size pixels, each a token with a fixed sine-cosine code of its place. With
(shift, scale, gate) computed from the embedding of the conditions, and LN a layer norm without parameters, a block is

    x = x + gate_1 * attention((1 + scale_1) * LN(x) + shift_1)
    x = x + gate_2 * mlp((1 + scale_2) * LN(x) + shift_2)

The layers for shift, scale and gate and the last layer start at zero, so that each block starts as the identity and a
new network predicts zero.

Four options make of it the transformer of today's image models (Yao & Wang 2025): `rms_norm` divides by the root mean
square instead of a layer norm, `qk_norm` normalises queries and keys before their product, `rope` turns them by angles
of their places instead of adding a code to the tokens, and `swiglu` gates the perceptron, W3 (silu(W1 x) * W2 x).
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from diffusion_lit.checks import check_count, check_number
from diffusion_lit.nets.checks import require_image, require_image_size, with_condition
from diffusion_lit.nets.layers import Conditioning, NoiseEmbeddingName, attention, recomputed
from diffusion_lit.nets.tokens import SwiGLU, place_angles, rotary_angles, rotate, token_norm

MOST_PLACES = 1024  # patches a side, of a table that is kept in memory


def position_code(height: int, width: int, channels: int) -> Tensor:
    """Sine-cosine code of the places of a grid, shape (height * width, channels), row by row.

    A quarter of the channels each for sin and cos of the column, and sin and cos of the row, at frequencies
    10000^(-i / n), i = 0 .. n - 1.

    Source: Peebles & Xie 2023, arXiv 2212.09748, section 3.2, after Vaswani 2017, arXiv 1706.03762, section 3.5.
    """
    columns, rows = place_angles(height, width, channels // 4, 10000.0)
    return torch.cat([columns.sin(), columns.cos(), rows.sin(), rows.cos()], dim=1).float()


class DiTBlock(nn.Module):
    """Attention and a two-layer perceptron over the tokens, both gated (adaLN-Zero).

    Args:
        channels: Width of the tokens.
        num_heads: Attention heads; must divide `channels`.
        mlp_ratio: Width of the perceptron's hidden layer, as a multiple of `channels`.
        rms_norm: Normalise tokens by their root mean square.
        qk_norm: Normalise queries and keys, with gains.
        swiglu: Gate the perceptron.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        mlp_ratio: float,
        rms_norm: bool = False,
        qk_norm: bool = False,
        swiglu: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = token_norm(channels, rms_norm)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.q_norm = nn.RMSNorm(channels // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(channels // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = nn.Linear(channels, channels)
        hidden = round(channels * mlp_ratio)
        plain = (nn.Linear(channels, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, channels))
        self.mlp = SwiGLU(channels, hidden) if swiglu else nn.Sequential(*plain)
        self.modulation = nn.Linear(channels, 6 * channels)

    def forward(self, x: Tensor, emb: Tensor, angles: Tensor | None = None) -> Tensor:
        """Return the tokens (B, N, channels) after the block, under emb (B, channels), turned by angles (N, d / 2)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(emb)[:, None].chunk(6, dim=-1)
        y = torch.addcmul(shift1, self.norm(x), scale1 + 1)
        q, k, v = rearrange(self.qkv(y), "b n (t h d) -> t b h n d", t=3, h=self.num_heads).unbind(0)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        y = rearrange(attention(q, k, v), "b h n d -> b n (h d)")
        x = torch.addcmul(x, gate1, self.proj(y))
        y = torch.addcmul(shift2, self.norm(x), scale2 + 1)
        return torch.addcmul(x, gate2, self.mlp(y))


class DiT(nn.Module):
    """Diffusion transformer with noise, class and augmentation conditioning.

    Args:
        in_channels: Channels of the image, or of the latent.
        image_size: Height and width of the images it is meant for; others work in `forward` if the patches divide them.
        num_classes: Number of classes, 0 for an unconditional network. Label `num_classes` is the null class.
        patch_size: Side of a patch in pixels; must divide the image size. Halving it makes four times as many tokens.
        hidden_channels: Width of the tokens, a multiple of 4 and of `num_heads`.
        depth: Number of blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the perceptrons, as a multiple of `hidden_channels`.
        noise_embedding: "positional" for c_noise = t in [0, 1000), "fourier" for ln(sigma) / 4 or a flow time, "none"
            for a network that ignores c_noise.
        out_channels: Channels of the output; None for those of the image, twice as many for a learned variance.
        augment_dim: Length of the augmentation labels, 0 for none.
        activation_checkpointing: Keep only the tokens between blocks for the backward pass and compute what lies within
            a block again: less than half the memory, for about a third more time.
        takes_until: Whether the network is given a second noise level, the one that a step ends at (MeanFlow).
        rms_norm: Normalise tokens by their root mean square alone (Zhang & Sennrich 2019, arXiv 1910.07467).
        qk_norm: Normalise queries and keys by their root mean square, with gains (Dehghani 2023, arXiv 2302.05442).
        rope: Turn queries and keys by their place instead of adding a code to the tokens; a head needs a multiple of 4
            channels.
        swiglu: Gate the perceptrons, whose hidden width becomes two thirds for as many weights.
        condition_channels: Channels of a condition image, which is concatenated to the input; 0 for none.

    Raises:
        ValueError: An argument is out of range, or the patches do not divide the image size.

    Source: Peebles & Xie 2023, arXiv 2212.09748, section 3 and table 1; the options as in Yao & Wang 2025, arXiv
    2501.01423, section 4.
    """

    def __init__(
        self,
        in_channels: int = 3,
        image_size: int = 32,
        num_classes: int = 0,
        patch_size: int = 2,
        hidden_channels: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        noise_embedding: NoiseEmbeddingName = "positional",
        out_channels: int | None = None,
        augment_dim: int = 0,
        activation_checkpointing: bool = False,
        takes_until: bool = False,
        rms_norm: bool = False,
        qk_norm: bool = False,
        rope: bool = False,
        swiglu: bool = False,
        condition_channels: int = 0,
    ) -> None:
        super().__init__()
        self.takes_until = takes_until
        self.activation_checkpointing = activation_checkpointing
        out_channels = in_channels if out_channels is None else out_channels
        check_count(
            in_channels=in_channels,
            image_size=image_size,
            out_channels=out_channels,
            patch_size=patch_size,
            hidden_channels=hidden_channels,
            depth=depth,
            num_heads=num_heads,
        )
        check_count(0, num_classes=num_classes, augment_dim=augment_dim, condition_channels=condition_channels)
        require_image_size(image_size, patch_size, f"patch_size={patch_size}")
        if hidden_channels % 4 or hidden_channels % num_heads:
            raise ValueError(
                f"hidden_channels={hidden_channels} must be a multiple of 4 and of num_heads={num_heads}: change one."
            )
        self.head_channels = hidden_channels // num_heads
        if rope and self.head_channels % 4:
            raise ValueError(
                f"num_heads={num_heads} leaves {self.head_channels} of hidden_channels={hidden_channels} to a head, "
                "and rope needs a multiple of 4: change one, or leave rope out."
            )
        check_number(above=0, mlp_ratio=mlp_ratio, hint="; the paper's is 4")
        if image_size // patch_size > MOST_PLACES:
            raise ValueError(
                f"image_size={image_size} at patch_size={patch_size} makes {image_size // patch_size} patches a side, "
                f"and at most {MOST_PLACES} can be attended to; raise patch_size."
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.image_size = image_size
        self.num_classes = num_classes
        self.augment_dim = augment_dim
        self.condition_channels = condition_channels
        self.patch_size = patch_size
        self.hidden_channels = hidden_channels
        self.stem = nn.Linear((in_channels + condition_channels) * patch_size**2, hidden_channels)
        self.conditioning = Conditioning(
            256, hidden_channels, noise_embedding, num_classes, augment_dim, "after", takes_until
        )
        options = (hidden_channels, num_heads, mlp_ratio, rms_norm, qk_norm, swiglu)
        self.blocks = nn.ModuleList(DiTBlock(*options) for _ in range(depth))
        self.norm = token_norm(hidden_channels, rms_norm)
        self.modulation = nn.Linear(hidden_channels, 2 * hidden_channels)
        self.out = nn.Linear(hidden_channels, out_channels * patch_size**2)
        grid = image_size // patch_size
        self.rope = rope
        self.register_buffer("place", self.code(grid, grid, hidden_channels), persistent=False)
        self.initialise()

    place: Tensor

    def initialise(self) -> None:
        """Draw the weights as the paper does: Glorot uniform, embeddings of deviation 0.02, adaLN and output zero."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        for layer in self.conditioning.modules():
            if isinstance(layer, nn.Linear | nn.Embedding):
                nn.init.normal_(layer.weight, std=0.02)
        if self.conditioning.until is not None:
            nn.init.zeros_(self.conditioning.until.weight)
        for layer in self.modules():
            if isinstance(layer, DiTBlock | DiT):
                nn.init.zeros_(layer.modulation.weight)
        nn.init.zeros_(self.out.weight)

    def forward(
        self,
        x: Tensor,
        noise: Tensor,
        label: Tensor | None = None,
        augment: Tensor | None = None,
        condition: Tensor | None = None,
        *,
        until: Tensor | None = None,
    ) -> Tensor:
        """Predict (B, out_channels, H, W) from noisy images; see `UNet.forward`. `patch_size` divides H and W."""
        require_image(x, self.in_channels, self.patch_size)
        x = with_condition(x, condition, self.condition_channels)
        height, width = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        emb = self.conditioning(noise, label, augment, until)
        p = self.patch_size
        x = self.stem(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p))
        places, angles = self.places(height, width), None
        if self.rope:
            angles = places
        else:
            x = x + places.to(x)
        for block in self.blocks:
            checkpointing = self.activation_checkpointing and torch.is_grad_enabled()
            x = recomputed(block, x, emb, angles) if checkpointing else block(x, emb, angles)
        shift, scale = self.modulation(emb)[:, None].chunk(2, dim=-1)
        x = self.out(torch.addcmul(shift, self.norm(x), scale + 1))
        return rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", h=height, w=width, p=p, q=p)

    def places(self, height: int, width: int) -> Tensor:
        """The code of each place of a grid of patches: stored for the image size, computed for any other."""
        if height == width == self.image_size // self.patch_size:
            return self.place
        return self.code(height, width, self.hidden_channels).to(self.place)

    def code(self, height: int, width: int, channels: int) -> Tensor:
        """The code or, for `rope`, the angles of each place of a grid."""
        return rotary_angles(height, width, self.head_channels) if self.rope else position_code(height, width, channels)
