"""Recalibration, least squares and OBS against plain numpy: explicit patches, lstsq row by row, one weight at a time with every inverse computed anew."""
import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fasterai_lib.core.masks import Masks
from fasterai_lib.sparse.compensate import compensate
from fasterai_lib.sparse.lockstep import Lockstep
from fasterai_lib.sparse.recalibrate import recalibrate
from fasterai_lib.sparse.least_squares import Moments, columns, solve_rows
from fasterai_lib.sparse.obs import Budget, obc_columns, obc_rows, sparsegpt_rows
from fasterai_lib.sparse.reconstruct import reconstruct
from fasterai_lib.sparse.sparsegpt import obc, sparsegpt
from fasterai_lib.sparse.sparsifier import Sparsifier

TYPES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def rng(seed=0): return torch.Generator().manual_seed(seed)
def random_masks(model, sparsity=50, granularity='weight', types=TYPES, **kw):
    torch.manual_seed(3)
    return Sparsifier(model, granularity, 'local', 'random', layer_type=types, **kw).plan(sparsity)
def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
def data(*shape, n=60, seed=1, mix=True):
    x = torch.randn(n, *shape, generator=rng(seed), dtype=torch.float64)
    return x + .5*x.roll(1, 1) + .3 if mix else x


def convnet(groups=2, norm=True, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups, bias=not norm), *[nn.BatchNorm2d(6)]*norm, nn.ReLU(), nn.Conv2d(6, 4, (3, 2), dilation=(1, 2), padding='same'),
              nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)]
    return nn.Sequential(*layers).double().eval()


def lstsq_rows(X, Y, keep, free, old=None, damp=0.):
    "[rows, K] and constants: X is [positions, K], Y [positions, rows]; each row alone, damping as further equations"
    W, c = np.zeros(keep.shape), np.zeros(len(keep))
    mean = X.mean(0) if free else np.zeros(X.shape[1])
    Xc, lam = X - mean, 0
    lam = damp*(Xc**2).sum(0).mean()
    for r, k in enumerate(keep):
        y = Y[:, r] - (Y[:, r].mean() if free else 0)
        A, b = np.vstack([Xc[:, k], np.sqrt(lam)*np.eye(k.sum())]), np.concatenate([y, np.sqrt(lam)*(old[r, k] if old is not None else np.zeros(k.sum()))])
        W[r, k] = np.linalg.lstsq(A, b, rcond=None)[0]
        c[r] = Y[:, r].mean() - W[r] @ X.mean(0) if free else 0
    return W, c


# columns

@pytest.mark.parametrize('make,shape', [
    (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), (4, 11)), (lambda: nn.Conv2d(4, 4, (3, 2), padding='same', padding_mode='reflect'), (4, 7, 8)),
    (lambda: nn.Conv2d(6, 6, 3, groups=6, padding=1), (6, 5, 5)), (lambda: nn.Conv3d(2, 3, (1, 2, 3), stride=(1, 2, 1)), (2, 3, 4, 5)), (lambda: nn.Linear(7, 3), (2, 5, 7))])
def test_columns_times_weights_are_the_outputs(make, shape):
    m = make().double()
    x, seen = data(*shape, n=3), []
    for _, _, ((run,),) in Lockstep(m, x, {'weight': m.weight}): seen.append(run.x)
    u = columns(m, seen[0])
    y = m.weight.reshape(len(u), -1, u.shape[1]) @ u + m.bias.view(len(u), -1, 1)
    out = m(x).reshape(-1, m.weight.shape[0]).T if isinstance(m, nn.Linear) else m(x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(y.reshape(out.shape), out)


# recalibrate

def test_statistics_are_those_of_all_values_layer_after_layer():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(), nn.Conv2d(3, 2, 2), nn.BatchNorm2d(2)).double().train()
    x, before = data(2, 6, 6, n=11), copy.deepcopy(net)
    recalibrate(net, list(x.split(4)))
    z = before[0](x).detach().numpy()
    mean, var = z.mean((0, 2, 3)), z.var((0, 2, 3), ddof=1)
    np.testing.assert_allclose(net[1].running_mean, mean); np.testing.assert_allclose(net[1].running_var, var)
    z = (z - mean.reshape(-1, 1, 1))/np.sqrt(var + 1e-5).reshape(-1, 1, 1)
    z = before[4](torch.from_numpy(np.maximum(z, 0))).detach().numpy()
    np.testing.assert_allclose(net[5].running_mean, z.mean((0, 2, 3))); np.testing.assert_allclose(net[5].running_var, z.var((0, 2, 3), ddof=1))
    assert all(m.training for m in net.modules()) and net[1].num_batches_tracked == 0 and net[1].momentum == .1
    for n, p in before.named_parameters(): assert torch.equal(p, dict(net.named_parameters())[n])


def test_only_named_norms_and_the_better_of_two():
    net = convnet()
    net.add_module('bn', nn.BatchNorm1d(5).double())
    x, before = data(4, 8, 8), copy.deepcopy(net)
    assert list(recalibrate(net, x, layers='b*').layer) == ['bn'] and torch.equal(net[1].running_var, before[1].running_var)
    for sign in 1, -1:
        net = copy.deepcopy(before)
        scores = recalibrate(net, x, score=lambda m: sign*float(m[1].running_mean.abs().sum())).attrs['score']
        assert (scores[1] > scores[0]) == (not same(net, before))
    def broken(m, n=[]):
        n.append(1)
        if len(n) > 1: raise KeyError('score')
        return 0
    net = copy.deepcopy(before)
    with pytest.raises(KeyError): recalibrate(net, x, score=broken)
    assert same(net, before)


def test_recalibrate_says_what_is_wrong():
    net, x = convnet(), data(4, 8, 8)
    net.spare = nn.BatchNorm2d(3).double()
    net.forward = lambda x: nn.Sequential(*list(net)[:-1])(x)
    before = copy.deepcopy(net.state_dict())
    for kw, says in ((dict(data=x), 'spare: the batches never reach'), (dict(data=None), 'data is needed'), (dict(data=x*float('nan'), layers='1'), '1: its inputs are NaN'),
                     (dict(data=x, layers='bn'), 'matches no BatchNorm'), (dict(data=x, score=3), 'score must be')):
        with pytest.raises((ValueError, TypeError), match=says): recalibrate(net, **kw)
    with pytest.raises(ValueError, match='no BatchNorm'): recalibrate(nn.Sequential(nn.GroupNorm(2, 4)), x)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values()))


# reconstruct

def conv_oracle(m, x, x0, keep, free, damp):
    "Weights and constants of a convolution by explicit patches, group by group"
    k, g = m.kernel_size, m.groups
    pad = m._reversed_padding_repeated_twice
    u, u0 = (F.unfold(F.pad(t, pad), k, m.dilation, 0, m.stride) for t in (x, x0)) # [n, C k k, places]
    W0 = m.weight.detach().reshape(g, len(m.weight)//g, -1).numpy()
    Ws, cs = [], []
    for i in range(g):
        X, X0 = (t.reshape(len(t), g, -1, t.shape[2])[:, i].permute(0, 2, 1).flatten(0, 1).numpy() for t in (u, u0))
        Y = X0 @ W0[i].T + (0 if m.bias is None else m.bias.detach().view(g, -1)[i].numpy())
        W, c = lstsq_rows(X, Y, keep.reshape(W0.shape)[i], free, W0[i], damp)
        Ws.append(W); cs.append(c)
    return np.stack(Ws).reshape(m.weight.shape), np.concatenate(cs)


@pytest.mark.parametrize('groups,norm,damp', [(1, False, 1e-9), (2, True, .01), (2, False, .3)])
def test_each_layer_is_the_least_squares_fit_on_what_the_pruned_network_sends(groups, norm, damp):
    net, x = convnet(groups, norm), data(4, 8, 8, n=80)
    dense, masks = copy.deepcopy(net), random_masks(net)
    table = reconstruct(net, masks, list(x.split(32)), damp=damp)
    at = x0 = x
    fresh = copy.deepcopy(dense)
    for i, m in enumerate(fresh):
        if isinstance(m, nn.Conv2d):
            keep = masks[f'{i}.weight'].full(m.weight.shape).numpy()
            W, c = conv_oracle(m, at, x0, keep, True, damp) # a constant goes into the bias, or into the norm
            np.testing.assert_allclose(net[i].weight.detach(), W, atol=1e-7)
            m.weight.data.copy_(torch.from_numpy(W))
            if m.bias is not None:
                np.testing.assert_allclose(net[i].bias.detach(), c, atol=1e-7)
                m.bias.data.copy_(torch.from_numpy(c))
        elif isinstance(m, nn.Linear):
            W, c = lstsq_rows(at.numpy(), dense[i](x0).detach().numpy(), masks[f'{i}.weight'].full(m.weight.shape).numpy(), True, dense[i].weight.detach().numpy(), damp)
            np.testing.assert_allclose(net[i].weight.detach(), W, atol=1e-6)
            np.testing.assert_allclose(net[i].bias.detach(), c, atol=1e-6)
            break
        elif isinstance(m, nn.BatchNorm2d):
            m.running_mean, m.running_var = at.mean((0, 2, 3)), at.transpose(0, 1).flatten(1).var(1)
            np.testing.assert_allclose(net[i].running_var, m.running_var)
        with torch.no_grad(): at, x0 = m(at), dense[i](x0)
    assert masks.held(net) and (table.fitted <= table.masked + 1e-12).all()
    target = dense[-1](x0).detach()
    assert abs(table.fitted.iloc[-1] - float((net(x).detach() - target).square().mean(0).sum()/target.var(0, correction=0).sum())) < 1e-6


def test_linear_of_any_leading_dims_and_attention():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double().eval()
    x, before = data(5, 8, n=20), copy.deepcopy(layer)
    masks = Sparsifier(layer, 'weight', 'local', 'random', layer_type=nn.Linear).plan(50)
    table = reconstruct(layer, masks, [x[:7], x[7:]], damp=1e-6)
    assert list(table.layer) == ['self_attn.out_proj', 'linear1', 'linear2']
    assert masks.held(layer) and not same(layer, before)
    def out(m): return m(x).detach()
    masked = masks.apply(copy.deepcopy(before))
    assert (out(layer) - out(before)).square().sum() < (out(masked) - out(before)).square().sum()


def test_a_shared_layer_sees_all_of_its_inputs():
    torch.manual_seed(0)
    a = nn.Linear(6, 6).double()
    net, x = nn.Sequential(a, nn.Tanh(), a).eval(), data(6)
    masks, dense = random_masks(net, types=nn.Linear), copy.deepcopy(a)
    reconstruct(net, masks, x, damp=0)
    keep = masks['0.weight'].full((6, 6)).numpy()
    with torch.no_grad():
        masked = copy.deepcopy(dense)
        masked.weight.mul_(torch.from_numpy(keep))
        X, X0 = torch.cat([x, masked(x).tanh()]), torch.cat([x, dense(x).tanh()])
        W, c = lstsq_rows(X.numpy(), dense(X0).numpy(), keep, True)
    np.testing.assert_allclose(a.weight.detach(), W, atol=1e-8); np.testing.assert_allclose(a.bias.detach(), c, atol=1e-8)


@pytest.mark.parametrize('granularity', ['weight', 'filter', 'shared_kernel', 'kernel'])
def test_batch_size_makes_no_difference_and_dead_is_dead(granularity):
    x, results = data(4, 8, 8, n=30), []
    for size in 30, 7, 1:
        net = convnet(groups=1, norm=True)
        masks = random_masks(net, 50, granularity, nn.Conv2d)
        reconstruct(net, masks, list(x.split(size)))
        assert masks.held(net)
        results.append(net.state_dict())
    for other in results[1:]:
        for k, v in results[0].items(): torch.testing.assert_close(other[k], v, atol=1e-8, rtol=1e-6)


def test_layers_without_a_mask_can_be_fitted_too_and_norms_left_alone():
    net, x = convnet(), data(4, 8, 8)
    before, masks = copy.deepcopy(net), random_masks(net, types=nn.Conv2d)
    assert list(reconstruct(net, masks, x, layers='*').layer) == ['0', '3', '6']
    assert not torch.equal(net[6].weight, before[6].weight) and not torch.equal(net[1].running_mean, before[1].running_mean)
    net = copy.deepcopy(before)
    assert list(reconstruct(net, masks, x, layers='3', norms=False).layer) == ['3']
    assert torch.equal(net[0].weight, masks.apply(copy.deepcopy(before))[0].weight) and torch.equal(net[1].running_mean, before[1].running_mean) and torch.equal(net[6].weight, before[6].weight)


def test_after_an_error_the_model_is_as_it_was():
    net, x = convnet(), data(4, 8, 8)
    net.spare = nn.Linear(3, 3).double()
    net.forward = lambda x: nn.Sequential(*list(net)[:-1])(x)
    before, masks = copy.deepcopy(net.state_dict()), random_masks(net)
    bad = x.clone(); bad[5, 0, 0, 0] = float('nan')
    for f, kw, says in ((reconstruct, dict(data=x), 'spare.weight: the batches never reach'), (reconstruct, dict(data=None), 'data is needed'), (reconstruct, dict(data=[x, bad], layers='[036]'), '0.weight: its inputs are NaN'),
                        (reconstruct, dict(data=x, layers='4x'), 'matches no Linear'), (reconstruct, dict(data=x, damp=-1.), 'damp must be'), (reconstruct, dict(data=x[:3], layers='[036]', damp=0), 'use a larger damp'),
                        (reconstruct, dict(data=x, layers='0', norms='zz'), 'matches no BatchNorm'), (reconstruct, dict(data=[x[:, :3]], layers='0'), 'channels')):
        with pytest.raises((ValueError, RuntimeError), match=says): f(net, masks, **kw)
    for f in sparsegpt, obc:
        for kw, says in ((dict(data=x), 'never reach'), (dict(data=[x, bad], exclude='spare'), 'NaN'), (dict(data=None, exclude='spare'), 'data is needed'), (dict(data=x, context='global'), 'none can compete'),
                         (dict(data=x, context='2:4', exclude='spare'), 'which 4 does not divide')):
            with pytest.raises(ValueError, match=says): f(net, 50, **kw)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values()))
    deconv = nn.Sequential(nn.ConvTranspose2d(3, 4, 3))
    with pytest.raises(ValueError, match='only Linear and Conv'): reconstruct(deconv, random_masks(deconv, types=nn.ConvTranspose2d), torch.randn(2, 3, 5, 5))


def test_rows_of_one_mask_are_solved_as_rows_alone():
    X, Y = data(12).numpy(), data(9, seed=2).numpy()
    H, G = (torch.from_numpy(a) for a in (X.T @ X/60, Y.T @ X/60))
    shared = (torch.rand(3, 12, generator=rng()) > .4).repeat_interleave(3, 0)
    shared[0] = False
    for keep in shared, torch.rand(9, 12, generator=rng(5)) > .4:
        W, _ = lstsq_rows(X, Y, keep.numpy(), False)
        np.testing.assert_allclose(solve_rows(H, G, keep, torch.zeros(9, 12), 0), W, atol=1e-9)


# choosing

def lost(H, w, keep): # of a row: what remains when the kept weights are fitted, every inverse computed anew
    k = np.flatnonzero(keep)
    v = np.zeros_like(w)
    if len(k): v[k] = np.linalg.solve(H[np.ix_(k, k)], H[k] @ w)
    return (w - v) @ H @ (w - v)


def brute_obc(w, H, budget):
    "One weight at a time: each that could go is tried"
    keep, c = np.ones(w.shape, bool), budget.context
    total = c.m and (c.m - c.n)*w.size//c.m or budget.remove
    for _ in range(total):
        trials = []
        for r, p in itertools.product(*map(range, w.shape)):
            if not keep[r, p] or c.m and (~keep[r].reshape(-1, c.m)[p//c.m]).sum() >= c.m - c.n or c.name == 'per_row' and (~keep[r]).sum() >= budget.per_row[r]: continue
            k = keep[r].copy(); k[p] = False
            trials.append((lost(H, w[r], k) - lost(H, w[r], keep[r]), r, p))
        keep[min(trials)[1:]] = False
    return keep


@pytest.mark.parametrize('context', ['local', 'per_row', '2:4', '1:4'])
def test_obc_is_brute_force(context):
    X, w = data(8), torch.randn(5, 8, generator=rng(4), dtype=torch.float64)
    H, budget = X.T @ X/60, Budget(5, 8, 23, context)
    keep = obc_rows(w, H, budget)
    assert (keep.numpy() == brute_obc(w.numpy(), H.numpy(), budget)).all()
    assert int((~keep).sum()) == {'2:4': 20, '1:4': 30}.get(context, 23)
    quick = obc_rows(w, H, budget, rounds=6)
    assert (~quick).sum() == (~keep).sum() and (context != 'per_row' or torch.equal((~quick).sum(1), budget.per_row))


def test_obc_columns_is_brute_force():
    X, w = data(12), torch.randn(2, 3, 12, generator=rng(4), dtype=torch.float64)
    H, of = torch.stack([X.T @ X/60, (X**3).T @ X**3/60]), torch.arange(12) % 6
    keep = obc_columns(w, H, of, 7).numpy()
    want = np.ones((2, 6), bool)
    cost = lambda g, k: sum(lost(H[g].numpy(), r, k[of.numpy()]) for r in w[g].numpy())
    for _ in range(7):
        trials = []
        for g, p in itertools.product(range(2), range(6)):
            if want[g, p]:
                k = want[g].copy(); k[p] = False
                trials.append((cost(g, k) - cost(g, want[g]), g, p))
        want[min(trials)[1:]] = False
    assert (keep == want).all()


@pytest.mark.parametrize('context,blocksize', [('local', 8), ('local', 3), ('per_row', 4), ('2:4', 8), ('2:4', 3)])
def test_sparsegpt_is_naive_obs_from_left_to_right(context, blocksize):
    X, w = data(8), torch.randn(1, 5, 8, generator=rng(4), dtype=torch.float64)
    H, budget = X.T @ X/60, Budget(5, 8, 23, context)
    new, keep = sparsegpt_rows(w, H[None], budget, blocksize, damp=.05)
    A, v, k = H.numpy() + .05*H.diagonal().mean().numpy()*np.eye(8), w[0].numpy().copy(), keep[0].numpy()
    scores = np.zeros((5, 8))
    size = -(-blocksize//4)*4 if context == '2:4' else blocksize
    for j in range(8):
        inverses = [np.linalg.inv(A[i:, i:]) for i in range(8)]
        if context == '2:4' and j % 4 == 0: scores[:, j:j+4] = np.stack([v[:, i]**2/inverses[i][0, 0] for i in range(j, j + 4)], 1)
        elif context != '2:4' and j % size == 0: scores[:, j:j+size] = np.stack([v[:, i]**2/inverses[i][0, 0] for i in range(j, min(j + size, 8))], 1)
        for r in range(5):
            if not k[r, j]: v[r, j:] -= v[r, j]/inverses[j][0, 0]*inverses[j][0]
    np.testing.assert_allclose(new[0], v*k, atol=1e-10)
    for a in range(0, 8, size if context != '2:4' else 4): # those that went are the lowest of those that compete
        s, kk = scores[:, a:a + (size if context != '2:4' else 4)], k[:, a:a + (size if context != '2:4' else 4)]
        for rows in [slice(None)] if context == 'local' else [slice(r, r + 1) for r in range(5)]:
            if kk[rows].any() and not kk[rows].all(): assert s[rows][~kk[rows]].max() <= s[rows][kk[rows]].min()


@pytest.mark.parametrize('f', [sparsegpt, obc, lambda *a, **k: obc(*a, rounds=3, **k)], ids=['sparsegpt', 'obc', 'obc by rounds'])
@pytest.mark.parametrize('context,sparsity', [('local', 37), ('per_row', 61), ('local', 100), ('local', 0), ('2:4', 50), ('local', {'0': 20, '3': 90})])
def test_exactly_as_many_as_asked(f, context, sparsity):
    net = convnet(groups=1) if context == '2:4' else convnet()
    x, before = data(4, 8, 8, n=20), copy.deepcopy(net)
    kw = dict(exclude='3') if context == '2:4' else {}
    masks = f(net, sparsity, list(x.split(9)), context=context, **kw)
    wanted = Sparsifier(before, 'weight', context, 'large_final', layer_type=TYPES, **kw).plan(sparsity).report().set_index('parameter')
    got = masks.report().set_index('parameter')
    assert got.kept_units.to_dict() == wanted.kept_units.to_dict()
    assert masks.held(net) and isinstance(masks, Masks) and all(torch.isfinite(p).all() for p in net.parameters())
    for n, p in net.named_parameters():
        if n in masks and not masks[n].follows and masks[n].keep.any(): assert int((p == 0).sum()) == masks[n].dead(), n
    if context == '2:4': assert (masks['0.weight'].full((6, 4, 3, 3)).view(6, 1, 4, 9).sum(2) == 2).all()


@pytest.mark.parametrize('granularity,types', [('column', nn.Linear), ('row', nn.Linear), ('filter', nn.Conv2d), ('shared_kernel', nn.Conv2d), ('shared_weight', nn.Conv2d)])
def test_structured_choice(granularity, types):
    net, x = convnet(), data(4, 8, 8)
    dense = copy.deepcopy(net)
    masks = obc(net, 50, x, granularity, layer_type=types)
    wanted = Sparsifier(dense, granularity, 'local', 'large_final', layer_type=types).plan(50)
    assert masks.report().equals(wanted.report()) and masks.held(net)
    fitted = copy.deepcopy(dense)
    reconstruct(fitted, wanted, x)
    error = lambda m: float((m(x) - dense(x)).detach().square().mean())
    assert error(net) < 1.5*error(fitted)


def test_each_layer_sees_the_pruned_or_the_dense_network():
    x = data(4, 8, 8)
    nets = [convnet(norm=False) for _ in range(3)]
    for net, kw in zip(nets, (dict(), dict(sequential=False), dict(dense=True))): sparsegpt(net, 60, x, **kw)
    assert torch.equal(nets[0][0].weight, nets[1][0].weight) and not torch.equal(nets[0][2].weight, nets[1][2].weight) and not torch.equal(nets[0][2].weight, nets[2][2].weight)


# compensate

def test_means_of_dead_units_go_into_the_next_bias_or_running_mean():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Sigmoid(), nn.Conv2d(6, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(80, 2)).double().eval()
    x, dense = data(3, 4, 4), copy.deepcopy(net)
    masks = random_masks(net, 50, 'shared_kernel', nn.Conv2d, exclude='0')
    table = compensate(net, masks, list(x.split(25)))
    gone = ~masks['2.weight'].full((5, 6, 3, 3))
    z = F.conv2d(dense[:2](x), dense[2].weight*gone, padding=1).mean((0, 2, 3)).detach() # what is missing, on average
    torch.testing.assert_close(net[3].running_mean, dense[3].running_mean - z)
    assert table.into.tolist()[0] == '3.running_mean' and masks.held(net) and torch.equal(net[0].weight, dense[0].weight)
    assert torch.equal(net[6].weight, dense[6].weight) and torch.equal(net[3].running_var, dense[3].running_var)
    torch.testing.assert_close(net(x).mean(0), dense(x).mean(0)) # the last bias corrects what the nonlinearity made of it

    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x, dense, masks = data(6), copy.deepcopy(net), random_masks(net, 50, 'row', nn.Linear, exclude='2')
    dead = ~masks['0.bias'].keep
    compensate(net, masks, x)
    torch.testing.assert_close(net[2].bias, dense[2].bias + dense[2].weight[:, dead] @ dense[:2](x)[:, dead].mean(0))
    assert (net[0].bias[dead] == 0).all()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match='NaN'): compensate(net, masks, x*float('nan'))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values()))


# what the shortcut around a layer has lost

class Around(nn.Module):
    "Residual blocks of all sorts: a sum after a norm, in place, swapped, of a bare layer, with dropout; and one whose shortcut is computed late"
    def __init__(self, how, norm=True, late=False):
        super().__init__()
        self.stem, self.body, self.norm, self.head, self.how, self.late = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1, bias=not norm), nn.BatchNorm2d(6) if norm else nn.Identity(), nn.Linear(6, 4), how, late
    def forward(self, x):
        x = self.stem(x).relu()
        y = F.dropout(self.norm(self.body(x)), .3, self.training)
        if self.late: x = x*1
        y = self.how(y, x)
        return self.head(y.relu().mean((2, 3)))

def in_place(y, x):
    y += x
    return y
SUMS = {'y + x': lambda y, x: y + x, 'x + y': lambda y, x: x + y, 'y += x': in_place, 'add': lambda y, x: torch.add(y, other=x), 'add_': lambda y, x: y.add_(x)}

@pytest.mark.parametrize('norm', [True, False])
@pytest.mark.parametrize('how', SUMS)
def test_a_branch_makes_up_for_what_its_shortcut_has_lost(how, norm):
    torch.manual_seed(0)
    net, x = Around(SUMS[how], norm).double().eval(), data(3, 8, 8, n=70)
    if norm:
        net.norm.weight.data.copy_(torch.tensor([0., -1., 2., .5, -.3, 1.])); nn.init.normal_(net.norm.bias); net.norm.running_var.uniform_(.5, 2.); net.norm.running_mean.normal_() # the first can bring nothing
    dense, masks, apart = copy.deepcopy(net), random_masks(net, types=nn.Conv2d), copy.deepcopy(net)
    reconstruct(net, masks, list(x.split(32)))
    reconstruct(apart, masks, list(x.split(32)), shortcuts=False)
    np.testing.assert_array_equal(net.stem.weight.detach(), apart.stem.weight.detach()) # nothing goes around it
    with torch.no_grad(): h0, h = dense.stem(x).relu(), net.stem(x).relu()
    keep = masks['body.weight'].full(net.body.weight.shape).numpy()
    for m, lost in ((apart, torch.zeros_like(h)), (net, h0 - h)):
        with torch.no_grad():
            gain = (dense.norm.weight/(dense.norm.running_var + dense.norm.eps).sqrt()).numpy() if norm else np.ones(6)
            per = gain/(gain**2 + 1e-4*np.abs(gain).max()**2) if norm else gain
            Y = (dense.body(h0).numpy() + lost.numpy()*per[:, None, None]).transpose(0, 2, 3, 1).reshape(-1, 6)
        X = F.unfold(h, 3, padding=1).permute(0, 2, 1).flatten(0, 1).numpy()
        W, c = lstsq_rows(X, Y, keep.reshape(6, -1), True, dense.body.weight.detach().reshape(6, -1).numpy(), .01)
        np.testing.assert_allclose(m.body.weight.detach().reshape(6, -1), W, atol=1e-8)
        if not norm: np.testing.assert_allclose(m.body.bias.detach(), c, atol=1e-8)
    def sums(m): # what the block sends on
        with torch.no_grad(): h = m.stem(x).relu(); return m.norm(m.body(h)) + h
    if not norm: assert (sums(net) - sums(dense)).square().mean() < .99*(sums(apart) - sums(dense)).square().mean()

def test_a_shortcut_that_is_not_known_yet_is_left_alone():
    torch.manual_seed(0)
    net, x = Around(SUMS['y + x'], late=True).double().eval(), data(3, 8, 8, n=40)
    apart, masks = copy.deepcopy(net), random_masks(net, types=nn.Conv2d)
    for m, on in ((net, True), (apart, False)): reconstruct(m, masks, x, shortcuts=on)
    assert same(net, apart)

def without_first(y, x):
    y[:, 0] = 0
    return y + x

@pytest.mark.parametrize('how', [lambda y, x: torch.add(y, x, alpha=2), lambda y, x: y*x, lambda y, x: y + x[:, :1], lambda y, x: y.relu() + x, lambda y, x: y.relu_() + x, lambda y, x: F.relu(y, inplace=True) + x, without_first])
def test_only_plain_sums_count(how):
    torch.manual_seed(0)
    net, x = Around(how).double().eval(), data(3, 8, 8, n=40)
    apart, masks = copy.deepcopy(net), random_masks(net, types=nn.Conv2d)
    for m, on in ((net, True), (apart, False)): reconstruct(m, masks, x, shortcuts=on)
    assert same(net, apart)

@pytest.mark.parametrize('sums', [1, 2])
def test_a_layer_in_two_places_has_no_one_shortcut(sums):
    class Twice(Around):
        def forward(self, x):
            x = self.stem(x).relu()
            x = self.body(x).relu() + (x if sums == 2 else 0)
            return self.head((x + self.body(x)).mean((2, 3)))
    torch.manual_seed(0)
    net, x = Twice(None, norm=False).double().eval(), data(3, 8, 8, n=40)
    apart, masks = copy.deepcopy(net), random_masks(net, types=nn.Conv2d)
    for m, on in ((net, True), (apart, False)): reconstruct(m, masks, x, shortcuts=on)
    assert same(net, apart)

def test_the_same_positions_of_inputs_and_of_what_is_lost():
    torch.manual_seed(0)
    layer, x, lost = nn.Conv2d(3, 4, 3, padding=1).double(), data(3, 5, 5, n=20), torch.randn(20, 4, 5, 5, dtype=torch.float64)
    u = columns(layer, x)
    exact = nn.Parameter(torch.randn(4, 27, dtype=torch.float64))
    lost = (exact.detach() @ u[0]).reshape(4, 20, 5, 5).transpose(0, 1)
    m = Moments(layer, positions=5)
    m.add(x, None, lost)
    assert m.n == 100
    H, G, _ = m.system(True)
    torch.testing.assert_close(torch.linalg.solve(H[0], G[0].mT).mT, layer.weight.detach().reshape(4, 27) + exact.detach())

@pytest.mark.parametrize('f', [sparsegpt, obc])
def test_choice_and_fit_know_of_the_shortcut(f):
    torch.manual_seed(0)
    net, x, kw = Around(SUMS['x + y'], norm=False).double().eval(), data(3, 8, 8, n=70), dict(rounds=2) if f is obc else dict(dense=True)
    dense, apart, parts = copy.deepcopy(net), copy.deepcopy(net), copy.deepcopy(net)
    for m, on in ((net, True), (apart, False)): f(m, 60, x, layer_type=nn.Conv2d, shortcuts=on, **kw)
    f(parts, 60, list(x.split(16)), layer_type=nn.Conv2d, **kw)
    for a, b in zip(net.parameters(), parts.parameters()): torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-6)
    def sums(m):
        with torch.no_grad(): h = m.stem(x).relu(); return m.body(h) + h
    assert (sums(net) - sums(dense)).square().mean() < (sums(apart) - sums(dense)).square().mean()

def test_attention_and_its_shortcuts():
    torch.manual_seed(0)
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True).double().eval(), data(5, 8, n=40)
    dense, apart = copy.deepcopy(layer), copy.deepcopy(layer)
    masks = Sparsifier(layer, 'weight', 'local', 'random', layer_type=nn.Linear).plan(60)
    for m, on in ((layer, True), (apart, False)): reconstruct(m, masks, [x[:7], x[7:]], shortcuts=on)
    assert torch.equal(layer.self_attn.out_proj.weight, apart.self_attn.out_proj.weight) # the model's own input goes around it: nothing is lost
    assert (layer(x) - dense(x)).square().mean() < (apart(x) - dense(x)).square().mean()

def test_a_norm_of_zeros_brings_nothing():
    torch.manual_seed(0)
    net, x = Around(SUMS['x + y']).double().eval(), data(3, 8, 8, n=40)
    nn.init.zeros_(net.norm.weight)
    reconstruct(net, random_masks(net, types=nn.Conv2d), x)
    assert all(torch.isfinite(p).all() for p in net.state_dict().values())
