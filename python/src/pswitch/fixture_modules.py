"""Small modules for the fixtures: each holds something that an executor of exported programs gets wrong easily."""

import torch
from torch import nn
from torch.nn import functional as F


class TwoInThreeOut(nn.Module):
    """Several inputs and several named outputs, one of which another is made of."""

    def __init__(self):
        super().__init__()
        self.left = nn.Linear(16, 24)
        self.right = nn.Linear(8, 24)

    def forward(self, image_features, text_features):
        left, right = self.left(image_features), self.right(text_features)
        joined = torch.tanh(left * right)
        return {
            "joined": joined,
            "similarity": F.cosine_similarity(left, right, dim=-1),
            "norm": joined.norm(dim=-1),
        }


class SmallConvolution(nn.Module):
    """A convolutional network small enough for many batch sizes."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 16, 3, padding=1, groups=4),
            nn.Hardswish(inplace=True),
            nn.AdaptiveAvgPool2d((2, 2)),
        )
        self.classifier = nn.Linear(64, 10)

    def forward(self, image):
        return {"logits": self.classifier(self.features(image).flatten(1))}


class IntegerOutputs(nn.Module):
    """Classes, counts and flags: outputs of every width of integer and of bool."""

    def __init__(self):
        super().__init__()
        self.score = nn.Linear(12, 7)

    def forward(self, features):
        score = self.score(features)
        top = score.topk(3, dim=-1)
        return {
            "values": top.values,
            "classes": top.indices,
            "best": score.argmax(-1).to(torch.int32),
            "count": (score > 0).sum(-1).to(torch.int16),
            "positive": score > 0,
            "bytes": (score.sigmoid() * 255).to(torch.uint8),
            "signed": (score.tanh() * 127).to(torch.int8),
            "total": (score > 0).sum(),
        }


class LowPrecision(nn.Module):
    """Weights, inputs and outputs of a 16-bit type, with one output in 32 bits."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.first = nn.Linear(32, 48, dtype=dtype)
        self.norm = nn.LayerNorm(48, dtype=dtype)
        self.second = nn.Linear(48, 5, dtype=dtype)

    def forward(self, features):
        hidden = F.gelu(self.norm(self.first(features)))
        return {"low": self.second(hidden), "high": hidden.float().square().mean(-1)}


class SymbolicArithmetic(nn.Module):
    """Sizes computed from sizes: sums, products, quotients, remainders, minima, and a size among the outputs."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Linear(6, 6)

    def forward(self, sequence):
        batch, length, width = sequence.shape
        scaled = self.scale(sequence)
        half = length // 2
        front, back = scaled[:, :half], scaled[:, length - half :]
        padded = F.pad(scaled, (0, 0, 0, 2 * length + 1 - length))
        positions = torch.arange(length * 3, device=sequence.device).remainder(length) / (length + batch)
        flat = (front - back).reshape(batch * half * width)
        mean = scaled.sum((1, 2)) / (length * width) ** 0.5
        return {"padded": padded, "positions": positions, "flat": flat, "mean": mean, "rows": batch * length}


class InPlace(nn.Module):
    """Operators that write into their arguments, into views of them and through indices."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(10, 10)

    def forward(self, features):
        x = self.mix(features)
        x.relu_().add_(1.0)
        x[:, 0] = 7.0
        x[:, 1:4].mul_(x[:, 4:7])
        x[0, [8, 9]] = x[1, [2, 3]]
        y = x.clone()
        y.masked_fill_(y > 1.5, -1.0)
        y.index_add_(0, torch.tensor([1, 0], device=y.device), x[:2])
        z = torch.empty_like(y)
        z.copy_(y.t().contiguous().t())
        return {"x": x, "y": y, "z": z.sub_(x, alpha=0.5)}


class Constants(nn.Module):
    """Tensors made in `forward`, held as plain attributes, as non-persistent buffers, and shared storage."""

    def __init__(self):
        super().__init__()
        self.table = torch.linspace(-1, 1, 9)
        self.register_buffer("window", torch.hann_window(9, periodic=False), persistent=False)
        self.register_buffer("steps", torch.arange(9))
        self.weight = nn.Parameter(torch.randn(9, 9))

    def _apply(self, fn, recurse=True):
        # A plain attribute stays behind when the parameters go to another device.
        self.table = fn(self.table)
        return super()._apply(fn, recurse)

    def forward(self, signal):
        levels = torch.tensor([0.5, 2.0, -1.0], device=signal.device)
        order = torch.tensor([[2, 0, 1]], device=signal.device)
        windowed = signal * self.window + self.table
        picked = windowed[:, :3].gather(1, order.expand(signal.shape[0], 3))
        return picked * levels, windowed @ self.weight, self.steps + windowed.round().long(), self.table * 2


class FixedInputs(nn.Module):
    """Arguments that are no tensors are fixed at export; some outputs are constants or inputs handed through."""

    def forward(self, features, mode: str, power: int, offset: float, negate: bool, mask=None):
        result = features.pow(power) + offset
        result = -result if negate else result
        if mode == "sum":
            result = result.sum(-1)
        if mask is not None:
            result = result * mask
        return result, None, features, 3


class Lookup(nn.Module):
    """An index out of range raises at run time, and the next call must be right again."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.rows = nn.Parameter(torch.randn(11, 6))

    def forward(self, ids, positions):
        return {"embedded": self.embedding(ids), "selected": self.rows[positions]}


class Lists(nn.Module):
    """Lists of tensors as arguments and results, and optional tensors in lists."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(12, 24)

    def forward(self, features, index):
        query, key, value = self.project(features).split(8, dim=-1)
        first, second, third, fourth = query.chunk(4, dim=-1)
        rows = key.unbind(0)
        uneven = value.split_with_sizes([1, 5, 2], dim=-1)
        joined = torch.cat([first * fourth, second - third], dim=-1)
        stacked = torch.stack(rows[::-1])
        product = torch.einsum("bi,bj->bij", query, uneven[1])
        grid = torch.meshgrid(features[0], features[1], indexing="ij")
        broadcast = torch.broadcast_tensors(features[:, :1], features)
        indexed = product[:, index, None]
        return [joined, stacked, product, grid[0] + grid[1], broadcast[0] - broadcast[1], indexed, uneven[2]]


class WritesChunk(nn.Module):
    """Writes to a part of a parameter that a list holds."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4), requires_grad=False)

    def forward(self, features):
        self.weight.chunk(2)[0].add_(1)
        return features @ self.weight


class WritesThroughDropout(nn.Module):
    """Writes to a parameter through an operator whose schema does not say that it returns its argument."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4), requires_grad=False)

    def forward(self, features):
        nn.functional.dropout(self.weight, training=False).mul_(2)
        return features @ self.weight


class Counter(nn.Module):
    """A buffer that every call changes: cases follow upon each other."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, features):
        self.count.add_(1)
        self.mean.mul_(0.5).add_(features.mean(0), alpha=0.5)
        return {"shifted": features - self.mean, "count": self.count.clone()}


class OddWeights(nn.Module):
    """Tied, transposed, expanded and overlapping weights."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(13, 8)
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.embedding.weight
        self.transposed = nn.Parameter(torch.randn(8, 5).t())
        storage = torch.randn(40)
        self.register_buffer("front", storage[:16].view(2, 8))
        self.register_buffer("middle", storage[8:24].view(2, 8))
        self.register_buffer("strided", torch.randn(6, 16)[::2, ::2])
        self.register_buffer("expanded", torch.randn(1, 8).expand(3, 8))
        self.register_buffer("nothing", torch.zeros(0, 8))

    def forward(self, ids):
        hidden = self.embedding(ids) + self.front.sum(0) * self.middle.sum(0)
        hidden = torch.cat([hidden, self.nothing])
        return {
            "logits": self.head(hidden),
            "small": hidden @ self.transposed.t(),
            "rows": hidden @ (self.strided + self.expanded).t(),
        }


class Recurrent(nn.Module):
    """An LSTM and a GRU: operators with lists of weights."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 10, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(20, 7, batch_first=True)

    def forward(self, sequence):
        out, (hidden, cell) = self.lstm(sequence)
        return {"last": self.gru(out)[0][:, -1], "hidden": hidden, "cell": cell}


class DataDependent(nn.Module):
    """Sizes that only the data tells, and numbers read back from tensors."""

    def forward(self, features, length):
        count = length.item()
        torch._check(count >= 1)
        torch._check(count <= features.shape[0])
        front = features[:count]
        return {"positive": features[features > 0], "front": front * features.sum().item(), "rows": count}


class Spectrum(nn.Module):
    """Complex numbers inside, real ones outside."""

    def forward(self, signal):
        spectrum = torch.fft.rfft(signal)
        return {"power": spectrum.abs().square(), "back": torch.fft.irfft(spectrum * 2, n=signal.shape[-1])}


class Conditional(nn.Module):
    """Control flow inside the graph: no operator of the dispatcher, to be refused by name."""

    def forward(self, features):
        return torch.cond(features.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (features,))


class Perceptron(nn.Module):
    """Returns its loss. Batch norm and dropout do in training what they do nowhere else."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(7, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.25), nn.Linear(16, 3)
        )

    def forward(self, features, labels):
        return F.cross_entropy(self.layers(features), labels)


class TiedTagger(nn.Module):
    """Returns its loss. A weight embeds and classifies, a layer comes twice: their gradients have two parts each."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.layer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens, labels):
        hidden = torch.tanh(self.layer(torch.tanh(self.layer(self.embedding(tokens)))))
        return F.cross_entropy(self.head(hidden).flatten(0, 1), labels.flatten())


class PictureClassifier(nn.Module):
    """A network that returns its loss."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images, labels):
        return F.cross_entropy(self.model(images), labels)
