"""What a model costs: against formulas in plain Python, and counts done by hand."""
import copy
import json
import math
import zlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn.utils.prune import random_unstructured

from fasterai_lib.all import Cost, LatencyTable, Spec, compare, cost, measure_latencies, measure_latency, positions, quantities
from fasterai_lib.core.cost import op_macs, packed
from fasterai_lib.core.latency import Timing

aten = torch.ops.aten


def X(*shape): return torch.rand(shape, generator=torch.Generator().manual_seed(0)) + .1


def count(model, x, **kwargs): return cost(model, x, latency=False, **kwargs)


class Fn(nn.Module):
    "A model of one function, with parameters"
    def __init__(self, f, **params):
        super().__init__()
        self.f = f
        for n, p in params.items(): self.register_parameter(n, p if isinstance(p, nn.Parameter) else nn.Parameter(p))
    def forward(self, *x, **kw): return self.f(self, *x, **kw)


# ------------------------------------------------------------------------------------------- multiply-accumulates
conv_shapes = st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.integers(1, 2), st.integers(7, 10), st.integers(1, 3), st.booleans())


@settings(max_examples=25, deadline=None)
@given(conv_shapes)
def test_convolutions(drawn): # each output (or, transposed, each input) position multiplies a kernel per pair of channels of its group
    dims, inside, outside, kernel, stride, padding, dilation, size, groups, transposed = drawn
    i, o, batch = inside*groups, outside*groups, 2
    layer = [[nn.Conv1d, nn.Conv2d, nn.Conv3d], [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]][transposed][dims - 1](i, o, kernel, stride, padding, dilation=dilation, groups=groups)
    out = size if transposed else (size + 2*padding - dilation*(kernel - 1) - 1)//stride + 1
    c = count(layer, X(batch, i, *[size]*dims))
    assert c['macs'] == c['effective_macs'] == out**dims*kernel**dims*inside*o
    assert c['parameters'] == o*inside*kernel**dims + o
    assert positions(layer, X(batch, i, *[size]*dims)) == {'': out**dims}


def lstm_macs(steps, i, h, layers, directions, gates):
    return sum(directions*steps*gates*h*((i if n == 0 else h*directions) + h) for n in range(layers))


def attention_macs(n, d, keys=None): # projections of queries, keys, values and the result; scores; mixing
    m = keys or n
    return 2*n*d*d + 2*m*d*d + 2*n*m*d


CASES = {
    'Linear': (lambda: nn.Linear(5, 7), (3, 5), 35),
    'Linear of tokens': (lambda: nn.Linear(5, 7), (3, 4, 5), 4*35),
    'Linear without bias': (lambda: nn.Linear(5, 7, bias=False), (3, 4, 2, 5), 8*35),
    'Bilinear': (lambda: Fn(lambda s, x: F.bilinear(x, x, s.w), w=X(4, 5, 5)), (3, 5), 4*25),
    'LSTM': (lambda: nn.LSTM(5, 7, 2, batch_first=True, bidirectional=True), (3, 4, 5), lstm_macs(4, 5, 7, 2, 2, 4)),
    'GRU': (lambda: nn.GRU(5, 7, batch_first=True), (3, 4, 5), lstm_macs(4, 5, 7, 1, 1, 3)),
    'attention': (lambda: Fn(lambda s, x: s.a(x, x, x, need_weights=False)[0]), (3, 4, 8), attention_macs(4, 8)),
    'encoder layer': (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (3, 4, 8), attention_macs(4, 8) + 2*4*8*16),
    'scaled dot product': (lambda: Fn(lambda s, q: F.scaled_dot_product_attention(q, q, q)), (3, 2, 4, 8), 2*2*4*4*8),
    'norms, activations, pools': (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.GELU(), nn.Flatten(), nn.LayerNorm(12), nn.Softmax(-1)), (3, 3, 4, 4), 0),
    'functional': (lambda: Fn(lambda s, x: F.linear(F.relu(F.linear(x, s.a)), s.b) @ s.b, a=X(7, 5), b=X(2, 7)), (3, 5), 35 + 14 + 14),
    'einsum': (lambda: Fn(lambda s, x: torch.einsum('bi,oi->bo', x, s.a), a=X(7, 5)), (3, 5), 35),
    'matrix times vector': (lambda: Fn(lambda s, x: x @ s.a, a=X(5)), (3, 5), 5),
}


@pytest.mark.parametrize('case', CASES)
def test_macs(case):
    make, shape, macs = CASES[case]
    torch.manual_seed(0)
    model = make()
    if case == 'attention': model.a = nn.MultiheadAttention(8, 2, batch_first=True)
    c = count(model, X(*shape))
    assert c['macs'] == macs
    assert math.isclose(c['effective_macs'], macs)
    assert c.df['macs'].sum() == macs and c.batch == 3
    assert count(copy.deepcopy(model), X(*shape).repeat(2, *[1]*(len(shape) - 1)))['macs'] == macs # per example
    with torch.inference_mode(): assert count(model, X(*shape))['macs'] == macs


def test_shapes_are_enough():
    class Shape:
        def __init__(self, *shape): self.shape = shape
    for T in (torch.zeros, lambda *s: Spec(s), Shape):
        assert op_macs(aten.mm.default, (T(2, 3), T(3, 4))) == 24
        assert op_macs(aten.addmm.default, (T(4), T(2, 3), T(3, 4))) == 24
        assert op_macs(aten.bmm.default, (T(5, 2, 3), T(5, 3, 4)), {}, [T(5, 2, 4)]) == 120
        assert op_macs(aten.baddbmm.default, (T(5, 2, 4), T(5, 2, 3), T(5, 3, 4))) == 120
        assert op_macs(aten.addmv.default, (T(2), T(2, 3), T(3))) == 6 == op_macs(aten.mv.default, (T(2, 3), T(3)))
        assert op_macs(aten.linear.default, (T(2, 3, 5), T(4, 5), None)) == 120
        for out in (T(2, 8, 30, 30), [T(2, 8, 30, 30)]): assert op_macs(aten.convolution.default, (T(2, 4, 32, 32), T(8, 2, 3, 3), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 2), {}, out) == 2*900*8*18
        q = T(2, 3, 4, 5)
        assert op_macs(aten._scaled_dot_product_flash_attention_for_cpu.default, (q, q, q)) == 2*2*3*4*4*5
        assert op_macs(aten.relu.default, (q,)) == 0 == op_macs(aten.embedding.default, (T(9, 5), T(2, 3)))


# ------------------------------------------------------------------------------------------------- zeros and bytes
def zeroed(t, share, seed=0):
    with torch.no_grad(): t.mul_(torch.rand(t.shape, generator=torch.Generator().manual_seed(seed)) >= share)
    return int((t != 0).sum())


def test_effective_macs_follow_zeros():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8*16, 10))
    left = zeroed(model[0].weight, .7), zeroed(model[3].weight, .4)
    c = count(model, X(2, 3, 6, 6))
    assert math.isclose(c['effective_macs'], left[0]*16 + left[1]) and c['macs'] == 8*27*16 + 1280
    assert c['nonzero'] == sum(int((p != 0).sum()) for p in model.parameters()) and c['parameters'] == sum(p.numel() for p in model.parameters())


def test_effective_macs_of_slices_masks_and_transposes():
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad(): mha.in_proj_weight[:8] = 0 # queries only
    cross = Fn(lambda s, x, y: s.a(x, y, y, need_weights=False)[0])
    cross.a = mha
    c = count(cross, (X(3, 4, 8), X(3, 6, 8)))
    assert c['macs'] == attention_macs(4, 8, 6) and math.isclose(c['effective_macs'], c['macs'] - 4*64)
    layer = nn.Linear(5, 7)
    random_unstructured(layer, 'weight', .6)
    assert math.isclose(count(nn.Sequential(layer), X(2, 5))['effective_macs'], int(layer.weight_mask.sum()))
    w = X(7, 5)
    left = zeroed(w, .5)
    for f in (lambda s, x: x @ s.w.t(), lambda s, x: (s.w @ x.t()).t(), lambda s, x: x @ s.w.view(7, 5).transpose(0, 1).contiguous(), lambda s, x: F.linear(x, s.w*2)):
        assert math.isclose(count(Fn(f, w=w.clone()), X(2, 5))['effective_macs'], left)


def test_tied_weights_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.emb.weight
            self.register_buffer('saved', torch.zeros(3)); self.register_buffer('not_saved', torch.zeros(5), persistent=False)
        def forward(self, i): return self.head(self.emb(i))
    c = count(Tied(), torch.zeros(2, 6, dtype=torch.long))
    assert (c['parameters'], c['memory'], c['disk'], c['macs']) == (36, 4*(36 + 8), 4*39, 6*36)
    assert list(c.df['layer']) == ['', 'emb', 'head'] and list(c.df['memory']) == [32, 144, 0]


def test_bytes_on_disk(tmp_path):
    from safetensors.torch import save_file
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 50), nn.BatchNorm1d(50), nn.Linear(50, 3)).half()
    model[1].num_batches_tracked.fill_(7)
    left = zeroed(model[0].weight, .9)
    c, state = count(model.float().half(), X(2, 40).half()), model.state_dict()
    save_file(state, tmp_path/'m.safetensors')
    assert 0 < (tmp_path/'m.safetensors').stat().st_size - c['disk'] < 150*len(state)
    assert c['disk_compressed'] == sum(len(zlib.compress(t.numpy().tobytes(), 1)) for t in state.values())
    dense = {n: t.numel()*t.itemsize for n, t in state.items()}
    assert c['disk_sparse'] == sum(min(dense[n], math.ceil(t.numel()/8) + t.itemsize*int((t != 0).sum())) for n, t in state.items())
    assert c.df.set_index('layer').loc['0', 'disk_sparse'] == 250 + 2*left + 100 # bias is dense
    assert 'disk_compressed' not in count(model, X(2, 40).half(), disk=False).total
    assert packed(torch.tensor(1.)) > 0


def test_activations():
    chain = nn.Sequential(*[nn.Linear(n, m, bias=False) for n, m in ((4, 10), (10, 3), (3, 20))])
    assert count(chain, X(2, 4))['activations'] == 4*2*max(10 + 3, 3 + 20) # what comes in, and what goes out
    keep = Fn(lambda s, x: (lambda a: (lambda b: (lambda c: a + b + c)(b*2))(a*2))(x*2)) # a, b, c, and both sums one after the other
    assert count(keep, X(3, 5))['activations'] == 4*15*5
    views = Fn(lambda s, x: (x*2).view(-1).t().unsqueeze(0)[:, :3])
    assert count(views, X(3, 5))['activations'] == 4*15
    assert count(Fn(lambda s, x: x.relu_()), X(3, 5))['activations'] == 0 # in the input itself
    c = count(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), X(2, 4))
    assert c['activations'] == 32 and list(c.df['activations']) == [32, 0]


# --------------------------------------------------------------------------------------------------------- layers
class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.norm, self.drop, self.w = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)), nn.BatchNorm1d(4), nn.Dropout(), nn.Parameter(X(4, 3))
        self.seen = {}
    def forward(self, x):
        self.calls = getattr(self, 'calls', 0) + 1
        self.seen['x'] = x
        return self.norm(x + self.drop(self.body(self.body(x)))) @ self.w


def test_rows_belong_to_the_module_that_ran():
    c = cost(Residual(), X(5, 4), repeats=3)
    assert list(c.df['layer']) == ['', 'body.0', 'body.1', 'body.2', 'norm'] # dropout does nothing
    rows = c.df.set_index('layer')
    assert dict(rows['macs']) == {'': 12, 'body.0': 48, 'body.1': 0, 'body.2': 48, 'norm': 0} # run twice
    assert math.isclose(rows['latency'].sum(), c['latency']) and (rows['latency'] > 0).all()
    for n in quantities:
        if n in rows and n != 'latency': assert rows[n].sum() == c[n]
    assert c['throughput'] == 5/c['latency'] and len(c.timing.times) == 3 and set(c.total) == set(quantities)
    text = repr(c)
    for said in ('batch of 5', '1 thread', 'cpu', 'float32', '3 runs', 'spread', '(itself)', 'total'): assert said in text and said in c._repr_html_()


def snapshot(model):
    return ({k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()], [{k: id(v) for k, v in m.__dict__.items()} for m in model.modules()],
            [p.grad.clone() for p in model.parameters()], [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()], torch.random.get_rng_state(),
            torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled, torch.is_grad_enabled(), [p.requires_grad for p in model.parameters()])


def same(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


@pytest.mark.parametrize('make', [Residual, lambda: nn.Sequential(nn.LSTM(4, 4)), lambda: nn.TransformerEncoderLayer(4, 2, 8)], ids=['residual', 'lstm', 'attention'])
@pytest.mark.parametrize('work', [lambda m, x: cost(m, x, repeats=2), positions, lambda m, x: measure_latency(m, x, repeats=2), lambda m, x: compare(m, m, x, repeats=2)],
                         ids=['cost', 'positions', 'latency', 'compare'])
def test_model_is_untouched(make, work):
    torch.manual_seed(0)
    model, x = make(), X(5, 4)
    out = model(x)
    sum(t.sum() for t in out if isinstance(t, torch.Tensor)).backward() if isinstance(out, tuple) else out.sum().backward()
    list(model.modules())[-1].eval()
    before, given_ = snapshot(model), x.clone()
    work(model, x)
    assert same(before, snapshot(model)) and torch.equal(x, given_)
    if hasattr(model, 'calls'): assert model.calls == 1
    with pytest.raises(ValueError, match='does not run on the example inputs'): work(model, X(5, 7))
    assert same(before, snapshot(model))


def test_inputs_may_be_written_into():
    x = X(3, 5)
    kept = x.clone()
    for f in (count, measure_latency): f(Fn(lambda s, x: x.mul_(0) + s.w, w=X(5)), x)
    assert torch.equal(x, kept)
    assert count(Fn(lambda s, a, b: a @ s.w + b, w=X(5, 2)), dict(a=X(3, 5), b=X(2)))['macs'] == 10
    assert count(Fn(lambda s, a, b: a @ s.w + b, w=X(5, 2)), (X(3, 5), 1.))['macs'] == 10


# ----------------------------------------------------------------------------------------------- before and after
def test_compare():
    torch.manual_seed(0)
    a, b = nn.Sequential(nn.Linear(64, 256, bias=False)), nn.Sequential(nn.Linear(64, 64, bias=False))
    r = compare(a, b, X(8, 64), repeats=5)
    assert (r['parameters'], r['macs'], r['memory']) == (4, 4, 4) and list(r.df.index) == list(quantities)
    assert math.isclose(r['latency'], r.df.loc['latency', 'before']/r.df.loc['latency', 'after']) and math.isclose(r['throughput'], r['latency'])
    assert ' 4x' in repr(r) and 'before' in repr(r) and '5 runs' in repr(r) and '<table' in r._repr_html_()
    dense, small = count(a, X(8, 64)), count(b, X(8, 64), disk=False)
    assert list(compare(dense, small).df.index) == [n for n in quantities if n not in ('latency', 'throughput', 'disk_compressed')]
    with torch.no_grad(): b[0].weight.zero_()
    assert compare(a, b, X(8, 64), latency=False)['nonzero'] == math.inf


def test_plot():
    import matplotlib; matplotlib.use('Agg')
    c = cost(nn.Sequential(*[nn.Linear(4, 4) for _ in range(30)]), X(2, 4), repeats=2)
    axs = c.plot(layers=10).axes
    assert [a.get_title().split(':')[0] for a in axs] == ['multiply-accumulates', 'latency', 'memory']
    for ax in axs: assert len(ax.patches) == 10 and math.isclose(sum(p.get_width() for p in ax.patches), 100)
    assert axs[0].get_yticklabels()[-1].get_text() == '21 others'


lazy = nn.Sequential(nn.LazyLinear(3))
ok = nn.Linear(4, 4)
BAD = {
    'no model': (lambda: cost(4, X(2, 4)), TypeError, 'model must be an nn.Module, got int'),
    'no inputs': (lambda: cost(ok, None), ValueError, 'example_inputs must be'),
    'a string': (lambda: cost(ok, 'x'), ValueError, 'got str without any'),
    'no example': (lambda: cost(ok, X(0, 4)), ValueError, 'no example at all'),
    'does not run': (lambda: cost(ok, X(2, 5)), ValueError, 'Linear does not run on the example inputs: RuntimeError'),
    'too many inputs': (lambda: cost(ok, (X(2, 4), 3)), ValueError, 'does not run on the example inputs: TypeError'),
    'lazy': (lambda: cost(lazy, X(2, 4)), ValueError, '0.weight: not initialised yet'),
    'meta': (lambda: cost(nn.Linear(4, 4, device='meta'), X(2, 4)), ValueError, 'weight is on the meta device'),
    'nothing runs': (lambda: cost(Fn(lambda s, x: x), X(2, 4)), ValueError, 'executed no operator that can be seen'),
    'script': (lambda: cost(torch.jit.script(nn.Linear(4, 4)), X(2, 4)), TypeError, 'give the model that it was made from'),
    'repeats': (lambda: cost(ok, X(2, 4), repeats=0), ValueError, 'repeats must be a whole number of runs, 1 or more, or None, got 0'),
    'repeats of a float': (lambda: measure_latency(ok, X(2, 4), repeats=2.5), ValueError, 'got 2.5'),
    'seconds': (lambda: measure_latency(ok, X(2, 4), seconds=-1), ValueError, 'seconds must be a number above 0, got -1'),
    'warmup': (lambda: measure_latency(ok, X(2, 4), warmup=-1), ValueError, 'warmup must be a whole number of runs, 0 or more, got -1'),
    'jobs': (lambda: measure_latencies([3]), TypeError, 'functions without arguments, got int'),
    'compare nothing': (lambda: compare(ok, None, X(2, 4)), TypeError, 'after must be a Cost or a model, got NoneType'),
    'compare unlike': (lambda: compare(count(ok, X(2, 4)), ok), TypeError, 'both be costs, or both be models'),
    'compare batches': (lambda: compare(count(ok, X(2, 4)), count(ok, X(3, 4))), ValueError, 'batches of 2 and 3'),
    'compare costs with inputs': (lambda: compare(count(ok, X(2, 4)), count(ok, X(2, 4)), X(2, 4)), ValueError, 'known already'),
    'plot': (lambda: count(ok, X(2, 4)).plot('latensy'), ValueError, "'latensy' is not known for each layer"),
    'conv without output': (lambda: op_macs(aten.convolution.default, (X(1, 1, 3), X(1, 1, 3), None, [1], [0], [1], False, [0], 1)), ValueError, 'pass out='),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input(case):
    f, error, message = BAD[case]
    with pytest.raises(error) as e: f()
    assert message in str(e.value)


def test_quantities():
    assert [q for q in quantities if not quantities[q].counted] == ['latency', 'throughput'] and [q for q in quantities if quantities[q].more_is_better] == ['throughput']
    f = lambda n, v: quantities[n].format(v)
    assert [f('memory', 3.1e6), f('latency', 8.02e-3), f('macs', 41.3e6), f('parameters', 7), f('latency', 0), f('throughput', 12.5), f('disk', 999.6), f('disk', None)] == \
        ['3.1 MB', '8.02 ms', '41.3 M', '7', '0 ns', '12.5/s', '1 kB', '–']
    for v in (1, 12, 123, 1234, 99949, 99950, 999499, 999500, 5e13):
        number, unit = f('memory', v).split()
        assert abs(float(number)*{'B': 1, 'kB': 1e3, 'MB': 1e6, 'GB': 1e9, 'TB': 1e12}[unit]/v - 1) < .005


# ------------------------------------------------------------------------------------------------------- latencies
def test_timing():
    t = Timing([3., 1., 2., 5., 4.], batch=2)
    assert (t.median, t.spread, t.throughput) == (3, 2, 2/3)


def test_functions_take_turns():
    order = []
    made = measure_latencies([lambda: order.append('a'), lambda: order.append('b')], repeats=3, warmup=1)
    assert ''.join(order) == 'ab' + 'ab' + 'ba' + 'ab' and [len(t.times) for t in made] == [3, 3]
    assert len(measure_latencies([lambda: None], seconds=.01)[0].times) >= 5


def test_table(tmp_path, monkeypatch):
    mm, path = aten.mm.default, tmp_path/'deep'/'table.json'
    table = LatencyTable(path, budget=.001)
    s = table.seconds(mm, (Spec((8, 9)), torch.zeros(9, 7)))
    assert 0 < s < 1 and len(table) == 1 and '1 operators' in repr(table) and list(path.parent.iterdir()) == [path]
    other = LatencyTable(path, budget=.001)
    assert other.seconds(mm, (torch.zeros(8, 9), Spec((9, 7)))) == s # from the file
    calls = []
    monkeypatch.setattr(LatencyTable, '_measure', lambda *a: calls.append(a[-1]) or .5)
    for args, kwargs in (((Spec((8, 9)), torch.zeros(7, 9).t()), {}), ((Spec((8, 9), 'float64'), Spec((9, 7), 'float64')), {}), ((Spec((8, 9)), Spec((9, 6))), {})): other.seconds(mm, args, kwargs)
    assert len(calls) == 3 == len(set(calls)) # other strides, dtypes, shapes
    table.seconds(mm, (Spec((1, 1)), Spec((1, 1)))) # both have written, nothing is lost
    assert len(json.loads(path.read_text())) == 5 == len(LatencyTable(path))
    assert LatencyTable(path).staircase(mm, (Spec((8, 9)), Spec((9, 7))), [6, 7], at=[(1, 1)]) == {6: .5, 7: s}
    with pytest.raises(ValueError, match=r'at: \(1, 2\)'): table.staircase(mm, (Spec((8, 9)), Spec((9, 7))), [6], at=[(1, 2)])
    table.clear()
    assert len(table) == 0 and not path.exists() and len(LatencyTable(path)) == 0


def test_table_runs_what_changes_its_input_and_what_makes_tensors(tmp_path):
    table = LatencyTable(tmp_path/'t.json', budget=.001)
    state = torch.random.get_rng_state()
    x = X(2, 3)
    for op, args, kw in ((aten.relu_.default, (x,), {}), (aten.embedding.default, (X(9, 4), torch.ones(3, 5, dtype=torch.long)), {}), (aten.cat.default, ([x, x], 1), {}),
                         (aten.zeros.default, ([3, 4],), dict(dtype=torch.float64)), (aten.native_batch_norm.default, (X(2, 3, 4), X(3), X(3), X(3), X(3), False, .1, 1e-5), {}),
                         (aten.mul_.Tensor, (x, x), {}), (aten.where.self, (x > .5, x, x), {})):
        assert 0 < table.seconds(op, args, kw) < 1
    assert torch.equal(x, X(2, 3)) and torch.equal(state, torch.random.get_rng_state()) and len(table) == 7


def test_table_says_what_is_wrong(tmp_path, monkeypatch):
    path = tmp_path/'t.json'
    for text in ('{"a": ', '[1]', '{"a": "b"}', '{"a": -1.0}', '{"a": NaN}'):
        path.write_text(text)
        with pytest.raises(ValueError, match='t.json is not a table of latencies'): LatencyTable(path)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    table = LatencyTable()
    assert table.path.parent == tmp_path/'cache'/'fasterai_lib'/'latency' and f'torch-{torch.__version__}' in table.path.name and '1-threads' in table.path.name and not table.path.exists()
    with pytest.raises(TypeError, match='func must be an ATen operator'): table.seconds(torch.mm, (Spec((2, 2)), Spec((2, 2))))
    with pytest.raises(ValueError, match='does not run: RuntimeError'): table.seconds(aten.mm.default, (Spec((2, 2)), Spec((3, 2))))
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 3)
    with pytest.raises(ValueError, match='for 1 threads, now there are 3'): table.seconds(aten.mm.default, (Spec((2, 2)), Spec((2, 2))))
