"""Objectives: what was asked for, what was predicted and what was measured after removal; accuracy of what is left; allocators beside the best possible."""
from common import SHORT, machine, note, optional, table, version  # one thread, before torch is imported
import argparse, copy, fnmatch, itertools, json, math, os, statistics, sys, tempfile, time
from pathlib import Path
import torch, torch.nn.functional as F
import cifar
from latency import alternate, build, macs, middle, size
from prune_accuracy import DATA, fine_tune

SHARES = [.75, .5, .33]
CONTEXTS = ['uniform', 'global', 'knapsack']
COSTS = ['model', 'input', 'objective', 'context', 'asked', 'predicted', 'measured', 'off by %', 'CPU time', 'scores kept %', 'parameters', 'search s', 'goal']
TESTED = ['objective', 'who', 'criterion', 'MACs', 'latency', 'parameters', 'right after %', 'fine-tuned %']
GOAL = dict(macs=1., latency=5.)  # percent


# ------------------------------------------------------------------------------------------------------------- models
def criterion(name):
    "`f`, or `f / normalizer`, summed or averaged over the weights of a unit as the criterion says; `taylor` summed, so that scores add up between layers"
    from fasterai_lib.core.criteria import Criteria, criteria
    import fasterai_lib.core.data_criteria  # registers them
    f, _, normalizer = name.partition(' / ')
    return Criteria(criteria[f].f, 'mean', normalizer, name=name) if normalizer else criteria['snip' if f == 'taylor' else f]


def macs_of(model, x):
    from fasterai_lib.core.cost import cost
    return cost(model, x, latency=False, disk=False)['macs']


def reached(dense, x, objective, context, criteria, **kwargs):
    "(the smaller model, what the search said) for one objective; its latency is measured again, by whoever asks"
    from fasterai_lib.prune.pruner import Pruner
    model = copy.deepcopy(dense)
    pruner = Pruner(model, x, criterion(criteria), context, **kwargs)
    if pruner.criteria.needs_data: pruner.collect()
    scores = [(g.roots[g.alive], pruner.scores(g).double().cpu()) for g in pruner.groups if len(g.roots) > 1]
    start = time.perf_counter()
    pruner.prune_model(objective)
    seconds, name, b = time.perf_counter() - start, objective.split()[-1], pruner.budget
    kept = sum(float(s[torch.from_numpy(pruner.graph.alive[roots])].sum()) for roots, s in scores)/sum(float(s.sum()) for _, s in scores)
    return model.eval(), dict(seconds=seconds, kept=100*kept, tries=len(b.df), chosen=b.best[f'{name} measured']/b.dense[name],
                              predicted=b.best[f'{name} predicted']/b.dense[name], dense=b.dense[name])


def timed(model, dense, x, runs):
    "The two in turn, after the search: what `Budget` measured while it searched is not looked at"
    from fasterai_lib.core.latency import time_models
    small, whole = time_models([(model, x), (dense, x)], repeats=runs)
    with torch.inference_mode(): ((_, cpu), (_, dense_cpu)) = (middle(r) for r in alternate(dict(small=lambda: model(x), dense=lambda: dense(x)), 0., runs//2).values())
    return dict(cpu=cpu/dense_cpu, latency=small.median/whole.median, ms=1e3*small.median, dense_ms=1e3*whole.median, spread=small.spread/small.median, runs=runs)


def torch_pruning(lib, dense, x, share, importance='GroupMagnitudeImportance', data=(), steps=400):
    "Its global pruning, a little at a time until the MACs are reached, as its own benchmark does"
    model = copy.deepcopy(dense)
    whole = macs(model, x)
    pruner = lib.pruner.BasePruner(model, x, importance=getattr(lib.importance, importance)(), pruning_ratio=1., iterative_steps=steps, global_pruning=True, ignored_layers=[model.linear])
    for _ in range(steps):
        if 'Taylor' in importance:
            model.zero_grad()
            for a, b in data: (F.cross_entropy(model(a), b)/len(data)).backward()
        pruner.step()
        if macs(model, x) <= share*whole: break
    model.zero_grad(set_to_none=True)
    return model.eval().requires_grad_(True)


# --------------------------------------------------------------------------------------- problems that can be enumerated
def small_problem(kind, g):
    "(problem, budget, value of a choice, value of the best): four groups; costs add up, come in stairs of 3 units, or multiply like those of layers in a row"
    from fasterai_lib.core.allocators import Problem
    sizes, price, names = torch.randint(3, 7, (4,), generator=g).tolist(), (1 + 9*torch.rand(4, generator=g)).tolist(), 'abcd'
    scores = {k: torch.rand(m, generator=g, dtype=torch.float64)*(1 + 3*torch.rand((), generator=g)) for k, m in zip(names, sizes)}
    def cost(kept):
        if kind == 'multiply': return 3*price[0]*kept['a'] + sum(p*kept[a]*kept[b] for p, a, b in zip(price[1:], names, names[1:]))
        return sum(p*(-(-kept[k]//3)*3 if kind == 'stairs' else kept[k]) for k, p in zip(names, price))
    low, whole = cost(dict.fromkeys(names, 1)), cost(dict(zip(names, sizes)))
    budget = low + (whole - low)*float(.15 + .6*torch.rand((), generator=g))
    def value(kept): return sum(float(scores[k].topk(n).values.sum()) for k, n in kept.items())
    choices = (dict(zip(names, ks)) for ks in itertools.product(*(range(1, m + 1) for m in sizes)))
    return Problem(scores, cost, dict.fromkeys(names, 1.)), budget, value, max(value(c) for c in choices if cost(c) <= budget)


def enumerated(kinds, names, n):
    "[kind, allocator, mean, worst, how often the best, largest gap stated, largest true gap, is the statement always true]"
    from fasterai_lib.core.allocators import allocators
    for kind in kinds:
        g = torch.Generator().manual_seed(0)
        problems = [small_problem(kind, g) for _ in range(n)]
        for name in names:
            got, stated, true, honest = [], [], [], True
            for problem, budget, value, best in problems:
                kept = allocators[name](problem, budget)
                if problem.cost(kept) > budget*(1 + 1e-9): raise ValueError(f'{name} is over the budget: {kept}')
                got.append(value(kept)/best)
                info = getattr(kept, 'info', {})
                if info.get('gap') is not None:
                    stated.append(info['gap'])
                    true.append(best/value(kept) - 1)
                    honest &= true[-1] <= stated[-1] + 1e-9
            gaps = [f'{100*max(stated):.2f}', f'{100*max(true):.2f}', ('yes' if honest else 'NO') + f', {len(stated)} of {n}'] if stated else ['none', '', '']
            yield [kind, name, f'{statistics.mean(got):.4f}', f'{min(got):.4f}', f'{sum(v > 1 - 1e-9 for v in got)} of {n}', *gaps]


# --------------------------------------------------------------------------------------------------------------- rows
class Rows:
    "What was measured, in a file that is gone on with; `only`: globs of 'part: key: key...', joined by |"
    def __init__(self, path, only): 
        self.path, self.only, self.rows = path, only.split('|'), {}
        if path and path.exists(): self.rows = {tuple(r['key']): r for r in map(json.loads, path.read_text().splitlines())}
    def wanted(self, key): return any(fnmatch.fnmatchcase(': '.join(key), o) for o in self.only)
    def __call__(self, key, work):
        if 'error' not in self.rows.get(key, dict(error='not yet')) or not self.wanted(key): return self.rows.get(key)
        try: found = work()
        except Exception as e: found = dict(error=f'{type(e).__name__}: {e}'[:300])
        self.rows[key] = dict(key=list(key), load=round(os.getloadavg()[0], 1), **found)
        note(f'budget: {": ".join(key)}: {found}')
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open('a') as file: file.write(json.dumps(self.rows[key]) + '\n')
        return self.rows[key]


def cost_line(key, r):
    _, model, image, objective, context, criteria = key
    kind, share = objective.split()[1], float(objective.split('x')[0])
    head = [f'{model}, {criteria}', image, objective, context]
    if 'error' in r: return [*head, r['error'].replace('|', '/').replace('\n', ' '), *['']*8]
    ratio = r[kind]
    off = 100*(ratio/share - 1)
    met = abs(off) <= GOAL[kind]
    return [*head, f'{share:.3f}', f'{r["predicted"]:.3f}', f'{ratio:.3f}' + (f' ({r["ms"]:.2f} of {r["dense_ms"]:.2f} ms)' if kind == 'latency' else ''), f'{off:+.1f}',
            f'{r["cpu"]:.3f}' if 'cpu' in r else '', f'{r["kept"]:.1f}', f'{r["parameters"]:.3f}', f'{r["seconds"]:.1f}', 'met' if met else 'below' if off < 0 else 'MISSED']


def mean(values): return statistics.mean(values) if isinstance(values, list) else values # rows of before there were seeds have one number
def mean_sd(values): return f'{mean(values):.2f}' + (f' ± {statistics.stdev(values):.2f}' if isinstance(values, list) and len(values) > 1 else '')


def tested_line(key, r):
    objective, who, criteria = key[-3:]
    if 'error' in r: return [objective, who, criteria, r['error'].replace('|', '/').replace('\n', ' '), *['']*4]
    show = lambda k, d=3: f'{r[k]:.{d}f}' if k in r else ''
    return [objective, who, criteria, show('macs'), show('latency'), show('parameters'), show('after', 2), mean_sd(r['tuned']) if 'tuned' in r else '']


def reached_goals(rows):
    "What was to be reached, and what was, in sentences; and whether all of it was"
    mine, lines, fine = {k[1:]: r for k, r in rows.items() if k[0] == 'costs'}, [], True
    for kind, goal in GOAL.items():
        of = {k: r for k, r in mine.items() if k[2].endswith(kind)}
        off = [100*(r[kind]/float(k[2].split('x')[0]) - 1) for k, r in of.items() if 'error' not in r]
        if not of: continue
        far, refused = sum(abs(v) > goal for v in off), len(of) - len(off)
        fine &= not far and not refused
        lines.append(f'- {kind} within {goal:g} % of what was asked for: {len(off) - far} of {len(of)} rows, {refused} refused' + (f'; the largest difference {max(off, key=abs):+.1f} %' if off else '') + '.')
    ahead = {k: mean(r['tuned']) - mean(u['tuned']) for k, r in mine.items() if k[3] == 'knapsack' and 'tuned' in r and 'tuned' in (u := mine.get((*k[:3], 'uniform', k[4]), {}))}
    for kind in GOAL:
        if found := {k: v for k, v in ahead.items() if k[2].endswith(kind)}:
            fine &= min(found.values()) > 0
            lines.append(f'- Knapsack ahead of uniform at equal {kind}, fine-tuned, points: ' + ', '.join(f'{v:+.2f} ({k[2]}, {k[4]})' for k, v in found.items()) + '.')
    for objective in dict.fromkeys(k[1] for k in rows if k[0] == 'peers'):
        theirs = {k[3]: mean(r['tuned']) for k, r in rows.items() if k[:2] == ('peers', objective) and 'tuned' in r}
        ours = {f'{k[3]}, {k[4]}': mean(r['tuned']) for k, r in mine.items() if k[0] == 'resnet56' and k[2] == objective and 'tuned' in r}
        if theirs and ours:
            (a, v), (b, w) = (max(d.items(), key=lambda i: i[1]) for d in (ours, theirs))
            lines.append(f'- {objective}: the best of ours ({a}) {v:.2f} %, of Torch-Pruning ({b}) {w:.2f} %.')
    return '\n'.join(lines) + '\n', fine


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('data', type=Path, nargs='?', default=DATA, help='folder that holds cifar10/ and cifar10_resnets/')
    parser.add_argument('--kinds', nargs='+', default=['macs', 'latency'], choices=['macs', 'latency'])
    parser.add_argument('--models', nargs='+', default=['resnet56', 'resnet18 64', 'mobilenet_v2 64', 'resnet18 224', 'mobilenet_v2 224'], help='a name, and the side of the image')
    parser.add_argument('--shares', nargs='+', type=float, default=SHARES)
    parser.add_argument('--contexts', nargs='+', default=CONTEXTS)
    parser.add_argument('--criteria', nargs='+', default=['taylor', 'squared_final / max'], help='for resnet56; models of random weights get squared_final / max')
    parser.add_argument('--test', type=int, default=2000, help='images to test on')
    parser.add_argument('--steps', type=int, default=100, help='of fine-tuning')
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--rate', type=float, default=.01)
    parser.add_argument('--seeds', type=int, default=1, help='of fine-tuning: the order of the images, flips and shifts')
    parser.add_argument('--runs', type=int, default=101, help='of each model for a latency')
    parser.add_argument('--problems', type=int, default=200, help='to enumerate, of each kind')
    parser.add_argument('--only', default='*', help='globs of "costs: model: side: objective: context: criterion", "peers: objective: who: criterion", joined by |')
    parser.add_argument('--table', type=Path, help='folder of the times of operators; by default a new one, so that the first search measures them')
    parser.add_argument('--out', type=Path, help='a file of rows, gone on with when it exists')
    parser.add_argument('--quick', action='store_true', help='resnet18 at 64x64, half, few runs')
    args = parser.parse_args()
    if args.quick: args.models, args.shares, args.runs, args.problems, args.contexts = ['resnet18 64'], [.5], 11, 20, ['uniform', 'knapsack']
    os.environ['XDG_CACHE_HOME'] = str(args.table or tempfile.mkdtemp())
    print(f'## Objectives\n\n{__doc__}\n\n{machine()}')
    if not report(args, Rows(args.out, args.only)): sys.exit(SHORT)


def report(args, rows):
    costs, tested, trained = [], [], any(m.startswith('resnet56') for m in args.models)
    if trained and not ((args.data/'cifar10').is_dir() and (args.data/'cifar10_resnets').is_dir()):
        print('*Left out: ResNet-56, whose data are not there.*\n')
        trained = False
    objectives = [f'{s:g}x {kind}' for kind in args.kinds for s in args.shares]
    settings = dict(test=args.test, steps=args.steps, batch=args.batch, rate=args.rate, seeds=args.seeds)
    if trained:
        x, y = cifar.images(args.data, 1)
        x_test, y_test = (t[:args.test] for t in cifar.images(args.data, 'test'))
        tune = lambda model, seed: fine_tune(model, (x, y), args.steps, seed, args.batch, args.rate)
        right = lambda model: cifar.accuracy(model, x_test, y_test)
        batches = [(cifar.normalised(a), b) for a, b in zip(x[:512].split(128), y[:512].split(128))]
        dense56 = cifar.trained(args.data, 'resnet56')
        rows(('dense', 'resnet56', str(args.test)), lambda: dict(right=right(dense56)))

    def scored(model, dense, example):
        "What is right of a smaller ResNet-56, before and after fine-tuning"
        out = dict(macs=macs_of(model, example)/macs_of(dense, example), parameters=size(model)/size(dense), settings=settings, after=right(model))
        return {**out, 'tuned': [right(tune(copy.deepcopy(model), s)) for s in range(args.seeds)]} if args.steps else out

    for kind in args.kinds:  # MACs first: what is counted does not mind what else the machine does
        for name in args.models:
            model_name, _, side = name.partition(' ')
            if model_name == 'resnet56' and not trained: continue
            side = side or '32'
            dense = dense56 if model_name == 'resnet56' else build(model_name)
            x_example = torch.randn(1, 3, int(side), int(side), generator=torch.Generator().manual_seed(0))
            for criteria in args.criteria if model_name == 'resnet56' else ['squared_final / max']:
                for objective, context in itertools.product((o for o in objectives if o.endswith(kind)), args.contexts):
                    def work():
                        data = dict(data=batches, loss=F.cross_entropy) if model_name == 'resnet56' and criterion(criteria).needs_data else {}
                        model, said = reached(dense, x_example, objective, context, criteria, **data)
                        found = dict(said, macs=macs_of(model, x_example)/macs_of(dense, x_example), parameters=size(model)/size(dense))
                        if kind == 'latency': found.update(timed(model, dense, x_example, args.runs))
                        return {**found, **scored(model, dense, x_example)} if model_name == 'resnet56' else found
                    key = ('costs', model_name, side, objective, context, criteria)
                    if (r := rows(key, work)) is None: continue
                    costs.append(cost_line(key, r))
                    if model_name == 'resnet56': tested.append(tested_line(('', objective, f'ours, {context}', criteria), r))
        if kind == 'macs' and trained and (lib := optional('torch_pruning')):
            example = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
            for share, (setting, kwargs) in itertools.product(args.shares, {
                    'group norm': {}, 'taylor': dict(importance='GroupTaylorImportance', data=batches[:1], steps=200)}.items()):
                key = ('peers', f'{share:g}x macs', 'Torch-Pruning, global', setting)
                if r := rows(key, lambda: scored(torch_pruning(lib, dense56, example, share, **kwargs), dense56, example)): tested.append(tested_line(key, r))
    print(f'''Batch 1, one thread. "Asked", "predicted" (before anything was removed) and "measured" are shares of the dense model. A latency: median of {args.runs} runs of the smaller
and of the dense model in turn, after the search, whose own measurements are not used. "CPU time": the same ratio of the thread's own time, which other work
disturbs less. MACs and parameters counted by `core.cost`. "Scores kept": of the sum of the scores of all units, which knapsack makes as large as it can.
"Search": deciding, proving and measuring, wall time; the first row of a model with latencies measures its operators too. `taylor`: |weight x gradient| of 512
training images, summed over the weights of a unit; `squared_final / max`: mean square of the weights over the largest in the group (random weights for
torchvision models: costs only). Goal: within {GOAL["macs"]:g} % (MACs) and {GOAL["latency"]:g} % (latency); "below": it costs less than that, which an objective allows.
''')
    loads = [r['load'] for r in rows.rows.values()]
    if loads: print(f'Load of the machine while the rows were measured (2 and more disturb latencies and searches): {min(loads):.1f} to {max(loads):.1f}.\n')
    print(table(COSTS, costs))
    if tested:
        dense = rows.rows.get(('dense', 'resnet56', str(args.test)), {}).get('right', math.nan)
        print(f'''### Accuracy of ResNet-56

Dense {dense:.2f} %. Right of the first {args.test} test images after removal, and after {args.steps} steps of fine-tuning, the same for all: {args.batch} of the first 10,000 training images
(flips, shifts) a step, SGD, Nesterov momentum .9, weight decay 5e-4, peak rate {args.rate:g}, cosine; mean ± standard deviation of the seeds of fine-tuning where there are several; with ONE half a point is chance. Scores over the largest of their
group are made for a threshold (global); knapsack adds scores up, which `taylor` allows and these do not: shown for what comes of it.
Torch-Pruning {version("torch-pruning")}: `global_pruning` in small steps (of 1/400; taylor: 1/200, the gradient of 128 images anew for each) until the MACs are reached.
''')
        order = {o: i for i, o in enumerate(objectives)}
        print(table(TESTED, sorted(tested, key=lambda l: order.get(l[0], 99))))
    said, fine = reached_goals(rows.rows)
    print(f'### What was to be reached\n\n{said}')
    print(f'''### Allocators beside the best of all choices

{args.problems} problems of each kind, four groups of 3 to 6 units, random scores and prices; every choice within the budget was looked at. Value: the sum of the scores kept over
that of the best choice. Costs `add up`, come in `stairs` of three units, or `multiply` like those of layers in a row. "Stated": by how much the allocator says that
the best may be ahead of it, at most (it says nothing where costs multiply).
''')
    print(table(['costs', 'allocator', 'mean value', 'worst', 'the best', 'largest stated gap %', 'its largest true gap %', 'gap always true'],
                enumerated(['add up', 'stairs', 'multiply'], ['knapsack', 'global', 'uniform'], args.problems)))
    return fine


if __name__ == '__main__': main()
