"""What a user can get wrong, and the error that says so; the model is afterwards what it was, bit for bit."""
import random
import re
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from safetensors.torch import save_file
from test_properties import fill, rng_state, snapshot
from torch import nn
from torch.nn.utils import parametrizations

from fasterai_lib.core.allocation import Context, as_context
from fasterai_lib.core.criteria import Criteria
from fasterai_lib.core.granularity import Granularities, Tile, parse_axes
from fasterai_lib.core.masks import Masks
from fasterai_lib.core.schedule import Schedule, as_schedule, gradual, iterative, lottery, poly
from fasterai_lib.core.units import layers_of, units_of
from fasterai_lib.show.report import SparsityReport
from fasterai_lib.sparse.sparsifier import Sparsifier
from fasterai_lib.sparse.sparsify_callback import MaskCallback, SparsifyCallback

nan, inf = float('nan'), float('inf')


def net():
    return fill(nn.Sequential(OrderedDict(conv1=nn.Conv2d(3, 8, 3), bn=nn.BatchNorm2d(8), relu=nn.ReLU(), conv2=nn.Conv2d(8, 6, 3), pool=nn.AdaptiveAvgPool2d(1),
                                          flat=nn.Flatten(), fc=nn.Linear(6, 4))))

OTHER = fill(nn.Sequential(OrderedDict(conv1=nn.Conv2d(3, 9, 3), conv3=nn.Conv2d(9, 6, 3)))) # another architecture
STRANGER, TURNED = nn.Conv2d(1, 1, 1), fill(nn.Sequential(OrderedDict(conv1=nn.Conv2d(8, 3, 3, bias=False))))

def frozen(): return net().requires_grad_(False)

def spoiled(value):
    def make():
        m = net()
        with torch.no_grad(): m.conv2.weight[1, 2, 0, 0] = value
        return m
    return make

def parametrized():
    m = net()
    parametrizations.weight_norm(m.conv2)
    return m

def lazy(): return nn.Sequential(OrderedDict(first=nn.Conv2d(3, 8, 3), late=nn.LazyConv2d(4, 3)))

# --- what a case does with w: a model, a folder, and a Learner made before anything is compared

def make(granularity='weight', context='local', criteria='large_final', **kw): return lambda w: Sparsifier(w.model, granularity, context, criteria, **kw)
def prune(sparsity, granularity='weight', context='local', criteria='large_final', round_to=None, **kw):
    return lambda w: Sparsifier(w.model, granularity, context, criteria, **kw).sparsify_model(sparsity, round_to)
def layer(which, sparsity=50, granularity='filter', context='local', round_to=None, **kw):
    return lambda w: Sparsifier(w.model, granularity, context, 'large_final', **kw).sparsify_layer(which(w.model) if callable(which) else which, sparsity, round_to)
def fit(sparsity=50, granularity='weight', context='local', criteria='large_final', schedule='one_shot', epochs=1, **kw):
    def run(w):
        cb = SparsifyCallback(sparsity, granularity, context, criteria, schedule, **kw)
        with w.learn.no_bar(), w.learn.no_logging(): w.learn.fit(epochs, 0., cbs=cb)
    return run

def masks_of(model, granularity='filter'): return Sparsifier(model, granularity, 'local', 'large_final').plan(50)
def load_junk(w):
    save_file({'conv1.weight': torch.zeros(3)}, str(w.path/'weights.safetensors'))
    Masks.load(w.path/'weights.safetensors')
def load_text(w):
    (w.path/'notes.txt').write_text('not at all')
    Masks.load(w.path/'notes.txt')

CASES = [
    # sparsities
    ('below 0', prune(-1), ValueError, r'sparsity.*between 0 and 100.*-1'),
    ('above 100', prune(150), ValueError, r'sparsity.*between 0 and 100.*150'),
    ('nan', prune(nan), ValueError, r'sparsity.*nan'),
    ('infinite', prune(inf), ValueError, r'sparsity.*inf'),
    ('text', prune('50'), TypeError, r"sparsity.*percentage.*'50'"),
    ('bool', prune(True), TypeError, r'sparsity.*percentage.*True'),
    ('none', prune(None), TypeError, r'sparsity.*percentage.*None'),
    ('set', prune({50}), TypeError, r'sparsity.*percentage.*\{50\}'),
    ('tensor of several', prune(torch.tensor([50., 20.])), TypeError, r'sparsity.*percentage.*tensor'),
    ('list too short', prune([50]), ValueError, r'got 1 values for 2 layers: conv1, conv2'),
    ('empty list', prune([]), ValueError, r'got 0 values for 2 layers'),
    ('list with a bad entry', prune([50, 120]), ValueError, r"sparsity of 'conv2'.*120"),
    ('list with text', prune([50, 'x']), TypeError, r"sparsity of 'conv2'.*'x'"),
    ('nested list', prune([[50], 20]), TypeError, r"sparsity of 'conv1'.*\[50\]"),
    ('dict key', prune({'conv9': 50}), ValueError, r"'conv9'.*did you mean 'conv\d'.*conv1, conv2"),
    ('dict key that is no text', prune({3: 50}), ValueError, r'no layer matches 3;.*conv1, conv2'),
    ('dict with a bad entry', prune({'conv1': -4}), ValueError, r"sparsity of 'conv1'.*-4"),
    ('empty dict', prune({}), ValueError, r'(empty|no layer|names no).*(conv1|dict|sparsity)'),
    ('dict in global', prune({'conv1': 50}, context='global'), ValueError, r"dict.*context='local'.*'global'"),
    ('list in global', prune([50, 20], context='global'), ValueError, r"list.*context='local'.*'global'"),
    # granularities
    ('unknown granularity', make('filtre'), ValueError, r"'filtre'.*Conv2d.*did you mean 'filter'"),
    ('granularity of another layer', make('head'), ValueError, r"'head' is not available for Conv2d.*filter"),
    ('granularity not for a linear layer', make('filter', layer_type=nn.Linear), ValueError, r"'filter' is not available for Linear.*row"),
    ('granularity of a wrong type', make(3), TypeError, r'granularity.*name or a Tile.*3'),
    ('granularity none', make(None), TypeError, r'granularity.*None'),
    ('granularity dict without the layer', make({nn.Linear: 'row'}), ValueError, r'no entry for Conv2d'),
    ('tile axis', make(Tile(o=2, z=3)), ValueError, r"conv1.*'z'.*Conv2d.*allowed: g, h, i, o, w"),
    ('tile size', lambda w: Tile(o=0), ValueError, r'Tile\(o=0\).*>= 1'),
    ('tile size bool', lambda w: Tile(o=True), ValueError, r'Tile\(o=True\)'),
    ('tile size text', lambda w: Tile(o='2'), ValueError, r"Tile\(o='2'\)"),
    ('tile size fraction', lambda w: Tile(i=1.5), ValueError, r'Tile\(i=1.5\)'),
    ('pattern', lambda w: parse_axes('o [i]'), ValueError, r"'o \[i\]'.*\(a b\)"),
    ('add to an unknown type', lambda w: Granularities.add('x', Tile(o=2), nn.ReLU), ValueError, r'ReLU is not registered.*Conv2d'),
    ('register like an unknown type', lambda w: Granularities.register(type('L', (nn.Module,), {}), 'o i', like=nn.ReLU), ValueError, r'ReLU is not registered'),
    ('register no type', lambda w: Granularities.register('Linear', 'o i'), TypeError, r"'Linear'"),
    ('register a bad pattern', lambda w: Granularities.register(type('L', (nn.Module,), {}), 'o,i'), ValueError, r"'o,i'"),
    ('add what is no tile', lambda w: Granularities.add('x', 'o', nn.Conv2d), TypeError, r"Tile.*'o'"),
    # layers
    ('units of a ReLU', lambda w: units_of(w.model.relu, 'weight', 'relu'), TypeError, r'relu: ReLU.*Granularities.register'),
    ('no such layer in the model', make(layer_type=nn.LSTM), ValueError, r'no LSTM layer.*Sequential.*Conv2d, Linear'),
    ('layer_type without weights', make(layer_type=nn.ReLU), ValueError, r'ReLU has no known weights'),
    ('layer_type an instance', make(layer_type=nn.Conv2d(1, 1, 1)), TypeError, r'layer_type.*Conv2d\(1, 1'),
    ('layer_type text', make(layer_type='Conv2d'), TypeError, r"layer_type.*'Conv2d'"),
    ('layer_type a tuple with text', make(layer_type=(nn.Conv2d, 'Linear')), TypeError, r"layer_type.*'Linear'"),
    ('layer_type no module', make(layer_type=int), TypeError, r'layer_type.*int'),
    ('layer_type an empty tuple', make(layer_type=()), ValueError, r'layer_type.*\(\)'),
    ('layer_type a list', make(layer_type=[nn.Conv2d]), TypeError, r'layer_type.*\['),
    ('empty model', lambda w: layers_of(nn.Sequential()), ValueError, r'no prunable layer.*Sequential'),
    ('model without layers', lambda w: Sparsifier(nn.ReLU(), 'weight', 'local', 'large_final'), ValueError, r'no Conv2d layer.*ReLU.*no prunable layer'),
    ('model no module', lambda w: Sparsifier(list(w.model), 'weight', 'local', 'large_final'), TypeError, r'nn.Module.*list'),
    ('model a class', lambda w: Sparsifier(nn.Conv2d, 'weight', 'local', 'large_final'), TypeError, r'nn.Module.*type'),
    ('all frozen', prune(50), ValueError, r'conv1, conv2.*frozen=True', frozen),
    ('exclude nothing', make(exclude='conv7'), ValueError, r"exclude 'conv7'.*did you mean 'conv\d'"),
    ('exclude all', make(exclude='conv*'), ValueError, r'all are excluded'),
    ('exclude no text', make(exclude=3), TypeError, r'exclude.*3'),
    ('exclude a tuple of numbers', make(exclude=(3,)), TypeError, r'exclude.*3'),
    ('parametrized', make(), TypeError, r'conv2.*parametriz', parametrized),
    ('lazy', make(), ValueError, r'late.*not initialised', lazy),
    ('nan weights', prune(50), ValueError, r'conv2\.weight.*NaN', spoiled(nan)),
    ('infinite weights', prune(50, context='global', granularity='filter'), ValueError, r'conv2\.weight.*infinity', spoiled(inf)),
    ('nan weights per row', prune(50, context='per_row'), ValueError, r'conv2\.weight.*NaN', spoiled(nan)),
    ('nan weights n:m', prune(50, context='1:2', layer_type=nn.Conv2d, exclude='conv1'), ValueError, r'conv2\.weight.*NaN', spoiled(nan)),
    # contexts
    ('unknown context', make(context='globel'), ValueError, r"'globel'.*did you mean 'global'"),
    ('context of a wrong type', make(context=2), TypeError, r'context.*2.*local, global, per_row'),
    ('context none', make(context=None), TypeError, r'context.*None'),
    ('per_row of filters', make('filter', 'per_row'), ValueError, r"conv1.*'per_row'.*several units"),
    ('n:m that does not divide', make(context='2:4'), ValueError, r"conv1: axis 'i' has 3 units.*4.*exclude='conv1'"),
    ('n:m of spanned axes', make('channel', '2:4', exclude='conv1'), ValueError, r"conv2.*'2:4'.*axis 'i'"),
    ('n:m along no axis', make(context='2:4 q', exclude='conv1'), ValueError, r"conv2.*'q'"),
    ('n above m', lambda w: as_context('4:2'), ValueError, r"'4:2'.*1 <= n < m"),
    ('n equal to m', lambda w: as_context('4:4'), ValueError, r"'4:4'.*1 <= n < m"),
    ('0:4', lambda w: as_context('0:4'), ValueError, r"'0:4'.*1 <= n < m"),
    ('n:m in text', lambda w: as_context('two:4'), ValueError, r"'two:4'.*n:m"),
    ('a context of that name', lambda model: Context('locl'), ValueError, r"'locl'.*local"),
    ('n:m and another sparsity', prune(30, context='2:4', exclude='conv1'), ValueError, r"conv2.*'2:4'.*50 %.*30"),
    # limits
    ('round_to 0', prune(50, 'filter', round_to=0), ValueError, r'round_to.*at least 1.*0'),
    ('round_to negative', prune(50, 'filter', round_to=-8), ValueError, r'round_to.*-8'),
    ('round_to bool', prune(50, 'filter', round_to=True), TypeError, r'round_to.*True'),
    ('round_to fraction', prune(50, 'filter', round_to=2.5), TypeError, r'round_to.*2\.5'),
    ('round_to text', prune(50, 'filter', round_to='8'), TypeError, r"round_to.*'8'"),
    ('round_to above the units', prune(50, 'filter', round_to=16), ValueError, r'conv1.*8 units.*round_to=16'),
    ('round_to and n:m', prune(50, context='2:4', exclude='conv1', round_to=4), ValueError, r"round_to.*'2:4'"),
    ('round_to and per_row', prune(50, context='per_row', round_to=4), ValueError, r"round_to.*'per_row'"),
    ('round_to and 100 %', prune(100, 'filter', round_to=2), ValueError, r'conv1.*100 %.*round_to=2'),
    ('min_kept negative', make(min_kept=-1), ValueError, r'min_kept.*-1'),
    ('min_kept fraction', make(min_kept=.5), TypeError, r'min_kept.*0\.5'),
    ('min_kept bool', make(min_kept=True), TypeError, r'min_kept.*True'),
    ('min_kept above the units', prune(50, 'filter', min_kept=7), ValueError, r'conv[12].*[68] units.*min_kept=7'),
    ('min_kept and 100 %', prune(100, 'filter', min_kept=1), ValueError, r'conv1.*100 %.*min_kept=1'),
    ('min_kept against the sparsity', prune(75, 'filter', min_kept=5), ValueError, r'conv1.*min_kept=5'),
    ('min_kept against the sparsity in global', prune(75, 'filter', 'global', min_kept=5), ValueError, r'75 %.*min_kept=5'),
    ('max_sparsity 150', make(max_sparsity=150), ValueError, r'max_sparsity.*150'),
    ('max_sparsity text', make(max_sparsity='80'), TypeError, r"max_sparsity.*'80'"),
    ('max_sparsity below the sparsity', prune(60, max_sparsity=50), ValueError, r'conv1.*60.*max_sparsity=50'),
    ('max_sparsity below the sparsity in global', prune(60, context='global', max_sparsity=50), ValueError, r'60 %.*max_sparsity=50'),
    # criteria
    ('unknown criterion', make(criteria='large_finl'), ValueError, r"'large_finl'.*did you mean 'large_final'"),
    ('a bare function', make(criteria=torch.abs), TypeError, r'Criteria\(f\)'),
    ('criterion none', make(criteria=None), TypeError, r'criteria.*None'),
    ('criterion of no function', lambda w: Criteria(3), TypeError, r'function.*3'),
    ('unknown reducer', lambda w: Criteria(torch.abs, reducer='avg'), ValueError, r"reducer 'avg'.*mean"),
    ('unknown normalizer', lambda w: Criteria(torch.abs, normalizer='meen'), ValueError, r"normalizer 'meen'.*did you mean 'mean'"),
    ('reducer none', lambda w: Criteria(torch.abs, reducer=None), (ValueError, TypeError), r'reducer.*None.*mean'),
    ('two references', lambda w: Criteria(torch.abs, needs_init=True, needs_update=True), ValueError, r'needs_init and needs_update'),
    ('output_fn without a reference', lambda w: Criteria(torch.abs, output_fn=torch.sub), ValueError, r'output_fn.*needs_init=True'),
    ('return_init without a reference', lambda w: Criteria(torch.abs, return_init=True), ValueError, r'return_init.*needs_init=True'),
    ('output_fn no function', lambda w: Criteria(torch.abs, output_fn='sub', needs_init=True), TypeError, r"output_fn.*'sub'"),
    ('criterion giving nan', prune(50, criteria=Criteria(lambda x: x/0*0, name='odd')), ValueError, r'conv1.*odd.*NaN'),
    ('criterion giving nan per kernel', prune(50, 'kernel', 'global', Criteria(lambda x: x*nan, name='odd')), ValueError, r'conv1.*odd.*NaN'),
    ('criterion of another shape', prune(50, criteria=Criteria(lambda x: x.sum(), name='odd')), ValueError, r'conv1.*odd.*shape'),
    # one layer
    ('unknown layer', layer('conv3'), ValueError, r"'?conv3'?.*did you mean 'conv\d'"),
    ('a layer outside the model', layer(lambda m: STRANGER), ValueError, r'Conv2d.*not a layer.*conv1, conv2'),
    ('a ReLU', layer(lambda m: m.relu), ValueError, r'relu.*not a layer.*conv1, conv2'),
    ('the linear layer', layer('fc'), ValueError, r'fc.*not a layer.*conv1, conv2'),
    ('a number for a layer', layer(lambda m: 3), (TypeError, ValueError), r'\b3\b|int'),
    ('one layer, a list', layer('conv1', [50]), TypeError, r'sparsity.*\[50\]'),
    ('one layer, above 100', layer('conv1', 101), ValueError, r'sparsity.*101'),
    ('one layer, round_to', layer('conv1', 50, round_to=-1), ValueError, r'round_to.*-1'),
    # schedules
    ('unknown schedule', lambda w: as_schedule('agpp'), ValueError, r"'agpp'.*did you mean 'agp'"),
    ('schedule a number', lambda w: as_schedule(3), TypeError, r'Schedule.*3'),
    ('start after end', lambda w: Schedule(lambda p: p, start=.8, end=.2), ValueError, r'start=0\.8 is after end=0\.2'),
    ('start after end in two units', lambda w: Schedule(lambda p: p, start='5 epochs', end=.2).over(50, 10, 100), ValueError, r'start is at 50%.*after.*20%'),
    ('start a bare number', lambda w: Schedule(lambda p: p, start=3), ValueError, r"start=3.*'3 epochs'"),
    ('start nan', lambda w: Schedule(lambda p: p, start=nan), ValueError, r'start=nan'),
    ('start negative', lambda w: Schedule(lambda p: p, start=-.1), ValueError, r'start=-0\.1'),
    ('duration misspelt', lambda w: Schedule(lambda p: p, start='3 apochs'), ValueError, r"start='3 apochs'.*epochs"),
    ('no arguments', lambda w: Schedule(lambda: 1), TypeError, r'f\(start, end, pos\).*takes 0'),
    ('four arguments', lambda w: Schedule(lambda a, b, c, d: 1), TypeError, r'f\(start, end, pos\).*takes 4'),
    ('no function', lambda w: Schedule('lin'), TypeError, r"f\(start, end, pos\).*'lin'"),
    ('start_sparsity', lambda w: Schedule(lambda p: p, start_sparsity=120), ValueError, r'start_sparsity=120'),
    ('gives nan', lambda w: Schedule(lambda s, e, p: nan, name='odd')(50, .5), ValueError, r'odd.*nan'),
    ('gives too much', lambda w: Schedule(lambda s, e, p: 2*e, name='odd')(60, .5), ValueError, r'odd.*120'),
    ('gives text', lambda w: Schedule(lambda s, e, p: 'much', name='odd')(60, .5), (TypeError, ValueError), r'odd.*much'),
    ('iterative(0)', lambda w: iterative(0), ValueError, r'n_steps=0'),
    ('iterative(2.5)', lambda w: iterative(2.5), ValueError, r'n_steps=2\.5'),
    ('lottery(True)', lambda w: lottery(True), ValueError, r'n_rounds=True'),
    ('poly(-1)', lambda w: poly(-1), ValueError, r'power=-1'),
    ('poly text', lambda w: poly('3'), ValueError, r"power='3'"),
    ('gradual gamma 0', lambda w: gradual(gamma=0), ValueError, r'gamma=0'),
    ('gradual gamma text', lambda w: gradual(gamma='5'), (TypeError, ValueError), r"gamma='5'"),
    ('gradual step 0', lambda w: gradual(step=0), ValueError, r'step=0'),
    ('gradual from above', fit(20, schedule=gradual(30.)), ValueError, r'30.*above.*20'),
    # training
    ('fit: sparsity', fit(130), ValueError, r'sparsity.*130'),
    ('fit: granularity', fit(granularity='krnel'), ValueError, r"'krnel'.*did you mean 'kernel'"),
    ('fit: context', fit(context='gobal'), ValueError, r"'gobal'.*did you mean 'global'"),
    ('fit: criterion', fit(criteria='magnitude'), ValueError, r"'magnitude'.*allowed"),
    ('fit: schedule', fit(schedule='linear'), ValueError, r"'linear'.*did you mean 'lin'"),
    ('fit: list', fit([50]), ValueError, r'got 1 values for 2 layers'),
    ('fit: no such layer', fit(layer_type=nn.LSTM), ValueError, r'no LSTM layer.*Conv2d, Linear'),
    ('fit: schedule gives nan', fit(schedule=Schedule(lambda s, e, p: nan, name='odd')), ValueError, r'odd.*nan'),
    ('fit: round_to', fit(granularity='filter', round_to=32), ValueError, r'conv1.*round_to=32'),
    ('fit: nan weights', fit(schedule='static'), ValueError, r'conv2\.weight.*NaN', spoiled(nan)),
    ('fit: part of another model', fit(model=nn.Sequential(nn.Conv2d(1, 1, 1))), ValueError, r'model.*(part|Learner)'),
    ('fit: model a name', fit(model='conv1'), TypeError, r"nn.Module.*str"),
    ('fit: rewind never', fit(schedule='iterative', lth=True, rewind_epoch=2), ValueError, r'rewind_epoch=2.*1 epochs'),
    ('fit: lth with lin', fit(schedule='lin', lth=True, epochs=2), ValueError, r'lth.*lin.*iterative'),
    ('fit: pruned before the rewind', fit(schedule='iterative', lth=True, rewind_epoch=1, epochs=2), ValueError, r'iterative prunes before rewind_epoch=1'),
    ('fit: masks of another model', lambda w: fit(masks=masks_of(OTHER))(w), ValueError, r'conv1\.weight.*mask.*\(8, 3, 3, 3\)'),
    ('fit: a masks file that is missing', lambda w: fit(masks=w.path/'none.safetensors')(w), FileNotFoundError, r'none\.safetensors'),
    ('fit: masks of a wrong type', fit(masks=3), (TypeError, FileNotFoundError), r'masks.*3'),
    ('rewind_epoch negative', lambda w: SparsifyCallback(50, 'weight', 'local', 'large_final', 'lin', lth=True, rewind_epoch=-1), ValueError, r'rewind_epoch.*-1'),
    ('rewind_epoch fraction', lambda w: SparsifyCallback(50, 'weight', 'local', 'large_final', 'lin', lth=True, rewind_epoch=.5), ValueError, r'rewind_epoch.*0\.5'),
    ('save_tickets without lth', lambda w: SparsifyCallback(50, 'weight', 'local', 'large_final', 'lin', save_tickets=True), ValueError, r'save_tickets=True needs lth=True'),
    ('unknown keyword', lambda w: SparsifyCallback(50, 'weight', 'local', 'large_final', 'lin', minkept=2), TypeError, r"'minkept'.*min_kept"),
    ('callback without a Learner', lambda w: SparsifyCallback(50, 'weight', 'local', 'large_final', 'lin').before_fit(), (ValueError, TypeError, AttributeError, RuntimeError), r'SparsifyCallback.*Learner'),
    ('mask callback without a Learner', lambda w: MaskCallback().before_fit(), (ValueError, TypeError, AttributeError, RuntimeError), r'MaskCallback.*Learner'),
    # masks
    ('masks of other shapes', lambda w: masks_of(OTHER).apply(w.model), ValueError, r'conv1\.weight.*243 weights.*\(8, 3, 3, 3\)'),
    ('masks of other names', lambda w: Masks({k: m for k, m in masks_of(OTHER).masks.items() if 'conv3' in k}).apply(w.model), ValueError, r"'conv3\.weight'.*did you mean 'conv\d\.weight'"),
    ('held in another model', lambda w: masks_of(OTHER).held(w.model), ValueError, r'conv1\.weight.*243 weights'),
    ('masks of a permuted shape', lambda w: masks_of(TURNED).apply(w.model), ValueError, r'conv1\.weight.*\(8, 3, 3, 3\)'),
    ('load what is not masks', load_junk, ValueError, r'weights\.safetensors.*not a file of masks'),
    ('load text', load_text, ValueError, r'notes\.txt'),
    ('load a missing file', lambda w: Masks.load(w.path/'none.safetensors'), FileNotFoundError, r'none\.safetensors'),
    ('combine other parameters', lambda w: masks_of(w.model) & masks_of(OTHER), ValueError, r'different parameters.*conv2'),
    ('combine other shapes', lambda w: masks_of(w.model, 'kernel') | Masks({'conv1.weight': masks_of(OTHER).masks['conv1.weight'], 'conv2.weight': masks_of(w.model).masks['conv2.weight']}), ValueError, r'conv1\.weight.*shapes'),
    ('combine with a number', lambda w: masks_of(w.model) & 3, TypeError, r"Masks.*int"),
    ('no such mask', lambda w: masks_of(w.model)['conv1.wieght'], KeyError, r"conv1\.wieght.*did you mean 'conv1\.weight'"),
    ('masks applied to no module', lambda w: masks_of(w.model).apply(w.model.state_dict()), TypeError, r'nn\.Module.*OrderedDict'),
    # reports
    ('report of no module', lambda w: SparsityReport(w.model.state_dict()), TypeError, r'nn.Module.*OrderedDict'),
    ('report of an empty model', lambda w: SparsityReport(nn.ReLU()), ValueError, r'no prunable layer.*ReLU'),
    ('report of a missing type', lambda w: SparsityReport(w.model, layer_type=nn.LSTM), ValueError, r'no LSTM layer'),
    ('report with inputs that do not fit', lambda w: SparsityReport(w.model, torch.randn(1, 5, 8, 8)), (ValueError, RuntimeError), r'5 channels'),
]


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('case', CASES, ids=[c[0].replace(' ', '-') for c in CASES])
def test_error_says_what_is_wrong_and_changes_nothing(case, tmp_path):
    name, call, kind, message, model = (*case, net)[:5]
    torch.manual_seed(0); np.random.seed(0); random.seed(0)
    model = model()
    w = SimpleNamespace(model=model, path=tmp_path)
    if name.startswith('fit') or call.__qualname__.startswith('fit.'):
        data = [(torch.randn(3, 8, 8), torch.tensor(i % 4)) for i in range(8)]
        w.learn = Learner(DataLoaders(DataLoader(data, bs=2), DataLoader(data, bs=2)), model, loss_func=nn.CrossEntropyLoss(), path=tmp_path)
    kinds = dict(Granularities.kinds), {t: dict(k.names) for t, k in Granularities.kinds.items()}
    lazy = any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters())
    snap, rng = None if lazy else snapshot(model), rng_state()
    try:
        with pytest.raises(kind) as caught: call(w)
    finally:
        registered = dict(Granularities.kinds), {t: dict(k.names) for t, k in Granularities.kinds.items()}
        for t in set(Granularities.kinds) - set(kinds[0]): del Granularities.kinds[t]
        for t, k in Granularities.kinds.items(): k.names = kinds[1][t]
    assert re.search(message, str(caught.value), re.S), f'message: {caught.value}'
    assert registered == kinds, 'the registry has changed'
    if not lazy: assert snapshot(model) == snap, 'the model has changed'
    if name != 'report with inputs that do not fit': assert rng_state()[1:] == rng[1:] and (hasattr(w, 'learn') or rng_state() == rng), 'a generator has moved'


@pytest.mark.parametrize('value', [.5, .999, 1e-6])
def test_a_fraction_warns(value):
    with pytest.warns(UserWarning, match=rf'{value}.*percentage.*did you mean {100*value:g} %'): Sparsifier(net(), 'weight', 'local', 'large_final').sparsify_model(value)

def test_after_an_error_the_same_object_still_works():
    model = net()
    s = Sparsifier(model, 'filter', 'global', 'large_final')
    for bad in (130, 'x', [50, 50]):
        with pytest.raises((ValueError, TypeError)): s.sparsify_model(bad)
    with pytest.raises(ValueError): s.sparsify_layer('conv1', 101)
    with pytest.raises(ValueError): s.sparsify_layer('conv1', 50, round_to=99)
    assert s.context.name == 'global' and not len(s.masks)
    assert abs(s.sparsify_model(50).sparsity - 50) < 10
