"""Golden values for vq-model from PyTorch: `python make_golden.py` rewrites golden.safetensors beside it.

Made with Python 3.11.7 and PyTorch 2.15.0 (CPU); nothing else is needed. Deterministic: the same versions
give the same bytes. Computed in f64 from parameters and images that are exact in f32, stored as f32.

The modules are written after Sonnet's `vqvae_example.ipynb` and `vqvae.py` (levels as in Razavi et al. 2019),
not after the Rust code; only their names are chosen so that `state_dict()` gives ours.

Tensors, for each case: CASE/images, CASE/param/NAME, CASE/reconstruction, CASE/codes.LEVEL (as f32),
CASE/losses [reconstruction, codebook, commitment, total], CASE/grad/NAME, CASE/grad_images.
Case `ema` also has images.STEP and usage.STEP, sums.STEP, codebook.STEP after three updates.
"""

import json
import pathlib
import struct

import torch
import torch.nn.functional as F
from torch import nn

BETA, VARIANCE = 0.25, 0.0628
DECAY, EPSILON = 0.9, 1e-5


class Residual(nn.Module):
    def __init__(self, channels, hidden):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, h):
        return h + self.conv2(F.relu(self.conv1(F.relu(h))))


class Codebook(nn.Module):
    def __init__(self, size, dim):
        super().__init__()
        self.codebook = nn.Parameter(torch.zeros(size, dim))


class Level(nn.Module):
    """Two halvings at the bottom, one above it."""

    def __init__(self, halvings, below, hidden, blocks, block_hidden, size, dim, above_features, above_dims):
        super().__init__()
        self.halvings = halvings
        widths = [below, hidden // 2, hidden][: halvings + 1]
        self.encoder = nn.ModuleList(
            [nn.Conv2d(i, o, 4, stride=2, padding=1) for i, o in zip(widths, widths[1:])]
            + [nn.Conv2d(widths[-1], hidden, 3, padding=1)]
            + [Residual(hidden, block_hidden) for _ in range(blocks)]
        )
        self.projection = nn.Conv2d(hidden + above_features, dim, 1)
        self.quantizer = Codebook(size, dim)
        widths = [hidden, hidden // 2, below] if halvings == 2 else [hidden, below]
        self.decoder = nn.ModuleList(
            [nn.Conv2d(dim + above_dims, hidden, 3, padding=1)]
            + [Residual(hidden, block_hidden) for _ in range(blocks)]
            + [nn.ConvTranspose2d(i, o, 4, stride=2, padding=1) for i, o in zip(widths, widths[1:])]
        )

    def encode(self, h, is_bottom):
        for index, layer in enumerate(self.encoder):
            if index > self.halvings:
                h = layer(h)
            elif index == 0 and is_bottom:
                h = F.relu(layer(h))
            else:
                h = F.relu(layer(F.relu(h)))
        return h

    def decode(self, h):
        for layer in self.decoder:
            h = layer(F.relu(h)) if isinstance(layer, nn.ConvTranspose2d) else layer(h)
        return h


def straight_through(z, e):
    return z + (e - z).detach()


def rotation(z, e):
    """Fifty et al. 2024, section 4.2."""
    with torch.no_grad():
        z_hat, e_hat = F.normalize(z, dim=-1), F.normalize(e, dim=-1)
        r = F.normalize(z_hat + e_hat, dim=-1)
        scale = e.norm(dim=-1, keepdim=True) / z.norm(dim=-1, keepdim=True)
    rotated = z - 2 * (z * r).sum(-1, keepdim=True) * r + 2 * (z * z_hat).sum(-1, keepdim=True) * e_hat
    return scale * rotated


class VqVae(nn.Module):
    def __init__(self, levels, estimator, rule):
        super().__init__()
        self.levels, self.estimator, self.rule = nn.ModuleList(levels), estimator, rule

    def quantize(self, level, z):
        z = z.permute(0, 2, 3, 1)  # [B,h,w,D]
        flat = z.reshape(-1, z.shape[-1])
        book = level.quantizer.codebook
        distances = (flat[:, None, :] - book[None, :, :]).pow(2).sum(-1)
        two = distances.topk(2, dim=1, largest=False).values
        assert (two[:, 1] - two[:, 0]).min() > 1e-5, "a code is too close a call to be golden"
        codes = distances.argmin(1)
        e = book[codes].view(z.shape)
        codebook_loss = (z.detach() - e).pow(2).mean() if self.rule == "gradient" else torch.zeros(())
        commitment_loss = (z - e.detach()).pow(2).mean()
        z_q = self.estimator(z, e.detach()).permute(0, 3, 1, 2)
        return z_q, codes.view(z.shape[:3]), codebook_loss, commitment_loss, flat.detach()

    def forward(self, x):
        features = []
        for index, level in enumerate(self.levels):
            x = level.encode(x, index == 0)
            features.append(x)
        maps, results = None, []
        for index in reversed(range(len(self.levels))):
            h = features[index]
            if maps is not None:
                h = torch.cat([h, self.levels[index + 1].decode(maps)], 1)
            result = self.quantize(self.levels[index], self.levels[index].projection(F.relu(h)))
            z_q = result[0]
            if maps is not None:
                z_q = torch.cat([z_q, F.interpolate(maps, scale_factor=2, mode="nearest")], 1)
            maps = z_q
            results.insert(0, result)
        return self.levels[0].decode(maps), results


def place_codebooks(model, images):
    """Codes among the encoder's outputs, so that several are in use and the losses are not tiny."""
    for level in model.levels:
        book = level.quantizer.codebook
        book.data.copy_(1e3 * torch.arange(book.numel()).view(book.shape))
    for level in reversed(model.levels):
        book = level.quantizer.codebook
        _, results = model(images)
        flat = results[list(model.levels).index(level)][4]
        chosen = flat[torch.randperm(len(flat))[: len(book)]]
        spread = flat.std(0)
        noise = torch.randn(len(book), book.shape[1], dtype=flat.dtype)
        placed = flat.mean(0) + 1.5 * spread * noise
        placed[: len(chosen)] = chosen + 0.4 * spread * noise[: len(chosen)]
        book.data.copy_(placed.float())


def run(out, case, model, images):
    reconstruction, results = model(images)
    losses = [
        (reconstruction - images).pow(2).mean() / VARIANCE,
        sum(result[2] for result in results),
        sum(result[3] for result in results),
    ]
    total = losses[0] + losses[1] + BETA * losses[2]
    total.backward()
    out[f"{case}/images"] = images
    out[f"{case}/grad_images"] = images.grad
    out[f"{case}/reconstruction"] = reconstruction
    out[f"{case}/losses"] = torch.stack([*losses, total])
    for index, result in enumerate(results):
        used = result[1].unique().numel()
        print(f"{case}: level {index}: {used} codes in use, losses {[round(l.item(), 4) for l in losses]}")
        assert used > 2
        out[f"{case}/codes.{index}"] = result[1]
    for name, parameter in model.named_parameters():
        out[f"{case}/param/{name}"] = parameter.detach().clone()
        if parameter.grad is not None:
            out[f"{case}/grad/{name}"] = parameter.grad
    return results


def build(seed, levels, estimator, rule, width=8):
    torch.manual_seed(seed)
    model = VqVae([Level(*level) for level in levels], estimator, rule)
    images = (torch.rand(4, 3, 8, width) - 0.5).double().requires_grad_()
    for parameter in model.parameters():
        # Twice PyTorch's default, so that nothing is close to zero.
        parameter.data.mul_(2)
    model = model.double()
    place_codebooks(model, images.detach())
    return model, images


def ema(out, model, images):
    """Sonnet's VectorQuantizerEMA with N = 1, m = e at the start; unused codes stay."""
    book = model.levels[0].quantizer.codebook.data
    usage, sums = torch.ones(len(book)).double(), book.clone()
    for step in range(3):
        batch = images.detach() if step == 0 else (torch.rand(4, 3, 8, 8) - 0.5).double()
        out[f"ema/images.{step}"] = batch
        with torch.no_grad():
            _, results = model(batch)
        codes, flat = results[0][1].flatten(), results[0][4]
        chosen = F.one_hot(codes, len(book)).double()
        usage = DECAY * usage + (1 - DECAY) * chosen.sum(0)
        sums = DECAY * sums + (1 - DECAY) * chosen.T @ flat
        n = usage.sum()
        smoothed = (usage + EPSILON) / (n + len(book) * EPSILON) * n
        hit = chosen.sum(0, keepdim=True).T > 0
        book.copy_(torch.where(hit, sums / smoothed[:, None], book))
        assert not hit.all() and hit.any()
        out[f"ema/usage.{step}"] = usage
        out[f"ema/sums.{step}"] = sums
        out[f"ema/codebook.{step}"] = book.clone()


def write(path, tensors):
    header, body, offset = {}, [], 0
    for name in sorted(tensors):
        data = tensors[name].detach().to(torch.float32).contiguous()
        raw = bytes(data.flatten().view(torch.uint8).tolist()) if data.numel() else b""
        header[name] = {"dtype": "F32", "shape": list(data.shape), "data_offsets": [offset, offset + len(raw)]}
        offset += len(raw)
        body.append(raw)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(body))
    print(f"{path.name}: {path.stat().st_size} bytes")


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    out = {}
    one = [(2, 3, 16, 2, 8, 16, 8, 0, 0)]
    run(out, "gradient", *build(0, one, straight_through, "gradient"))
    small = [(2, 3, 8, 1, 4, 16, 4, 0, 0)]
    run(out, "rotation", *build(1, small, rotation, "gradient"))
    model, images = build(2, small, straight_through, "ema")
    run(out, "ema", model, images)
    ema(out, model, images)
    two = [(2, 3, 8, 1, 4, 16, 4, 8, 3), (1, 8, 6, 1, 4, 8, 3, 0, 0)]
    run(out, "two_levels", *build(3, two, straight_through, "gradient", width=16))
    write(pathlib.Path(__file__).with_name("golden.safetensors"), out)


if __name__ == "__main__":
    main()
