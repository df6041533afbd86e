"""Recipes: what a file says is what is done; a mistake is told with its line; nothing else can be in a file."""
import copy
import json
import random
import re
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import jsonschema
import pytest
import torch
import yaml
from fastai.callback.schedule import *
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from fasterai_lib.core.criteria import criteria
from fasterai_lib.core.schedule import Schedule, one_cycle, schedules, sched_poly
from fasterai_lib.prune.prune_callback import PruneCallback
from fasterai_lib.prune.pruner import Pruner
from fasterai_lib.recipe.recipe import Recipe
from fasterai_lib.recipe.recipe_callback import RecipeCallback
from fasterai_lib.recipe.schema import context_names, make_schedule, problems, schedule_arguments, schema
from fasterai_lib.recipe.text import read_lines, write_text
from fasterai_lib.sparse.sparsifier import Sparsifier
from fasterai_lib.sparse.sparsify_callback import MaskCallback, SparsifyCallback

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT/'fasterai_lib/recipe.schema.json'
CASES = yaml.safe_load((ROOT/'nbs/tutorials/bad_recipes.yaml').read_text())
FULL = schema(defs=False)
VALID = jsonschema.Draft202012Validator(schema())
quick = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(OrderedDict(stem=nn.Conv2d(3, 8, 3), bn=nn.BatchNorm2d(8), relu=nn.ReLU(), body=nn.Conv2d(8, 16, 3), pool=nn.AdaptiveAvgPool2d(1),
                                     flat=nn.Flatten(), head=nn.Linear(16, 4)))

def state(m): return {k: v.clone() for k, v in m.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def zeros(m): return {n: int((p == 0).sum()) for n, p in m.named_parameters() if p.ndim > 1}


# --- mistakes

def test_there_are_many_mistakes(): assert len(CASES) >= 40 and len({c['about'] for c in CASES}) == len(CASES)


@pytest.mark.parametrize('case', CASES, ids=lambda c: c['about'])
def test_mistake_is_told(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(case['file']).write_text(case['text'])
    model = net()
    before = state(model)
    with pytest.raises(ValueError) as e:
        recipe = Recipe.read(case['file'])
        assert case['by'] == 'model'
        recipe.apply(model, torch.randn(1, 3, 9, 9) if recipe.remove else None)
    assert str(e.value).startswith(case['says']) and len(str(e.value).splitlines()) == 1
    assert same(before, state(model))


@pytest.mark.parametrize('case', [c for c in CASES if c['by'] != 'file'], ids=lambda c: c['about'])
def test_schema_refuses_what_it_can(case, tmp_path):
    (tmp_path/case['file']).write_text(case['text'])
    data, _ = read_lines(tmp_path/case['file'])
    assert VALID.is_valid(data) == (case['by'] != 'schema')
    assert bool(list(problems(data, FULL))) == (case['by'] == 'schema')


def test_line_is_that_of_the_value(tmp_path):
    "A wrong value is put at each line in turn, and the message must name it"
    good = 'default:\n  criteria: l1\nlayers:\n  - match: stem\n    sparsity: 50\n\n  - match:\n      type: Linear\n    sparsity: 60\n    schedule:\n      name: agp\n      start: 0.1\nremove: false\n'
    Recipe.from_dict(yaml.safe_load(good))
    lines = good.splitlines()
    tried = 0
    for i, line in enumerate(lines):
        if not re.search(r': \S', line): continue
        (tmp_path/'r.yaml').write_text('\n'.join([*lines[:i], re.sub(r': \S+', ': [[]]', line), *lines[i+1:]]))
        with pytest.raises(ValueError, match=rf'r\.yaml:{i + 1}: '): Recipe.read(tmp_path/'r.yaml')
        tried += 1
    assert tried == 8


def test_several_mistakes_are_told_in_order(tmp_path):
    (tmp_path/'r.yaml').write_text('layers:\n  - {match: stem, sparsity: 150}\nremov: true\n')
    with pytest.raises(ValueError) as e: Recipe.read(tmp_path/'r.yaml')
    assert [re.search(r'r\.yaml:(\d+):', l)[1] for l in str(e.value).splitlines()] == ['2', '3']


def test_a_file_cannot_run_anything(tmp_path):
    for text in ('!!python/object/apply:os.mkdir [{}]', 'default: !!python/object/apply:os.mkdir [{}]', 'default: !!python/name:os.mkdir'):
        (tmp_path/'r.yaml').write_text(text.format(tmp_path/'made'))
        with pytest.raises(ValueError, match='the tag|not YAML'): Recipe.read(tmp_path/'r.yaml')
    assert not (tmp_path/'made').exists()


@pytest.mark.parametrize('text', ['a: &a [*a]', 'a: &a {b: *a}', 'a: {<<: 3}', 'a: &a [x, x, x, x, x, x, x, x, x, x]\n' + '\n'.join(f'{chr(98 + i)}: &{chr(98 + i)} [{", ".join([f"*{chr(97 + i)}"]*10)}]' for i in range(9)),
                                  '[' * 3000, 'a: \x00', '? [1, 2]\n: 3', 'a: !!int x', 'a: !!float x', '{a: 1, a: 2}'])
def test_odd_yaml_is_an_error_of_its_line(text, tmp_path):
    (tmp_path/'r.yaml').write_text(text)
    with pytest.raises(ValueError, match=r'r\.yaml:\d+: '): read_lines(tmp_path/'r.yaml')


def test_odd_files(tmp_path):
    (tmp_path/'r.yaml').write_bytes(b'a: 1\nb: \xff\n')
    with pytest.raises(ValueError, match=r'r\.yaml:2: not a text in UTF-8'): Recipe.read(tmp_path/'r.yaml')
    (tmp_path/'r.toml').write_text('a = ' + '['*4000)
    with pytest.raises(ValueError, match=r'r\.toml:\d+: '): Recipe.read(tmp_path/'r.toml')
    with pytest.raises(FileNotFoundError): Recipe.read(tmp_path/'none.yaml')
    with pytest.raises(TypeError, match='a file name'): Recipe.read(3)
    with pytest.raises(TypeError, match='a recipe is a dict'): Recipe.from_dict([1])
    with pytest.raises(ValueError, match='must end in .yaml'): Recipe.from_dict({'default': {'sparsity': 5}}).to_file(tmp_path/'r.txt')


# --- the schema

def test_schema_is_one(tmp_path):
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.Draft202012Validator.check_schema(FULL)
    run = subprocess.run([sys.executable, '-m', 'fasterai_lib.cli', 'schema'], cwd=ROOT, text=True, capture_output=True)
    assert run.stdout == SHIPPED.read_text(), 'run `make export`'


def test_schema_follows_the_registries(monkeypatch):
    data = {'default': {'sparsity': 50, 'criteria': 'mine', 'schedule': {'name': 'own', 'power': 2}}}
    with pytest.raises(ValueError, match="'mine'"): Recipe.from_dict(data)
    monkeypatch.setitem(criteria, 'mine', criteria['l1'])
    monkeypatch.setitem(schedules, 'own', Schedule(sched_poly))
    assert Recipe.from_dict(data).selections[0].schedule(80, .5) == pytest.approx(60)


def drawn(s):
    "Data that a schema describes"
    if 'anyOf' in s: return st.one_of(*map(drawn, s['anyOf']))
    if 'enum' in s: return st.sampled_from(s['enum'])
    if 'const' in s: return st.just(s['const'])
    if s['type'] == 'boolean': return st.booleans()
    if s['type'] == 'integer': return st.integers(s['minimum'], s['minimum'] + 40)
    if s['type'] == 'number': return st.floats(s.get('minimum', -5), s.get('maximum', 120), allow_subnormal=False) | st.integers(s.get('minimum', -5), s.get('maximum', 120))
    if s['type'] == 'array': return st.lists(drawn(s['items']), min_size=s.get('minItems', 0), max_size=3)
    if 'pattern' in s: return st.sampled_from(['3 epochs', '1 step', ' 2.5 epochs '] if 'epoch' in s['pattern'] else ['2:4', '1:8 o'])
    if s['type'] == 'string': return st.text(min_size=1, max_size=8) | st.sampled_from(['stem', '*', 'no', '1e3', '2:4', '~', 'true', '0x1', '- a', '# b', '"', "'", '.5', ''+'null'])
    props = s.get('properties') or {k: s['additionalProperties'] for k in ('o', 'i')}
    needed = {k: drawn(v) for k, v in props.items() if k in s.get('required', ())}
    return st.fixed_dictionaries(needed, optional={k: drawn(v) for k, v in props.items() if k not in needed}).filter(lambda d: len(d) >= s.get('minProperties', 0))

anything = drawn(FULL)
junk = st.recursive(st.none() | st.booleans() | st.integers(-200, 200) | st.floats(allow_nan=False) | st.text(max_size=5), lambda x: st.lists(x, max_size=2) | st.dictionaries(st.text(max_size=4), x, max_size=2), max_leaves=4)

def places(x, path=()): # of all values
    yield path
    for k, v in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else (): yield from places(v, (*path, k))

def put(x, path, value):
    if not path: return value
    x = copy.copy(x)
    x[path[0]] = put(x[path[0]], path[1:], value)
    return x


@quick
@given(anything)
def test_what_the_schema_describes_is_accepted(data):
    VALID.validate(data)
    assert not list(problems(data, FULL))


@quick
@given(anything, st.data())
def test_reader_and_schema_agree(data, more):
    data = put(data, more.draw(st.sampled_from(list(places(data)))), more.draw(junk))
    if more.draw(st.booleans()) and isinstance(data, dict): data = {**data, more.draw(st.text(max_size=6)): more.draw(junk)}
    assert VALID.is_valid(data) == (not list(problems(data, FULL))), data


# --- round trips

plain = st.dictionaries(st.text(max_size=6), st.recursive(st.booleans() | st.integers(-10**12, 10**12) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=12),
                        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3), max_leaves=8), max_size=4)

def deep_types(x): return {k: deep_types(v) for k, v in x.items()} if isinstance(x, dict) else [deep_types(v) for v in x] if isinstance(x, list) else type(x)

@pytest.mark.parametrize('suffix', ['.yaml', '.toml'])
def test_any_data_survives(suffix, tmp_path):
    @quick
    @given(plain)
    def check(data):
        write_text(data, tmp_path/f'x{suffix}')
        back, lines = read_lines(tmp_path/f'x{suffix}')
        assert (back or {}) == data and deep_types(back or {}) == deep_types(data)
        texts = (tmp_path/f'x{suffix}').read_text().split('\n')
        if data: assert set(places(back)) <= set(lines)
        for path, line in lines.items():
            if path and isinstance(path[-1], str) and re.fullmatch('[a-z]{3,}', path[-1]): assert path[-1] in texts[line - 1]
    check()


@pytest.mark.parametrize('suffix', ['.yaml', '.toml'])
def test_recipes_survive(suffix, tmp_path):
    @quick
    @given(anything)
    def check(data):
        if 'objective' in data: data['objective'] = ['2x latency', 'accuracy >= dense - 1']
        try: recipe = Recipe.from_dict(data)
        except ValueError: assume(False) # what does not go together
        recipe.to_file(tmp_path/f'r{suffix}')
        assert Recipe.read(tmp_path/f'r{suffix}') == recipe and Recipe.read(tmp_path/f'r{suffix}').data == data
    check()


def test_yaml_is_that_of_json(tmp_path):
    (tmp_path/'r.yaml').write_text('{a: 2:4, b: no, c: 012, d: 1e3, e: ~, f: 1_0, g: yes, h: 2026-11-21, i: .5, j: -7, k: True}')
    assert read_lines(tmp_path/'r.yaml')[0] == dict(a='2:4', b='no', c=12., d=1000., e=None, f='1_0', g='yes', h='2026-11-21', i=.5, j=-7, k=True)


def test_toml_lines(tmp_path):
    text = '''# [not] = 1
top = "a # [[b]]" # [c]
'quoted key' = 1
a.b . "c d" = [ # x
  1, [2,
  "]"], {x = """
]
""", y = 2},
]
[tab.le]
v = \'\'\'
[no]
\'\'\'
w = 1979-05-27 07:32:00
[[rows]]
n = 1
[rows.sub]
k = 1
[[rows]]
n = 2
[[rows.more]]
z = 3
[[rows.more]]
z = 4
'''
    (tmp_path/'r.toml').write_text(text)
    data, lines = read_lines(tmp_path/'r.toml')
    assert set(places(data)) <= set(lines)
    expected = {('top',): 2, ('quoted key',): 3, ('a', 'b', 'c d'): 4, ('a', 'b', 'c d', 0): 5, ('a', 'b', 'c d', 1, 1): 6, ('a', 'b', 'c d', 2, 'x'): 6, ('a', 'b', 'c d', 2, 'y'): 8,
                ('tab', 'le'): 10, ('tab', 'le', 'v'): 11, ('tab', 'le', 'w'): 14, ('rows', 0): 15, ('rows', 0, 'n'): 16, ('rows', 0, 'sub'): 17, ('rows', 0, 'sub', 'k'): 18,
                ('rows', 1): 19, ('rows', 1, 'n'): 20, ('rows', 1, 'more', 0, 'z'): 22, ('rows', 1, 'more', 1, 'z'): 24}
    assert {k: lines[k] for k in expected} == expected


# --- meeting a model

def names(recipe, model=None): return {p.path: p.names for p in Recipe.from_dict(recipe).parts(model or net())}

def test_selection():
    both = {'match': {'type': 'Conv2d'}, 'sparsity': 50}
    assert names({'layers': [both]}) == {('layers', 0): ['stem', 'body']}
    assert names({'layers': [{**both, 'match': {'type': ['Conv2d', 'Linear'], 'exclude': 's*'}}]}) == {('layers', 0): ['body', 'head']}
    assert names({'layers': [{**both, 'match': {'regex': '.o.*|h.*d'}}]}) == {('layers', 0): ['body', 'head']}
    assert names({'layers': [{**both, 'match': {'glob': '*e*', 'type': '_ConvNd'}}]}) == {('layers', 0): ['stem']}
    assert names({'layers': [{**both, 'match': ['h*', 'stem']}]}) == {('layers', 0): ['stem', 'head']}
    assert names({'layers': [{**both, 'match': 'stem'}, both], 'default': {'sparsity': 10}}) == {('layers', 0): ['stem'], ('layers', 1): ['body'], ('default',): ['head']}
    assert names({'default': {'sparsity': 10}, 'exclude': ['body', 'h*']}) == {('default',): ['stem']}
    assert names({'layers': [{**both, 'match': 'stem', 'sparsity': 0}], 'default': {'sparsity': 10}}) == {('default',): ['body', 'head']} # 0: left alone
    assert names({'layers': [{**both, 'match': n, 'group': 'g'} for n in ('head', 'stem')] + [{**both, 'match': 'body'}]}) == {('layers', 0): ['stem', 'head'], ('layers', 2): ['body']}


def test_tied_weights_are_one_layer():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.out = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
            self.out.weight = self.emb.weight
    assert names({'default': {'sparsity': 50}}, Tied()) == {('default',): ['emb']}
    with pytest.raises(ValueError, match="'out' shares its weights with 'emb'"): names({'layers': [{'match': 'out', 'sparsity': 50}]}, Tied())


MIXED = {'default': {'schedule': {'name': 'agp', 'start': 0}},
         'layers': [{'match': 'stem', 'sparsity': 40, 'granularity': 'kernel'},
                    {'match': 'body', 'sparsity': 50, 'granularity': 'filter', 'criteria': 'movement', 'schedule': {'name': 'one_cycle', 'end': .8}, 'round_to': 4},
                    {'match': {'type': 'Linear'}, 'context': '2:4', 'schedule': {'name': 'iterative', 'n_steps': 2}}]}

def by_hand(make):
    "The same three, as one writes them in Python"
    return [make(40, 'kernel', 'local', 'large_final', schedules['agp'] and Schedule(sched_poly, 0., 1.), exclude='body'),
            make(50, 'filter', 'local', 'movement', Schedule(one_cycle.f, 0., .8), round_to=4, exclude='stem'),
            make(50, 'weight', '2:4', 'large_final', make_schedule({'name': 'iterative', 'n_steps': 2}), layer_type=nn.Linear)]


def test_apply_is_what_sparsifiers_do():
    a, b = net(), net()
    masks = Recipe.from_dict({**MIXED, 'layers': [{**l, 'criteria': 'large_final'} for l in MIXED['layers']]}).apply(a)
    def make(s, g, c, crit, sched, layer_type=nn.Conv2d, round_to=None, **kw): Sparsifier(b, g, c, 'large_final', layer_type, **kw).sparsify_model(s, round_to)
    by_hand(make)
    assert same(state(a), state(b)) and masks.held(a) and zeros(a) == {'stem.weight': 90, 'body.weight': 8*72, 'head.weight': 32} # 40 % of 24 kernels: 10


def test_group_competes_as_one():
    def group(context): return {'layers': [{'match': n, 'group': 'g', 'sparsity': 60, 'context': context} for n in ('stem', 'head')]}
    a, b, c = net(), net(), net()
    with torch.no_grad(): # so that what is small is in one
        for m in (a, b, c): m.stem.weight.mul_(.01)
    Recipe.from_dict(group('global')).apply(a)
    Sparsifier(b, 'weight', 'global', 'large_final', (nn.Conv2d, nn.Linear), exclude='body').sparsify_model(60)
    assert same(state(a), state(b)) and zeros(a)['stem.weight'] > 160
    Recipe.from_dict(group('local')).apply(c)
    assert zeros(c) == {'stem.weight': 130, 'body.weight': 0, 'head.weight': 38}


@pytest.mark.parametrize('context', context_names())
def test_every_context_is_a_name(context):
    "Those that need measurements are refused, with the line's place; all others do what they do in a Sparsifier"
    a, b = net(), net()
    recipe = Recipe.from_dict({'layers': [{'match': {'type': 'Conv2d'}, 'sparsity': 50, 'context': context}]})
    try: Sparsifier(b, 'weight', context, 'large_final').sparsify_model(50)
    except ValueError as e:
        with pytest.raises(ValueError, match='layers.0.: .*it works in compress'): recipe.apply(a)
        assert 'it works in compress' in str(e)
    recipe.apply(a) if zeros(b)['body.weight'] else None
    assert same(state(a), state(b))


@pytest.mark.parametrize('granularity, zero', [({'tile': {'o': 4, 'i': 'all'}}, lambda w: (w == 0).reshape(2, -1, 8, 3, 3).all(1).all(1).sum() == 9),
                                               ({'Conv2d': 'filter', 'Linear': 'row'}, lambda w: (w == 0).flatten(1).all(1).sum() == len(w)//2)])
def test_granularities(granularity, zero):
    m = net()
    if 'tile' in granularity: m.body = nn.Conv2d(8, 8, 3)
    Recipe.from_dict({'layers': [{'match': 'body', 'sparsity': 50, 'granularity': granularity}]}).apply(m)
    assert zero(m.body.weight)


def test_table_says_what_happens():
    t = Recipe.from_dict(MIXED).table(net()).set_index('layer')
    assert list(t.selection) == ['layers[0]', 'layers[1]', 'layers[2]'] and list(t.sparsity) == [40, 50, 50] and list(t.schedule) == ['agp', 'one_cycle', 'iterative']


@pytest.mark.parametrize('name', schedules)
def test_schedules_by_name(name):
    "A name with its own defaults spelled out is the schedule itself"
    s = make_schedule({'name': name, **{k: v for k, (_, v) in schedule_arguments(name).items()}})
    assert (s.over(80, 10, 200) == schedules[name].over(80, 10, 200)).all() and make_schedule(name) is schedules[name] or name in ('iterative', 'poly', 'lottery', 'static', 'gradual')


# --- training

def images(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return list(zip(torch.randn(n, 3, 8, 8, generator=g), torch.randint(0, 4, (n,), generator=g)))

def learner(tmp_path, seed=0):
    random.seed(0)
    learn = Learner(DataLoaders.from_dsets(images(32), images(8, 1), bs=8, device='cpu', num_workers=0), net(seed), loss_func=nn.CrossEntropyLoss(), path=tmp_path)
    torch.manual_seed(1)
    return learn

def fit(learn, epochs=2, **kw):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-2, **kw)


def test_callback_is_what_callbacks_do(tmp_path):
    "Each selection trains as if a SparsifyCallback of its own had been written"
    MIXED['layers'][0]['schedule'] = {'name': 'agp', 'start': 0}
    (tmp_path/'r.yaml').write_text(yaml.safe_dump(MIXED))
    one, three = learner(tmp_path), learner(tmp_path)
    cb = SparsifyCallback.from_recipe(tmp_path/'r.yaml')
    fit(one, 4, cbs=cb)
    fit(three, 4, cbs=by_hand(SparsifyCallback))
    assert same(state(one.model), state(three.model))
    assert zeros(one.model) == {'stem.weight': 90, 'body.weight': 8*72, 'head.weight': 32}
    assert one.recorder.values == three.recorder.values or [v[:-1] for v in one.recorder.values] == [v[:-1] for v in three.recorder.values]
    assert cb.masks.held(one.model) and isinstance(cb, (RecipeCallback, MaskCallback)) and len(cb.parts) == 3


def test_masks_hold_afterwards(tmp_path):
    learn = learner(tmp_path)
    cb = SparsifyCallback.from_recipe(MIXED)
    fit(learn, cbs=cb)
    dead = {n: p == 0 for n, p in learn.model.named_parameters()}
    learn.validate()
    fit(learn, cbs=cb) # again with the same callback
    assert all((p[dead[n]] == 0).all() for n, p in learn.model.named_parameters())
    fit(learn, cbs=MaskCallback(cb.masks))
    assert all((p[dead[n]] == 0).all() for n, p in learn.model.named_parameters())
    assert zeros(learn.model) == {'stem.weight': 90, 'body.weight': 8*72, 'head.weight': 32}


def test_callback_in_a_learner_survives_lr_find(tmp_path):
    learn = learner(tmp_path)
    learn.add_cb(SparsifyCallback.from_recipe(MIXED))
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=20, show_plot=False)
    assert not sum(zeros(learn.model).values())
    fit(learn)
    assert zeros(learn.model) == {'stem.weight': 90, 'body.weight': 8*72, 'head.weight': 32}


def test_error_in_a_fit_tells_the_line(tmp_path):
    (tmp_path/'r.yaml').write_text('layers:\n  - match: stem\n    sparsity: 50\n  - match: head\n    sparsity: 50\n    round_to: 500\n')
    learn = learner(tmp_path)
    before = state(learn.model)
    with pytest.raises(ValueError, match=r'r\.yaml:4: layers\[1\]: head: .*round_to=500'): fit(learn, cbs=SparsifyCallback.from_recipe(tmp_path/'r.yaml'))
    assert same(before, state(learn.model))


REMOVE = {'remove': True, 'default': {'schedule': {'name': 'iterative', 'n_steps': 2, 'start': 0}}, 'layers': [{'match': 'stem', 'sparsity': 25}, {'match': {'type': 'Conv2d'}, 'sparsity': 50}]}

def test_removal_is_what_prune_callback_does(tmp_path):
    a, b = learner(tmp_path), learner(tmp_path)
    fit(a, cbs=PruneCallback.from_recipe(REMOVE))
    fit(b, cbs=PruneCallback({'stem': 25, 'body': 50}, 'local', 'large_final', make_schedule(REMOVE['default']['schedule'])))
    assert (a.model.stem.out_channels, a.model.body.out_channels) == (6, 8) and same(state(a.model), state(b.model))


def test_removal_at_once():
    x, a, b = torch.randn(2, 3, 8, 8), net(), net()
    Recipe.from_dict(REMOVE).apply(a, x)
    Pruner(b, x).prune_model({'stem': 25, 'body': 50})
    assert same(state(a), state(b))
    whole = net()
    Recipe.from_dict({'remove': True, 'default': {'context': 'global'}, 'layers': [{'match': {'type': 'Conv2d', 'exclude': 'stem'}, 'sparsity': 50}]}).apply(whole, x)
    assert (whole.stem.out_channels, whole.body.out_channels) == (8, 8) # what is in no selection keeps its outputs


def test_frozen_layers_keep_their_units():
    m = net()
    m.stem.requires_grad_(False)
    Recipe.from_dict({'remove': True, 'default': {'sparsity': 50}}).apply(m, torch.randn(1, 3, 8, 8))
    assert (m.stem.out_channels, m.body.out_channels) == (8, 8)


@pytest.mark.parametrize('make, message', [
    (lambda: SparsifyCallback.from_recipe(REMOVE), 'use PruneCallback.from_recipe'),
    (lambda: PruneCallback.from_recipe(MIXED), 'needs remove: true'),
    (lambda: PruneCallback.from_recipe({'remove': True, 'objective': '2x latency'}), 'Recipe.compress'),
    (lambda: SparsifyCallback.from_recipe({'objective': '2x latency'}), 'Recipe.compress'),
    (lambda: Recipe.from_dict(REMOVE).apply(net()), 'pass example_inputs'),
    (lambda: Recipe.from_dict(MIXED).apply(net(), torch.randn(1, 3, 8, 8)), 'example_inputs are for remove'),
    (lambda: Recipe.from_dict(MIXED).parts(nn.ReLU()), 'no prunable layer')])
def test_wrong_use(make, message):
    with pytest.raises(ValueError, match=message): make()


def test_objective_is_handed_through():
    r = Recipe.from_dict({'objective': ['2x latency', 'accuracy >= dense - 1'], 'steps': 5, 'fine_tune': 1, 'remove': True})
    assert (r.objective, r.steps, r.fine_tune, r.remove) == (['2x latency', 'accuracy >= dense - 1'], 5, 1, True)
    assert Recipe.from_dict({'objective': '3 MB'}).objective == ['3 MB']
