"""One-shot magnitude pruning: milliseconds to decide and mask, beside `w.abs().clone()` over the same tensors."""
import argparse, copy, statistics
import torch, torch.nn as nn, torchvision
from common import DENSE_TYPES, asked_zeros, contenders, interleave, note, optional, quiet, spread, table, tensors, zeros

GOAL = {'global': 4., 'local': 2.5}  # times the floor
HEADERS = ['model', 'tensors', 'context', 'asked %', 'contender', 'ms (min-max)', 'x floor', 'zeros asked', 'delivered', 'off by']


def half_zero(model):
    "Every second entry (at random) is zero before we start"
    for m, n in tensors(model): getattr(m, n).data.mul_(torch.rand_like(getattr(m, n)) < .5)


def few_values(model):
    "Three magnitudes, the same in all layers: ties by the million"
    for m, n in tensors(model):
        w = getattr(m, n).data
        w.copy_(w.sign()*(w.abs()/w.std()).ceil().clamp(1, 3)/100)


def floor(model, granularity, context, types):
    def work(percent):
        for m, n in tensors(model, types): getattr(m, n).detach().abs().clone()
    return work


def measure(model, context, percent, names, repeats, types=DENSE_TYPES):
    "name -> (seconds of each repetition, zeros delivered); each repetition starts from an untimed copy of `model`"
    delivered = {}
    def job(name, prepare):
        def start():
            target = copy.deepcopy(model)
            with quiet(): work = prepare(target, 'weight', context, types)
            def run():
                with quiet(): work(percent)
                delivered[name] = target  # the last copy is kept, to be counted
            return run
        return start
    seconds = interleave({name: job(name, prepare) for name, prepare in names.items()}, repeats)
    return {name: (seconds[name], zeros(delivered[name], types)) for name in names}


def rows(label, case, model, context, percent, names, repeats, types=DENSE_TYPES):
    note(f'oneshot: {label}, {case}, {context}, {percent} %')
    names = {n: f for n, f in names.items() if supports(f, context, types, n)}
    results = measure(model, context, percent, names | {'floor': floor}, repeats, types)
    base, asked = statistics.median(results['floor'][0]), asked_zeros(model, percent, context, types)
    for name, (seconds, got) in sorted(results.items(), key=lambda item: statistics.median(item[1][0])):
        ratio, times = statistics.median(seconds)/base, spread(seconds, scale=1000)
        if name == 'floor': yield [label, case, context, percent, name, times, '1.0', '', '', '']; continue
        goal = f' (goal {GOAL[context]}: {"met" if ratio <= GOAL[context] else "MISSED"})' if name == 'ours' else ''
        yield [label, case, context, percent, name, times, f'{ratio:.1f}{goal}', asked, got, f'{got - asked:+d}']


def supports(prepare, context, types, name):
    "Whether a contender takes these layer types, found on a model of two layers"
    tiny = nn.ModuleList([nn.Conv2d(2, 2, 1), nn.Linear(4, 4), nn.MultiheadAttention(4, 2)])
    try:
        with quiet(): return prepare(tiny, 'weight', context, types) is not None
    except (ValueError, TypeError, AttributeError, NotImplementedError) as e:
        print(f'*{name} refuses {[t.__name__ for t in types]}: {str(e).splitlines()[0]}*\n')


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--quick', action='store_true', help='resnet18 only, five repetitions')
    parser.add_argument('--repeats', type=int, default=15)
    parser.add_argument('--models', nargs='*', default=['resnet18', 'resnet50', 'vit_b_16'])
    parser.add_argument('--skip', nargs='*', default=[], help='contenders to leave out')
    args = parser.parse_args()
    repeats = 5 if args.quick else args.repeats
    print(f'## One-shot magnitude pruning\n\n{__doc__}\n')
    names = {name: f for name, f in contenders().items() if name not in args.skip}
    lines = []
    for label in ['resnet18'] if args.quick else args.models:
        torch.manual_seed(0)
        model = getattr(torchvision.models, label)(weights=None)
        if label == 'vit_b_16': nn.init.trunc_normal_(model.heads.head.weight, std=.02)
        cases = [('Conv2d + Linear', model, DENSE_TYPES)]
        if label == 'vit_b_16': cases.append(('+ in_proj_weight', model, (*DENSE_TYPES, nn.MultiheadAttention)))
        if label == 'resnet18':
            for change in half_zero, few_values:
                changed = copy.deepcopy(model)
                change(changed)
                cases.append((change.__name__.replace('_', ' '), changed, DENSE_TYPES))
        for case, model, types in cases:
            for context in 'global', 'local':
                for percent in 50, 90: lines += rows(label, case, model, context, percent, names, repeats, types)
    print(f'''Random weights (seed 0; vit's head, zero as torchvision makes it, is drawn too), weight granularity. The same tensors
for everyone: the `weight` of every Conv2d and Linear. fasterai cannot reach the packed `in_proj_weight` of vit's attention,
so that is a case of its own, without fasterai; there, in `local`, ours ranks and rounds the two matrices of an attention
block together. Building the sparsifier and restoring the model are not timed. One process, one thread, interleaved, at
most {repeats} repetitions (3 for what takes over a second); medians with min-max. "half zero": every second weight is zero
beforehand (what is already there counts, and sets the least that can be asked); "few values": three distinct magnitudes.\n''')
    print(table(HEADERS, lines))


if __name__ == '__main__': main()
