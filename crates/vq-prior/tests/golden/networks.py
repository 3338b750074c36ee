"""The two networks of vq-prior in PyTorch, as functions of a dict of parameters with our names.

Written after van den Oord et al. 2016b (figure 2; MASKED n×n convolutions and a link that is shifted down
in every layer, where the Rust code crops kernels and shifts once) and after Vaswani et al. 2017 with RMS
norms and SwiGLU. `cropped=True` takes the cropped kernels instead, for timing. Grids are [B, C, h, w] here.
"""

import torch
import torch.nn.functional as F


def shapes(kind, grid, sizes, classes, channels, layers, hidden, skip=0, first=5, kernel=3, mlp=0):
    """Names and shapes of all parameters."""
    result = {}

    def linear(name, i, o, kh=1, kw=1):
        result[f"{name}.weight"], result[f"{name}.bias"] = (o, i, kh, kw), (o,)

    def norm(name):
        result[f"{name}.gain"] = (channels,)
        if classes:
            result[f"{name}.class"] = (classes + 1, 2 * channels)

    for index, size in enumerate(sizes):
        result[f"codes.{index}"] = (size, channels)
    for index in range(layers):
        name = f"layers.{index}"
        if kind == "pixelcnn":
            n = first if index == 0 else kernel
            half = (n + 1) // 2
            linear(f"{name}.vertical", channels, 2 * channels, half, n)
            linear(f"{name}.horizontal", channels, 2 * channels, 1, half)
            linear(f"{name}.link", 2 * channels, 2 * channels)
            if index + 1 < layers:
                linear(f"{name}.residual", channels, channels)
            linear(f"{name}.skip", channels, skip)
            if classes:
                result[f"{name}.class"] = (classes + 1, 4 * channels)
        else:
            norm(f"{name}.attention.norm")
            for part in ("query", "key", "value", "output"):
                linear(f"{name}.attention.{part}", channels, channels)
            norm(f"{name}.mlp.norm")
            linear(f"{name}.mlp.in", channels, 2 * mlp)
            linear(f"{name}.mlp.out", mlp, channels)
    if kind == "transformer":
        result["positions.rows"] = (1, grid[0], 1, channels)
        result["positions.columns"] = (1, 1, grid[1], channels)
        norm("norm")
    features = skip if kind == "pixelcnn" else channels
    for index, size in enumerate(sizes):
        if index + 1 < len(sizes):
            result[f"head.codes.{index}"] = (size, hidden)
        linear(f"head.{index}.features", features, hidden)
        if index > 0:
            linear(f"head.{index}.before", hidden, hidden)
        linear(f"head.{index}.logits", hidden, size)
    return result


def conv(p, name, x):
    return F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"])


def embed(p, codes):
    count = codes.shape[-1]
    return sum(F.embedding(codes[..., g], p[f"codes.{g}"]) for g in range(count)).permute(0, 3, 1, 2)


def gate(x):
    a, b = x.chunk(2, dim=1)
    return torch.tanh(a) * torch.sigmoid(b)


def masked(p, name, x, first_layer, rows):
    """An n×n (or 1×n) convolution whose weights are zero where the mask hides the input. Mask A, in the
    first layer, hides the position itself (the row itself, for the vertical stack) from the kernel; our
    weight is then that of the positions one further away."""
    w = p[f"{name}.weight"]
    o, i, kh, kw = w.shape
    if rows:
        # n = kw; rows above and, unless masked, the own row.
        n = 2 * kh + 1
        full = w.new_zeros(o, i, n, kw)
        first = 0 if first_layer else 1
        full = torch.cat([full[:, :, :first], w, full[:, :, first + kh :]], dim=2)
        return F.conv2d(x, full, p[f"{name}.bias"], padding=(kh, kw // 2))
    n = 2 * kw + 1
    full = w.new_zeros(o, i, 1, n)
    first = 0 if first_layer else 1
    full = torch.cat([full[:, :, :, :first], w, full[:, :, :, first + kw :]], dim=3)
    return F.conv2d(x, full, p[f"{name}.bias"], padding=(0, kw))


def pixelcnn(p, codes, labels, layers, dropout=0.0, cropped=False):
    x = embed(p, codes)
    v, h = x, x
    if cropped:
        v, h = F.pad(x, (0, 0, 1, -1)), F.pad(x, (1, -1, 0, 0))
    skips = 0
    for index in range(layers):
        name = f"layers.{index}"
        c = x.shape[1]
        classes = None
        if f"{name}.class" in p:
            classes = F.embedding(labels, p[f"{name}.class"])[:, :, None, None]
        if cropped:
            kh, kw = p[f"{name}.vertical.weight"].shape[2:]
            before = conv(p, f"{name}.vertical", F.pad(v, (kw // 2, kw // 2, kh - 1, 0)))
            kw = p[f"{name}.horizontal.weight"].shape[3]
            own = conv(p, f"{name}.horizontal", F.pad(h, (kw - 1, 0, 0, 0)))
        else:
            before = masked(p, f"{name}.vertical", v, index == 0, rows=True)
            own = masked(p, f"{name}.horizontal", h, index == 0, rows=False)
        own = own + conv(p, f"{name}.link", before)
        if classes is not None:
            own, before = own + classes[:, 2 * c :], before + classes[:, : 2 * c]
        out = F.dropout(gate(own), dropout)
        skips = skips + conv(p, f"{name}.skip", out)
        if index + 1 < layers:
            v = F.dropout(gate(before), dropout)
            if index == 0 and not cropped:
                # The residual path must not show a position to itself.
                h = F.pad(h, (1, -1, 0, 0))
            h = h + conv(p, f"{name}.residual", out)
    return skips


def norm(p, name, x, labels):
    """x [B, T, C]."""
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    if f"{name}.class" in p:
        scale, shift = F.embedding(labels, p[f"{name}.class"])[:, None].chunk(2, dim=-1)
        return y * (p[f"{name}.gain"] + scale) + shift
    return y * p[f"{name}.gain"]


def linear(p, name, x):
    return F.linear(x, p[f"{name}.weight"][:, :, 0, 0], p[f"{name}.bias"])


def transformer(p, codes, labels, layers, heads, dropout=0.0):
    b, h, w, _ = codes.shape
    x = embed(p, codes).flatten(2).transpose(1, 2)
    x = F.pad(x, (0, 0, 1, -1)) + (p["positions.rows"] + p["positions.columns"]).flatten(1, 2)
    x = F.dropout(x, dropout)
    for index in range(layers):
        name = f"layers.{index}"
        y = norm(p, f"{name}.attention.norm", x, labels)

        def split(part):
            return linear(p, f"{name}.attention.{part}", y).unflatten(2, (heads, -1)).transpose(1, 2)

        y = F.scaled_dot_product_attention(split("query"), split("key"), split("value"), is_causal=True)
        y = linear(p, f"{name}.attention.output", y.transpose(1, 2).flatten(2))
        x = x + F.dropout(y, dropout)
        y = linear(p, f"{name}.mlp.in", norm(p, f"{name}.mlp.norm", x, labels))
        a, b_ = y.chunk(2, dim=-1)
        x = x + F.dropout(linear(p, f"{name}.mlp.out", F.silu(a) * b_), dropout)
    return norm(p, "norm", x, labels).transpose(1, 2).unflatten(2, (h, w))


def head(p, features, codes):
    """Logits [B, K, h, w] of every code of a position."""
    before, result = 0, []
    for g in range(codes.shape[-1]):
        hidden = conv(p, f"head.{g}.features", F.relu(features))
        if g > 0:
            before = before + F.embedding(codes[..., g - 1], p[f"head.codes.{g - 1}"]).permute(0, 3, 1, 2)
            hidden = hidden + conv(p, f"head.{g}.before", before)
        result.append(conv(p, f"head.{g}.logits", F.relu(hidden)))
    return result


def loss(logits, codes):
    """Nats per code."""
    nats = [F.cross_entropy(logit, codes[..., g]) for g, logit in enumerate(logits)]
    return sum(nats) / len(nats)
