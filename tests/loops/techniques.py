"""Kinds of training that change what a step is: two gradients, learned loss weights, new parts."""

import math
from itertools import permutations

import torch
from loops.loop import Loop, draw, network
from loops.published import Published, binary
from torch import nn, optim
from torch.nn import functional


class SharpnessAware(Loop):
    """The step is made from where the gradient at the top of a step uphill says."""

    def backward(self, seed):
        inputs, targets = draw(seed)
        params = list(self.model.parameters())
        functional.cross_entropy(self.model(inputs), targets).backward()
        starts = [param.detach().clone() for param in params]
        with torch.no_grad():
            norm = math.sqrt(sum(float(param.grad.square().sum()) for param in params))
            for param in params:
                param.add_(param.grad, alpha=0.05 / norm)
        self.model.zero_grad()
        functional.cross_entropy(self.model(inputs), targets).backward()
        for param, start in zip(params, starts, strict=True):
            param.data = start
        return [(inputs,)]


class LearnedWeights(Loop):
    """Weights of two losses are learned too; gradients are cleared after the forward call."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network()[:3]
            self.classes, self.value = nn.Linear(12, 3), nn.Linear(12, 1)

        def forward(self, inputs):
            features = self.body(inputs)
            return self.classes(features), self.value(features).squeeze(1)

    def build(self):
        return self.Network()

    def make_optimizers(self, make):
        self.weights = nn.Parameter(torch.zeros(2))
        return [make([*self.model.parameters(), self.weights], lr=self.lr)]

    def backward(self, seed):
        inputs, targets = draw(seed)
        logits, values = self.model(inputs)
        losses = torch.stack(
            (
                functional.cross_entropy(logits, targets),
                functional.mse_loss(values, inputs.sum(1)),
            )
        )
        loss = ((-self.weights).exp() * losses + self.weights).sum()
        self.optimizers[0].zero_grad()
        loss.backward()
        return [(inputs,)]

    def logits(self, model, *args):
        return model(*args)[0]


class NoisyGradients(Loop):
    """Hooks clamp each gradient and add noise from a generator of their own."""

    def __init__(self, make=optim.AdamW):
        super().__init__(make)
        noise = torch.Generator().manual_seed(1)
        for param in self.model.parameters():
            param.register_hook(
                lambda gradient: (
                    gradient.clamp(-0.01, 0.01)
                    + 1e-3 * torch.randn(gradient.shape, generator=noise)
                )
            )


class Growing(Loop):
    """Layers and classes come while the training runs."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layers, self.head = nn.Linear(5, 12), nn.ModuleList(), nn.Linear(12, 3)

        def forward(self, inputs):
            features = self.first(inputs).tanh()
            for layer in self.layers:
                features = features + layer(features).tanh()
            return self.head(features)

    def build(self):
        torch.manual_seed(0)
        return self.Network()

    def backward(self, seed):
        if seed in (2, 5):
            self.model.layers.append(nn.Linear(12, 12))
            self.optimizers[0].add_param_group({"params": self.model.layers[-1].parameters()})
        return super().backward(seed)


class SetPrediction(Published):
    """As many answers as are asked for, each matched to an object or to none, after each layer."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.asked = nn.Parameter(torch.randn(5, 8))
            self.layers = nn.ModuleList(
                nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
                for _ in range(2)
            )
            self.classes, self.boxes = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, image):
            features, found = self.asked.expand(len(image), -1, -1), []
            for layer in self.layers:
                features = layer(features, image)
                found.append((self.classes(features), self.boxes(features)))
            return [
                {"logits": logits, "boxes": boxes.sigmoid(), "raw": boxes}
                for logits, boxes in found
            ]

    def batch(self, generator):
        image = torch.randn(3, 6, 8, generator=generator)
        labels = torch.randint(3, (3, 2), generator=generator)
        return image, labels, torch.rand(3, 2, 4, generator=generator)

    def matched(self, output, labels, boxes):
        """Return indices of images, of their objects and of the answer that suits each best."""
        found = []
        with torch.no_grad():
            for at, chances in enumerate(output["logits"].softmax(-1)):
                apart = torch.cdist(output["boxes"][at], boxes[at].to(chances), p=1)
                cost = (apart - chances[:, labels[at]]).tolist()
                pairs = permutations(range(5), 2)
                best = min(pairs, key=lambda pair, cost=cost: cost[pair[0]][0] + cost[pair[1]][1])
                found += [(at, which, answer) for which, answer in enumerate(best)]
        return torch.tensor(found).T

    def loss(self, image, labels, boxes):
        total = 0.0
        for output in self.model(image):
            at, which, answer = self.matched(output, labels, boxes)
            wanted = torch.full(output["logits"].shape[:2], 3)
            wanted[at, answer] = labels[at, which]
            total = total + functional.cross_entropy(output["logits"].transpose(1, 2), wanted)
            total = total + functional.l1_loss(output["boxes"][at, answer], boxes[at, which])
        return total

    def rows(self, model, image, labels, boxes):
        found = []
        for output in model(image):
            at, _, answer = self.matched(output, labels, boxes)
            found += [output["logits"], binary(output["raw"][at, answer])]
        return found


TECHNIQUES = {
    "sharpness-aware": SharpnessAware,
    "learned loss weights": LearnedWeights,
    "noise on gradients": NoisyGradients,
    "growing": Growing,
    "set prediction": SetPrediction,
}
