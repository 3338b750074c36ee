"""The measured programs on PyTorch's side: `pytorch.py WORK WAY`, told when to work on standard input.

Answers each line with: units done, seconds, peak memory in MiB and, for a search, how many MiB more than before
it took at most. `pytorch.py version` says which PyTorch it is. The model is the standard one of the
benchmark (Sonnet's CIFAR-10 VQ-VAE with a gradient codebook), the loss and the optimizer those of the
recipe cifar10-paper.
"""
import os
import pathlib
import resource
import sys
import time

import torch

if sys.argv[1:] == ["version"]:
    print(torch.__version__)
    sys.exit()

import torch.nn as nn
import torch.nn.functional as F

torch.set_num_threads(int(os.environ.get("RAYON_NUM_THREADS", os.cpu_count())))
sys.path.insert(0, str(pathlib.Path(__file__).parents[3] / "crates/vq-prior/tests/golden"))
import networks

BATCH, BATCHES, IMAGES, VECTORS = 128, 16, 10_000, 65_536
PRIORS = {
    "pixelcnn": dict(channels=128, layers=10, hidden=256, skip=128, first=5, kernel=3),
    "transformer": dict(channels=256, layers=6, hidden=256, mlp=512),
}
work, way = sys.argv[1:]
channels_last, bf16, compiled = "cl" in way, "bf16" in way, "compiled" in way


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(128, 32, 3, 1, 1), nn.Conv2d(32, 128, 1)

    def forward(self, x):
        return x + self.b(F.relu(self.a(F.relu(x))))


class Standard(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 64, 4, 2, 1), nn.ReLU(), nn.Conv2d(64, 128, 4, 2, 1), nn.ReLU(),
            nn.Conv2d(128, 128, 3, 1, 1), Residual(), Residual(), nn.ReLU(), nn.Conv2d(128, 64, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(64, 128, 3, 1, 1), Residual(), Residual(), nn.ReLU(),
            nn.ConvTranspose2d(128, 64, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(64, 3, 4, 2, 1),
        )
        self.codebook = nn.Parameter((torch.rand(512, 64) * 2 - 1) / 512)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            z = self.encoder(x)
        z = z.float().permute(0, 2, 3, 1)
        flat = z.reshape(-1, 64)
        with torch.no_grad():
            distances = self.codebook.pow(2).sum(1) - 2 * flat @ self.codebook.T
            codes = distances.argmin(1)
        e = self.codebook[codes]
        codebook, commitment = F.mse_loss(e, flat.detach()), F.mse_loss(flat, e.detach())
        z_q = (flat + (e - flat).detach()).view(z.shape).permute(0, 3, 1, 2)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return self.decoder(z_q).float(), codebook, commitment


def standard():
    model = Standard()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model


def images():
    x = torch.rand(BATCH, 3, 32, 32) - 0.5
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def train():
    model = standard()
    run = torch.compile(model) if compiled else model
    optimizer = torch.optim.Adam(model.parameters(), 3e-4, fused=True)
    x = images()

    def piece():
        for _ in range(BATCHES):
            reconstruction, codebook, commitment = run(x)
            loss = F.mse_loss(reconstruction, x) / 0.0628 + codebook + 0.25 * commitment
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return BATCHES * BATCH, piece


def forward():
    """A set as large as CIFAR-10's for testing, batch by batch; the last batch is smaller."""
    model = standard().eval()
    run = torch.compile(model, dynamic=False) if compiled else model
    pixels = torch.randint(0, 256, (IMAGES, 3, 32, 32), dtype=torch.uint8)

    def piece():
        with torch.no_grad():
            for part in pixels.split(BATCH):
                x = part.float() / 255 - 0.5
                run(x.contiguous(memory_format=torch.channels_last) if channels_last else x)

    return IMAGES, piece


def prior():
    """The default networks of vq-prior, with as many classes and as much dropout as on our side."""
    batch, settings = 64, PRIORS[work]
    p = {}
    for name, shape in networks.shapes(work, (8, 8), [512], 10, **settings).items():
        fan_in = max(1, shape[1] * shape[2] * shape[3]) if name.endswith("weight") else 1
        p[name] = (torch.rand(shape) * 2 - 1) / fan_in**0.5
        if channels_last and p[name].dim() == 4:
            p[name] = p[name].contiguous(memory_format=torch.channels_last)
        p[name].requires_grad_()
    optimizer = torch.optim.AdamW(p.values(), lr=1e-4, fused=True)
    codes, labels = torch.randint(0, 512, (batch, 8, 8, 1)), torch.randint(0, 10, (batch,))

    def step(p, codes, labels):
        if work == "pixelcnn":
            features = networks.pixelcnn(p, codes, labels, settings["layers"], 0.1, cropped=True)
        else:
            features = networks.transformer(p, codes, labels, settings["layers"], 4, 0.1)
        return networks.loss(networks.head(p, features, codes), codes)

    run = torch.compile(step) if compiled else step

    def piece():
        for _ in range(BATCHES):
            optimizer.zero_grad(set_to_none=True)
            run(p, codes, labels).backward()
            optimizer.step()

    return BATCHES * batch, piece


def search(codes):
    z, codebook = torch.randn(VECTORS, 64), torch.randn(codes, 64)

    def nearest(z):
        return (codebook.pow(2).sum(1) - 2 * z @ codebook.T).argmin(1)

    run = torch.compile(nearest) if compiled else nearest
    # Chunks whose distances take 64 MiB; all at once where asked for and possible.
    chunk = VECTORS if way == "matmul" and codes <= 8192 else max(1, (1 << 24) // codes)

    def piece():
        with torch.no_grad():
            for part in z.split(chunk):
                run(part)

    return VECTORS, piece


def memory(name):
    """A line of what Linux says of this process's memory, in MiB."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def growth(piece):
    """By how many MiB the resident memory grows while the piece runs, at most."""
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        piece()
        return [memory("VmHWM") - before]
    except OSError:
        return []


more = []
if work.startswith("search"):
    units, piece = search(int(work.split("-")[1]))
    # What is compiled, and the threads, are there already.
    piece()
    more = growth(piece)
else:
    units, piece = {"train": train, "forward": forward, "pixelcnn": prior, "transformer": prior}[work]()
    piece()
print("ready", flush=True)
for _ in sys.stdin:
    start = time.perf_counter()
    piece()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(units, seconds, peak, *more, flush=True)
