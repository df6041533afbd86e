"""Part of the coverage benchmark: models as they come, half of their channels removed with nothing configured, and proven by other means than the library's:
the masked dense model and the removed one, both built anew, on other inputs in float64. The whole is `make bench-coverage`."""
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]/'benchmarks'))
import coverage_checks
import zoo

from fasterai_lib.prune.pruner import Pruner

TORCHVISION = '''resnet18 resnext50_32x4d densenet121 squeezenet1_1 squeezenet1_0 googlenet mobilenet_v2 mobilenet_v3_small mobilenet_v3_large mnasnet0_5 mnasnet1_0
shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 efficientnet_b0 regnet_x_400mf regnet_y_400mf convnext_tiny vit_b_32 swin_t swin_v2_t lraspp_mobilenet_v3_large
deeplabv3_mobilenet_v3_large fasterrcnn_mobilenet_v3_large_320_fpn mc3_18 mvit_v1_b raft_small'''.split()
TIMM = 'test_byobnet test_vit ghostnet_050 levit_128s test_resnet test_coatnet xcit_nano_12_p8_224 mobilevit_xxs'.split()
TRANSFORMERS = 'bert gpt2 llama t5 mixtral mamba swinv2 segformer clip falcon'.split()
OTHERS = [('resnet18', 30), ('resnet18', 70), ('mobilenet_v3_small', 30), ('mobilenet_v3_small', 70), ('shufflenet_v2_x0_5', 70), ('squeezenet1_1', 30), ('swin_t', 70)]
CASES = [*((f'torchvision/{m}', 50) for m in TORCHVISION), *((f'torchvision/{m}', s) for m, s in OTHERS), *((f'timm/{m}', 50) for m in TIMM), *((f'transformers/{m}', 50) for m in TRANSFORMERS),
         *((f'transformers/{m}', s) for m in ('bert', 'llama') for s in (30, 70))]

def needs(name):
    library = name.split('/')[0]
    if not importlib.util.find_spec(library): pytest.skip(f'{library} is not installed')
    return name

@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name, sparsity', CASES, ids=lambda v: str(v))
def test_pruned_runs_trains_and_is_exact(name, sparsity):
    row = {}
    coverage_checks.measure(needs(name), 'ours', sparsity, False, lambda **found: row.update(found))
    assert 'error' not in row and row.get('pruned') and row['runs'] and row['backward'], row
    assert row['exact'] and row['diff'] <= 1e-10 and not row['note'], row
    assert row['cut'] > 0 and row['params'] < 1 - .1*sparsity/100, row

# --- where nothing is exact

class Stream(nn.Module): # a norm over every width
    def __init__(self):
        super().__init__()
        self.a, self.n, self.b, self.m, self.c = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 12), nn.GroupNorm(1, 12), nn.Linear(12, 4)
    def forward(self, x): return self.c(self.m(self.b(self.n(self.a(x)).relu()).relu()))

class Response(nn.Module): # as in ConvNeXt V2
    def __init__(self):
        super().__init__()
        self.a, self.g, self.b = nn.Linear(6, 16), nn.Parameter(torch.randn(16)), nn.Linear(16, 4)
    def forward(self, x):
        x = self.a(x).relu()
        n = x.norm(dim=1, keepdim=True)
        return self.b(x + self.g*x*n/(n.mean(-1, keepdim=True) + 1e-6)).mean(1)

def refused(model, inputs, reason):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    p = Pruner(model, inputs)
    with pytest.raises(ValueError, match=rf'nothing can be removed from {type(model).__name__} exactly: .*{reason}.*exact=False') as caught: p.prune_model(50)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    size = sum(q.numel() for q in model.parameters())
    plan = Pruner(model, inputs, exact=False).prune_model(50)
    assert len(plan.table()) and sum(q.numel() for q in model.parameters()) < .8*size
    assert all(o.isfinite().all() for o in coverage_checks.outputs(model, zoo.fresh(inputs)))
    coverage_checks.backward(model, inputs)

@pytest.mark.parametrize('make, inputs, reason', [(Stream, (torch.randn(5, 6),), 'norm'), (Response, (torch.randn(2, 5, 6),), 'mean|computes something else')])
def test_refused_with_the_reason_and_pruned_inexactly(make, inputs, reason):
    torch.manual_seed(0)
    refused(zoo.randomise(make()).eval(), inputs, reason)

@pytest.mark.filterwarnings('ignore')
def test_convnextv2_of_transformers():
    refused(*zoo.build(needs('transformers/convnextv2')), 'computes something else|norm|mean')

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', ['vit_b_32', 'convnext_tiny', 'swin_t'])
def test_residual_widths_go_too_when_it_need_not_be_exact(name):
    model, inputs = zoo.build(needs(f'torchvision/{name}'))
    size = sum(p.numel() for p in model.parameters())
    Pruner(model, inputs, exact=False).prune_model(50)
    assert sum(p.numel() for p in model.parameters()) < .4*size
    assert all(o.isfinite().all() for o in coverage_checks.outputs(model, zoo.fresh(inputs)))
    coverage_checks.backward(model, inputs)
