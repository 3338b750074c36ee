"""What `cargo xtask gpu-check` is compared with: DEVICE MODELS FORMATS BATCHES SECONDS (lists with commas).

Trains the standard model (Sonnet's CIFAR-10 VQ-VAE) or that of imagenet256 (VQ-VAE-2, two levels) on images
that lie on the device, with EMA codebooks and AdamW as our recipes do, in PyTorch's ways: eager, compiled, and
compiled into CUDA graphs, all channels-last. Prints one line of JSON for each. TF32 is on for `tf32` alone.
"""
import json
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

device, models, formats, batches, seconds = sys.argv[1:6]
device = torch.device(device)
on_cuda = device.type == "cuda"
torch.backends.cudnn.benchmark = True


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(128, 32, 3, 1, 1), nn.Conv2d(32, 128, 1)

    def forward(self, x):
        return x + self.b(F.relu(self.a(F.relu(x))))


def encoder(channels, downsample, last):
    down = [nn.Conv2d(channels, 64, 4, 2, 1), nn.ReLU(), nn.Conv2d(64, 128, 4, 2, 1)] if downsample == 4 else [
        nn.Conv2d(channels, 128, 4, 2, 1)]
    return nn.Sequential(*down, nn.ReLU(), nn.Conv2d(128, 128, 3, 1, 1), Residual(), Residual(), nn.ReLU(), *last)


def decoder(channels, upsample, out):
    up = [nn.ConvTranspose2d(128, 64, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(64, out, 4, 2, 1)] if upsample == 4 else [
        nn.ConvTranspose2d(128, out, 4, 2, 1)]
    return nn.Sequential(nn.Conv2d(channels, 128, 3, 1, 1), Residual(), Residual(), nn.ReLU(), *up)


class Codebook(nn.Module):
    """Nearest of 512 codes of 64 numbers, moved by averages."""

    def __init__(self):
        super().__init__()
        e = (torch.rand(512, 64) * 2 - 1) / 512
        self.register_buffer("e", e)
        self.register_buffer("n", torch.ones(512))
        self.register_buffer("m", e.clone())

    def forward(self, z):
        z = z.float().permute(0, 2, 3, 1)
        flat = z.reshape(-1, 64)
        with torch.no_grad():
            codes = (self.e.pow(2).sum(1) - 2 * flat @ self.e.T).argmin(1)
            e = self.e[codes]
        commitment = F.mse_loss(flat, e)
        with torch.no_grad():
            counts = torch.zeros_like(self.n).index_add_(0, codes, torch.ones_like(codes, dtype=torch.float32))
            sums = torch.zeros_like(self.m).index_add_(0, codes, flat)
            self.n.mul_(0.99).add_(counts, alpha=0.01)
            self.m.mul_(0.99).add_(sums, alpha=0.01)
            total = self.n.sum()
            smoothed = (self.n + 1e-5) / (total + 512e-5) * total
            self.e.copy_(torch.where((counts > 0)[:, None], self.m / smoothed[:, None], self.e))
        z_q = flat + (e - flat).detach()
        return z_q.view(z.shape).permute(0, 3, 1, 2), commitment


class Standard(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = encoder(3, 4, [nn.Conv2d(128, 64, 1)])
        self.codes, self.decoder = Codebook(), decoder(64, 4, 3)

    def forward(self, x):
        z_q, commitment = self.codes(self.encoder(x))
        return self.decoder(z_q), commitment


class TwoLevels(nn.Module):
    def __init__(self):
        super().__init__()
        self.bottom, self.top = encoder(3, 4, []), encoder(128, 2, [nn.Conv2d(128, 64, 1)])
        self.top_codes, self.bottom_codes = Codebook(), Codebook()
        self.top_decoder, self.projection = decoder(64, 2, 128), nn.Conv2d(256, 64, 1)
        self.decoder = decoder(128, 4, 3)

    def forward(self, x):
        low = self.bottom(x)
        top, first = self.top_codes(self.top(low))
        both = torch.cat([low, self.top_decoder(top)], 1)
        bottom, second = self.bottom_codes(self.projection(both))
        maps = torch.cat([bottom, F.interpolate(top, scale_factor=2)], 1)
        return self.decoder(maps), first + second


def measure(name, format, way, batch):
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = format == "tf32"
    model, side = {"standard": (Standard, 32), "imagenet256": (TwoLevels, 256)}[name]
    model = model().to(device).to(memory_format=torch.channels_last)
    capturable = on_cuda and way == "graphs"
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, weight_decay=1e-4, fused=True, capturable=capturable)
    x = (torch.rand(batch, 3, side, side, device=device) - 0.5).contiguous(memory_format=torch.channels_last)

    def forward(x):
        with torch.autocast(device.type, torch.bfloat16, enabled=format == "bf16"):
            y, commitment = model(x)
        return F.mse_loss(y.float(), x) / 0.0628 + 0.25 * commitment

    run = forward if way == "eager" else torch.compile(forward)

    def step():
        loss = run(x)
        optimizer.zero_grad(set_to_none=not capturable)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def wait():
        if on_cuda:
            torch.cuda.synchronize()

    for _ in range(11 if on_cuda else 2):
        step()
    if capturable:
        # The whole step as one graph.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        piece = graph.replay
    else:
        piece = step
    piece()
    wait()
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < float(seconds):
        for _ in range(10 if on_cuda else 1):
            piece()
            steps += 1
        wait()
    return steps * batch / (time.perf_counter() - start)


for name in models.split(","):
    for format in formats.split(","):
        for batch in map(int, batches.split(",")):
            for way in ["eager", "compiled", "graphs"] if on_cuda else ["eager"]:
                line = {"way": way, "model": name, "format": format, "batch": batch}
                try:
                    line["images_per_second"] = measure(name, format, way, batch)
                except Exception as error:  # one that does not run must not hide the others
                    line |= {"images_per_second": None, "problem": str(error).split("\n")[0][:200]}
                    if on_cuda:
                        torch.cuda.empty_cache()
                print(json.dumps(line), flush=True)
