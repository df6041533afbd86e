"Recipes that say until what: at once, in the loop, and on the command line"
import subprocess
import sys

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.metrics import accuracy
from torch import nn

from fasterai_lib.cli import main
from fasterai_lib.core.cost import cost
from fasterai_lib.prune.compress import compress
from fasterai_lib.prune.plan import load_pruned
from fasterai_lib.prune.pruner import Pruner
from fasterai_lib.recipe.recipe import Recipe
from fasterai_lib.recipe import recipe_callback

X = torch.randn(2, 3, 10, 10)
MAKE = '''from torch import nn
def make(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
'''
exec(MAKE)
def net(seed=0): torch.manual_seed(seed); return make().eval()
def total(m, q): return cost(m, X, latency=False).total[q]
def state(m): return {k: v.clone() for k, v in m.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def widths(m): return [c.out_channels for c in m if isinstance(c, nn.Conv2d)]

# --- at once

def test_removal_is_what_the_pruner_does():
    a, b = net(), net()
    plan, budget = Recipe.from_dict({'remove': True, 'objective': '50% macs', 'default': {'context': 'global', 'criteria': 'l1', 'max_sparsity': 75}}).reach(a, X)
    Pruner(b, X, 'l1', 'global', max_sparsity=75).prune_model('50% macs')
    assert same(state(a), state(b)) and plan.removed_weights > 0
    assert total(a, 'macs') == budget.best['macs measured'] and .4*total(net(), 'macs') < total(a, 'macs') <= .5*total(net(), 'macs')

def test_layers_that_keep_all():
    for layers in ([{'match': '5', 'sparsity': 0}], [{'match': '0'}, {'match': '3'}], [{'match': '5', 'sparsity': 0, 'criteria': 'l1'}, {'match': ['0', '3']}]):
        m = net(); Recipe.from_dict({'remove': True, 'objective': '70% macs', 'layers': layers}).apply(m, X)
        assert widths(m)[2] == 16 and widths(m)[:2] != [8, 16]
    with pytest.raises(ValueError, match='layers.0.: none of its layers can lose units'): Recipe.from_dict({'remove': True, 'objective': '70% macs', 'layers': [{'match': '8'}, {'match': '3'}]}).apply(net(), X)

@pytest.mark.parametrize('context', ['global', 'local', 'knapsack', 'netadapt'])
def test_masks(context):
    m, dense = net(), total(net(), 'nonzero')
    tries = dict(data=[(X, torch.tensor([0, 1]))], loss=nn.functional.cross_entropy) if context == 'netadapt' else {}
    masks, budget = Recipe.from_dict({'objective': ['40% nonzero'], 'layers': [{'match': {'type': 'Conv2d'}}, {'match': '8', 'sparsity': 0}], 'default': {'context': context}}).reach(m, X, **tries)
    assert .38*dense <= total(m, 'nonzero') <= .4*dense and masks.held(m) and (m[8].weight != 0).all()
    assert budget.best['nonzero measured'] == total(m, 'nonzero')

def test_criterion_that_looks_at_data():
    m = net()
    Recipe.from_dict({'objective': '50% nonzero', 'default': {'criteria': 'taylor'}}).apply(m, X, [(X, torch.tensor([0, 1]))], nn.functional.cross_entropy)
    assert total(m, 'nonzero') <= .5*total(net(), 'nonzero')

@pytest.mark.parametrize('data, inputs, message', [
    ({'objective': ['50% nonzero', 'accuracy >= dense - 1']}, X, r"objective\[1\]: 'accuracy >= dense - 1' is about a metric.*Recipe.compress\(learn\)"),
    ({'objective': '50% nonzero'}, None, 'pass example_inputs'),
    ({'objective': '50% macs'}, X, 'objective: .*zeros do not change'),
    ({'objective': '1% macs', 'remove': True, 'default': {'min_kept': 7}}, X, 'objective: .*the nearest that is possible'),
    ({'objective': '50% macs', 'remove': True, 'default': {'context': 'netadapt'}}, X, 'objective: .*data= and loss='),
    ({'objective': '50% macs', 'remove': True, 'exclude': '*'}, X, 'all layers are excluded')])
def test_what_cannot_be_at_once(data, inputs, message):
    m = net(); before = state(m)
    with pytest.raises(ValueError, match=message): Recipe.from_dict(data).apply(m, inputs)
    assert same(before, state(m))

@pytest.mark.parametrize('data, message', [
    ({'layers': [{'match': '0', 'sparsity': 50}]}, 'layers.0..sparsity: got 50, but with an objective'),
    ({'default': {'sparsity': 50}}, 'default.sparsity: got 50, but with an objective'),
    ({'default': {'context': '2:4'}}, "default.context: got '2:4', which settles"),
    ({'default': {'round_to': 4}}, 'round_to needs remove: true'),
    ({'layers': [{'match': '0', 'criteria': 'l1'}, {'match': '3'}]}, r"layers.1.: got None, but layers.0. has 'l1': with an objective, all selections share one criteria")])
def test_what_does_not_go_together(data, message):
    with pytest.raises(ValueError, match=message): Recipe.from_dict({'objective': '50% nonzero', **data})

# --- in the loop

def learner(seed=0):
    g = torch.Generator().manual_seed(0)
    data = [(torch.randn(3, 10, 10, generator=g), torch.tensor(i % 4)) for i in range(32)]
    return Learner(DataLoaders.from_dsets(data, data[:16], bs=8, device='cpu', num_workers=0, shuffle=False), net(seed).train(), loss_func=nn.CrossEntropyLoss(), metrics=accuracy)

@pytest.mark.parametrize('remove', [True, False])
def test_loop_is_compress(remove):
    aim = ['50% macs'] if remove else ['30% nonzero']
    settings = {'criteria': 'l1', 'context': 'global', 'schedule': 'agp', 'max_sparsity': 90}
    recipe = Recipe.from_dict({'remove': remove, 'objective': [*aim, 'accuracy >= 0'], 'steps': 2, 'fine_tune': 1, 'default': settings, 'layers': [{'match': {'type': 'Conv2d'}}]})
    a, b = learner(), learner()
    with a.no_bar(), a.no_logging(): torch.manual_seed(1); done = recipe.compress(a, n_batches=2)
    how = dict(ignored=('8',)) if remove else dict(layer_type=nn.Conv2d)
    with b.no_bar(), b.no_logging(): torch.manual_seed(1); want = compress(b, [*aim, 'accuracy >= 0'], 'l1', 'global', 'agp', 2, 1, remove, max_sparsity=90, n_batches=2, **how)
    assert done.reached and want.reached and len(done.df) == 3 and same(state(a.model), state(b.model))

def test_loop_goes_on(tmp_path):
    recipe = Recipe.from_dict({'remove': True, 'objective': '50% macs', 'steps': 1, 'fine_tune': 0})
    runs = []
    for _ in range(2):
        learn = learner()
        with learn.no_bar(), learn.no_logging(): recipe.compress(learn, path=tmp_path/'run')
        runs.append(state(learn.model))
    assert same(*runs) and (tmp_path/'run/log.json').exists()

@pytest.mark.parametrize('data, kwargs, kind, message', [
    ({'default': {'sparsity': 50}}, {}, ValueError, 'compress needs an objective'),
    ({'objective': '50% nonzero'}, {'steps': 3}, TypeError, "no argument 'steps'; allowed: path, example_inputs"),
    ({'objective': ['50% nonzero', 'acuracy >= 1']}, {}, ValueError, "objective: .*no metric 'acuracy'"),
    ({'objective': '50% macs', 'remove': True, 'steps': 1, 'layers': [{'match': '8'}, {'match': '0'}]}, {}, ValueError, 'none of its layers can lose units')])
def test_wrong_use_of_the_loop(data, kwargs, kind, message):
    learn = learner(); before = state(learn.model)
    with pytest.raises(kind, match=message), learn.no_bar(), learn.no_logging(): Recipe.from_dict(data).compress(learn, **kwargs)
    assert same(before, state(learn.model))

# --- the command line

@pytest.fixture
def folder(tmp_path):
    (tmp_path/'tinynet.py').write_text(MAKE)
    torch.save(net().state_dict(), tmp_path/'net.pt')
    return tmp_path

def cli(folder, recipe, out, *more):
    (folder/'r.yaml').write_text(recipe)
    return subprocess.run([sys.executable, '-m', 'fasterai_lib.cli', 'compress', 'r.yaml', 'net.pt', '-o', out, '--model', 'tinynet:make', *more], text=True, capture_output=True, cwd=folder)

def test_command_line_removes(folder):
    done = cli(folder, 'remove: true\nobjective: [50% macs, 80% parameters]\n', 'small.safetensors', '--input', '2,3,10,10')
    assert done.returncode == 0, done.stderr
    assert all(w in done.stdout for w in ('asked', 'measured', '50% macs', '80% parameters', 'not trained'))
    small = load_pruned(make(), folder/'small.safetensors').eval()
    assert total(small, 'macs') <= .5*total(net(), 'macs') and total(small, 'parameters') <= .8*total(net(), 'parameters')

def test_command_line_masks(folder):
    done = cli(folder, 'objective: 40% nonzero\nlayers: [{match: {type: Conv2d}, context: global}]\n', 'small.pt', '--input', '2,3,10,10')
    assert done.returncode == 0 and '40% nonzero' in done.stdout, done.stderr
    m = make(); m.load_state_dict(torch.load(folder/'small.pt', weights_only=True))
    assert total(m, 'nonzero') <= .4*total(net(), 'nonzero')

@pytest.mark.parametrize('recipe, more, says', [
    ('objective: 50% nonzero\n', (), 'r.yaml has an objective, for which the model must be run'),
    ('objective:\n- 50% nonzero\n- accuracy >= dense - 1\n', ('--input', '2,3,10,10'), "r.yaml:3: objective[1]: 'accuracy >= dense - 1' is about a metric, which a model alone does not tell: Recipe.compress(learn)")])
def test_command_line_says_what_is_wrong(folder, recipe, more, says, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (folder/'r.yaml').write_text(recipe)
    assert main(['compress', 'r.yaml', 'net.pt', '-o', 'small.safetensors', '--model', 'tinynet:make', *more]) == 2
    said = capsys.readouterr().err
    assert says in said and not (folder/'small.safetensors').exists() and said.count('\n') == 1
