"""Times a training step (forward, backward, AdamW) of the default networks in compiled PyTorch:
`python time_steps.py pixelcnn|transformer [GRID] [BATCH]`; compare with the example `speed`.
"""

import sys
import time

import torch

import networks

kind = sys.argv[1] if len(sys.argv) > 1 else "pixelcnn"
side = int(sys.argv[2]) if len(sys.argv) > 2 else 8
batch = int(sys.argv[3]) if len(sys.argv) > 3 else 32
settings = {
    "pixelcnn": dict(channels=128, layers=10, hidden=256, skip=128, first=5, kernel=3),
    "transformer": dict(channels=256, layers=6, hidden=256, mlp=512),
}[kind]
layers = settings["layers"]
torch.manual_seed(0)
p = {}
for name, shape in networks.shapes(kind, (side, side), [512], 0, **settings).items():
    fan_in = max(1, shape[1] * shape[2] * shape[3]) if name.endswith("weight") else 1
    p[name] = (torch.rand(shape) * 2 - 1) / fan_in**0.5
    if p[name].dim() == 4 and "positions" not in name and kind == "pixelcnn":
        p[name] = p[name].contiguous(memory_format=torch.channels_last)
    p[name].requires_grad_()
optimizer = torch.optim.AdamW(p.values(), lr=1e-4, fused=True)
codes = torch.randint(0, 512, (batch, side, side, 1))


def step(p, codes):
    if kind == "pixelcnn":
        features = networks.pixelcnn(p, codes, None, layers, dropout=0.1, cropped=True)
    else:
        features = networks.transformer(p, codes, None, layers, heads=4, dropout=0.1)
    return networks.loss(networks.head(p, features, codes), codes)


compiled = torch.compile(step)
times, processor = [], []
for index in range(13):
    start, used = time.perf_counter(), time.process_time()
    optimizer.zero_grad()
    compiled(p, codes).backward()
    optimizer.step()
    times.append(time.perf_counter() - start)
    processor.append(time.process_time() - used)
times, processor = sorted(times[3:]), sorted(processor[3:])
print(f"{kind} {side}x{side}, batch {batch}, {torch.get_num_threads()} threads, torch {torch.__version__}:")
print(f"training step: median {times[len(times) // 2]:.4f} s, fastest {times[0]:.4f} s; "
    f"processor time: median {processor[len(processor) // 2]:.4f} s, least {processor[0]:.4f} s")
