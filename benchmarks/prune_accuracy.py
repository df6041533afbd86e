"""Accuracy of the trained CIFAR-10 ResNets at half the multiply-accumulates, every library fine-tuned for the same number of steps."""
from common import machine, note, optional, quiet, table, version  # one thread, before torch is imported
import argparse, copy, fnmatch, json, math, statistics, time
from functools import partial
from pathlib import Path
import torch, torch.nn as nn, torch.nn.functional as F
import cifar
from accuracy import mean_sd
from latency import macs, size

DATA = Path(__file__).resolve().parents[1].parent/'shared/data'
EXAMPLE = torch.zeros(1, 3, 32, 32)
HEADERS = ['library', 'setting', 'MACs ratio', 'params ratio', 'right after %', 'BatchNorm measured again %', 'fine-tuned % (mean ± sd)', 'minus dense']


def stream(model):
    "The convolutions that write to the residual stream"
    return [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and (n == 'conv1' or n.endswith('.conv2'))]


# ---------------------------------------------------------------------------------------------------------- libraries
# (model, percent) -> nothing: removes from the model. `keep`: the residual stream stays as it is.

def ours(lib, model, percent, keep=False, reducer='mean', normalizer=None, criteria='large_final', **kwargs):
    from fasterai_lib.core.criteria import Criteria, criteria as known
    c = Criteria(known[criteria].f, reducer, normalizer)
    lib.Pruner(model, EXAMPLE, c, ignored=stream(model) if keep else (), **kwargs).prune_model(percent)


def fasterai(lib, model, percent, keep=False, context='local', criteria='large_final'):
    ignored = [model.linear, *(model.get_submodule(n) for n in stream(model))] if keep else None
    with quiet(): lib.Pruner(model, percent/100, context, getattr(optional('fasterai.core.criteria'), criteria), ignored_layers=ignored, example_inputs=EXAMPLE).prune_model()


def torch_pruning(lib, model, percent, keep=False, importance='GroupMagnitudeImportance', **kwargs):
    ignored = [model.linear, *(model.get_submodule(n) for n in (stream(model) if keep else ()))]
    lib.pruner.BasePruner(model, EXAMPLE, importance=getattr(lib.importance, importance)(), pruning_ratio=percent/100, ignored_layers=ignored, **kwargs).step()


def contenders():
    "(library, setting) -> function(model, percent); the first of each library is what one gets without asking"
    made = {}
    def add(name, function, module, settings):
        lib = optional(module)
        if lib: made.update({(name, setting): partial(function, lib, **kwargs) for setting, kwargs in settings.items()})
    square = dict(criteria='squared_final')
    add('ours', ours, 'fasterai_lib.prune.pruner', {
        'large_final, local': {}, 'large_final, global': dict(context='global'), 'squared_final, local': square,
        'squared_final / mean, global': dict(square, normalizer='mean', context='global'),
        'squared_final / max, global': dict(square, normalizer='max', context='global'),
        'large_final, local, stream kept': dict(keep=True), 'squared_final, local, stream kept': dict(square, keep=True),
        'squared_final / mean, global, stream kept': dict(square, normalizer='mean', context='global', keep=True)})
    add('fasterai', fasterai, 'fasterai.prune.pruner', {
        'large_final, local': {}, 'large_final, global': dict(context='global'), 'large_final, local, stream kept': dict(keep=True)})
    add('Torch-Pruning', torch_pruning, 'torch_pruning', {
        'group norm, local': {}, 'group norm, global': dict(global_pruning=True), 'LAMP, global': dict(importance='LAMPImportance', global_pruning=True),
        'group norm, local, stream kept': dict(keep=True), 'group norm, global, stream kept': dict(keep=True, global_pruning=True),
        'LAMP, global, stream kept': dict(importance='LAMPImportance', global_pruning=True, keep=True)})
    return made


def at_macs(prune, dense, target, tolerance=.02, tries=16):
    "The model whose MACs are nearest to `target` of the dense, by bisection on the percentage"
    low, high, best, whole = 0., 99., None, macs(dense, EXAMPLE)
    for _ in range(tries):
        percent = (low + high)/2
        model = copy.deepcopy(dense)
        try: prune(model, percent)
        except Exception as e:  # too much asked for
            error, high = e, percent
            continue
        ratio = macs(model, EXAMPLE)/whole
        if best is None or abs(ratio - target) < abs(best[0] - target): best = ratio, percent, model
        if abs(ratio - target) < tolerance*target/4: break
        low, high = (percent, high) if ratio > target else (low, percent)
    if best is None: raise error
    if abs(best[0] - target) > tolerance*target: raise ValueError(f'{best[0]:.3f} of the MACs is the nearest')
    return best


# ----------------------------------------------------------------------------------------------------------- training
def remeasured(model, x):
    "A copy with BatchNorm statistics of these images"
    model = copy.deepcopy(model).train()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): m.momentum = m.reset_running_stats()  # None: the mean over batches
    with torch.no_grad():
        for part in cifar.normalised(x).split(500): model(part)
    return model.eval()


def fine_tune(model, data, steps, seed, batch, rate):
    "SGD; the seed fixes order, flips and shifts, the same for everyone"
    x, y = data
    generator = torch.Generator().manual_seed(seed)
    opt = torch.optim.SGD(model.parameters(), rate, momentum=.9, nesterov=True, weight_decay=5e-4)
    shape = lambda step: min(1, (step + 1)/(.1*steps + 1))*(1 + math.cos(math.pi*step/steps))/2
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, shape)
    model.train()
    order = iter(())
    for _ in range(steps):
        at = next(order, None)
        if at is None:
            order = iter(torch.randperm(len(x), generator=generator).split(batch)[:len(x)//batch])
            at = next(order)
        at = at.to(x.device)
        opt.zero_grad()
        F.cross_entropy(model(cifar.normalised(cifar.shifted(x[at], generator))), y[at]).backward()
        opt.step()
        schedule.step()
    return model.eval()


def steps_in(minutes, dense, data, batch):
    "How many steps of the dense model fit in: everyone gets as many"
    start = time.perf_counter()
    fine_tune(copy.deepcopy(dense), data, 10, 0, batch, .01)
    return max(1, int(60*minutes/((time.perf_counter() - start)/10)))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('data', type=Path, nargs='?', default=DATA, help='folder that holds cifar10/ and cifar10_resnets/')
    parser.add_argument('--model', default='resnet20', choices=list(cifar.DEPTHS))
    parser.add_argument('--target', type=float, default=.5, help='of the MACs')
    parser.add_argument('--images', type=int, default=40000, help='to train on, the first of the training set')
    parser.add_argument('--test', type=int, default=10000, help='images to test on')
    parser.add_argument('--epochs', type=float, default=1, help='0: only what is right after removal')
    parser.add_argument('--minutes', type=float, help='instead of epochs: as many steps as the dense model takes in this time')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--batch', type=int, default=128)
    parser.add_argument('--rate', type=float, default=.02)
    parser.add_argument('--only', default='*', help='globs of "library: setting", joined by |')
    parser.add_argument('--select', action='store_true', help='test on the last 10,000 training images, which are not trained on here: for choosing settings')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--quick', action='store_true', help='4 steps, 500 test images, one seed, the first setting of each library')
    parser.add_argument('--out', type=Path, help='a file of rows, resumed when it exists')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f'## Really removing: accuracy of {args.model}\n\n{__doc__}\n')
    if not (args.data/'cifar10').is_dir() or not (args.data/'cifar10_resnets').is_dir(): return print('*Left out: the data are not there.*\n')
    if args.quick: args.images, args.test, args.seeds, args.epochs = 4*args.batch, 500, 1, 1
    parts = [cifar.images(args.data, i + 1) for i in range(math.ceil(min(args.images, 40000)/10000))]
    x, y = (torch.cat(t)[:args.images].to(args.device) for t in zip(*parts))
    x_test, y_test = (t[:args.test].to(args.device) for t in cifar.images(args.data, 5 if args.select else 'test'))
    dense = cifar.trained(args.data, args.model)
    on_device = lambda model: copy.deepcopy(model).to(args.device)
    steps = steps_in(args.minutes, on_device(dense), (x, y), args.batch) if args.minutes else round(args.epochs*(len(x)//args.batch))
    percent_right = lambda model: cifar.accuracy(model, x_test, y_test)
    reference = percent_right(on_device(dense))
    made, first = contenders(), {}
    for key in made: first.setdefault(key[0], key)
    if args.quick: made = {k: made[k] for k in first.values()}
    made = {k: f for k, f in made.items() if any(fnmatch.fnmatchcase(': '.join(k), o) for o in args.only.split('|'))}
    identity = dict(model=args.model, target=args.target, images=args.images, steps=steps, test=args.test, select=args.select, batch=args.batch, rate=args.rate)
    rows = [r for r in map(json.loads, args.out.read_text().splitlines()) if r['identity'] == identity] if args.out and args.out.exists() else []
    pruned = {}

    def one(key, seed):  # one seed of everyone before the next: stopped early, it is still a comparison
        if any(r['key'] == list(key) and r['seed'] == seed for r in rows): return
        try:
            if key not in pruned: pruned[key] = at_macs(made[key], dense, args.target)
        except Exception as e: row = dict(error=f'{type(e).__name__}: {e}'[:150])
        else:
            ratio, percent, model = pruned[key]
            model = on_device(model)
            row = dict(macs=ratio, percent=percent, params=size(model)/size(dense))
            if not seed: row.update(after=percent_right(model), again=percent_right(remeasured(model, x[:2000])))
            if steps: row['tuned'] = percent_right(fine_tune(model, (x, y), steps, seed, args.batch, args.rate))
        rows.append(dict(identity=identity, key=list(key), seed=seed, **row))
        note(f'prune_accuracy: {args.model}, {": ".join(key)}, seed {seed}: {row}')
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open('a') as file: file.write(json.dumps(rows[-1]) + '\n')

    for seed in range(args.seeds if steps else 1):
        for key in made: one(key, seed)
    lines = []
    for key in made:
        mine = [r for r in rows if r['key'] == list(key)]
        if 'error' in mine[0]:
            lines.append([*key, mine[0]['error'].replace('|', '/'), *['']*5])
            continue
        tuned = [r['tuned'] for r in mine if 'tuned' in r]
        lines.append([*key, *(f'{mine[0][k]:.3f}' for k in ('macs', 'params')), *(f'{mine[0][k]:.2f}' for k in ('after', 'again')),
                      *([mean_sd(tuned), f'{statistics.mean(tuned) - reference:+.2f}'] if tuned else ['', ''])])
    print(f'{machine()}\n{args.model}, dense {reference:.2f} % of {len(y_test)} {"held-out training" if args.select else "test"} images; MACs {args.target:g} of the dense ones, '
          f'found by bisection within 2 %;\nfine-tuning: {steps} steps of {args.batch} of the first {len(x)} training images (flips, shifts), SGD, Nesterov momentum .9, weight decay 5e-4, '
          f'\npeak rate {args.rate:g}, cosine; the same order for everyone; Torch-Pruning {version("torch-pruning")}. "Stream kept": the convolutions that write to the residual stream\n'
          'are ignored. "BatchNorm measured again": on 2,000 training images, no weight changed.\n')
    print(table(HEADERS, lines))


if __name__ == '__main__': main()
