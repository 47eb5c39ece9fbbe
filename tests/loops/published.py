"""Kinds of training that people publish, written anew: what enters each softmax is known."""

import math
import random

import torch
from loops.loop import Loop
from torch import nn
from torch.nn import functional


def binary(score):
    return torch.stack((torch.zeros_like(score), score), -1)


class Published(Loop):
    """A loop whose loss is a function of one batch; `is_told` where it is more than an output's."""

    is_told = False

    def build(self):
        torch.manual_seed(0)
        return self.Network()

    def backward(self, seed):
        batch = self.batch(torch.Generator().manual_seed(seed))
        if self.is_told:
            for guard in self.guards:
                guard.record(self.loss, *batch)
        self.loss(*batch).backward()
        return [batch]

    def logits(self, model, *batch):
        return self.rows(model, *batch)


class KnowledgeGraph(Published):
    """Entities turned by relations; negatives are weighed by the model's own scores."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.entities = nn.Parameter(torch.rand(20, 8) - 0.5)
            self.turns = nn.Parameter(torch.rand(4, 4) * 6 - 3)

        def forward(self, triples, tails=None):
            tails = triples[:, 2:] if tails is None else tails
            a, b = self.entities[triples[:, :1]].chunk(2, -1)
            c, d = self.entities[tails].chunk(2, -1)
            cos, sin = self.turns[triples[:, 1:2]].cos(), self.turns[triples[:, 1:2]].sin()
            apart = torch.stack((a * cos - b * sin - c, a * sin + b * cos - d))
            return 4 - apart.norm(dim=0).sum(-1)

    def batch(self, generator):
        sizes = torch.tensor([20, 4, 20])
        triples = (torch.rand(6, 3, generator=generator) * sizes).long()
        return triples, torch.randint(20, (6, 5), generator=generator)

    def loss(self, triples, tails):
        wrong = self.model(triples, tails)
        weight = wrong.softmax(1).detach()
        wrong = (weight * functional.logsigmoid(-wrong)).sum(1)
        return -(functional.logsigmoid(self.model(triples)).squeeze(1) + wrong).mean()

    def rows(self, model, triples, tails):
        return [binary(model(triples, tails)), binary(model(triples))]


class RandomField(Published):
    """The model returns the loss: a normaliser over all sequences of tags, padded."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(12, 8), nn.Linear(8, 4)
            self.first, self.last = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(4))
            self.pairs = nn.Parameter(torch.rand(4, 4))
            self.summed = None

        def forward(self, words, tags, lengths):
            scores, each = self.head(self.words(words)), torch.arange(len(words))
            gold = self.first[tags[:, 0]] + scores[each, 0, tags[:, 0]]
            total, self.summed = self.first + scores[:, 0], []
            for at in range(1, words.shape[1]):
                goes_on = lengths > at
                move = self.pairs[tags[:, at - 1], tags[:, at]] + scores[each, at, tags[:, at]]
                gold = gold + move * goes_on
                terms = total.unsqueeze(2) + self.pairs + scores[:, at].unsqueeze(1)
                self.summed.append(terms[goes_on].transpose(1, 2))
                total = torch.where(goes_on.unsqueeze(1), terms.logsumexp(1), total)
            self.summed.append(total + self.last)
            gold = gold + self.last[tags[each, lengths - 1]]
            return ((total + self.last).logsumexp(1) - gold).mean()

    def batch(self, generator):
        words = torch.randint(12, (3, 6), generator=generator)
        return words, torch.randint(4, (3, 6), generator=generator), torch.tensor([6, 4, 2])

    def loss(self, *batch):
        loss = self.model(*batch)
        self.model.summed = None  # of the graph
        return loss

    def rows(self, model, *batch):
        model(*batch)
        return model.summed


class Speech(Published):
    """Connectionist temporal classification of clips of several lengths."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.GRU(5, 8, batch_first=True), nn.Linear(8, 6)

        def forward(self, sound):
            return self.head(self.cell(sound)[0]).log_softmax(-1).transpose(0, 1)

    def batch(self, generator):
        sound = torch.randn(3, 10, 5, generator=generator)
        letters = torch.randint(1, 6, (3, 3), generator=generator)
        return sound, letters, torch.tensor([10, 8, 6])

    def loss(self, sound, letters, lengths):
        return functional.ctc_loss(self.model(sound), letters, lengths, torch.tensor([3, 2, 3]))

    def rows(self, model, sound, letters, lengths):
        return [model(sound).transpose(0, 1)[torch.arange(10) < lengths.unsqueeze(1)]]


class CachedContrast(Published):
    """Pairs against all pairs of several batches, whose features are kept without a graph."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.images = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 6))
            self.texts, self.scale = nn.Linear(7, 6), nn.Parameter(torch.tensor(math.log(14.0)))

        def forward(self, images, texts):
            features = self.images(images), self.texts(texts)
            return [functional.normalize(each, dim=-1) for each in features], self.scale.exp()

    def similarity(self, model, images, texts, kept_images, kept_texts, at):
        (own_images, own_texts), scale = model(images[at], texts[at])
        both = []
        for own, kept in ((own_images, kept_images), (own_texts, kept_texts)):
            both.append(torch.cat((*kept[:at], own, *kept[at + 1 :])))
        return scale * both[0] @ both[1].T

    def loss(self, *batch):
        logits = self.similarity(self.model, *batch)
        labels = torch.arange(len(logits))
        both = (functional.cross_entropy(each, labels) for each in (logits, logits.T))
        return sum(both) / 2

    def backward(self, seed):
        generator = torch.Generator().manual_seed(seed)
        data = [torch.randn(3, 4, width, generator=generator) for width in (5, 7)]
        with torch.no_grad():
            features, _ = self.model(*data)
        calls = [(*data, *features, torch.tensor(at)) for at in range(3)]
        for call in calls:
            for guard in self.guards:
                guard.record(self.loss, *call)
            self.loss(*call).backward()
        return calls

    def after_step(self):
        with torch.no_grad():
            self.model.scale.clamp_(0, math.log(100))

    def rows(self, model, *batch):
        logits = self.similarity(model, *batch)
        return [logits, logits.T]


class PolicyAndValue(Published):
    """A game's moves, whose labels are shares of visits, and its outcome."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
            self.policy, self.value = nn.Linear(24, 17), nn.Linear(24, 1)

        def forward(self, boards):
            features = self.body(boards.unsqueeze(1)).flatten(1)
            return self.policy(features).log_softmax(1), self.value(features).tanh()

    def batch(self, generator):
        visits = (3 * torch.randn(8, 17, generator=generator)).softmax(1)
        boards = torch.randn(8, 4, 4, generator=generator)
        return boards, visits, torch.rand(8, generator=generator)

    def loss(self, boards, visits, outcome):
        logs, value = self.model(boards)
        return -(visits * logs).sum() / 8 + (outcome - value.view(-1)).square().mean()

    def rows(self, model, boards, *_):
        return [model(boards)[0]]


class Distributional(Published):
    """Shares of returns for each action, of which one was taken."""

    def build(self):
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 33))
        return body.append(nn.Unflatten(1, (3, 11)))

    def batch(self, generator):
        actions = torch.randint(3, (8,), generator=generator)
        returns = torch.randn(8, 11, generator=generator).softmax(1)
        return torch.randn(8, 5, generator=generator), actions, returns

    def loss(self, states, actions, returns):
        logs = self.model(states).log_softmax(-1)[torch.arange(8), actions]
        return -(returns * logs).sum(1).mean()

    def rows(self, model, states, actions, _):
        return [model(states)[torch.arange(8), actions]]


class MixtureDensity(Published):
    """A mixture of Gaussians: the log-density of each part enters a log-sum-exp."""

    is_told = True

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4))
            self.normals = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8))

        def forward(self, inputs):
            middles, widths = self.normals(inputs).chunk(2, 1)
            return self.weights(inputs).log_softmax(1), middles, widths.exp()

    def batch(self, generator):
        return torch.randn(8, 5, generator=generator), torch.randn(8, 1, generator=generator)

    def terms(self, model, inputs, targets):
        logs, middles, widths = model(inputs)
        return logs - 0.5 * ((targets - middles) / widths).square() - widths.log()

    def loss(self, *batch):
        return -self.terms(self.model, *batch).logsumexp(1).mean()

    def rows(self, model, *batch):
        return [self.terms(model, *batch), model(batch[0])[0]]


class Hierarchical(Published):
    """Frequent words in a first softmax, rare ones in a second and third."""

    is_told = True
    CUTS = ((5, 15), (15, 30))

    def build(self):
        torch.manual_seed(0)
        body = nn.Sequential(nn.Embedding(30, 16), nn.Linear(16, 16), nn.Tanh())
        head = nn.AdaptiveLogSoftmaxWithLoss(16, 30, [5, 15], div_value=2.0)
        return nn.ModuleDict({"body": body, "head": head})

    def batch(self, generator):
        return torch.randint(30, (12,), generator=generator), torch.arange(12) * 5 % 30

    def loss(self, words, following):
        return self.model["head"](self.model["body"](words), following).loss

    def rows(self, model, words, following):
        features, head = model["body"](words), model["head"]
        tails = [
            tail(features[(following >= first) & (following < end)])
            for tail, (first, end) in zip(head.tail, self.CUTS, strict=True)
        ]
        return [head.head(features), *tails]


class ScheduledSampling(Published):
    """A decoder that is fed the right word, or its own last one where a coin says so."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.cell, self.head = (
                nn.Embedding(9, 6),
                nn.GRUCell(6, 10),
                nn.Linear(10, 9),
            )
            self.fed = None

        def forward(self, target, fed=None):
            hidden, word, outputs, own = self.head.weight.new_zeros(4, 10), target[:, 0] * 0, [], []
            for at in range(target.shape[1]):
                hidden = self.cell(self.words(word), hidden)
                outputs.append(self.head(hidden))
                word = target[:, at] if random.random() < 0.5 else outputs[-1].argmax(1)
                word = word if fed is None else fed[at]
                own.append(word)
            self.fed = own
            return torch.stack(outputs, 1)

    def backward(self, seed):
        random.seed(seed)
        return super().backward(seed)

    def batch(self, generator):
        return (torch.randint(9, (4, 6), generator=generator),)

    def loss(self, target):
        return functional.cross_entropy(self.model(target).flatten(0, 1), target.flatten())

    def rows(self, model, target):
        return [model(target, self.model.fed)]


class TrajectoryBalance(Published):
    """The square of a sum of log-probabilities along a trajectory, and a learned constant."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(5, 16), nn.LeakyReLU(), nn.Linear(16, 4))
            self.total = nn.Parameter(torch.zeros(1))

        def forward(self, states):
            return self.body(states)

    def batch(self, generator):
        actions = torch.randint(3, (12,), generator=generator)
        return torch.randn(12, 5, generator=generator), actions

    def loss(self, states, actions):
        logits = self.model(states).masked_fill(torch.arange(4) == 3, -1e9)
        logs = torch.distributions.Categorical(logits=logits).log_prob(actions)
        return (self.model.total + logs.view(4, 3).sum(1) + 1).square().mean()

    def rows(self, model, states, _):
        return [model(states)[:, :3]]


PUBLISHED = {
    "knowledge graph": KnowledgeGraph,
    "conditional random field": RandomField,
    "CTC": Speech,
    "contrast with kept features": CachedContrast,
    "policy and value": PolicyAndValue,
    "distributional values": Distributional,
    "mixture density": MixtureDensity,
    "hierarchical softmax": Hierarchical,
    "scheduled sampling": ScheduledSampling,
    "trajectory balance": TrajectoryBalance,
}
