"""What coverage.py does to one model in one process: prune it with one library, then run it, train it and prove it exact."""
import copy, functools, io, time
import numpy as np, torch, torch.nn as nn
from torch.overrides import TorchFunctionMode
import zoo

LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding, nn.MultiheadAttention, nn.RNNBase)


class Double(TorchFunctionMode):
    "float64 also where a model asks for float32 by name, as the norms of language models do"
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float: func = torch.Tensor.double
        swap = lambda x: torch.float64 if x is torch.float32 else x
        return func(*map(swap, args), **{k: swap(v) for k, v in (kwargs or {}).items()})


@torch.no_grad()
def outputs(model, inputs, double=False):
    if not double: return zoo.leaves(zoo.call(model, inputs))
    for m in model.modules():  # transformers' experts multiply in groups by a kernel that has no float64: one by one instead
        if hasattr(getattr(m, 'config', None), '_experts_implementation'): m.config._experts_implementation = 'eager'
    torch.set_default_dtype(torch.float64)
    try:
        with Double(): return zoo.leaves(zoo.call(model.double(), zoo.tree(lambda x: x.double() if x.is_floating_point() else x, inputs)))
    finally: torch.set_default_dtype(torch.float32)


def difference(outs, references):
    "Largest difference, relative to the largest value of the same output"
    if [o.shape for o in outs] != [r.shape for r in references]: raise ValueError('outputs of other shapes')
    if not sum(r.numel() for r in references): raise ValueError('the outputs are empty')
    parts = [float((o - r).abs().max()/r.abs().max().clamp(min=1e-30)) for o, r in zip(outs, references) if r.numel()]
    return max(parts) if all(np.isfinite(parts)) else float('nan')


def layers(model):
    "layer name -> parameter name -> shape of its weights, for what a pruner can cut: conv, linear, embedding, attention, recurrent, experts"
    found = {}
    for name, m in model.named_modules():
        if not (isinstance(m, LAYERS) or type(m).__name__ == 'Conv1D' or type(m).__name__.endswith('Experts')): continue
        weights = {k: p.shape for k, p in m.named_parameters(prefix=name, recurse=hasattr(m, 'parametrizations')) if p.dim() > 1}
        if weights: found[name] = weights
    return found


def output_layers(model, inputs, weights):
    "The layers that the walk back from the outputs meets first: the classifier, or all that write to a residual stream that is an output"
    owners = {k: layer for layer, names in weights.items() for k in names}
    owners = {id(p): owners[k] for k, p in model.named_parameters() if k in owners}
    following = lambda node: [n for n, _ in node.next_functions if n]
    is_layer = lambda node: any(part in node.name() for part in ('mm', 'Mm', 'Convolution', 'Embedding', 'Linear', 'Rnn'))
    def reached(node, depth=5):
        "The layer whose weight comes in here, as it is, transposed, viewed or normalised"
        if hasattr(node, 'variable'): return owners.get(id(node.variable))
        if depth and not is_layer(node): return next(filter(None, (reached(n, depth - 1) for n in following(node))), None)
    model.requires_grad_(True)
    stack, seen, found = [o.grad_fn for o in zoo.leaves(zoo.call(model, inputs)) if o.grad_fn], set(), set()
    while stack:
        node = stack.pop()
        if node in seen: continue
        seen.add(node)
        hits = {reached(n) for n in following(node)} - {None} if is_layer(node) else set()
        found |= hits
        if not hits: stack += following(node)
    return sorted(found | {k for k in weights if k in ('rpn.head.cls_logits', 'rpn.head.bbox_pred')})  # proposals are detached


# ---------------------------------------------------------------------------------------------------------- libraries
def ours(model, inputs, sparsity, ignored, exact=True):
    "-> CPU seconds of the one thread (other processes do not change them), function that zeroes on a copy, function that removes from a copy"
    from fasterai_lib.prune.pruner import Pruner
    start = time.process_time()
    plan = Pruner(model, inputs, exact=exact).plan(sparsity)
    plan.remove(model)
    seconds = time.process_time() - start
    def mask(dense):
        before = {k: p.detach().clone() for k, p in dense.named_parameters()}
        plan.apply(dense)
        notes = set()
        for k, p in dense.named_parameters(remove_duplicate=False):
            gone = torch.zeros(p.shape, dtype=torch.bool)
            for (name, axis), indices in plan.removed.items():
                if name == k: gone.index_fill_(axis, torch.as_tensor(np.asarray(indices)), True)
            if p.detach()[gone].any(): notes.add('apply leaves removed weights')
            if k in before and (p.detach() != before[k])[~gone].any(): notes.add('apply changes kept weights')
        return ', '.join(sorted(notes))
    return seconds, mask, plan.remove


def torch_pruning(model, inputs, sparsity, ignored):
    "Nothing told but the output layers; what it keeps of every parameter is noted as it slices, to zero the rest of a dense model"
    import torch_pruning as tp
    kept, slicer = {}, tp.pruner.function.BasePruningFunc._prune_parameter_and_grad
    def noting(self, weight, keep, dim):
        out = slicer(self, weight, keep, dim)
        axes, dim = dict(kept[id(weight)][1]) if id(weight) in kept else {}, dim % weight.dim()
        axes[dim] = axes.get(dim, np.arange(weight.shape[dim]))[np.asarray(keep, dtype=int)]
        kept[id(out)] = out, axes
        return out
    modules = dict(model.named_modules())
    parents = [modules[name.rpartition('.')[0]] for name in ignored]  # out_proj is ignored with its attention
    ignored = [modules[name] for name in ignored] + [m for m in parents if isinstance(m, nn.MultiheadAttention)]
    tp.pruner.function.BasePruningFunc._prune_parameter_and_grad = noting
    start = time.process_time()
    pruner = tp.pruner.MagnitudePruner(model, inputs, importance=tp.importance.MagnitudeImportance(p=1), global_pruning=False,
                                       pruning_ratio=sparsity/100, ignored_layers=ignored)
    pruner.step()
    seconds = time.process_time() - start
    axes = {name: kept[id(p)][1] for name, p in model.named_parameters() if id(p) in kept}
    @torch.no_grad()
    def mask(dense):
        for name, p in dense.named_parameters():
            for axis, keep in axes.get(name, {}).items():
                p.index_fill_(axis, torch.as_tensor(np.setdiff1d(np.arange(p.shape[axis]), keep)), 0)
        return ''
    return seconds, mask, None


LIBS = {'ours': ours, 'inexact': functools.partial(ours, exact=False), 'torch-pruning': torch_pruning}  # inexact: also what norms average over


# -------------------------------------------------------------------------------------------------------- full checks
def same(model, inputs, references, tolerance=1e-4):
    diff = difference(outputs(model, inputs), references)
    if not diff <= tolerance: raise ValueError(f'outputs differ by {diff:.1e}')


def save(model, inputs, refs):
    file = io.BytesIO()
    torch.save(model, file)
    same(torch.load(io.BytesIO(file.getvalue()), weights_only=False), inputs, refs)


def state_dict(model, inputs, refs):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters(): p.fill_(.5)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    same(other, inputs, refs)


def export(model, inputs, refs):
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    with torch.no_grad(): program = torch.export.export(model, args, kwargs, strict=False)
    same(program.module(), inputs, refs)


def batch(model, inputs, refs):
    "Twice the batch: the first half is what it was"
    def twice(x):
        if isinstance(x, torch.Tensor): return torch.cat([x, x])
        if isinstance(x, dict): return {k: twice(v) for k, v in x.items()}
        return tuple(map(twice, x)) if isinstance(x, tuple) else x + x
    outs = outputs(model, twice(inputs))
    pairs = [(o[:len(r)] if o.dim() else o, r) for o, r in zip(outs, refs)]
    pairs = [(o, r) for o, r in pairs if r.dim() and o.shape == r.shape]
    diff = difference(*zip(*pairs)) if pairs else 0
    if not diff <= 1e-3: raise ValueError(f'outputs differ by {diff:.1e}')


def backward(model, inputs, refs=None):
    model.zero_grad()
    sum(o.abs().pow(2).mean() for o in zoo.leaves(zoo.call(model, inputs)) if o.requires_grad and o.numel()).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if not grads or not all(g.isfinite().all() for g in grads): raise ValueError('no gradients or infinite ones')
    model.zero_grad()


def train(model, inputs, refs):
    try: backward(model.train(), inputs)
    finally: model.eval()


def again(model, inputs, refs):
    from fasterai_lib.prune.pruner import Pruner
    Pruner(model, inputs, exact=True).prune_model(30)
    outputs(model, inputs)


CHECKS = dict(save=save, deepcopy=lambda model, *rest: same(copy.deepcopy(model), *rest), state_dict=state_dict, export=export,
              compile=lambda model, *rest: same(torch.compile(model, backend='eager'), *rest), batch=batch, train=train, again=again)


def full_checks(model, inputs, dense, send):
    "name -> 'ok', 'dense too' where the model before pruning fails as well, or the error"
    found = {}
    for name, check in CHECKS.items():
        try: check(model, inputs, outputs(model, inputs)); found[name] = 'ok'
        except Exception as e: found[name] = text(e)
        if found[name] != 'ok' and name != 'again':
            try: original = dense(); check(original, inputs, outputs(original, inputs))
            except Exception: found[name] = 'dense too'
        send(full=found)


# ------------------------------------------------------------------------------------------------------------ measure
def text(e): return f'{type(e).__name__}: {" ".join(str(e).split())}'[:400]


def measure(name, lib, sparsity, full, send):
    "Sends what is found as soon as it is found: the time limit may come at any moment"
    factory = zoo.models(name)[name]
    send(stage='build')
    model, inputs = zoo.build(name, factory)
    other, weights = zoo.fresh(inputs), layers(model)
    last = output_layers(model, inputs, weights)
    prunable, size = [k for k in weights if k not in last], sum(p.numel() for p in model.parameters())
    send(stage='prune', pruned=False, runs=False, backward=False, exact=False, layers=len(prunable))
    start = time.process_time()
    try: seconds, mask, remove = LIBS[lib](model, inputs, sparsity, last)
    except Exception as e: return send(error=text(e), refused=isinstance(e, ValueError) and lib != 'torch-pruning', seconds=time.process_time() - start)
    now = {k: p.shape for k, p in model.named_parameters(remove_duplicate=False)}
    cut = sum(any(now.get(k) != shape for k, shape in weights[layer].items()) for layer in prunable)
    params = sum(p.numel() for p in model.parameters())/size
    send(stage='run', pruned=cut > 0 or params < 1, params=params, cut=cut/max(1, len(prunable)), seconds=seconds)
    try:
        model.eval()
        send(stage='backward', runs=all(o.isfinite().all() for o in outputs(model, other)))
        backward(model, other)
        send(stage='exact', backward=True)
    except Exception as e: send(error=text(e))
    if lib != 'inexact': send(**exactness(name, factory, model, other, mask, remove))
    if full and remove: send(stage='full'); full_checks(model, inputs, lambda: zoo.build(name, factory)[0], send)
    send(stage='done')


def exactness(name, factory, model, inputs, mask, remove):
    """The masked dense model and the removed one, both built anew for `ours`, in float64 (float32 where the model cannot)"""
    notes = []
    for double in (True, False):
        dense = zoo.build(name, factory)[0]
        try:
            note = mask(dense)
            references = outputs(dense, inputs, double)
            break
        except Exception as e:
            notes.append(f'{"float64" if double else "float32"} {text(e)}')
    else: return dict(note='; '.join(notes))
    del dense
    try:
        if remove:
            small = zoo.build(name, factory)[0].to(torch.float64 if double else None)  # so that the folded norms are rounded in it too
            remove(small)
        else: small = model
        diff = difference(outputs(small, inputs, double), references)
    except Exception as e: return dict(note='; '.join([*notes, text(e)]))
    return dict(diff=diff, exact=bool(diff <= (1e-10 if double else 1e-4)), note='; '.join(n for n in [note, *notes] if n))
