"""A short fit with AGP tightening every batch, beside the same fit without pruning."""
import argparse, statistics, time
import torch, torchvision
from functools import partial
from fastai.vision.all import SGD, Adam, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner
from common import asked_zeros, note, optional, quiet, spread, table, zeros

VARIANTS = [('weight', 'global'), ('weight', 'local'), ('filter', 'global'), ('filter', 'local')]
GOAL = {'weight': 1.15, 'filter': 1.03}
OPTIMIZERS = {'Adam': Adam, 'SGD': partial(SGD, mom=.9)}  # fastai's
HEADERS = ['optimizer', 'granularity', 'context', 'contender', 's a fit (min-max)', 'x plain, wall (min-max)', 'x plain, CPU time',
           'zeros asked', 'delivered', 'goal (ours, CPU time)']


def learner(arch, batches, batch_size, size, opt_func):
    "A new model on random images; the loaders hold tensors, so that nothing but training takes time"
    torch.manual_seed(0)
    def loader(n):
        images, labels = torch.randn(n, 3, size, size), torch.randint(0, 10, (n,))
        return DataLoader(list(zip(images, labels)), bs=batch_size, num_workers=0)
    model = arch(num_classes=10)
    data = DataLoaders(loader(batches*batch_size), loader(batch_size))
    return Learner(data, model, loss_func=CrossEntropyLossFlat())


def fit(callback, arch, batches, batch_size, size, opt_func, **_):
    "(wall seconds, CPU seconds, learner) of one epoch"
    learn = learner(arch, batches, batch_size, size, opt_func)
    with quiet(), learn.no_bar(), learn.no_logging():
        wall, cpu = time.perf_counter(), time.process_time()
        learn.fit(1, 1e-3, cbs=callback())
        return time.perf_counter() - wall, time.process_time() - cpu, learn


def callbacks(percent):
    "(granularity, context, contender) -> function that makes its callback, for the libraries installed"
    ours, peer = optional('fasterai_lib.all'), optional('fasterai.sparse.all')
    made = {}
    for g, c in VARIANTS:
        if ours: made[g, c, 'ours'] = lambda g=g, c=c: [ours.SparsifyCallback(percent, g, c, ours.large_final, ours.agp)]
        if peer: made[g, c, 'fasterai'] = lambda g=g, c=c: [peer.SparsifyCallback(percent/100, g, c, peer.large_final, peer.agp)]
    return made


def measure(made, rounds, **setup):
    "Each sparse fit is divided by the mean of the plain fits just before and just after it"
    results = {key: [] for key in made}
    for i in range(rounds):
        plain = fit(list, **setup)[:2]
        for key in sorted(made, reverse=i % 2):
            note(f'fit: round {i + 1} of {rounds}, {" ".join(key)}')
            wall, cpu, learn = fit(made[key], **setup)
            after = fit(list, **setup)[:2]
            base = [(b + a)/2 for b, a in zip(plain, after)]
            results[key].append((wall, wall/base[0], cpu/base[1], zeros(learn.model, torch.nn.Conv2d)))
            plain = after
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--quick', action='store_true', help='8 batches, 2 rounds')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--batches', type=int, default=25)
    parser.add_argument('--skip', nargs='*', default=[], help='contenders to leave out')
    args = parser.parse_args()
    rounds, percent = 2 if args.quick else args.rounds, 90
    setup = dict(arch=torchvision.models.resnet18, batches=8 if args.quick else args.batches, batch_size=16, size=64)
    print(f'## A fit with pruning\n\n{__doc__}\n')
    made = {key: f for key, f in callbacks(percent).items() if key[2] not in args.skip}
    model, lines = setup['arch'](num_classes=10), []
    for optimizer, opt_func in OPTIMIZERS.items():
        setup['opt_func'] = opt_func
        fit(list, **setup)  # warm up
        for (granularity, context, name), got in measure(made, rounds, **setup).items():
            walls, wall_ratios, cpu_ratios, zero_counts = zip(*got)
            ratio = statistics.median(cpu_ratios)
            goal = f'{GOAL[granularity]}: {"met" if ratio <= GOAL[granularity] else "MISSED"}' if name == 'ours' else ''
            lines.append([optimizer, granularity, context, name, spread(walls, 2), spread(wall_ratios, 3), spread(cpu_ratios, 3),
                          asked_zeros(model, percent, 'global', torch.nn.Conv2d), round(statistics.median(zero_counts)), goal])
    print(f'''torchvision resnet18, {setup["batches"]} batches of 16 random 64x64 images, one epoch with one batch of validation, {percent} % of
the Conv2d weights, each library's own `agp` (it starts at 20 % of the fit and tightens at every batch). {rounds} rounds; each
sparse fit is divided by the mean of the plain fits just before and after it, and the median of these ratios is given
(min-max). CPU time is the process's own, which other work on the machine disturbs less. The zeros asked are {percent} % of all
weights; whole filters round that, and where a library counts filters, of unequal size, they need not add up to it. Ours zeroes
the optimizer's state of masked weights too.\n''')
    print(table(HEADERS, lines))


if __name__ == '__main__': main()
