"""The main job on real data: the same network trained dense and made 95 % sparse while it trains, under the same budget."""
import argparse
import statistics
import warnings
from pathlib import Path

warnings.filterwarnings('ignore', category=FutureWarning) # of the libraries below, while they are imported

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import torch
from fastai.vision.all import (ConvLayer, CrossEntropyLossFlat, DataLoaders, Flatten, ImageDataLoaders, Learner, Resize, accuracy,
                               get_image_files, nn, set_seed)
from sklearn.datasets import load_digits

from fasterai_lib.all import SparsifyCallback, agp, large_final, plot_masks, plot_sparsity

LAYERS = (nn.Conv2d, nn.Linear)


def digits(batch_size=64):
    "scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, every fifth for validation"
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x/16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(y)
    valid = torch.arange(len(y)) % 5 == 0
    sets = [list(zip(x[s], y[s])) for s in (~valid, valid)]
    dls = DataLoaders.from_dsets(*sets, bs=batch_size, val_bs=512, device='cpu', shuffle=True)
    dls.c, dls.channels = 10, 1
    return dls


def folder(path, size=32, batch_size=64):
    "Images in one folder per class, a fifth of them for validation"
    batch_size = min(batch_size, max(len(get_image_files(path))//8, 1))
    dls = ImageDataLoaders.from_folder(path, valid_pct=.2, seed=0, item_tfms=Resize(size), bs=batch_size, num_workers=0)
    dls.channels = 3
    return dls


def network(dls):
    sizes = [dls.channels, 32, 64, 64]
    body = [ConvLayer(a, b, stride=1 if i == 0 else 2) for i, (a, b) in enumerate(zip(sizes, sizes[1:]))]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(sizes[-1], dls.c))


def train(make_dls, seed, epochs, callback=None):
    set_seed(seed, reproducible=True)
    dls = make_dls()
    learn = Learner(dls, network(dls), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    learn.fit_one_cycle(epochs, 5e-3, cbs=callback)
    return learn, 100*float(learn.recorder.values[-1][2])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--data', help='a folder of images, one folder per class; by default handwritten digits')
    parser.add_argument('--sparsity', type=float, default=95, help='percent')
    parser.add_argument('--epochs', type=int, default=10)
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--out', default='demo_output', help='where the figures go')
    args = parser.parse_args()
    make_dls = (lambda: folder(args.data)) if args.data else digits
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    scores = {'dense': [], f'{args.sparsity:g} % sparse': []}
    for seed in range(args.seeds):
        for name in scores:
            print(f'\n{name}, seed {seed}')
            callback = None if name == 'dense' else SparsifyCallback(args.sparsity, 'weight', 'global', large_final, agp, layer_type=LAYERS)
            learn, score = train(make_dls, seed, args.epochs, callback)
            scores[name].append(score)

    report = learn.sparsity_report(layer_type=LAYERS)
    print(f'\n{report}\n')
    for name, values in scores.items():
        print(f"{name:>12}: accuracy {statistics.mean(values):.2f} % ± {statistics.pstdev(values):.2f} ({args.seeds} seeds, {args.epochs} epochs each)")

    for name, draw in dict(weights=lambda: plot_masks(callback.masks), schedule=lambda: plot_sparsity(learn, callback), layers=report.plot).items():
        drawn = draw()
        figure = getattr(drawn, 'figure', drawn)
        figure.savefig(out/f'{name}.png', dpi=120, bbox_inches='tight')
        plt.close(figure)
    print(f"\nfigures: {', '.join(str(out/f'{n}.png') for n in ('weights', 'schedule', 'layers'))}")


if __name__ == '__main__': main()
