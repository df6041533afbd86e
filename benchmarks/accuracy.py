"""Accuracy after one fit with AGP magnitude pruning (global), beside the dense net under the same budget."""
import argparse, gzip, statistics
from pathlib import Path
import numpy as np
import torch, torch.nn as nn
from fastai.vision.all import Callback, CrossEntropyLossFlat, DataLoaders, Learner
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset
from common import DENSE_TYPES, asked_zeros, note, optional, quiet, table, tensors, torch_prune, zeros

START, END = .2, .75  # of the fit: AGP tightens between; what is left of the budget is for recovery
DATA = Path(__file__).resolve().parents[1].parent/'shared/data'
HEADERS = ['data', 'asked %', 'contender', 'accuracy % (mean ± sd)', 'minus dense', 'achieved %', 'zeros asked', 'delivered']


def digits(folder):
    "1437 training and 360 test images of 8x8, 20 epochs"
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float).view(-1, 1, 8, 8)/16, torch.tensor(y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    return (x[train], y[train]), (x[test], y[test]), 20


def fashion_mnist(folder):
    "The first 10,000 training images and all 10,000 test images of 28x28, 5 epochs"
    def read(name, offset): return np.frombuffer(gzip.open(folder/'fashion_mnist'/f'{name}-ubyte.gz').read(), np.uint8, offset=offset)
    def images(name): return (torch.tensor(read(name, 16)).view(-1, 1, 28, 28)/255 - .286)/.353
    def labels(name): return torch.tensor(read(name, 8)).long()
    return ((images('train-images-idx3')[:10000], labels('train-labels-idx1')[:10000]),
            (images('t10k-images-idx3'), labels('t10k-labels-idx1')), 5)


def net():
    "Three 3x3 convolutions with BatchNorm and a linear layer: 56 thousand prunable weights"
    def block(i, o, stride): return [nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*block(1, 32, 2), *block(32, 64, 2), *block(64, 64, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class TorchPrune(Callback):
    "The loop one writes with torch.nn.utils.prune: before each batch, mask as many more as the schedule now wants"
    def __init__(self, percent): self.percent = percent

    def before_fit(self): self.pairs, self.done = tensors(self.learn.model), 0

    def before_batch(self):
        if not self.training: return
        n, step = self.n_iter*self.n_epoch, self.epoch*self.n_iter + self.iter + 1
        pos = min(max(0, (step/n - START)/(END - START)), 1)
        want = round(asked_zeros(self.learn.model, self.percent, 'global')*(1 - (1 - pos)**3))
        if want == self.done: return
        # `weight` is what the last forward saw; the scores are of the weights as they now are
        scores = {(m, n): getattr(m, f'{n}_orig', m.weight) for m, n in self.pairs}
        torch_prune.global_unstructured(self.pairs, torch_prune.L1Unstructured, scores, amount=want - self.done)
        self.done = want


def callbacks():
    "name -> function(percent) that makes the callbacks of a fit"
    def sparse(lib, scale, agp):
        return lambda p: [lib.SparsifyCallback(p*scale, 'weight', 'global', lib.large_final, lib.Schedule(agp, START, END), layer_type=DENSE_TYPES)]
    ours, peer = optional('fasterai_lib.all'), optional('fasterai.sparse.all')
    made = {'torch prune': lambda p: [TorchPrune(p)]}
    if ours: made['ours'] = sparse(ours, 1, ours.sched_poly)
    if peer: made['fasterai'] = sparse(peer, 1/100, peer.sched_agp)
    return made


def train(data, cbs, seed):
    "(accuracy in %, zeros) of one fit; the seed fixes weights and order of batches, the same for every contender"
    (x, y), (x_test, y_test), epochs = data
    torch.manual_seed(seed)
    loader = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True, drop_last=True)
    valid = DataLoader(TensorDataset(x_test[:64], y_test[:64]), batch_size=64)  # a fit must validate: as little as possible
    learn = Learner(DataLoaders(loader, valid), net(), loss_func=CrossEntropyLossFlat())
    with quiet(), learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 5e-3, cbs=cbs)
    learn.model.eval()
    with torch.no_grad(): right = sum((learn.model(x).argmax(1) == y).sum().item() for x, y in zip(x_test.split(500), y_test.split(500)))
    return 100*right/len(y_test), zeros(learn.model)


def mean_sd(values):
    return f'{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}' if len(values) > 1 else f'{values[0]:.2f}'


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--quick', action='store_true', help='digits only, 95 %, two seeds')
    parser.add_argument('--data', type=Path, default=DATA, help='folder that holds fashion_mnist/')
    parser.add_argument('--seeds', type=int, default=3)
    args = parser.parse_args()
    seeds, percents = range(2 if args.quick else args.seeds), [95] if args.quick else [90, 95, 98, 99]
    print(f'## Accuracy\n\n{__doc__}\n')
    made, lines = callbacks(), []
    total = sum(getattr(m, n).numel() for m, n in tensors(net()))
    for load in [digits] if args.quick else [digits, fashion_mnist]:
        if load is fashion_mnist and not (args.data/'fashion_mnist').is_dir():
            print('*Left out: Fashion-MNIST, its folder is not there (`--data`).*\n')
            continue
        data = load(args.data)
        print(f'{load.__name__.replace("_", "-")}: {load.__doc__}, batches of 64.\n')
        dense = [train(data, [], seed)[0] for seed in seeds]
        lines.append([load.__name__, 0, 'dense', mean_sd(dense), '', '', '', ''])
        for percent in percents:
            asked = asked_zeros(net(), percent, 'global')
            for name, make in made.items():
                note(f'accuracy: {load.__name__}, {percent} %, {name}')
                got, counts = zip(*(train(data, make(percent), seed) for seed in seeds))
                less = statistics.mean(g - d for g, d in zip(got, dense))
                share = f'{100*statistics.mean(counts)/total:.3f}'
                lines.append([load.__name__, percent, name, mean_sd(got), f'{less:+.2f}', share, asked,
                              '-'.join(str(c) for c in sorted({min(counts), max(counts)}))])
    print(f'''The same net ({total} weights in Conv2d and Linear, all open to pruning), optimizer (Adam, one cycle to 5e-3) and number of
batches for everyone; {len(seeds)} seeds, each fixing the first weights and the order of the batches; one global ranking by
magnitude, tightened before every batch between {START:.0%} and {END:.0%} of the fit. torch prune is a loop written with
`global_unstructured`. Test images are used once, at the end.\n''')
    print(table(HEADERS, lines))


if __name__ == '__main__': main()
