"""wanda and sparsegpt on a transformer block, beside a straightforward reference of each: hooks for the inputs, a sort per row; one column after the other."""
from common import note, table  # one thread, before torch is imported
import argparse, copy, statistics, time
import torch, torch.nn as nn

PERCENT = 50


def block(width): return nn.TransformerEncoderLayer(width, 16, 4*width, dropout=0., batch_first=True).eval()


def linear(net): return {n: m for n, m in net.named_modules() if n in ('linear1', 'linear2')}


def inputs_of(net, data, gather):
    "What `gather` makes of the inputs of the linear layers, summed over the batches"
    sums, hooks = {}, []
    for n, m in linear(net).items():
        def hook(m, args, n=n): sums[n] = sums.get(n, 0) + gather(args[0].flatten(0, 1))
        hooks.append(m.register_forward_pre_hook(hook))
    slow = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            for x in data: net(x)
    finally:
        for h in hooks: h.remove()
        torch.backends.mha.set_fastpath_enabled(slow)
    return sums


def wanda_reference(net, data):
    for n, squares in inputs_of(net, data, lambda x: x.square().sum(0)).items():
        w = linear(net)[n].weight.data
        order = (w.abs()*squares.sqrt()).sort(1).indices[:, :w.shape[1]*PERCENT//100]
        w.scatter_(1, order, 0)


def sparsegpt_reference(net, data, damp=.01):
    "Column by column, each removal spread over all columns to its right at once; both layers see the inputs of the dense block"
    for n, h in inputs_of(net, data, lambda x: x.T @ x).items():
        w, h = linear(net)[n].weight.data, h.double()
        h = h + damp*h.diagonal().mean()*torch.eye(len(h), dtype=h.dtype)
        u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()
        for i in range(w.shape[1]):
            if i % 128 == 0:
                part = w[:, i:i + 128]
                score = (part/u.diagonal()[i:i + 128]).square()
                gone = score <= score.flatten().kthvalue(score.numel()*PERCENT//100).values
            kept = w[:, i]*~gone[:, i % 128]
            w[:, i:] -= torch.outer((w[:, i] - kept)/u[i, i], u[i, i:])
            w[:, i] = kept


def wanda_ours(net, data):
    from fasterai_lib.sparse.sparsifier import Sparsifier
    Sparsifier(net, 'weight', None, 'wanda', nn.Linear, exclude='self_attn.*', data=data).sparsify_model(PERCENT)


def sparsegpt_ours(net, data):
    from fasterai_lib.sparse.sparsegpt import sparsegpt
    sparsegpt(net, PERCENT, data, layer_type=nn.Linear, exclude='self_attn.*', sequential=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--quick', action='store_true', help='width 64')
    parser.add_argument('--width', type=int, default=1024)
    parser.add_argument('--repeats', type=int, default=3)
    args = parser.parse_args()
    if args.quick: args.width, args.repeats = 64, 1
    torch.manual_seed(0)
    net = block(args.width)
    mix = torch.randn(args.width, args.width)/args.width**.5 + torch.eye(args.width)  # inputs that depend on each other
    data = [torch.randn(4, 128, args.width) @ mix for _ in range(8)]
    with torch.no_grad(): want = [net(x) for x in data]

    jobs = {'a pass over the data': None, 'wanda, reference': wanda_reference, 'wanda, ours': wanda_ours, 'sparsegpt, reference': sparsegpt_reference, 'sparsegpt, ours': sparsegpt_ours}
    seconds, found = {n: [] for n in jobs}, {}
    for _ in range(args.repeats):
        for name, f in jobs.items():
            model = copy.deepcopy(net)
            start = time.perf_counter()
            with torch.no_grad(): f(model, data) if f else [model(x) for x in data]
            seconds[name].append(time.perf_counter() - start)
            with torch.no_grad(): error = sum((model(x) - y).square().sum() for x, y in zip(data, want))/sum(y.square().sum() for y in want)
            found[name] = float(error), 100*sum(int((m.weight == 0).sum()) for m in linear(model).values())/sum(m.weight.numel() for m in linear(model).values())
        note(f'block: {({n: round(s[-1], 2) for n, s in seconds.items()})}')
    whole = statistics.median(seconds['a pass over the data'])
    print(f'''## Criteria: a transformer block\n\n{__doc__}\n\nWidth {args.width}, hidden {4*args.width}, {len(data)} batches of 4 sequences of 128; {PERCENT} % of each of the two linear layers of its MLP; {args.repeats} run(s), one thread.
"lost": squared difference of the block's outputs from the dense block's, relative to these.\n''')
    print(table(['what', 'seconds (median)', 'x pass', 'zeros %', 'lost'], [[n, f'{statistics.median(s):.2f}', f'{statistics.median(s)/whole:.2f}', f'{found[n][1]:.2f}', f'{found[n][0]:.5f}'] for n, s in seconds.items()]))


if __name__ == '__main__': main()
