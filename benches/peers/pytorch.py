"""Forward-only steps in eager PyTorch, to compare FLOPS for Burn with.

Reads one task per line from standard input, does it, and answers with its seconds. `table` runs it
in turn with its own work:

    inference ROWS      forward passes and losses of ROWS rows, MAX_ROWS in a pass
    weights QUERIES     a step in all parameters: antithetic normal noise on the weights, one pass
                        over the batch for each of an even number of queries
    activation QUERIES  a step in all parameters: signs on the outputs of all layers, QUERIES rows
                        for each image, MAX_ROWS in a pass
    backprop            a step of backpropagation

Each step ends with an update by Adam. The model is vit_micro_patch4_32, or another --model, with
random weights. As in FLOPS for Burn, its last block computes only what reaches the class token.
"""

import argparse
import sys
import time

try:
    import torch
    from torch import nn
    from torch.nn import functional as F
except ImportError as error:
    print(f"absent: {error}", flush=True)
    sys.exit(0)

SIZES = {
    "vit_micro_patch4_32": dict(image=32, patch=4, width=128, depth=6, heads=4, classes=10),
    "vit_tiny_patch16_224": dict(image=224, patch=16, width=192, depth=12, heads=3, classes=10),
    "vit_small_patch16_224": dict(image=224, patch=16, width=384, depth=12, heads=6, classes=10),
    "vit_base_patch16_224": dict(image=224, patch=16, width=768, depth=12, heads=12, classes=10),
}


class Record:
    """Records the inputs of layers."""

    def __init__(self):
        self.sites = []

    def __call__(self, layer, x, y):
        self.sites.append((layer, x, torch.zeros_like(y)))
        return y


class Noise:
    """Adds signs to the outputs of layers, and keeps the signs."""

    def __init__(self, sigma):
        self.sigma = sigma
        self.noises = []

    def __call__(self, layer, x, y):
        noise = torch.empty_like(y).bernoulli_().mul_(2).sub_(1)
        self.noises.append(noise)
        return y.add(noise, alpha=self.sigma)


def plain(layer, x, y):
    return y


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.query, self.key, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x, at, seen):
        """Returns the first `seen` tokens of the result."""
        rows, tokens, width = x.shape
        call = lambda layer, x: at(layer, x, layer(x))
        split = lambda x: x.view(rows, -1, self.heads, width // self.heads).transpose(1, 2)
        h = call(self.norm1, x)
        q = split(call(self.query, h[:, :seen]))
        k, v = (split(call(layer, h)) for layer in (self.key, self.value))
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, seen, width)
        x = x[:, :seen] + call(self.proj, a)
        h = F.gelu(call(self.fc1, call(self.norm2, x)))
        return x + call(self.fc2, h)


class ViT(nn.Module):
    def __init__(self, image, patch, width, depth, heads, classes):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, classes)

    def forward(self, images, at=plain):
        x = at(self.patch_embed, images, self.patch_embed(images)).flatten(2).transpose(1, 2)
        cls = at(self.cls_token, None, self.cls_token.expand(len(x), -1, -1))
        x = torch.cat([cls, x], 1)
        x = at(self.pos_embed, None, x + self.pos_embed)
        # only the class token reaches the loss
        for i, block in enumerate(self.blocks):
            x = block(x, at, 1 if i + 1 == len(self.blocks) else x.shape[1])
        x = at(self.norm, x[:, 0], self.norm(x[:, 0]))
        return at(self.head, x, self.head(x))


def losses(model, images, labels, at=plain):
    return F.cross_entropy(model(images, at), labels, reduction="none")


@torch.no_grad()
def weights(model, optimizer, images, labels, queries, sigma=1e-3):
    """g = mean over pairs of (L(θ + σε) − L(θ − σε))/2σ · ε.

    Each pair has a fresh ε, which is drawn again from its seed instead of stored.
    """
    parameters = list(model.parameters())
    generator = torch.Generator(device=parameters[0].device)
    draw = lambda p: torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype)

    def move(seed, scale):
        generator.manual_seed(seed)
        for p in parameters:
            p.add_(draw(p), alpha=scale)

    coefficients = []
    for pair in range(queries // 2):
        move(pair, sigma)
        plus = losses(model, images, labels).mean()
        move(pair, -2 * sigma)
        minus = losses(model, images, labels).mean()
        move(pair, sigma)
        coefficients.append((plus - minus) / (2 * sigma))
    # waits for the device once
    coefficients = torch.stack(coefficients).tolist()
    for p in parameters:
        p.grad = torch.zeros_like(p)
    for pair, c in enumerate(coefficients):
        generator.manual_seed(pair)
        for p in parameters:
            p.grad.add_(draw(p), alpha=c / len(coefficients))
    optimizer.step()


@torch.no_grad()
def activation(model, optimizer, images, labels, queries, max_rows, sigma=1e-3):
    """Likelihood ratio on the outputs of all layers.

    Every query of every image has signs of its own. Their weighted sum per image is multiplied with
    the clean input.
    """
    record = Record()
    clean = losses(model, images, labels, record)
    scale = 1.0 / (len(images) * queries)
    for start in range(0, len(images) * queries, max_rows):
        datum = torch.arange(start, min(start + max_rows, len(images) * queries), device=images.device) // queries
        noise = Noise(sigma)
        c = (losses(model, images[datum], labels[datum], noise) - clean[datum]) * (scale / sigma)
        for (_, _, total), e in zip(record.sites, noise.noises):
            total.index_add_(0, datum, e.mul_(c.to(e.dtype).view(-1, *[1] * (e.dim() - 1))))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for layer, x, g in record.sites:
        if isinstance(layer, nn.Parameter):
            layer.grad.add_(g.sum(0, keepdim=True))
        elif isinstance(layer, nn.Linear):
            flat = g.reshape(-1, g.shape[-1])
            layer.weight.grad.addmm_(flat.t(), x.reshape(-1, x.shape[-1]))
            layer.bias.grad.add_(flat.sum(0))
        elif isinstance(layer, nn.LayerNorm):
            normed = F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
            over = tuple(range(g.dim() - 1))
            layer.weight.grad.add_((g * normed).sum(over))
            layer.bias.grad.add_(g.sum(over))
        else:
            columns = F.unfold(x, layer.kernel_size, stride=layer.stride)
            layer.weight.grad.add_(torch.einsum("nop,nip->oi", g.flatten(2), columns).view_as(layer.weight))
            layer.bias.grad.add_(g.sum((0, 2, 3)))
    optimizer.step()


def backprop(model, optimizer, images, labels):
    optimizer.zero_grad()
    losses(model, images, labels).mean().backward()
    optimizer.step()


@torch.no_grad()
def inference(model, images, labels, rows, max_rows):
    for start in range(0, rows, max_rows):
        datum = torch.arange(start, min(start + max_rows, rows), device=images.device) % len(images)
        losses(model, images[datum], labels[datum]).sum()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="vit_micro_patch4_32")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--max-rows", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    # a GPU multiplies single precision in TF32, as CubeCL does on tensor cores
    torch.set_float32_matmul_precision("highest" if args.device == "cpu" else "high")
    size = SIZES[args.model]
    where = dict(device=args.device, dtype=getattr(torch, args.dtype))
    model = ViT(**size).to(**where)
    images = torch.randn(args.batch, 3, size["image"], size["image"]).to(**where)
    labels = torch.arange(args.batch, device=args.device) % size["classes"]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    tasks = {
        "inference": lambda rows: inference(model, images, labels, rows, args.max_rows),
        "weights": lambda queries: weights(model, optimizer, images, labels, queries),
        "activation": lambda queries: activation(model, optimizer, images, labels, queries, args.max_rows),
        "backprop": lambda: backprop(model, optimizer, images, labels),
    }
    print(f"torch {torch.__version__}", flush=True)
    for line in sys.stdin:
        name, *numbers = line.split()
        start = time.perf_counter()
        tasks[name](*map(int, numbers))
        if args.device != "cpu":
            torch.cuda.synchronize()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
