"""One-shot pruning of trained CIFAR-10 ResNets without retraining: masks alone, statistics recomputed, what remains fitted, and weights chosen by what a fit can make up for."""
import argparse, copy, statistics, time
from pathlib import Path
import torch, torch.nn as nn, torch.nn.functional as F
import cifar
from common import note, table
from fasterai_lib.all import Sparsifier, obc, recalibrate, reconstruct, reconstruct_in_steps, refine, sparsegpt

DATA = Path(__file__).resolve().parents[1].parent/'shared/data'
SAMPLES, BATCH = 1024, 128


def by_layer(masks):
    "Layer name to percent: how a global choice shares the weights out"
    return {row.parameter.removesuffix('.weight'): row.sparsity for row in masks.report().itertuples()}


def magnitude(model, percent): return Sparsifier(model, 'weight', 'global', 'large_final').plan(percent)
def masked(model, percent, data, positions): magnitude(model, percent).apply(model)
def recalibrated(model, percent, data, positions):
    masked(model, percent, data, positions)
    recalibrate(model, data)
def fitted(model, percent, data, positions): reconstruct(model, magnitude(model, percent), data, layers='*', positions=positions)
def gpt(model, percent, data, positions): sparsegpt(model, {**by_layer(magnitude(model, percent)), 'linear': 0}, data, dense=True, positions=positions)
def surgeon(model, percent, data, positions): obc(model, {**by_layer(magnitude(model, percent)), 'linear': 0}, data, rounds=4, positions=positions)


def refitted(model, percent, data, positions): reconstruct(model, refine(model, percent, data, F.cross_entropy), data, layers='*', positions=positions)  # chosen with labels
def in_steps(model, percent, data, positions): reconstruct_in_steps(model, percent, data, F.cross_entropy, fit=dict(layers='*', positions=positions))


def twice(model, percent, data, positions):  # first to twice as many weights as are to stay
    for p in (2*percent - 100, percent):
        if p > 0: refitted(model, p, data, positions)


METHODS = {'global magnitude': masked, '+ recalibrate': recalibrated, '+ reconstruct': fitted, 'refine, reconstruct': refitted, 'the same in two steps': twice, 'in four steps': in_steps, 'sparsegpt': gpt, 'obc, 4 rounds': surgeon}
HEADERS = ['network', 'asked %', 'method', 'delivered %', 'accuracy % (mean ± sd)', 'minus dense', 'seconds']


def calibration(folder, seed, copies=1):
    "1,024 training images, others for each seed, in batches of 128; the labels are for `refine` alone"
    x, y = cifar.images(folder, 1 + seed % 4)  # the fifth batch is for choosing
    generator = torch.Generator().manual_seed(seed)
    at = torch.randperm(len(x), generator=generator)[:SAMPLES]
    x = torch.cat([x[at], *(cifar.shifted(x[at], generator) for _ in range(copies - 1))])
    return list(zip(cifar.normalised(x).split(BATCH), y[at].repeat(copies).split(BATCH)))


def measure(folder, net, percent, make, data, test, positions):
    "(accuracy, percent of zeros, seconds)"
    model, start = cifar.trained(folder, net), time.perf_counter()
    make(model, percent, data, positions)
    seconds, convs = time.perf_counter() - start, [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    return cifar.accuracy(model, *test), 100*sum(int((w == 0).sum()) for w in convs)/sum(w.numel() for w in convs), seconds


def mean_sd(values): return f'{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}' if len(values) > 1 else f'{values[0]:.2f}'


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--quick', action='store_true', help='ResNet-20 at 80 %%, 256 images each')
    parser.add_argument('--data', type=Path, default=DATA, help='folder that holds cifar10/ and cifar10_resnets/')
    parser.add_argument('--seeds', type=int, default=1, help='each takes other calibration images')
    parser.add_argument('--nets', nargs='+', default=['resnet56', 'resnet20'])
    parser.add_argument('--percents', nargs='+', type=float, default=[50, 70, 80, 90])
    parser.add_argument('--methods', nargs='+', default=list(METHODS), choices=list(METHODS))
    parser.add_argument('--positions', type=int, default=128, help='of each image that a layer is fitted on')
    parser.add_argument('--copies', type=int, default=1, help='of each calibration image: all but the first flipped by chance and moved by up to 4 pixels, as the nets were trained')
    parser.add_argument('--images', type=int, default=10000, help='test images')
    parser.add_argument('--held-out', action='store_true', help='judge on training images that calibrate nothing, to choose between methods')
    args = parser.parse_args()
    if args.quick: args.nets, args.percents, args.images = ['resnet20'], [80], 256
    test = [t[:args.images] for t in cifar.images(args.data, 5 if args.held_out else 'test')]
    data = {s: calibration(args.data, s, args.copies)[:2 if args.quick else None] for s in range(args.seeds)}
    lines = []
    for net in args.nets:
        dense = cifar.accuracy(cifar.trained(args.data, net), *test)
        lines.append([net, 0, 'dense', '0.00', f'{dense:.2f}', '', ''])
        for percent in args.percents:
            for name in args.methods:
                got = []
                for seed in range(args.seeds):
                    got.append(measure(args.data, net, percent, METHODS[name], data[seed], test, args.positions))
                    note(f'reconstruct: {net}, {percent:g} %, {name}, seed {seed}: {got[-1]}')
                scores, zeros, seconds = zip(*got)
                lines.append([net, f'{percent:g}', name, f'{statistics.mean(zeros):.2f}', mean_sd(scores), f'{statistics.mean(scores) - dense:+.2f}', f'{statistics.median(seconds):.0f}'])
    print(f'''## Without retraining\n\n{__doc__}\n\nAll convolutions of the network (the last linear layer is fitted, but keeps all of its weights), {sum(len(x) for x, _ in data[0])//args.copies} training images to calibrate on{f' ({args.copies} versions of each image, flipped and moved)' if args.copies > 1 else ''}, {args.positions} positions of each to
fit on, no labels (but for `refine`); {args.seeds} seed(s), each with other images. Judged on {len(test[1])} {'training images that calibrated nothing' if args.held_out else 'test images'}. Each layer has the share of weights
that one global ranking by magnitude leaves it.\n''')
    print(table(HEADERS, lines))


if __name__ == '__main__': main()
