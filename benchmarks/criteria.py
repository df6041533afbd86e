"""Which weights to choose: criteria one-shot without retraining, at initialisation, and what they cost."""
from common import DENSE_TYPES, interleave, machine, note, optional, quiet, table, tensors, torch_prune, version  # one thread, before torch is imported
import argparse, copy, gc, json, statistics, subprocess, time
from pathlib import Path
import torch, torch.nn as nn, torch.nn.functional as F
import accuracy, cifar
from accuracy import mean_sd
from memory import settle, status
from prune_accuracy import EXAMPLE, stream

DATA = Path(__file__).resolve().parents[1].parent/'shared/data'
CALIBRATE, BATCH = 1024, 128


def commit():
    run = subprocess.run(['git', '-C', Path(__file__).parent, 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True)
    return run.stdout.strip() or 'unknown'


class Rows:
    "Rows of a file, one JSON object a line: what is there is not measured again"
    def __init__(self, path):
        self.path, self.rows = path, {}
        if path and path.exists(): self.rows = {self.name(r['key']): r['value'] for r in map(json.loads, path.read_text().splitlines())}

    @staticmethod
    def name(key): return json.dumps([int(k) if isinstance(k, float) and k == int(k) else k for k in key])

    def __call__(self, key, measure):
        name = self.name(key)
        if name not in self.rows:
            try: value = measure()
            except Exception as e: value = dict(error=f'{type(e).__name__}: {e}'[:150])
            self.rows[name] = value
            note(f'criteria: {key}: {value}')
            if self.path:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open('a') as file: file.write(json.dumps(dict(key=key, value=value)) + '\n')
        return self.rows[name]


# ------------------------------------------------------------------------------------------------- one-shot, unstructured
# name -> function(dense, data) that returns function(percent) -> model; statistics are gathered once for all percentages

def recalibrated(model, data):
    "BatchNorm statistics measured again"
    from fasterai_lib.sparse.recalibrate import recalibrate
    recalibrate(model, data)
    return model


def masked(dense, data, criteria, context='global', granularity='weight', types=DENSE_TYPES, **kwargs):
    from fasterai_lib.sparse.sparsifier import Sparsifier
    s = Sparsifier(dense, granularity, context, criteria, layer_type=types, **kwargs)
    if s.criteria.needs_data:
        s.data, s.loss = data, F.cross_entropy
        if s.criteria.rounds == 1:
            s.collect()
            s.data = None  # what was gathered serves every percentage
    return lambda percent: s.plan(percent).apply(copy.deepcopy(dense))


def torch_global(dense, data):
    def at(percent):
        model = copy.deepcopy(dense)
        pairs = tensors(model)
        torch_prune.global_unstructured(pairs, torch_prune.L1Unstructured, amount=percent/100)
        for m, n in pairs: torch_prune.remove(m, n)
        return model
    return at


def fasterai_sparse(dense, data, lib, criteria, context='global', granularity='weight', types=DENSE_TYPES):
    def at(percent):
        model = copy.deepcopy(dense)
        with quiet(): lib.Sparsifier(model, granularity, context, getattr(lib, criteria), layer_type=types).sparsify_model(percent/100)
        return model
    return at


def moved(dense, data):
    "The library's `refine`: magnitude, asked again of the net as pruned"
    from fasterai_lib.sparse.refine import refine
    return lambda percent: refine(dense, percent, data, F.cross_entropy, layer_type=DENSE_TYPES).apply(copy.deepcopy(dense))


def from_name(text): # 'wanda, per_row': a criterion and a context
    name, _, context = text.partition(', ')
    return lambda dense, data: masked(dense, data, made_criteria().get(name, name), context or 'global')


def made_criteria():
    "Normalised and mixed ones that are no more than a line"
    from fasterai_lib.core.attribution import attribute
    from fasterai_lib.core import data_criteria  # registers them
    from fasterai_lib.core.criteria import Criteria, criteria
    few = lambda model, layer, data, loss: attribute(model, layer, data[:2], loss, exact=0, permutations=4, tolerance=0)  # a run of the net's rest for each sample, order and unit
    shapley = Criteria(**like(criteria['shapley'], gather=few))
    return {'wanda / layer': Criteria(**like(criteria['wanda']), normalizer='mean'), 'obd / layer': Criteria(**like(criteria['obd']), normalizer='mean'), f'shapley, 4 orders of {2*BATCH} images': shapley}


def like(c, **changed): return dict(f=c.f, needs=c.needs, gather=c.gather, output_fn=c.output_fn, return_init=c.return_init, per_sample=c.per_sample, reducer='mean') | changed


WEIGHTS = ['large_final', 'large_final, local', 'layer_magnitude', 'lamp', 'random', 'gradient', 'taylor', 'taylor_signed', 'sensitivity', 'fisher', 'obd', 'grasp', 'synflow', 'wanda',
           'wanda, per_row', 'wanda / layer', 'obd / layer']


def unstructured():
    made = {('ours', name): from_name(name) for name in WEIGHTS}
    made['ours', 'large_final, moved'] = moved
    made['torch.nn.utils.prune', 'L1, global'] = torch_global
    if peer := optional('fasterai.sparse.all'):
        for name, context in (('large_final', 'global'), ('large_final', 'local'), ('random', 'global')):
            made['fasterai', f'{name}, {context}'] = lambda d, data, name=name, context=context: fasterai_sparse(d, data, peer, name, context)
    return made


# ------------------------------------------------------------------------------------------------------ one-shot, filters

FILTERS = ['large_final', 'l1', 'l2', 'fpgm', 'random', 'gradient', 'taylor', 'taylor_signed', 'sensitivity', 'fisher', 'obd', 'grasp', 'synflow', 'apoz', 'mean_activation', 'hrank', 'wanda', 'bn_scale', f'shapley, 4 orders of {2*BATCH} images']


def removed(dense, data, criteria):
    from fasterai_lib.prune.pruner import Pruner
    refs = []
    def at(percent):
        model = copy.deepcopy(dense)
        p = Pruner(model, EXAMPLE, made_criteria().get(criteria, criteria), ignored=stream(model), data=data, loss=F.cross_entropy)
        if p.criteria.needs_data and p.criteria.rounds == 1:
            if not refs:
                p.collect()
                refs.append(p.refs)
            p.data, p.refs = None, refs[0]  # what was gathered serves every percentage
        p.prune_model(percent)
        return model
    return at


def torch_pruning(dense, data, lib, importance, gradients=False):
    def at(percent):
        model = copy.deepcopy(dense)
        ignored = [model.linear, *(model.get_submodule(n) for n in stream(model))]
        p = lib.pruner.BasePruner(model, EXAMPLE, importance=getattr(lib.importance, importance)(), pruning_ratio=percent/100, ignored_layers=ignored)
        if gradients:
            for x, y in data: F.cross_entropy(model(x), y).backward()
        p.step()
        return model.zero_grad() or model
    return at


def filters():
    made = {('ours', f'{name}, removed'): (lambda d, data, name=name: removed(d, data, name)) for name in FILTERS}
    if lib := optional('torch_pruning'):
        for name, gradients in (('GroupMagnitudeImportance', 0), ('FPGMImportance', 0), ('BNScaleImportance', 0), ('GroupTaylorImportance', 1), ('RandomImportance', 0)):
            made['Torch-Pruning', f'{name}, removed'] = lambda d, data, name=name, gradients=gradients: torch_pruning(d, data, lib, name, gradients)
    if peer := optional('fasterai.sparse.all'): # its sparsifier zeroes the filters of every convolution, the residual stream too
        made['fasterai', 'large_final, zeroed everywhere'] = lambda d, data: fasterai_sparse(d, data, peer, 'large_final', 'local', 'filter', nn.Conv2d)
        made['ours', 'large_final, zeroed everywhere'] = lambda d, data: masked(d, data, 'large_final', 'local', 'filter', nn.Conv2d)
    return made


def oneshot(args, rows):
    print('## Criteria: one-shot\n')
    if not (args.data/'cifar10').is_dir() or not (args.data/'cifar10_resnets').is_dir(): return print('*Left out: CIFAR-10 and its ResNets are not there (`criteria.py PATH`).*\n')
    x, y = cifar.images(args.data, 1 + args.calibration % 4)  # the fifth batch is for choosing
    at = torch.randperm(len(x), generator=torch.Generator().manual_seed(args.calibration))[:CALIBRATE] if args.calibration else torch.arange(CALIBRATE)
    data = list(zip(cifar.normalised(x[at]).split(BATCH), y[at].split(BATCH)))
    torch.manual_seed(args.calibration)
    test = tuple(t[:args.test] for t in cifar.images(args.data, 5 if args.select else 'test'))
    where = f'{len(test[1]):,} {"held-out training" if args.select else "test"} images{f", calibration {args.calibration}" if args.calibration else ""}'
    for label in args.models:
        dense = cifar.trained(args.data, label)
        base = rows([label, where, 'dense'], lambda: [cifar.accuracy(dense, *test)])[0]
        for kind, contenders, percents in (('weights', unstructured(), args.percents or [50, 70, 80, 90]), ('filters', filters(), args.filters or [10, 20, 30, 40, 50])):
            lines = []
            for key, make in contenders.items():
                if args.quick and key[1].startswith('shapley'): continue  # minutes
                if args.only and not any(o == key[1] or o in ': '.join(key) and o.endswith('*') or f'{kind}/{key[1]}' == o for o in args.only.split('|')): continue
                found, start = [], time.process_time()
                def at(percent):
                    if not found: found.append(make(dense, data))
                    model = found[0](percent)
                    return [cifar.accuracy(model, *test) if args.plain else None, cifar.accuracy(recalibrated(model, data), *test)]
                got = [rows([label, where, kind, *key, percent], lambda: at(percent)) for percent in percents]
                lines.append([*key, *(cell(g, 0) for g in got), *(cell(g, 1) for g in got)])
            if not lines: continue
            print(f'{label}, dense {base:.2f} % of {where}; percent of {kind}: right as it is, then with BatchNorm statistics measured again on {CALIBRATE:,} training images.\n')
            print(table(['library', 'criterion', *(f'{p} %' for p in percents), *(f'{p} %, again' for p in percents)], lines))


def cell(got, i): return got['error'].replace('|', '/')[:60] if isinstance(got, dict) else '' if got[i] is None else f'{got[i]:.2f}'


# ------------------------------------------------------------------------------------------------------ at initialisation

METHODS = {'magnitude': ('large_final', 'global', 0), 'magnitude, floor': ('large_final', 'global', None), 'random': ('random', 'global', 0),
           'SNIP': ('snip', 'global', 0), 'GraSP': ('grasp', 'global', 0), 'SynFlow': ('synflow', 'global', 0)}


def mlp(pixels):
    "Five hidden layers, 100 wide"
    widths = [pixels, 100, 100, 100, 100, 100]
    hidden = [m for a, b in zip(widths, widths[1:]) for m in (nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(100, 10))


def trained_sparse(net, masks, data, epochs, seed, test):
    (x, y), opt = data, torch.optim.Adam(net.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(seed)
    net.train()
    for _ in range(epochs):
        for at in torch.randperm(len(x), generator=generator).split(64)[:len(x)//64]:
            opt.zero_grad()
            F.cross_entropy(net(x[at]), y[at]).backward()
            opt.step()
            if masks is not None: masks.apply(net)
    net.eval()
    with torch.no_grad(): return 100*sum(int((net(a).argmax(1) == b).sum()) for a, b in zip(test[0].split(500), test[1].split(500)))/len(test[1])


def initial(args, rows):
    from fasterai_lib.sparse.sparsifier import Sparsifier
    print('## Criteria: at initialisation\n')
    for load in [accuracy.digits] if args.quick else [accuracy.digits, accuracy.fashion_mnist]:
        if load is accuracy.fashion_mnist and not (args.data/'fashion_mnist').is_dir():
            print('*Left out: Fashion-MNIST, its folder is not there (`criteria.py PATH`).*\n')
            continue
        name, (train, test, _) = load.__name__, load(args.data)
        if load is accuracy.fashion_mnist: test = tuple(t[:args.test] for t in test)
        for net_name in args.nets:
            epochs, lines = args.epochs or (10 if load is accuracy.digits else 1), []
            make = accuracy.net if net_name == 'conv' else lambda: mlp(train[0][0].numel())
            total = sum(m.weight.numel() for m, _ in tensors(make()))

            def one(method, percent, seed):
                torch.manual_seed(seed)
                net, masks, empty = make(), None, 0
                if method:
                    criteria, context, floor = METHODS[method]
                    sample = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(seed))[:256]
                    masks = Sparsifier(net, 'weight', context, criteria, layer_type=DENSE_TYPES, min_kept=floor, data=(train[0][sample], train[1][sample]), loss=F.cross_entropy).sparsify_model(percent)
                    empty = sum(not m.keep.any() for m in masks.masks.values() if not m.follows)
                return [trained_sparse(net, masks, train, epochs, seed, test), empty]
            for method, percents in ((None, [0]), *((m, args.percents or [90, 95, 98, 99]) for m in METHODS)):
                if args.quick and percents != [0]: percents = [98]
                got = [[rows([name, net_name, epochs, len(test[1]), method, p, seed], lambda: one(method, p, seed)) for seed in range(2 if args.quick else args.seeds)] for p in percents]
                if method is None: dense = mean_sd([g[0] for g in got[0]]); continue
                lines.append([method, *(f"{mean_sd([v[0] for v in g])}{f' ({max(v[1] for v in g)} empty)' if any(v[1] for v in g) else ''}" for g in got)])
            print(f'{name}, {net_name} net of {total:,} weights (BatchNorm between), dense {dense} %, {epochs} epochs of {len(train[0]):,} images, Adam 2e-3; '
                  f'accuracy % (mean ± sd of {2 if args.quick else args.seeds} seeds) on {len(test[1]):,} test images; in brackets: the most layers that are left empty.\n')
            print(table(['method', *(f'{p} %' for p in ([98] if args.quick else args.percents or [90, 95, 98, 99]))], lines))


# -------------------------------------------------------------------------------------------------------------------- cost

def cost(args, rows):
    from fasterai_lib.core.collect import collect
    from fasterai_lib.core.criteria import criteria
    from fasterai_lib.sparse.sparsifier import Sparsifier
    import fasterai_lib.core.data_criteria
    print('## Criteria: cost\n')
    n = 64 if args.quick else 256
    torch.manual_seed(0)
    net, data = cifar.ResNet(3).eval(), [(torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,))) for _ in range(n//64)]
    params = {f'{k}.weight': m.weight for k, m in net.named_modules() if isinstance(m, nn.Conv2d)}

    def base():
        for x, y in data:
            F.cross_entropy(net(x), y).backward()
            net.zero_grad()
    def work(c):
        if c.needs == 'attribution': return lambda: collect(c, net, {'layer2.1.conv1.weight': net.layer2[1].conv1.weight}, data, F.cross_entropy)
        if not c.needs_data or c.rounds > 1: return lambda: Sparsifier(net, 'filter' if c.between else 'weight', 'global', c, data=data).plan(80)
        return lambda: collect(c, net, params, data, F.cross_entropy)
    jobs = {'forward and backward': base} | {k: work(c) for k, c in criteria.items() if c.needs_data or k in ('large_final', 'lamp', 'fpgm')}

    def measure(name, f):
        if long := name == 'shapley': note('criteria: shapley takes minutes: once, without a warm-up')
        else: f() # kernels and caches
        seconds = []
        for _ in range(1 if args.quick or long else args.repeats):
            settle()
            before, start = status('VmRSS'), time.process_time()
            Path('/proc/self/clear_refs').write_text('5') # forget the peak so far
            kept = f()
            seconds.append(time.process_time() - start)
            peak = (status('VmHWM') - before)*1024
        return [seconds, peak]
    weights, lines = sum(p.nbytes for p in params.values()), []
    got = {name: rows(['cost', n, name], lambda: measure(name, f)) for name, f in jobs.items()}
    whole = statistics.median(got['forward and backward'][0])
    for name, (seconds, peak) in got.items():
        lines.append([name, f'{statistics.median(seconds):.2f} ({min(seconds):.2f}-{max(seconds):.2f})', f'{statistics.median(seconds)/whole:.2f}', f'{peak/1e6:.0f}'])
    print(f'ResNet-20 ({weights/1e6:.1f} MB of convolution weights), {n} images of 32x32 in batches of 64: CPU seconds of the process (median, min-max), beside one forward and backward pass of the '
          f'same batches; MB above the resident size before, at the peak. Criteria of the weights alone, and SynFlow with its 100 rounds: deciding 80 % too. Shapley: one layer of 32 units in the middle, once.\n')
    print(table(['criterion', 'CPU s', 'x pass', 'peak MB'], lines))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('data', type=Path, nargs='?', default=DATA, help='folder that holds cifar10/, cifar10_resnets/ and fashion_mnist/')
    parser.add_argument('--parts', nargs='*', default=['oneshot', 'initial', 'cost'], choices=['oneshot', 'initial', 'cost'])
    parser.add_argument('--models', nargs='*', default=['resnet20', 'resnet56'], choices=list(cifar.DEPTHS))
    parser.add_argument('--nets', nargs='*', default=['conv', 'mlp'], choices=['conv', 'mlp'])
    parser.add_argument('--percents', nargs='*', type=float, help='of the weights')
    parser.add_argument('--filters', nargs='*', type=float, help='percents of the filters')
    parser.add_argument('--only', default='', help='criteria, joined by |')
    parser.add_argument('--test', type=int, default=10000, help='images to judge on')
    parser.add_argument('--select', action='store_true', help='judge on the last training images, which nothing here has been calibrated on: for choosing')
    parser.add_argument('--calibration', type=int, default=0, help='which 1,024 training images: 0 takes the first, others draw with this seed')
    parser.add_argument('--no-plain', dest='plain', action='store_false', help='only with BatchNorm statistics measured again')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--epochs', type=int, help='at initialisation')
    parser.add_argument('--repeats', type=int, default=3, help='of each cost')
    parser.add_argument('--quick', action='store_true', help='resnet20, 200 images, one percentage; digits, two seeds; 64 images')
    parser.add_argument('--out', type=Path, help='a file of rows, resumed when it exists')
    args = parser.parse_args()
    if args.quick: args.models, args.test, args.percents, args.filters = ['resnet20'], 200, [80], [30]
    rows = Rows(args.out)
    print(f'{machine()}\nCommit {commit()}; fasterai {version("fasterai")}, Torch-Pruning {version("torch-pruning")}.\n')
    for part in args.parts: dict(oneshot=oneshot, initial=initial, cost=cost)[part](args, rows)


if __name__ == '__main__': main()
