"""Parameters and optimizers cut in the middle of training: the kept weights go on as if the others had been masked."""
import copy
import pickle
from functools import partial

import pytest
import torch
from fastai import optimizer as fo
from torch import nn, optim
from torch.optim.swa_utils import AveragedModel

from fasterai_lib.prune.optimizer import replace_parameter_, slice_optimizer_, slice_parameter_

KEPT1, KEPT2 = torch.tensor([0, 2, 3, 6]), torch.tensor([1, 2, 5, 6])


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def net(n1=8, n2=8, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, n1), nn.Tanh(), nn.Linear(n1, n2), nn.Tanh(), nn.Linear(n2, 3)).double()


def cuts_of(m):  # both sides of the kept units of two hidden layers
    k1, k2 = KEPT1, KEPT2
    cuts = {m[0].weight: [(0, k1)], m[0].bias: [(0, k1)], m[2].weight: [(0, k2), (-1, k1)], m[2].bias: [(0, k2)], m[4].weight: [(1, k2)]}
    return {p: (p.shape, c) for p, c in cuts.items()}


def kept(x, cut):
    for a, k in cut: x = x.index_select(a, k)
    return x


def dead(p, cut):
    "Where an entry of `p` goes"
    gone = torch.zeros(p.shape, dtype=torch.bool)
    for a, k in cut:
        line = torch.ones(p.shape[a], dtype=torch.bool)
        line[k] = False
        gone |= line.view([-1 if i == a % p.dim() else 1 for i in range(p.dim())])
    return gone


def batch(i):
    g = torch.Generator().manual_seed(i)
    return torch.randn(16, 6, generator=g, dtype=torch.float64), torch.randn(16, 3, generator=g, dtype=torch.float64)


def step(model, opt, i, after_backward=lambda: None):
    "Of training; what it returns keeps the graph alive"
    x, y = batch(i)
    loss = ((model(x) - y)**2).mean()
    loss.backward()
    after_backward()
    opt.step()
    opt.zero_grad()
    return loss


def shrink(model, opt, cuts=None, optimizer_first=True):
    cuts = cuts_of(model) if cuts is None else cuts
    if optimizer_first: slice_optimizer_(opt, cuts)
    for p, (_, cut) in cuts.items(): slice_parameter_(p, cut)
    if not optimizer_first: slice_optimizer_(opt, cuts)
    return cuts


def innermost(opt):
    while hasattr(opt, 'opt'): opt = opt.opt
    return opt


def snapshot(opt):
    "All that an optimizer holds, to the bit"
    slow = [[w.clone() for w in g] for g in getattr(opt, 'slow_weights', None) or ()]
    opt = innermost(opt)
    state = [(id(p), k, id(v), v.clone() if isinstance(v, torch.Tensor) else copy.deepcopy(v)) for p, s in opt.state.items() for k, v in s.items()]
    return slow, state, [[id(p) for p in g['params']] for g in opt.param_groups], [{k: v for k, v in g.items() if k != 'params'} for g in opt.param_groups]


def equal(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict): return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return a == b


T = {
    'sgd': partial(optim.SGD, lr=.1), 'momentum': partial(optim.SGD, lr=.1, momentum=.9, dampening=.1, weight_decay=1e-2),
    'nesterov': partial(optim.SGD, lr=.1, momentum=.9, nesterov=True), 'maximize': partial(optim.SGD, lr=1e-3, momentum=.9, maximize=True),
    'adam': partial(optim.Adam, lr=.05, weight_decay=1e-2), 'adamw': partial(optim.AdamW, lr=.05), 'amsgrad': partial(optim.AdamW, lr=.05, amsgrad=True),
    'rmsprop': partial(optim.RMSprop, lr=.01, centered=True, momentum=.9), 'adagrad': partial(optim.Adagrad, lr=.1, initial_accumulator_value=.1, lr_decay=.01),
    'adadelta': partial(optim.Adadelta, lr=1.), 'adamax': partial(optim.Adamax, lr=.05), 'nadam': partial(optim.NAdam, lr=.05), 'radam': partial(optim.RAdam, lr=.05),
    'asgd': partial(optim.ASGD, lr=.1, t0=3), 'rprop': partial(optim.Rprop, lr=.01),
}
EXACT = {**T, **{f'{n} foreach': partial(o, foreach=True) for n, o in T.items()}}
EXACT |= {f'{n} fused': partial(T[n], fused=True) for n in ('momentum', 'nesterov', 'adam', 'adamw', 'amsgrad')} | {'adagrad fused': partial(optim.Adagrad, lr=.1, fused=True)}
EXACT |= {f'fastai {n}': o for n, o in {
    'sgd': partial(fo.SGD, lr=.1), 'momentum': partial(fo.SGD, lr=.1, mom=.9, wd=1e-2), 'l2': partial(fo.SGD, lr=.1, mom=.9, wd=1e-2, decouple_wd=False),
    'rmsprop': partial(fo.RMSProp, lr=.01, mom=.9), 'adam': partial(fo.Adam, lr=.05), 'radam': partial(fo.RAdam, lr=.05, beta=.1), 'qhadam': partial(fo.QHAdam, lr=.05),
    'ranger': partial(fo.ranger, lr=.05, k=3), 'lookahead': lambda ps: fo.Lookahead(fo.SGD(ps, lr=.1, mom=.9), k=2),
    'wrapper': partial(fo.OptimWrapper, opt=optim.AdamW, lr=.05), 'built': lambda ps: fo.OptimWrapper(opt=optim.Adam(ps, lr=.05)),
    'lookahead wrapper': lambda ps: fo.Lookahead(fo.OptimWrapper(ps, opt=partial(optim.SGD, momentum=.9), lr=.1), k=3)}.items()}
BY_NORM = {
    'adafactor': partial(optim.Adafactor, lr=.05), 'adafactor foreach': partial(optim.Adafactor, lr=.05, foreach=True), 'lamb': partial(fo.Lamb, lr=.05),
    'larc': partial(fo.Larc, lr=.1), 'lars': partial(fo.Larc, lr=.1, clip=False),
}


@pytest.mark.parametrize('name', EXACT)
def test_goes_on_as_the_masked_one(name):
    masked, small, start = net(), net(), net()
    opt_m, opt_s = EXACT[name](list(masked.parameters())), EXACT[name](list(small.parameters()))
    for i in range(4):
        step(masked, opt_m, i)
        step(small, opt_s, i)
    cuts = cuts_of(masked)
    gone = {p: dead(p, cut) for p, (_, cut) in cuts.items()}

    def hold(what):
        for p, d in gone.items():
            if what(p) is not None: what(p)[d] = 0.
    hold(lambda p: p.data)
    ids = [id(p) for p in small.parameters()]
    shrink(small, opt_s, optimizer_first=len(name) % 2)
    assert ids == [id(p) for p in small.parameters()]
    for i in range(4, 12):
        step(masked, opt_m, i, lambda: hold(lambda p: p.grad))
        hold(lambda p: p.data)
        loss = step(small, opt_s, i)
    assert torch.isfinite(loss)
    for a, b, s in zip(masked.parameters(), small.parameters(), start.parameters()):
        cut = cuts.get(a, (None, []))[1]
        assert (kept(a.data, cut) - b.data).abs().max() < 1e-12
        assert (kept(s.data, cut) - b.data).abs().max() > 1e-3  # it was trained
    assert fits(opt_s) or name in ('sgd', 'maximize', 'sgd foreach', 'fastai sgd')


def fits(opt):
    "Each tensor of the state has the shape of its parameter: how many there are"
    tensors = [(p, v) for p, s in innermost(opt).state.items() for v in s.values() if isinstance(v, torch.Tensor) and v.numel() > 1]
    tensors += [(p, v) for g, slow in zip(opt.param_groups, getattr(opt, 'slow_weights', None) or ()) for p, v in zip(g['params'], slow)]
    assert all(v.shape == p.shape and v.is_contiguous() and not v._is_view() for p, v in tensors)
    return len(tensors)


@pytest.mark.parametrize('name', BY_NORM)
def test_what_depends_on_norms_runs(name):
    m = net()
    opt = BY_NORM[name](list(m.parameters()))
    for i in range(3): step(m, opt, i)
    cuts, old = cuts_of(m), {p: dict(s) for p, s in opt.state.items()}
    shrink(m, opt)
    for p, (shape, cut) in cuts.items():
        for k, v in old[p].items():
            if not isinstance(v, torch.Tensor) or v.numel() == 1: assert opt.state[p][k] is v
            else: assert torch.equal(opt.state[p][k], kept(v, [(a, i) for a, i in cut if v.shape[a] == shape[a]])), k
    for i in range(3, 6): assert torch.isfinite(step(m, opt, i))


@pytest.mark.parametrize('lib', ['torch', 'fastai'])
def test_groups_hyperparameters_and_frozen_state_stay(lib):
    m = net()
    groups = [list(m[0].parameters()), list(m[2:].parameters())]
    if lib == 'torch': opt = optim.Adam([{'params': groups[0], 'lr': .01, 'betas': (.8, .9)}, {'params': groups[1], 'lr': .02}])
    else:
        opt = fo.Adam(groups, lr=.1)
        opt.set_hyper('lr', [.01, .02])
        opt.state[m[0].weight]['do_wd'] = False
        opt.state[m[0].bias]['force_train'] = True
    step(m, opt, 0)
    if lib == 'fastai': opt.freeze_to(1)
    before = snapshot(opt)[2:], [p.requires_grad for p in m.parameters()], getattr(opt, 'frozen_idx', None)
    shrink(m, opt)
    assert before == (snapshot(opt)[2:], [p.requires_grad for p in m.parameters()], getattr(opt, 'frozen_idx', None))
    step(m, opt, 1)
    if lib == 'fastai':
        assert not m[0].weight.requires_grad and m[0].bias.requires_grad
        assert opt.state[m[0].weight]['do_wd'] is False and opt.state[m[0].bias]['force_train'] is True
        opt.unfreeze()
        step(m, opt, 2)
    loaded = fo.Adam(groups, lr=.1) if lib == 'fastai' else optim.Adam([{'params': g} for g in groups])
    loaded.load_state_dict(pickle.loads(pickle.dumps(opt.state_dict())))
    step(m, loaded, 3)


@pytest.mark.parametrize('name', ['adam', 'fastai adam', 'fastai lookahead', 'fastai lookahead wrapper'])
def test_a_failure_changes_nothing(name):
    m = net()
    opt = EXACT[name](list(m.parameters()))
    for i in range(3): step(m, opt, i)
    inner = innermost(opt)
    last, cuts = inner.state[m[4].weight], cuts_of(m)
    for bad, contains in ((torch.zeros(5, 5), r"'odd' of shape \(5, 5\)"), ([torch.zeros(3, 8)], 'a list of tensors'), ({'a': torch.zeros(3, 8)}, 'a dict of tensors'),
                          (torch.zeros(3, 8, dtype=torch.uint8), 'torch.uint8'), (torch.zeros(8), None)):
        last['odd'] = bad
        before = snapshot(opt)
        if contains is None:  # a tensor without the first axis is known
            slice_optimizer_(opt, cuts)()
        else:
            with pytest.raises(ValueError, match=type(inner).__name__ + ' keeps .*' + contains): slice_optimizer_(opt, cuts)
        assert equal(before, snapshot(opt))
    del last['odd']
    before = snapshot(opt)
    undo = slice_optimizer_(opt, cuts)
    assert not equal(before, snapshot(opt))
    undo()
    assert equal(before, snapshot(opt))


def test_refusals():
    m, other = net(), net()
    cuts = cuts_of(m)
    for opt in (optim.Adam(other.parameters()), fo.Adam(list(other.parameters()), lr=.1), fo.Lookahead(fo.OptimWrapper(list(other.parameters()), opt=optim.SGD, lr=.1))):
        with pytest.raises(ValueError, match='none of the 5 parameters.*another model'): slice_optimizer_(opt, cuts)
        slice_optimizer_(opt, {})
    for opt in (optim.LBFGS(m.parameters()), fo.OptimWrapper(opt=optim.LBFGS(m.parameters()))):
        with pytest.raises(ValueError, match='LBFGS.*flat history'): slice_optimizer_(opt, cuts)
    for opt in (None, m, 'adam'):
        with pytest.raises(TypeError, match='optimizer of fastai or torch'): slice_optimizer_(opt, cuts)
    opt = optim.Adam(m.parameters())
    step(m, opt, 0)
    shrink(m, opt, cuts)
    with pytest.raises(ValueError, match='how to slice it is not known'): slice_optimizer_(opt, cuts)  # a second time


@pytest.mark.parametrize('cut, error, contains', [
    ([(2, KEPT1)], ValueError, 'no axis 2'), ([(-3, KEPT1)], ValueError, 'no axis -3'), ([(0, KEPT1), (-2, KEPT1)], ValueError, 'cut twice'),
    ([(0, [0, 1])], TypeError, 'LongTensor.*list'), ([(0, torch.ones(8, dtype=torch.bool))], TypeError, 'LongTensor.*bool'),
    ([(0, KEPT1[None])], TypeError, 'LongTensor'), ([(0, torch.tensor([8]))], ValueError, 'from 8 to 8'), ([(0, torch.tensor([-1]))], ValueError, 'from -1'),
    ([(1, KEPT1), (0, torch.tensor([1, 1]))], ValueError, 'kept twice'),
])
def test_bad_cuts(cut, error, contains):
    p = nn.Parameter(torch.randn(8, 8))
    p.grad, opt = torch.ones(8, 8), optim.Adam([p])
    opt.step()
    before = snapshot(opt), p.detach().clone(), p.grad.clone(), id(p.grad)
    with pytest.raises(error, match=contains): slice_parameter_(p, cut)
    with pytest.raises(error, match=contains): slice_optimizer_(opt, {p: (p.shape, cut)})
    assert equal(before, (snapshot(opt), p.detach(), p.grad, id(p.grad)))


class Factored(optim.Optimizer):
    "Factors as in the Adafactor of transformers and timm: without their axis"
    def __init__(self, params, names): super().__init__(params, dict(lr=.1)), setattr(self, 'names', names)
    def step(self):
        for g in self.param_groups:
            for p in g['params']: self.state[p] = {self.names[0]: p.detach().mean(-1), self.names[1]: p.detach().mean(-2), 'RMS': 1., 'step': 3}


def test_factors_without_an_axis():
    conv, square = nn.Parameter(torch.randn(4, 6, 3, 3)), nn.Parameter(torch.randn(8, 8))
    opt = Factored([conv, square], ('exp_avg_sq_row', 'exp_avg_sq_col'))
    opt.step()
    cuts = {conv: (conv.shape, [(0, torch.tensor([0, 2])), (1, torch.tensor([1, 5]))]), square: (square.shape, [(0, KEPT1), (1, KEPT2[:3])])}
    old = copy.deepcopy([opt.state[p] for p in cuts])
    slice_optimizer_(opt, cuts)
    for (p, (_, cut)), was in zip(cuts.items(), old):
        row, col = kept(was['exp_avg_sq_row'], [(a, k) for a, k in cut if a != p.dim() - 1]), was['exp_avg_sq_col']
        col = kept(col, [(a - (a == p.dim() - 1), k) for a, k in cut if a != p.dim() - 2])
        assert torch.equal(opt.state[p]['exp_avg_sq_row'], row) and torch.equal(opt.state[p]['exp_avg_sq_col'], col)
        assert opt.state[p]['RMS'] == 1. and opt.state[p]['step'] == 3
    opt = Factored([square], ('a', 'b'))  # which is which?
    opt.step()
    with pytest.raises(ValueError, match="Factored keeps 'a' of shape"): slice_optimizer_(opt, {square: cuts[square]})
    slice_optimizer_(opt, {square: (square.shape, [(0, KEPT1), (1, KEPT1)])})  # it does not matter
    assert opt.state[square]['a'].shape == opt.state[square]['b'].shape == (4,)


# --- parameters

def test_the_graph_of_an_earlier_batch():
    m, log = net(), []
    for p in m.parameters():
        p.register_hook(lambda g: log.append(('hook', g.shape)))
        p.register_post_accumulate_grad_hook(lambda p: log.append(('post', p.shape)))
    loss = ((m(batch(0)[0]))**2).mean()
    loss.backward(retain_graph=True)
    plain = copy.deepcopy(m)
    held = (plain(batch(0)[0])**2).mean()  # noqa: F841
    for p, (_, cut) in cuts_of(plain).items(): p.grad, p.data = None, kept(p.data, cut)
    with pytest.raises(RuntimeError, match='expected shape'): (plain(batch(0)[0])**2).mean().backward()  # what is worked around
    for p, (_, cut) in cuts_of(m).items(): slice_parameter_(p, cut)
    log.clear()
    grads = {n: p.grad.clone() for n, p in m.named_parameters()}
    (m(batch(1)[0])**2).mean().backward()
    shapes = sorted(tuple(p.shape) for p in m.parameters())
    for kind in ('hook', 'post'): assert sorted(tuple(s) for k, s in log if k == kind) == shapes
    fresh = copy.deepcopy(m)
    fresh.zero_grad()
    (fresh(batch(1)[0])**2).mean().backward()
    for (n, p), q in zip(m.named_parameters(), fresh.parameters()): torch.testing.assert_close(p.grad, q.grad + grads[n], rtol=0, atol=1e-14)
    before = [p.grad.clone() for p in m.parameters()]
    with pytest.raises(RuntimeError, match='modified by an inplace operation'): loss.backward()
    assert equal(before, [p.grad for p in m.parameters()])


def test_again_and_again_with_every_graph_alive():
    m, graphs = net(), []
    opt = optim.Adam(m.parameters())
    for i in range(4):
        graphs.append(step(m, opt, i))
        keep = torch.arange(len(m[0].bias) - 1)
        cuts = {p: (p.shape, [(a, keep)]) for p, a in ((m[0].weight, 0), (m[0].bias, 0), (m[2].weight, 1))}
        shrink(m, opt, cuts)
    assert m[0].weight.shape == (4, 6) and torch.isfinite(step(m, opt, 9))


def test_rolled_back():
    m = net()
    loss = (m(batch(0)[0])**2).mean()
    loss.backward()
    old = {p: (p.data, p.grad, p.data.clone(), p.grad.clone()) for p in m.parameters()}
    for p, (_, cut) in cuts_of(m).items(): slice_parameter_(p, cut)
    for p, (data, grad, *_) in old.items(): replace_parameter_(p, data, grad)
    for p, (data, grad, data2, grad2) in old.items(): assert torch.equal(p.data, data2) and p.grad is grad and torch.equal(grad, grad2)
    (m(batch(0)[0])**2).mean().backward()
    for p, (*_, grad2) in old.items(): torch.testing.assert_close(p.grad, 2*grad2)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.int8, torch.int64, torch.bool])
def test_dtypes(dtype):
    floats = dtype.is_floating_point or dtype.is_complex
    p = nn.Parameter(torch.arange(8).to(dtype), requires_grad=floats)
    held = (p*2).sum()  # noqa: F841
    slice_parameter_(p, [(0, KEPT1)])
    assert torch.equal(p.data, torch.arange(8).to(dtype)[KEPT1]) and p.dtype == dtype and p.requires_grad == floats
    if floats:
        (p*2).sum().abs().backward()
        assert p.grad.shape == p.shape


def test_frozen():
    m = net()
    for p in m[:3].parameters(): p.requires_grad_(False)
    opt = optim.SGD(m.parameters(), lr=.1, momentum=.9)
    loss = step(m, opt, 0)  # noqa: F841
    shrink(m, opt)
    assert not m[0].weight.requires_grad and m[0].weight.grad is None and m[4].weight.requires_grad
    for p in m.parameters(): p.requires_grad_(True)
    step(m, opt, 1)


def test_some_parameters_are_not_in_the_optimizer():
    m = net()
    opt = optim.Adam(m[4].parameters())
    step(m, opt, 0)
    shrink(m, opt)
    step(m, opt, 1)


@pytest.mark.parametrize('shape, memory_format', [((4, 6, 3, 3), torch.channels_last), ((4, 6, 3, 3, 3), torch.channels_last_3d), ((4, 6, 3, 3), torch.contiguous_format), ((4, 6, 1, 1), torch.channels_last)])
def test_memory_format(shape, memory_format):
    p = nn.Parameter(torch.randn(shape).to(memory_format=memory_format))
    opt, full = optim.Adam([p]), p.detach().clone()
    (p**2).sum().backward()
    opt.step()
    full, grad = p.detach().clone(), p.grad.clone()
    cut = [(0, torch.tensor([0, 3])), (1, torch.tensor([1, 2, 5]))]
    slice_optimizer_(opt, {p: (p.shape, cut)})
    slice_parameter_(p, cut)
    assert p.stride() == torch.empty(2, 3, *shape[2:]).to(memory_format=memory_format).stride()
    for x, whole in ((p.data, full), (p.grad, grad), (opt.state[p]['exp_avg'], grad*.1)):
        assert x.is_contiguous(memory_format=memory_format) and not x._is_view()
        torch.testing.assert_close(x, kept(whole, cut))
        assert x.untyped_storage().nbytes() == x.nbytes


def test_transposed_and_expanded():
    p, q = nn.Parameter(torch.randn(5, 4).t()), nn.Parameter(torch.randn(1, 5).expand(4, 5))
    for x in (p, q):
        whole = x.detach().clone()
        slice_parameter_(x, [(0, torch.tensor([1, 3])), (1, torch.tensor([0, 2, 4]))])
        assert torch.equal(x.data, whole[[1, 3]][:, [0, 2, 4]])
        x.data.add_(1.)
        assert torch.equal(x.data, whole[[1, 3]][:, [0, 2, 4]] + 1)


def test_nothing_to_cut():
    p = nn.Parameter(torch.randn(3))
    data = p.data_ptr()
    slice_parameter_(p, [])
    assert p.data_ptr() == data
    slice_parameter_(p, [(0, torch.tensor([], dtype=torch.long))])
    assert p.shape == (0,)


@pytest.mark.parametrize('cls', [partial(optim.SGD, lr=.1, momentum=.9), optim.SparseAdam, partial(optim.Adagrad, lr=.1)])
def test_sparse_gradients(cls):
    e = nn.Embedding(10, 4, sparse=True)
    opt, x = cls(e.parameters()), torch.tensor([1, 2, 2, 7])
    (e(x)**2).sum().backward()
    opt.step()
    k, rows = torch.tensor([0, 3]), torch.tensor([1, 2, 5, 7])
    whole, grad, state = e.weight.detach().clone(), e.weight.grad.to_dense(), copy.deepcopy(opt.state[e.weight])
    cut = [(1, k), (0, rows)]
    shrink(e, opt, {e.weight: (e.weight.shape, cut)})
    assert e.weight.grad.is_sparse and torch.equal(e.weight.grad.to_dense(), kept(grad, cut)) and torch.equal(e.weight.data, kept(whole, cut))
    for key, v in state.items():
        if isinstance(v, torch.Tensor) and v.numel() > 1: assert torch.equal(opt.state[e.weight][key].to_dense(), kept(v.to_dense(), cut))
    opt.zero_grad()
    (e(torch.tensor([0, 3]))**2).sum().backward()
    opt.step()


def test_tied_weights_stay_tied():
    m = nn.Sequential(nn.Embedding(8, 6), nn.Linear(6, 8, bias=False))
    m[1].weight = m[0].weight
    opt = optim.Adam(m.parameters())
    m(torch.arange(8)).sum().backward()
    opt.step()
    shrink(m, opt, {m[0].weight: (m[0].weight.shape, [(1, torch.tensor([0, 4]))])})
    assert m[0].weight is m[1].weight
    m(torch.arange(8)).sum().backward()
    opt.step()


def test_meta_and_inference():
    p = nn.Parameter(torch.empty(8, device='meta'))
    slice_parameter_(p, [(0, torch.arange(4))])
    assert p.shape == (4,) and p.is_meta
    with torch.inference_mode(): q = nn.Linear(8, 1)
    slice_parameter_(q.weight, [(1, KEPT1)])
    assert q.weight.shape == (1, 4) and q.weight.is_inference() and 'requires_grad' in repr(q.weight)
    with torch.inference_mode(): q(torch.randn(2, 4))
    m = net()
    with torch.inference_mode():
        for p, (_, cut) in cuts_of(m).items(): slice_parameter_(p, cut)
    m(batch(0)[0]).sum().backward()


# --- around the optimizer

def test_grad_scaler():
    m = net().float()
    opt, scaler = optim.SGD(m.parameters(), lr=.1, momentum=.9), torch.amp.GradScaler('cpu', init_scale=2.**10)
    def scaled(i):
        x, y = (t.float() for t in batch(i))
        loss = ((m(x) - y)**2).mean()
        scaler.scale(loss).backward()
        before = m[0].weight.detach().clone()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        return loss, not torch.equal(before, m[0].weight)
    assert scaled(0)[1]
    shrink(m, opt)
    loss, stepped = scaled(1)
    assert stepped and torch.isfinite(loss) and scaler.get_scale() == 2.**10


@pytest.mark.parametrize('use_buffers', [False, True])
def test_averaged_model(use_buffers):
    m = net()
    opt, ema = optim.Adam(m.parameters()), AveragedModel(m, use_buffers=use_buffers)
    for i in range(2):
        step(m, opt, i)
        ema.update_parameters(m)
    old = {n: p.detach().clone() for n, p in ema.module.named_parameters()}
    cuts = {n: cut for (n, p) in m.named_parameters() for q, (_, cut) in cuts_of(m).items() if p is q}
    shrink(m, opt)
    for p, (_, cut) in cuts_of(ema.module).items(): slice_parameter_(p, cut)
    for n, p in ema.module.named_parameters(): assert torch.equal(p.data, kept(old[n], cuts.get(n, [])))
    step(m, opt, 2)
    ema.update_parameters(m)
    for p, q in zip(ema.parameters(), m.parameters()): assert p.shape == q.shape


def test_lookahead_before_its_first_step():
    m = net()
    opt = fo.Lookahead(fo.Adam(list(m.parameters()), lr=.1), k=2)
    shrink(m, opt)
    for i in range(4): step(m, opt, i)
    assert fits(opt)


@pytest.mark.skipif(not hasattr(optim, 'Muon'), reason='torch has no Muon')
def test_muon():
    m = net().float()
    opt = optim.Muon([m[0].weight, m[2].weight], lr=.01)
    def go(): (m(batch(0)[0].float())**2).mean().backward(), opt.step()
    go()
    shrink(m, opt)
    go()
    assert fits(opt) == 2


def test_scheduler_goes_on():
    m = net()
    opt = optim.SGD(m.parameters(), lr=.1, momentum=.9)
    sched = optim.lr_scheduler.OneCycleLR(opt, .1, total_steps=10)
    for i in range(3): step(m, opt, i), sched.step()
    lr = opt.param_groups[0]['lr']
    shrink(m, opt)
    assert opt.param_groups[0]['lr'] == lr
    step(m, opt, 3), sched.step()
