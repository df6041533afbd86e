"""Keeping a pruned model: files of what was kept, plans for copies, and all the ways in which torch and fastai save, copy, export and compile."""
import copy
import importlib.util
import io
import json

import pytest
import torch
import fastai.callback.progress
from fastai.data.core import Datasets
from fastai.learner import Learner, load_learner
from safetensors import safe_open
from safetensors.torch import save_file
from test_prune_bad_input import picture, randomised, rng
from torch import nn
from torch.nn import functional as F

from fasterai_lib.prune.plan import load_plan, load_pruned, save_pruned
from fasterai_lib.prune.pruner import Pruner
from fasterai_lib.sparse.sparsifier import Sparsifier

seeded = lambda: torch.Generator().manual_seed(3)
PICTURE, STEPS, TOKENS = torch.randn(2, 3, 8, 8, generator=seeded()), torch.randn(2, 5, 8, generator=seeded()), torch.randint(0, 11, (2, 6), generator=seeded())


class Cnn(nn.Module):
    def __init__(self, c=8, h=16):
        super().__init__()
        self.stem, self.bn, self.a, self.g, self.bng, self.b = nn.Conv2d(3, c, 3), nn.BatchNorm2d(c), nn.Conv2d(c, h, 1), nn.Conv2d(h, h, 3, padding=1, groups=4), nn.BatchNorm2d(h), nn.Conv2d(h, c, 1)
        self.fc = nn.Linear(c, 5)
    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        return self.fc((x + self.b(self.bng(self.g(self.a(x).relu())).relu())).mean((2, 3)))

class Transformer(nn.Module): # states its sizes
    def __init__(self, d=8, heads=4, width=6, hidden=20, words=11):
        super().__init__()
        self.num_heads, self.head_dim, self.inner, self.hidden = heads, width, heads*width, hidden
        self.tok, self.norm, self.qkv, self.out = nn.Embedding(words, d), nn.LayerNorm(d), nn.Linear(d, 3*heads*width), nn.Linear(heads*width, d)
        self.up, self.down, self.head = nn.Linear(d, hidden), nn.Linear(hidden, d), nn.Linear(d, 3)
    def forward(self, x):
        x = self.tok(x)
        B, N, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, self.inner))
        return self.head(x + self.down(F.gelu(self.up(x))))

class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.fc = nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True), nn.Linear(12, 4)
    def forward(self, x): return self.fc(self.rnn(x)[0])

class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.attn, self.fc = nn.Linear(8, 12), nn.MultiheadAttention(12, 4, batch_first=True), nn.Linear(12, 3)
    def forward(self, x):
        x = self.inp(x)
        return self.fc(x + self.attn(x, x, x, need_weights=False)[0])

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.tok, self.a, self.b, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.b.weight, self.head.weight = self.a.weight, self.tok.weight
    def forward(self, x): return self.head(self.b(self.a(self.tok(x)).relu()).relu())

class Normed(nn.Module):
    def __init__(self, wrap=nn.utils.parametrizations.weight_norm):
        super().__init__()
        self.a, self.b, self.fc = wrap(nn.Linear(8, 12)), nn.Linear(12, 10), nn.Linear(10, 3)
    def forward(self, x): return self.fc(self.b(self.a(x).relu()).relu())

MODELS = dict(cnn=(Cnn, PICTURE), transformer=(Transformer, TOKENS), lstm=(Recurrent, STEPS), heads=(Heads, STEPS), tied=(Tied, TOKENS), weight_norm=(Normed, STEPS))
def build(name, seed=0): return randomised(MODELS[name][0](), seed).eval()
def pruned(name, *sparsities):
    model = build(name)
    for s in sparsities or (50,): plan = Pruner(model, MODELS[name][1]).prune_model(s)
    assert len(plan.cuts) and sum(p.numel() for p in model.parameters()) < .8*sum(p.numel() for p in build(name).parameters())
    return model

def numbers(model): # every size that a module states
    return [(n, type(m).__name__, {k: v for k, v in vars(m).items() if isinstance(v, (int, float, str, tuple, bool)) and k not in ('training', '_is_torch_compile')}) for n, m in model.named_modules()]
def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y) for x, y in zip(a.values(), b.values()))
def same(a, b, x): # in evaluation and in training
    assert same_weights(a, b) and numbers(a) == numbers(b)
    assert torch.equal(a.eval()(x), b.eval()(x))
    assert torch.equal(a.train()(x), b.train()(x)) and same_weights(a, b)

# --- files

TWICE = dict(once=lambda m, x: Pruner(m, x).prune_model(50), two_pruners=lambda m, x: [Pruner(m, x).prune_model(s) for s in (20, 50)],
             one_pruner=lambda m, x: [p.prune_model(s) for p in [Pruner(m, x)] for s in (20, 50)], inexact=lambda m, x: Pruner(m, x, exact=False).prune_model(50),
             rounded=lambda m, x: Pruner(m, x, context='global', round_to=2).prune_model(60))

@pytest.mark.parametrize('way', TWICE)
@pytest.mark.parametrize('name', MODELS)
def test_round_trip(name, way, tmp_path):
    x, model, fresh, before = MODELS[name][1], build(name), build(name, 7), rng()
    TWICE[way](model, x)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in fresh.parameters())
    save_pruned(model, tmp_path/'m.safetensors')
    ids = [id(p) for p in fresh.parameters()]
    assert load_pruned(fresh, tmp_path/'m.safetensors') is fresh and [id(p) for p in fresh.parameters()] == ids and rng() == before
    same(model, fresh, x)
    assert (name != 'tied') or (fresh.b.weight is fresh.a.weight and fresh.head.weight is fresh.tok.weight)
    fresh.zero_grad(); fresh(x).sum().backward()
    save_pruned(fresh, tmp_path/'again.safetensors') # and on it goes
    same(load_pruned(build(name, 8), tmp_path/'again.safetensors'), fresh, x)
    third = load_pruned(build(name, 9), tmp_path/'again.safetensors').eval()
    Pruner(third, x).prune_model(30)
    save_pruned(third, tmp_path/'third.safetensors')
    same(load_pruned(build(name, 10), tmp_path/'third.safetensors'), third, x)

def test_one_pruner_and_two_give_the_number_asked():
    one, two = build('cnn'), build('cnn')
    TWICE['one_pruner'](one, PICTURE); TWICE['two_pruners'](two, PICTURE)
    assert one.stem.out_channels == 4 and one.g.out_channels == 8 and one.g.groups == 4 # of what there was at first
    assert two.stem.out_channels == 3 # 20 % of 8, then 50 % of 6

def test_a_file_is_no_pickle(tmp_path):
    save_pruned(pruned('cnn'), str(tmp_path/'m.safetensors'))
    data = (tmp_path/'m.safetensors').read_bytes()
    n = int.from_bytes(data[:8], 'little')
    assert set(json.loads(json.loads(data[8:8+n])['__metadata__']['fasterai_lib.plan'])) >= {'model', 'cuts', 'sizes', 'shapes'} and b'c__builtin__' not in data
    with safe_open(str(tmp_path/'m.safetensors'), 'pt') as f: assert set(f.keys()) == set(build('cnn').state_dict())
    plan = load_plan(tmp_path/'m.safetensors')
    assert len(plan.cuts['stem.weight'][0]) == 4 and plan.shapes['stem.weight'] == (8, 3, 3, 3)

def text(p): (p/'m').write_text('not at all')
def empty(p): (p/'m').write_bytes(b'')
def truncated(n):
    def f(p):
        save_pruned(pruned('cnn'), p/'m')
        (p/'m').write_bytes((p/'m').read_bytes()[:n])
    return f
def masks(p): Sparsifier(build('cnn'), 'filter', 'local', 'large_final').plan(50).save(p/'m')
def weights(p): save_file(dict(pruned('cnn').state_dict()), p/'m')
def pickle(p): torch.save(pruned('cnn').state_dict(), p/'m')
def other(name): return lambda p: save_pruned(pruned(name), p/'m')
def extra(p): # the same layers and one more
    m = pruned('cnn')
    m.more = nn.Linear(2, 2)
    save_pruned(m, p/'m')
def less(p):
    m = pruned('cnn')
    del m.fc.bias
    m.fc.bias = None
    save_pruned(m, p/'m')
def wide(p):
    m = randomised(Cnn(8, 32)).eval()
    Pruner(m, PICTURE).prune_model(50) # as wide afterwards as the other is before
    save_pruned(m, p/'m')
def uncut_wide(p): # another width of a layer that was not cut
    m = randomised(Cnn()).eval()
    m.fc = nn.Linear(8, 7)
    Pruner(m, PICTURE, ignored='stem').prune_model(50)
    save_pruned(m, p/'m')

REFUSED = [('text', text, ValueError, r'm: not a file'), ('empty', empty, ValueError, r'm: not a file'), ('a folder', lambda p: (p/'m').mkdir(), (ValueError, OSError), r''),
           ('nothing of the end', truncated(-40), ValueError, r'm: not a file'), ('half', truncated(900), ValueError, r'm: not a file'), ('a little', truncated(5), ValueError, r'm: not a file'),
           ('masks', masks, ValueError, r'm: no plan.*save_pruned'), ('weights', weights, ValueError, r'm: no plan.*save_pruned'), ('a pickle', pickle, ValueError, r'm: not a file'),
           ('missing', lambda p: None, FileNotFoundError, r'\bm\b'), ('another architecture', other('transformer'), ValueError, r"'[a-z.]+' that Cnn does not have"), ('another one', other('heads'), ValueError, r'Cnn'),
           ('a layer more', extra, ValueError, r'm is not a Cnn.*more\.weight'), ('a tensor less', less, ValueError, r'm is not a Cnn.*fc\.bias'), ('another width', wide, ValueError, r'shape \(.*Cnn has \('),
           ('another width of a whole layer', uncut_wide, ValueError, r'm is not a Cnn.*fc\.(weight|bias)')]

@pytest.mark.parametrize('case', REFUSED, ids=[c[0].replace(' ', '-') for c in REFUSED])
def test_what_is_no_file_of_this_model_changes_nothing(case, tmp_path):
    name, make, kind, message = case
    make(tmp_path)
    fresh = build('cnn').train()
    fresh(PICTURE).sum().backward()
    snap, before = picture(fresh), rng()
    with pytest.raises(kind, match=f'(?s){message}'): load_pruned(fresh, tmp_path/'m')
    assert picture(fresh) == snap and rng() == before

def test_refusals(tmp_path):
    model = pruned('cnn')
    save_pruned(model, tmp_path/'m')
    for m in (model, pruned('cnn', 20)):
        snap = picture(m)
        with pytest.raises(ValueError, match='Cnn has been pruned already.*anew'): load_pruned(m, tmp_path/'m')
        assert picture(m) == snap
    with pytest.raises(ValueError, match='Cnn has not been pruned'): save_pruned(build('cnn'), tmp_path/'n')
    with pytest.raises(TypeError, match='nn.Module, got OrderedDict'): save_pruned(model.state_dict(), tmp_path/'n')
    with pytest.raises(TypeError, match='nn.Module, got OrderedDict'): load_pruned(model.state_dict(), tmp_path/'m')
    assert not (tmp_path/'n').exists()

# --- plans

@pytest.mark.parametrize('name', MODELS)
def test_a_plan_is_for_any_copy(name):
    x, model, masked = MODELS[name][1], build(name).double(), build(name).double()
    x = x.double() if x.is_floating_point() else x
    plan = Pruner(build(name), MODELS[name][1]).plan(50)
    small = copy.deepcopy(model)
    plan.apply(masked); plan.remove(small)
    assert torch.allclose(masked(x), small(x), rtol=1e-10, atol=1e-12) and not torch.equal(masked(x), model(x)) and same_weights(model, build(name).double())
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in model.parameters()) - plan.removed_weights
    snap = picture(small)
    with pytest.raises(ValueError, match=r'the plan is for shape \(.*has \('): plan.remove(small) # it has gone already
    with pytest.raises(ValueError, match='does not have|the plan is for shape'): plan.remove(stranger := build('cnn' if name != 'cnn' else 'tied'))
    assert picture(small) == snap and same_weights(stranger, build('cnn' if name != 'cnn' else 'tied'))
    with pytest.raises(ValueError): plan.apply(stranger)
    assert same_weights(stranger, build('cnn' if name != 'cnn' else 'tied'))

def test_the_table_of_a_plan():
    t = (p := Pruner(build('cnn'), PICTURE)).plan(50).table()
    assert list(t.columns) == ['layer', 'units', 'kept', 'removed %', 'slices', 'tensors'] and t['removed %'].tolist() == [50]*len(t)
    rows = t.set_index('layer')
    assert rows.units['stem'] == 8 and rows.kept['stem'] == 4 and rows.tensors['stem'] >= 6
    assert 'groups of units' in repr(p.plan(50)) and len(p.plan(0).table()) == 0
    model = build('cnn')
    p = Pruner(model, PICTURE)
    p.prune_model(25)
    assert p.prune_model(50).table().set_index('layer').loc['stem', ['units', 'kept']].tolist() == [6, 4]

# --- torch

def through_file(m, x):
    torch.save(m, f := io.BytesIO())
    return torch.load(io.BytesIO(f.getvalue()), weights_only=False)
def through_state(m, x):
    out = copy.deepcopy(m)
    randomised(out, 9)
    out.load_state_dict(copy.deepcopy(m.state_dict()))
    return out
def exported(m, x):
    with torch.no_grad(): return torch.export.export(m, (x,), strict=False).module()
def exported_file(m, x):
    with torch.no_grad(): torch.export.save(torch.export.export(m, (x,), strict=False), f := io.BytesIO())
    return torch.export.load(io.BytesIO(f.getvalue())).module()
def compiled(m, x):
    torch._dynamo.reset()
    return torch.compile(m, backend='eager')
def traced(m, x):
    with torch.no_grad(): return torch.jit.trace(m, x)
WAYS = dict(file=through_file, deepcopy=lambda m, x: copy.deepcopy(m), state=through_state, export=exported, export_file=exported_file, compile=compiled, trace=traced)

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('name', MODELS)
def test_torch_takes_it(name, way):
    if (name, way) == ('weight_norm', 'file'): pytest.skip('torch saves no parametrised module, pruned or not')
    x, model = MODELS[name][1], pruned(name)
    want, snap = model(x), numbers(model)
    out = WAYS[way](model, x)
    with torch.no_grad(): torch.testing.assert_close(out(x), want, rtol=1e-5, atol=1e-6)
    assert numbers(model) == snap
    if way in ('file', 'deepcopy', 'state'):
        same(out, model, x)
        Pruner(out.eval(), x).prune_model(30) # and it goes on

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', MODELS)
def test_onnx(name):
    if not importlib.util.find_spec('onnx') or not importlib.util.find_spec('onnxscript'): pytest.skip('onnx and onnxscript are not installed')
    import onnx
    x, model = MODELS[name][1], pruned(name)
    torch.onnx.export(model, (x,), f := io.BytesIO(), dynamo=False)
    onnx.checker.check_model(graph := onnx.load_model_from_string(f.getvalue()))
    sizes = {tuple(i.dims) for i in graph.graph.initializer}
    if name == 'cnn': assert (4, 3, 3, 3) in sizes and (8, 3, 3, 3) not in sizes

# --- fastai

def picture_of(i): return PICTURE[i % 2]
def label_of(i): return torch.tensor(i % 5)
def learner(model, path):
    sets = Datasets(list(range(8)), [[picture_of], [label_of]], splits=[list(range(8)), list(range(4))])
    return Learner(sets.dataloaders(bs=4, num_workers=0, device='cpu'), model, loss_func=nn.CrossEntropyLoss(), path=path)

def fit(learn): # quietly
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)

@pytest.mark.filterwarnings('ignore')
def test_fastai_saves_loads_and_exports(tmp_path):
    learn = learner(build('cnn'), tmp_path)
    fit(learn)
    Pruner(learn.model, PICTURE).prune_model(50, learn.opt)
    fit(learn)
    learn.save('small')
    save_pruned(learn.model, tmp_path/'m')
    want, state = copy.deepcopy(learn.model), copy.deepcopy(learn.opt.state_dict())
    fit(learn)
    assert not same_weights(learn.model, want)
    learn.load('small', with_opt=True)
    assert same_weights(learn.model, want) and all(torch.equal(a['grad_avg'], b['grad_avg']) for a, b in zip(state['state'], learn.opt.state_dict()['state']) if 'grad_avg' in a)
    fit(learn)
    learn.load('small')
    learn.export('learn.pkl')
    same(load_learner(tmp_path/'learn.pkl').model, copy.deepcopy(want), PICTURE)
    other = learner(load_pruned(build('cnn', 4), tmp_path/'m'), tmp_path)
    same(copy.deepcopy(other.model), copy.deepcopy(want), PICTURE)
    fit(other.load('small')) # fastai's file fits the model that was made small
    with pytest.raises(RuntimeError, match='size mismatch'): learner(build('cnn'), tmp_path).load('small')
