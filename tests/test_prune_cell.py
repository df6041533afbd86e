"""PruneCell: what every mode and filler masks, against plain numpy; that it trains, stops, resumes and leaves; and what INI files may say."""
import copy
import math
import pickle
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import *
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.learner import *
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import OptimWrapper
from fastcore.basics import noop
from torch import nn
from torch.nn import functional as F

from fasterai_lib.all import Masks, PruneCell, PruneCellCallback, SparsityReport, attach, detach, get_current_threshold, get_pruned_masks, read_ini, write_ini
from fasterai_lib.sparse.prune_cell import PruneCells

pytestmark = pytest.mark.filterwarnings('ignore:.*pin_memory')


@pytest.fixture(autouse=True)
def seeded():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)


# --- oracles, in numpy and exact fractions

def ceil(theta, n): return math.ceil(Fraction(str(theta))*n)
def asked(cell, u): return {'Identity': Fraction(0), 'Static': Fraction(str(cell.threshold))}.get(cell.prune_mode) if cell.prune_mode != 'Gradual' else \
    min(Fraction(str(cell.threshold)), Fraction(str(cell.start)) + u*Fraction(str(cell.gamma)))
def lowest(w, m): return set(sorted(range(w.size), key=lambda i: (abs(float(w.flat[i])), i))[:m])  # sorted, ties by index


def band(w, theta, delta):  # N2D2's own loop: widen by delta until enough are inside
    a, k = np.abs(w), 0
    while k == 0 or (a <= a.dtype.type(k*delta)).sum() < math.ceil(theta*w.size): k += 1
    return a > a.dtype.type(k*delta)


def conv_net(): return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
def dense(m): return m.parametrizations.weight.original
def masked(t): return int((~t).sum())
def rng(): return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


# --- what is masked

@pytest.mark.parametrize('n', [1, 7, 100, 432])
@pytest.mark.parametrize('theta', [0., .07, .2, .29, 1/3, .5, .999, 1.])
@pytest.mark.parametrize('filler', ['Random', 'IterNonStruct'])
def test_static_masks_exactly_as_many(filler, theta, n):
    w, before = torch.randn(n), rng()
    keep = PruneCell('Static', filler, threshold=theta).fill(w)
    assert masked(keep) == ceil(theta, n) and rng() == before
    if filler == 'IterNonStruct': assert set((~keep).nonzero().flatten().tolist()) == lowest(w.numpy(), ceil(theta, n))


@pytest.mark.parametrize('make', [lambda: torch.zeros(4, 5), lambda: torch.randint(-2, 3, (6, 6)).float(), lambda: torch.randn(3, 4, 3, 3).to(memory_format=torch.channels_last),
                                  lambda: torch.randn(8, 5).t(), lambda: torch.randn(30, dtype=torch.float64), lambda: torch.randn(31).half(), lambda: torch.randn(33).bfloat16()])
def test_lowest_with_ties_strides_and_types(make):
    w = make()
    keep = PruneCell('Static', 'IterNonStruct', threshold=.4).fill(w)
    assert set((~keep).flatten().nonzero().flatten().tolist()) == lowest(w.double().contiguous().numpy(), ceil(.4, w.numel())) and keep.shape == w.shape


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('delta', [.001, .0037, .1, 1e-5])
@pytest.mark.parametrize('theta', [.01, .2, .5])
def test_delta_band_is_n2d2s_loop(theta, delta, dtype):
    for scale in (.001, .02):
        w = scale*torch.randn(500, dtype=dtype)
        if delta >= .001: w[:200] = (delta*torch.randint(0, 5, (200,), dtype=torch.float64)).to(dtype)  # on the edges of bands
        keep = PruneCell('Static', 'IterNonStruct', threshold=theta, delta=delta, exact=False).fill(w)
        assert (keep.numpy() == band(w.numpy(), theta, delta)).all()


def test_delta_band_overshoots_as_theirs_does():
    w = .001*torch.randn(100_000)
    got = {exact: masked(PruneCell('Static', 'IterNonStruct', threshold=.2, exact=exact).fill(w))/100_000 for exact in (True, False)}
    assert got[True] == .2 and got[False] == pytest.approx(.6827, abs=.01)  # a normal distribution within one standard deviation


def test_delta_band_is_computed_at_once():
    assert masked(PruneCell('Static', 'IterNonStruct', threshold=.5, delta=1e-30, exact=False).fill(torch.randn(100))) == 50  # 1e30 bands


def test_identity_masks_nothing():
    net = nn.Linear(5, 3)
    nn.init.zeros_(net.weight)
    attach(net, {'': PruneCell()})
    assert get_pruned_masks(net)[''].all() and get_current_threshold(net) == {'': 0}


@pytest.mark.parametrize('filler', ['Random', 'IterNonStruct'])
@pytest.mark.parametrize('kw', [dict(threshold=.3), dict(threshold=.5, start=.05, gamma=.2), dict(threshold=.1), dict(threshold=.9, start=0., gamma=.3)])
def test_gradual_step_by_step(filler, kw):
    net, cell = nn.Linear(23, 17), PruneCell('Gradual', filler, stepsize='3 steps', **kw)
    handle = attach(net, {'': cell})
    before, n = get_pruned_masks(net)[''], net.weight.numel()
    for step in range(1, 3*cell.updates + 8):
        with torch.no_grad(): dense(net).add_(.1*torch.randn_like(dense(net)))
        w = dense(net).detach().numpy()
        changed = handle.step()
        keep, u = get_pruned_masks(net)[''], min(step//3, cell.updates)
        assert masked(keep) == math.ceil(asked(cell, u)*n) and get_current_threshold(net)[''] == pytest.approx(float(asked(cell, u)))
        assert changed == (step % 3 == 0 and step//3 <= cell.updates)  # at the threshold the mask freezes
        if not changed: assert torch.equal(keep, before)
        elif filler == 'Random': assert not (keep & ~before).any()  # only ever adds
        else: assert set((~keep).flatten().nonzero().flatten().tolist()) == lowest(w, masked(keep))  # ranked anew
        before = keep
    assert get_current_threshold(net)[''] == cell.threshold and cell.asked(cell.updates - 1) < cell.threshold or not cell.updates


def test_random_is_uniform_seeded_and_different_in_each_layer():
    cell, w = PruneCell('Static', threshold=.25), torch.randn(40)
    counts = sum((~PruneCell('Static', threshold=.25, seed=s).fill(w)).int() for s in range(2000))
    assert ((counts - 500).abs() < 5*math.sqrt(2000*.25*.75)).all()
    assert torch.equal(cell.fill(w, name='a'), cell.fill(w, name='a')) and not torch.equal(cell.fill(w, name='a'), cell.fill(w, name='b'))
    net = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))
    attach(net, {'*': cell})
    a, b = get_pruned_masks(net).values()
    assert masked(a) == masked(b) == 21 and not torch.equal(a, b)


# --- in a model

layers = dict(conv1d=lambda: nn.Conv1d(2, 4, 3), grouped=lambda: nn.Conv2d(4, 8, 3, groups=2), conv3d=lambda: nn.Conv3d(2, 3, 2), transposed=lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
              linear=lambda: nn.Linear(6, 5), bilinear=lambda: nn.Bilinear(3, 4, 2), embedding=lambda: nn.Embedding(9, 4), bag=lambda: nn.EmbeddingBag(9, 4), lstm=lambda: nn.LSTM(5, 4, 2, bidirectional=True),
              gru=lambda: nn.GRU(5, 4), rnn=lambda: nn.RNN(5, 4), cell=lambda: nn.LSTMCell(5, 4), attention=lambda: nn.MultiheadAttention(8, 2), kdim=lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=6))
inputs = dict(conv1d=(2, 2, 7), grouped=(2, 4, 5, 5), conv3d=(2, 2, 3, 3, 3), transposed=(2, 4, 5, 5), linear=(3, 6), lstm=(3, 2, 5), gru=(3, 2, 5), rnn=(3, 2, 5), cell=(3, 5))


def run(kind, m):
    g = torch.Generator().manual_seed(1)
    if kind == 'bilinear': return m(torch.randn(2, 3, generator=g), torch.randn(2, 4, generator=g))
    if kind in ('embedding', 'bag'): return m(torch.tensor([[1, 2, 8], [0, 1, 1]]))
    if kind in ('attention', 'kdim'): return m(*(torch.randn(3, 2, d, generator=g) for d in ((8, 8, 8) if kind == 'attention' else (8, 4, 6))))[0]
    out = m(torch.randn(inputs[kind], generator=g))
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize('kind', layers)
def test_every_layer(kind):
    "Runs with W*M, masks the gradient of W and nothing else, and comes out as it went in"
    net = layers[kind]()
    plain, twin, order = copy.deepcopy(net), copy.deepcopy(net), list(net.state_dict())
    params = {n: p for n, p in net.named_parameters()}
    weights = [n for n in params if 'weight' in n]
    handle = attach(net, {'': PruneCell('Static', threshold=.4)})
    masks = handle.masks
    assert set(masks.masks) == set(weights) and all(masks[n].dead() == ceil(.4, params[n].numel()) for n in weights)
    with torch.no_grad():
        for n, p in twin.named_parameters():
            if n in weights: p.mul_(masks[n].full(p.shape))
    for mode in (True, False):
        net.train(mode), twin.train(mode)
        torch.testing.assert_close(run(kind, net), run(kind, twin))
    copied = copy.deepcopy(net)  # also after a run
    net.train(), twin.train()
    run(kind, net).square().sum().backward(); run(kind, twin).square().sum().backward()
    for n, p in twin.named_parameters():
        torch.testing.assert_close(params[n].grad, p.grad*masks[n].full(p.shape) if n in weights else p.grad)
    assert all(torch.equal(params[n], p) for n, p in plain.named_parameters())  # dense underneath
    assert detach(copied, keep_dense=True) is copied and all(torch.equal(a, b) for a, b in zip(copied.state_dict().values(), plain.state_dict().values()))
    detach(net)
    assert list(net.state_dict()) == order == list(plain.state_dict()) and [id(p) for p in net.parameters()] == [id(p) for p in params.values()]
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters())) and masks.held(net)
    torch.testing.assert_close(run(kind, net), run(kind, twin))
    pickle.dumps(net)


def test_transformer_layer_in_eval_mode():
    "Its fast path reads the weights of its parts itself"
    net, x = nn.TransformerEncoderLayer(8, 2, 16, dropout=0., batch_first=True), torch.randn(2, 3, 8)
    attach(net, {'*': PruneCell('Static', threshold=.5)})
    a = net(x)
    net.eval()
    with torch.no_grad(): b = net(x)
    detach(net)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(net(x), b)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.out = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.out.weight = self.emb.weight
    def forward(self, x): return self.out(self.emb(x))


def test_tied_weights_have_one_mask():
    net = Tied()
    w = net.emb.weight
    with pytest.raises(ValueError, match="the weights of 'out' belong to 'emb'"): attach(net, {'out': PruneCell()})
    attach(net, {'emb': PruneCell('Static', threshold=.5)})
    assert torch.equal(net.emb.weight, net.out.weight) and masked(net.out.weight != 0) == 12 and dense(net.out) is dense(net.emb) is w
    detach(net)
    assert net.emb.weight is net.out.weight is w and list(net.state_dict()) == ['emb.weight', 'out.weight']


@pytest.mark.parametrize('first', [True, False])
@pytest.mark.parametrize('make', [lambda ps: torch.optim.SGD(ps, .1, momentum=.9, weight_decay=.01), lambda ps: torch.optim.Adam(ps, .01)])
def test_optimizer_before_or_after(make, first):
    "Both train the dense parameter; by hand: the gradient of W*M, masked, for an optimizer of plain tensors"
    net, x, y = nn.Linear(6, 3), torch.randn(20, 6), torch.randn(20, 3)
    opt = make(net.parameters()) if first else None
    attach(net, {'': PruneCell('Static', threshold=.5)})
    opt = opt or make(net.parameters())
    keep, w, b = get_pruned_masks(net)[''], dense(net).detach().clone().requires_grad_(), net.bias.detach().clone().requires_grad_()
    ref = make([w, b])
    for _ in range(5):
        opt.zero_grad(); F.mse_loss(net(x), y).backward(); opt.step()
        ref.zero_grad()
        wm = (w*keep).detach().requires_grad_()
        F.mse_loss(x@wm.t() + b, y).backward()
        w.grad = wm.grad*keep
        ref.step()
    torch.testing.assert_close(dense(net), w)
    torch.testing.assert_close(net.bias, b)
    assert not net.weight[~keep].any() and dense(net)[~keep].all()


def test_a_masked_weight_of_any_value_gives_no_gradient():
    net = nn.Linear(4, 2)
    attach(net, {'': PruneCell('Static', threshold=.5)})
    with torch.no_grad(): dense(net)[~get_pruned_masks(net)['']] = float('nan')
    out = net(torch.randn(3, 4))
    out.sum().backward()
    assert out.isfinite().all() and not dense(net).grad[~get_pruned_masks(net)['']].any()


def test_names_globs_and_shared_cells():
    net, cell = conv_net(), PruneCell('Static', threshold=.25)
    handle = attach(net, {'*': cell, '2': PruneCell('Static', 'IterNonStruct', threshold=.5), '[6]': PruneCell('Static', threshold=.25)})
    df = handle.report().set_index('weight')
    assert df.masked.to_dict() == {'0.weight': 9, '2.weight': 144, '6.weight': 8} and df.achieved.to_dict() == {'0.weight': .25, '2.weight': .5, '6.weight': .25}
    assert list(get_pruned_masks(net)) == ['0', '2', '6'] and 'PruneCells(3 weights' in repr(handle)


def test_masks_go_on_to_the_rest(tmp_path):
    net = conv_net()
    handle = attach(net, {'2': PruneCell('Static', 'IterNonStruct', threshold=.3)})
    with pytest.raises(TypeError, match='parametrized'): SparsityReport(net)
    handle.masks.save(tmp_path/'masks.safetensors')
    detach(net)
    assert Masks.load(tmp_path/'masks.safetensors').held(net) and SparsityReport(net).df.set_index('layer').zeros['2'] == ceil(.3, 288)


def test_state_dict_resumes(tmp_path):
    "Saved in the middle, loaded into a fresh model, and continued: as if nothing had been. Strict both ways."
    def fresh():
        torch.manual_seed(3)
        net = conv_net()
        opt = torch.optim.SGD(net.parameters(), .2, momentum=.9)
        return net, opt, attach(net, {'2': PruneCell('Gradual', threshold=.7, stepsize='3 steps'), '6': PruneCell('Gradual', 'IterNonStruct', threshold=.6, gamma=.2, stepsize='10 samples'),
                                      '0': PruneCell('Gradual', 'IterNonStruct', threshold=.5)}, steps_per_epoch=4)
    def train(net, opt, handle, steps):
        for i in steps:
            x = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(i))
            opt.zero_grad(); net(x).square().sum().backward(); opt.step(); handle.step(samples=4)
    a = fresh(); train(*a, range(20))
    b = fresh(); train(*b, range(9))
    torch.save({'net': b[0].state_dict(), 'opt': b[1].state_dict()}, tmp_path/'x.pt')
    saved, c = torch.load(tmp_path/'x.pt', weights_only=True), fresh()
    c[0].load_state_dict(saved['net'], strict=True); c[1].load_state_dict(saved['opt'])
    assert all(torch.equal(p, q) for p, q in zip(get_pruned_masks(c[0]).values(), get_pruned_masks(b[0]).values())) and get_current_threshold(c[0]) == get_current_threshold(b[0])
    train(*c, range(9, 20))
    for k, v in a[0].state_dict().items(): assert torch.equal(v, c[0].state_dict()[k]), k
    with pytest.raises(RuntimeError, match='Unexpected key'): conv_net().load_state_dict(saved['net'])
    with pytest.raises(RuntimeError, match='Missing key'): c[0].load_state_dict(conv_net().state_dict())


def test_a_failed_update_changes_nothing():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    handle = attach(net, {'*': PruneCell('Gradual', 'IterNonStruct', stepsize='1 step')})
    with torch.no_grad(): dense(net[1])[0] = float('nan')
    before = {k: v.clone() for k, v in net.state_dict().items() if 'original' not in k}
    with pytest.raises(ValueError, match='1.weight: 4 of 16 weights are NaN or infinite'): handle.step()
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())


# --- in fastai

def items(n, seed):
    g = torch.Generator().manual_seed(seed)
    return list(zip(torch.randn(n, 1, 6, 6, generator=g), torch.randint(0, 4, (n,), generator=g)))


@pytest.fixture
def make(tmp_path):
    def learner(n=24, **kwargs):
        torch.manual_seed(1)
        dls = DataLoaders.from_dsets(items(n, 0), items(16, 1), bs=8, val_bs=16, shuffle=False, device='cpu', num_workers=0)
        learn = Learner(dls, conv_net(), loss_func=CrossEntropyLossFlat(), path=tmp_path, **kwargs)
        learn.remove_cb(ProgressCallback)
        learn.logger = noop
        return learn
    return learner


gradual = lambda **kw: PruneCell('Gradual', 'IterNonStruct', **{**dict(threshold=.5, start=.1, gamma=.1), **kw})


@pytest.mark.parametrize('stepsize, after', [('1 epoch', [1, 2, 3]), ('2 epochs', [0, 1, 1]), ('2 steps', [1, 3, 4]), ('9 samples', [2, 4, 4]), ('24 samples', [1, 2, 3])])
def test_fit_counts_epochs_steps_and_samples(make, stepsize, after):
    learn = make()
    attach(learn, {'2': gradual(stepsize=stepsize)})
    learn.fit(3, 1e-2)
    names = learn.recorder.metric_names[1:-1]
    assert list(names) == ['train_loss', 'valid_loss', 'sparsity', 'zeros']
    rows = [dict(zip(names, v)) for v in learn.recorder.values]
    assert [r['sparsity'] for r in rows] == pytest.approx([min(10 + 10*u, 50) for u in after])
    assert [r['zeros'] for r in rows] == pytest.approx([100*ceil(min(10 + 10*u, 50)/100, 288)/288 for u in after])
    learn.fit(4, 1e-2)  # a second fit goes on
    assert get_current_threshold(learn) == {'2': pytest.approx(.4 if stepsize == '2 epochs' else .5)}
    assert masked(get_pruned_masks(learn)['2']) == ceil(round(get_current_threshold(learn)['2'], 9), 288)


def test_accumulated_batches_are_one_step(make):
    learn = make(48)
    attach(learn, {'2': gradual(stepsize='1 step'), '6': gradual(stepsize='16 samples')})
    learn.fit(1, 1e-2, cbs=GradientAccumulation(16))
    assert get_current_threshold(learn) == {'2': .4, '6': .4}


def test_validation_and_lr_find_count_nothing(make):
    learn = make()
    cb = PruneCellCallback({'2': gradual(stepsize='1 step')})
    learn.add_cb(cb)
    learn.fit(1, 1e-2)
    state = {k: v.clone() for k, v in learn.model.state_dict().items()}
    learn.validate(); learn.get_preds(); learn.lr_find(num_it=5, show_plot=False)
    assert all(torch.equal(v, learn.model.state_dict()[k]) for k, v in state.items())
    learn.fine_tune(1, 1e-2)
    assert get_current_threshold(learn) == {'2': .5} and cb.measured == pytest.approx(50)


def test_fastai_as_plain_pytorch(make):
    "The same masks and weights from a loop by hand"
    cells = {'2': gradual(threshold=.3, stepsize='2 steps'), '6': PruneCell('Static', threshold=.25)}
    learn, other = make(), make()
    attach(learn, cells)
    learn.opt_func = lambda ps, lr=1e-2, **kw: OptimWrapper(ps, torch.optim.SGD, lr=lr)
    learn.opt = None
    learn.fit(2, .1, wd=0.)
    net, handle = other.model, attach(other.model, cells, steps_per_epoch=3)
    opt = torch.optim.SGD(net.parameters(), .1)
    for _ in range(2):
        for i in range(0, 24, 8):
            x, y = (torch.stack(v) for v in zip(*items(24, 0)[i:i+8]))
            opt.zero_grad(); F.cross_entropy(net(x), y).backward(); opt.step(); handle.step(samples=8)
    assert handle.report().drop(columns='weight').equals(PruneCells(learn.model).report().drop(columns='weight'))
    for k, v in net.state_dict().items(): torch.testing.assert_close(v, learn.model.state_dict()[k])


@pytest.mark.parametrize('by_callback', [True, False])
def test_resume_is_as_if_nothing_had_been(make, by_callback):
    "Also when the optimizer was made before the cells came in: its state goes by the order of the parameters"
    cells = {'0': PruneCell('Gradual', threshold=.6, stepsize='2 steps'), '2': gradual()}
    def begin():
        learn = make()
        attach(learn, cells)
        return learn
    a = begin(); a.fit(4, 1e-1)
    b = make() if by_callback else begin()
    b.fit(2, 1e-1, cbs=PruneCellCallback(cells) if by_callback else None)
    b.save('half')
    c = begin(); c.load('half'); c.fit(4, 1e-1, start_epoch=2)
    assert get_current_threshold(c) == {'0': pytest.approx(.4), '2': .5}
    for k, v in a.model.state_dict().items(): torch.testing.assert_close(v, c.model.state_dict()[k], rtol=0, atol=0)


class Score(Metric):
    "Says that the first epochs are the best"
    def reset(self): pass
    def accumulate(self, learn): self.epoch = learn.epoch
    @property
    def value(self): return [.9, .8, .7, .6, .4, .5][self.epoch]
    @property
    def name(self): return 'score'


def test_best_model_comes_with_its_mask_and_is_as_sparse_as_the_last(make):
    learn = make(metrics=Score())
    attach(learn, {'2': gradual(threshold=.4)})  # moves in epochs 0, 1, 2
    seen = {}
    class Look(Callback):
        order = 100
        def after_epoch(self): seen[self.epoch] = {k: v.clone() for k, v in self.learn.model.state_dict().items()}
    learn.fit(6, 1e-2, cbs=[Look(), SaveModelCallback(monitor='score')])
    assert get_current_threshold(learn) == {'2': .4} and masked(get_pruned_masks(learn)['2']) == ceil(.4, 288)
    assert all(torch.equal(v, learn.model.state_dict()[k]) for k, v in seen[2].items())


def test_detach_pickle_and_copies(make):
    learn = make()
    attach(learn, {'2': gradual(threshold=.3, start=.3)})
    learn.fit(1, 1e-2)
    again = copy.deepcopy(learn.model)
    assert torch.equal(get_pruned_masks(again)['2'], get_pruned_masks(learn)['2'])
    with pytest.raises(RuntimeError, match='parametrized modules'): pickle.dumps(learn.model)  # PyTorch says so
    detach(learn)
    learn.fit(1, 0., wd=0.)
    pickle.dumps(learn.model)
    assert not any(isinstance(cb, PruneCellCallback) for cb in learn.cbs) and 'sparsity' not in learn.recorder.metric_names
    assert SparsityReport(learn.model).df.set_index('layer').zeros['2'] == ceil(.3, 288)


def test_a_second_callback(make):
    learn = make()
    learn.fit(1, 1e-2, cbs=PruneCellCallback({'2': gradual()}))
    learn.fit(1, 1e-2, cbs=PruneCellCallback({'2': gradual()}))  # the same cells: goes on
    assert get_current_threshold(learn)['2'] == pytest.approx(.3)
    with pytest.raises(ValueError, match='has other cells already, in 2'): learn.fit(1, 1e-2, cbs=PruneCellCallback({'2': gradual(gamma=.2)}))
    with pytest.raises(ValueError, match='two PruneCellCallback'): learn.fit(1, 1e-2, cbs=[PruneCellCallback(), PruneCellCallback()])


# --- what is refused

bad_cells = [
    (dict(prune_mode='gradual'), "prune_mode='gradual'; did you mean 'Gradual'"), (dict(prune_mode='Statick'), "did you mean 'Static'"), (dict(prune_mode=3), 'prune_mode=3; allowed: Identity, Static, Gradual'),
    (dict(prune_filler='IterNonstruct'), "did you mean 'IterNonStruct'"), (dict(prune_filler=None), "prune_filler=None fills nothing: write prune_mode='Identity'"),
    (dict(threshold=30), 'threshold=30 is a fraction in N2D2, not a percentage: write threshold=0.3 for 30 %'), (dict(threshold=-.1), 'threshold=-0.1 must be a fraction'),
    (dict(threshold=float('nan')), 'threshold=nan must be a fraction'), (dict(threshold='0.3'), "threshold='0.3' must be a fraction"), (dict(threshold=True), 'threshold=True'), (dict(threshold=200), 'threshold=200 must be'),
    (dict(delta=0), 'delta=0 must be finite and more than 0'), (dict(delta=-.1), 'delta=-0.1'), (dict(delta=float('nan')), 'delta=nan'), (dict(delta=float('inf')), 'delta=inf'), (dict(delta='x'), "delta='x' must be a number"),
    (dict(prune_mode='Gradual', start=.5), 'start=0.5 is above threshold=0.2'), (dict(start=10), 'write start=0.1 for 10 %'), (dict(gamma=0), 'gamma=0 never reaches'), (dict(gamma=-.1), 'gamma=-0.1'),
    (dict(gamma=5), 'write gamma=0.05 for 5 %'), (dict(stepsize=500), "stepsize=500 .*'1 epoch', '500 steps' .* or '500 samples'"), (dict(stepsize='1'), "stepsize='1'"), (dict(stepsize='0 epochs'), "stepsize='0 epochs'"),
    (dict(stepsize='0.5 epochs'), 'whole number'), (dict(stepsize='2 weeks'), "stepsize='2 weeks'"), (dict(stepsize=None), 'stepsize=None'), (dict(exact=1), 'exact=1 must be True or False'), (dict(seed=-1), 'seed=-1'), (dict(seed=.5), 'seed=0.5')]


@pytest.mark.parametrize('kw, says', bad_cells, ids=lambda v: str(v) if isinstance(v, dict) else '')
def test_bad_cells(kw, says):
    with pytest.raises((ValueError, TypeError), match='PruneCell: .*' + says.replace('(', r'\(')) as e: PruneCell(**kw)
    assert next(iter(reversed(kw))) in str(e.value)


def weight_norm(m): return nn.utils.parametrizations.weight_norm(m)


bad_attach = [
    (conv_net, {'conv*': PruneCell()}, "no layer matches 'conv\\*'; allowed: 0, 2, 6"), (conv_net, {'1': PruneCell()}, "no layer matches '1'"), (conv_net, {'*': PruneCell(), '[02]': PruneCell('Static')}, "'0' matches both '\\*' and '\\[02\\]'"),
    (conv_net, {}, 'a dict of layer names'), (conv_net, PruneCell(), 'a dict of layer names'), (conv_net, {'0': 'Static'}, "'0' must have a PruneCell, got 'Static'"), (lambda: 3, {'0': PruneCell()}, 'an nn.Module or a Learner, got int'),
    (lambda: nn.Embedding(4, 2, sparse=True), {'': PruneCell()}, 'weight: .*sparse=True'), (lambda: nn.Embedding(4, 2, max_norm=1.), {'': PruneCell()}, 'max_norm'),
    (lambda: weight_norm(nn.Linear(3, 2)), {'': PruneCell()}, 'parametrized'), (lambda: nn.utils.weight_norm(nn.Linear(3, 2)), {'': PruneCell()}, 'computed from something else'),
    (lambda: nn.Sequential(nn.LazyLinear(3)), {'*': PruneCell()}, 'not initialised'), (lambda: nn.MultiheadAttention(4, 2), {'out_proj': PruneCell()}, "the weights of 'out_proj' belong to ''")]


@pytest.mark.filterwarnings('ignore:.*weight_norm')
@pytest.mark.parametrize('make_net, cells, says', bad_attach, ids=range(len(bad_attach)))
def test_bad_attach(make_net, cells, says):
    net = make_net()
    before = str(net)
    with pytest.raises((ValueError, TypeError), match=says): attach(net, cells)
    assert str(net) == before


def test_more_mistakes():
    net = conv_net()
    for f in (detach, get_pruned_masks, get_current_threshold, PruneCells):
        with pytest.raises(ValueError, match='Sequential has no PruneCell'): f(net)
    with torch.no_grad(): net[2].weight[0, 0, 0, 0] = float('inf')
    with pytest.raises(ValueError, match='2.weight: 1 of 288 weights are NaN or infinite'): attach(net, {'*': PruneCell('Static', 'IterNonStruct')})
    assert 'Parametrized' not in str(net)
    with pytest.raises(ValueError, match='steps_per_epoch'): attach(net, {'0': PruneCell()}, steps_per_epoch=0)
    handle = attach(net, {'0': gradual()})
    with pytest.raises(ValueError, match='0: has a PruneCell already'): attach(net, {'0': PruneCell()})
    with pytest.raises(ValueError, match=r"0.weight: its cell counts epochs \('1 epoch'\)"): handle.step()
    attach(net, {'6': gradual(stepsize='7 samples')})
    with pytest.raises(ValueError, match=r"6.weight: its cell counts samples \('7 samples'\)"): PruneCells(net, steps_per_epoch=2).step()
    detach(net)


# --- INI files

text = """\ufeffDefaultModel=Frame_CUDA ; all of it
$RATE=0.4

[database]
Type=MNIST_IDX_Database

[sp]
SizeX=32
BatchSize=128

[conv1]
Input=sp
Type=Conv
KernelDims=5 5
NbOutputs=6
Mapping(sp).Size=1
Mapping(sp)=\\
1 0 \\
0 1
ActivationFunction=Rectifier
WeightsFiller=HeFiller
ConfigSection=common.config,more.config
QWeight=Prune
QWeight.PruningMode="Static" # quoted
QWeight.Threshold=${RATE}

[conv2]conv1
NbOutputs=[conv1]NbOutputs
QWeight.Threshold=0.6

[block.*]
QWeight=Prune
QWeight.PruningMode=Gradual
QWeight.Threshold=[conv1]QWeight.Threshold
QWeight.StepSizeThreshold=6000
QWeight.Range=15

[fc1]
Type=Fc
Input=conv1
QWeight=LSQ
QWeight.StepSize=100

[fc1.Target]

[common.config]
NoBias=1
Solvers.LearningRatePolicy=StepDecay
[more.config]
QWeight.PruningFiller=IterNonStruct
QWeight.Delta=0.01
"""


@pytest.fixture
def ini(tmp_path):
    def write(t):
        (tmp_path/'net.ini').write_text(t, encoding='utf-8')
        return tmp_path/'net.ini'
    return write


def test_ini(ini):
    conv = PruneCell('Static', 'IterNonStruct', threshold=.4, delta=.01)
    assert read_ini(ini(text)) == {'conv1': conv, 'conv2': PruneCell('Static', 'IterNonStruct', threshold=.6, delta=.01),
                                   'block.*': PruneCell('Gradual', threshold=.4, stepsize='6000 samples')}
    assert read_ini(ini('[a]\nQWeight=Prune\n')) == {'a': PruneCell()}


@pytest.mark.parametrize('value, means', [('0', '1 epoch'), ('[sp]_EpochSize', '1 epoch'), ('$([sp]_EpochSize * 3)', '3 epochs'), ('$(2*[sp]_EpochSize)', '2 epochs'), ('$([sp]_EpochSize * ${N})', '4 epochs'), ('50', '50 samples'), ('50 steps', '50 steps')])
def test_ini_stepsize(ini, value, means): assert read_ini(ini(f'$N=4\n[a]\nQWeight=Prune\nQWeight.StepSizeThreshold={value}'))['a'].stepsize == means


def test_ini_round_trip(ini, tmp_path):
    cells = {'a.*': PruneCell(), 'b': PruneCell('Gradual', 'IterNonStruct', threshold=.123456789, delta=3e-7, start=0, stepsize='2 epochs', gamma=1e-3, exact=False, seed=7),
             'c[12]': PruneCell('Static', stepsize='30 samples', threshold=1), 'd': PruneCell('Gradual', stepsize='5 steps'), 'e': PruneCell('Gradual', threshold=np.float32(.3))}
    write_ini(cells, tmp_path/'out.ini')
    assert read_ini(tmp_path/'out.ini') == cells and list(read_ini(tmp_path/'out.ini')) == list(cells)
    write_ini(read_ini(ini(text)), tmp_path/'out.ini')
    assert read_ini(tmp_path/'out.ini') == read_ini(ini(text))


def test_ini_attaches(ini, make):
    net = conv_net()
    handle = attach(net, str(ini('[[02]]\nQWeight=Prune\nQWeight.PruningMode=Static\n[6]\nQWeight=Prune')))
    assert handle.report().masked.tolist() == [8, 58, 0]
    learn = make()
    learn.fit(1, 1e-2, cbs=PruneCellCallback(ini('[2]\nQWeight=Prune\nQWeight.PruningMode=Gradual')))
    assert get_current_threshold(learn)['2'] == pytest.approx(.15)


bad_inis = [  # what is replaced by what; how many lines further on the error is; what is said
    ('QWeight.Threshold=0.6', 'QWeight.Threshold=60', 0, r'\[conv2\] PruneCell: threshold=60.0 is a fraction'),
    ('QWeight.Threshold=0.6', 'QWeight.Threshold=', 0, 'has no value'),
    ('QWeight.Threshold=0.6', 'QWeight.Threshold=many', 0, "QWeight.Threshold='many' must be a number"),
    ('QWeight.Threshold=0.6', 'QWeight.Treshold=0.6', 0, "QWeight has no option 'Treshold'; did you mean 'Threshold'"),
    ('QWeight.Threshold=0.6', 'QWeight.threshold=0.6', 0, "did you mean 'Threshold'"),
    ('KernelDims=5 5', 'KernelDim=5 5', 0, "'KernelDim' is no option .*did you mean 'KernelDims'"),
    ('KernelDims=5 5', 'kernelDims=5 5', 0, "did you mean 'KernelDims'"),
    ('NbOutputs=6', 'NbOutputs.Size=6', 0, 'NbOutputs has no options of its own'),
    ('NoBias=1', 'NoBiass=1', 0, "did you mean 'NoBias'"),
    ('QWeight=LSQ', 'QWeight=SATT', 0, "QWeight='SATT'; did you mean 'SAT'"),
    ('QWeight=LSQ', 'QWeight=prune', 0, "did you mean 'Prune'"),
    ('Type=MNIST_IDX_Database', 'QWieght=Prune', 0, "did you mean 'QWeight'"),
    ('Type=MNIST_IDX_Database', 'qweight.Threshold=.1', 0, "did you mean 'QWeight.Threshold'"),
    ('Type=MNIST_IDX_Database', 'QWeight.Threshold=.1', 0, r'QWeight.Threshold in \[database\], but no QWeight=Prune'),
    ('[fc1.Target]', '[conv1]', 0, r'section \[conv1\] is there already, in line 11'),
    ('SizeX=32', 'BatchSize=1', 1, r'BatchSize is there already in \[sp\], in line 8'),
    ('SizeX=32', 'SizeX', 0, "'SizeX' is neither a section nor key=value"),
    ('SizeX=32', '=32', 0, 'neither'),
    ('[sp]\n', '[sp\n', 0, r"'\[sp' is not a section"),
    ('[sp]\n', '[]\n', 0, 'is not a section'),
    ('"Static"', '"Static', 0, 'a quote .* is not closed'),
    ('common.config,more', 'common.config,mode', 0, "ConfigSection='mode.config' is not in this file; did you mean 'more.config'"),
    ('${RATE}', '${RATES}', 0, r"variable \$\{RATES\} is not set; did you mean '\$RATE'"),
    ('${RATE}', '$(1/3)', 0, 'is to be computed'),
    ('=[conv1]QW', '=[conv9]QW', 0, 'is not in this file'),
    ('$RATE=0.4', '$RATE=${RATE}', 0, 'stands for itself'),
    ('[fc1.Target]', '[tpl@x.ini]', 0, 'includes a template'),
    ('[block.*]', '[onnx:Conv_def]', 1, 'is a default for the layers of a type'),
    ('[conv2]conv1', '[conv2]conv7', 0, "begins as 'conv7', which is not there before it; did you mean 'conv1'"),
    ('=6000', '=6000.5', 0, 'stepsize=.6000.5. must be a whole number'),
    ('QWeight.Delta=0.01', 'QWeight.Threshold=0.9', 0, r'QWeight.Threshold=0.9 in \[more.config\], but 0.4 in \[conv1\], line 25; say it once'),
    ('=Gradual', '=Graduel', 0, "did you mean 'Gradual'"),
    ('QWeight.Delta=0.01', 'QWeight.Delta=0', 0, 'delta=0.0 must be finite'),
    ('[database]', 'QWeight=Prune\n[database]', 0, 'is in no section')]


@pytest.mark.parametrize('old, new, after, says', bad_inis, ids=[b[1] for b in bad_inis])
def test_bad_inis(ini, old, new, after, says):
    assert text.count(old) == 1
    changed = text.replace(old, new)
    n = next(i for i, (a, b) in enumerate(zip(text.splitlines(), changed.splitlines()), 1) if a != b) + after
    with pytest.raises(ValueError, match=rf'net\.ini, line {n}: .*{says}'): read_ini(ini(changed))


def test_more_bad_inis(ini, tmp_path):
    with pytest.raises(ValueError, match='no section has QWeight=Prune; the sections are a'): read_ini(ini('[a]\nType=Conv'))
    with pytest.raises(FileNotFoundError): read_ini(tmp_path/'none.ini')
    with pytest.raises(TypeError, match='named by its path'): read_ini(3)
    (tmp_path/'x.ini').write_bytes(b'\xff\xfe\x00')
    with pytest.raises(ValueError, match='not a text file in UTF-8'): read_ini(tmp_path/'x.ini')
    with pytest.raises(ValueError, match="cannot be the name of a section"): write_ini({'a;b': PruneCell()}, tmp_path/'y.ini')
    with pytest.raises(ValueError, match="cannot be the name of a section"): write_ini({'': PruneCell()}, tmp_path/'y.ini')
    with pytest.raises(TypeError, match="'a' must have a PruneCell"): write_ini({'a': 1, }, tmp_path/'y.ini')
    assert not (tmp_path/'y.ini').exists()
    with pytest.raises(ValueError, match="no layer matches 'conv1'"): attach(conv_net(), ini(text))
