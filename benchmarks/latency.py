"""Latency of one image through the pruned network beside the dense one, one thread, and how much of the saved work is saved time."""
from common import machine, note, table, version  # one thread, before torch is imported
import argparse, copy, itertools, json, multiprocessing, statistics, time
from pathlib import Path
import torch, torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

MODELS = {'resnet18': 'fc', 'resnet50': 'fc', 'mobilenet_v2': 'classifier', 'vit_b_16': 'heads'}  # name -> what is left alone
HEADERS = ['model', 'form', 'removed %', 'library', 'params ratio', 'MACs ratio', 'dense ms', 'latency ratio', 'CPU-time ratio', 'latency / MACs', 'goal (ours)']
GOAL = 1/.8  # of the speed-up that the MACs promise, 80 %


def macs(model, inputs):
    "Multiply-accumulates of a run. With gradients, because attention's fused path is not counted"
    model.requires_grad_(True)
    with FlopCounterMode(display=False) as counter, torch.enable_grad(): model(inputs)
    return counter.get_total_flops()//2


def size(model): return sum(p.numel() for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------- libraries
def ours(model, inputs, fraction, ignored, **kwargs):
    from fasterai_lib.prune.pruner import Pruner
    Pruner(model, inputs, ignored=[ignored], **kwargs).prune_model(100*fraction)


def torch_pruning(model, inputs, fraction, ignored):
    "Told of the output layer, and of the heads of attention, which it cannot find"
    import torch_pruning as tp
    heads = {m: m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    tp.pruner.MagnitudePruner(model, inputs, importance=tp.importance.MagnitudeImportance(), pruning_ratio=fraction,
                              ignored_layers=[model.get_submodule(ignored)], num_heads=heads).step()


LIBS = {'ours': ours, 'ours, round_to=8': lambda *args: ours(*args, round_to=8), 'ours, round_to=16': lambda *args: ours(*args, round_to=16),
        'ours, exact=False': lambda *args: ours(*args, exact=False), 'Torch-Pruning': torch_pruning}


def build(name):
    "Random weights; BatchNorm and biases too, so that nothing is a constant. Denormals, which are slow, do not arise"
    import torchvision
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm): m.weight.uniform_(.5, 1.5), m.bias.normal_(0, .1)
    return model.eval()


def alternate(jobs, seconds, least=15):
    "job -> (wall, CPU) seconds of its runs; one run of each in turn, so that a slow spell hits all"
    taken = {name: [] for name in jobs}
    end = None
    while end is None or time.perf_counter() < end or len(taken[next(iter(jobs))]) < least:
        for name, work in jobs.items():
            wall, cpu = time.perf_counter(), time.thread_time()
            work()
            taken[name].append((time.perf_counter() - wall, time.thread_time() - cpu))
        if end is None and len(taken[next(iter(jobs))]) == 3:  # warm-up
            taken, end = {name: [] for name in jobs}, time.perf_counter() + seconds
    return taken


def ready(model, form):
    "As one would deploy it: BatchNorm folded into the convolution before it, channels last in memory"
    if 'folded' in form and any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        from torch.fx.experimental.optimization import fuse
        model = fuse(model)
    return model.to(memory_format=torch.channels_last) if 'channels last' in form else model


def middle(runs): return [statistics.median(values) for values in zip(*runs)]


def measure(name, percent, lib, seconds, image, form):
    "In a process of its own"
    torch.set_num_threads(1)
    dense = build(name)
    if name == 'vit_b_16': image = 224
    inputs = torch.randn(1, 3, image, image)
    before = size(dense), macs(dense, inputs)
    pruned = copy.deepcopy(dense)
    try: LIBS[lib](pruned, inputs, percent/100, MODELS[name])
    except Exception as e: return dict(error=f'{type(e).__name__}: {e}'[:200])
    after = size(pruned), macs(pruned, inputs)
    dense, pruned = (ready(m.eval().requires_grad_(False), form) for m in (dense, pruned))
    if 'channels last' in form: inputs = inputs.to(memory_format=torch.channels_last)
    with torch.inference_mode(): runs = alternate(dict(dense=lambda: dense(inputs), pruned=lambda: pruned(inputs)), seconds)
    (wall, cpu), (pruned_wall, pruned_cpu) = middle(runs['dense']), middle(runs['pruned'])
    return dict(params=after[0]/before[0], macs=after[1]/before[1], ms=1000*wall, latency=pruned_wall/wall, cpu=pruned_cpu/cpu, runs=len(runs['dense']))


def convolutions(spans, seconds, side=28):
    "[(kernel, channels, CPU seconds)] of a convolution from c to c channels, all counts of a span in turn"
    torch.set_num_threads(1)
    found = []
    for low, high in spans:
        for kernel in (1, 3):
            made = {c: (nn.Conv2d(c, c, kernel, 1, kernel//2, bias=False), torch.randn(1, c, side, side)) for c in range(low, high + 1)}
            with torch.inference_mode(): runs = alternate({c: lambda conv=conv, x=x: conv(x) for c, (conv, x) in made.items()}, seconds, 40)
            found += [(kernel, c, middle(taken)[1]) for c, taken in runs.items()]
    return found


def alone(function, *args):
    "Call in a fresh process"
    with multiprocessing.get_context('spawn').Pool(1) as pool: return pool.apply(function, args)


def counts_table(found, spans):
    "A count is slow when a larger one within 16 takes less time: rounding up would cost nothing"
    time_of, lines = {(k, c): s for k, c, s in found}, []
    for low, high in spans:
        for kernel in (1, 3):
            s = {c: time_of[kernel, c] for c in range(low, high + 1)}
            slow = [c for c in s if any(s[d] < .97*s[c] for d in range(c + 1, min(c + 16, high) + 1))]
            cells = ' '.join(f'**{c}**: {1e6*v:.0f}' if c in slow else f'{c}: {1e6*v:.0f}' for c, v in s.items())
            # microseconds for each channel, of the counts that a rounding leaves, beside the others
            each = lambda some: some and f'{1e6*statistics.mean(s[c]/c for c in some):.2f}'
            lines.append([f'{kernel}x{kernel}', cells, f'{len(slow)} of {len(s)}', *(each([c for c in s if c % n == 0]) for n in (8, 16)), each([c for c in s if c % 8])])
    return table(['kernel', 'channels: microseconds (slow in bold)', 'slow', 'us per channel, multiples of 8', 'of 16', 'other counts'], lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--quick', action='store_true', help='resnet18 at 64x64, 50 %, few runs')
    parser.add_argument('--models', nargs='+', default=list(MODELS), choices=list(MODELS))
    parser.add_argument('--percents', nargs='+', type=float, default=[50, 75])
    parser.add_argument('--seconds', type=float, default=8, help='of measuring, per row')
    parser.add_argument('--forms', nargs='+', default=['as it is', 'folded'], choices=['as it is', 'folded', 'channels last', 'folded, channels last'],
                        help='of both models: BatchNorm folded, memory order')
    parser.add_argument('--libs', nargs='+', default=list(LIBS), choices=list(LIBS))
    parser.add_argument('--out', type=Path, help='append the rows to this file as JSON')
    args = parser.parse_args()
    models, percents, seconds, image, spans = args.models, args.percents, args.seconds, 224, [(30, 50), (126, 146)]
    if args.quick: models, percents, seconds, image, spans = ['resnet18'], [50], 1, 64, [(30, 34)]
    print(f'## Really removing: latency\n\n{__doc__}\n\n{machine()}')
    print(f'torchvision, {image} px, batch 1, random weights, Torch-Pruning {version("torch-pruning")}. Each row is a process: dense and pruned alternate run by run for\n'
          f'{seconds:g} s after 3 runs each; ratios of medians, pruned to dense; CPU time is the thread\'s own, less sensitive to what else runs.\n'
          f'latency / MACs: 1 when all saved work is saved time; goal at most {GOAL:g} (80 % of the speed-up), and a latency ratio of at most 1.\n')
    lines = []
    for name in models:
        for percent in percents:
            for lib, form in itertools.product(args.libs, args.forms):
                if name == 'vit_b_16' and form != 'as it is': continue  # it has no BatchNorm
                if lib == 'ours, exact=False' and name != 'vit_b_16': continue  # the same where no norm stands in the way
                found = alone(measure, name, percent, lib, seconds, image, form)
                note(f'latency: {name}, {form}, {percent:g} %, {lib}: {found}')
                if args.out:
                    with args.out.open('a') as file: file.write(json.dumps(dict(model=name, form=form, percent=percent, lib=lib, **found)) + '\n')
                if 'error' in found:
                    lines.append([name, form, f'{percent:g}', lib, found['error'].replace('|', '/'), *['']*6])
                    continue
                over = found['latency']/found['macs']
                goal = ('met' if over <= GOAL and found['latency'] <= 1 else 'MISSED') if lib.startswith('ours') else ''
                lines.append([name, form, f'{percent:g}', lib, f'{found["params"]:.3f}', f'{found["macs"]:.3f}', f'{found["ms"]:.1f}',
                              f'{found["latency"]:.3f}', f'{found["cpu"]:.3f}', f'{over:.2f}', goal])
    print(table(HEADERS, lines))
    print('### Slow channel counts\n\nOne convolution of as many output as input channels on 28x28, CPU time, all counts in turn. Slow: one of the next 16 counts is more\n'
          'than 3 % faster.\n')
    print(counts_table(alone(convolutions, spans, seconds), spans))


if __name__ == '__main__': main()
