"""The command line: what it writes is what the library does; a mistake is one line and exit status 2."""
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_model
from torch import nn

from fasterai_lib.cli import main
from fasterai_lib.prune.plan import load_pruned
from fasterai_lib.prune.pruner import Pruner
from fasterai_lib.sparse.sparsifier import Sparsifier

NET = '''
from torch import nn
def make(width=8): return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
def words(): return nn.Sequential(nn.Embedding(10, 8), nn.Flatten(), nn.Linear(24, 6), nn.ReLU(), nn.Linear(6, 2))
def tied():
    m = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    m[2].weight = m[0].weight
    return m
def broken(): raise KeyError('oh')
def none(): return 3
'''
MASK = 'layers:\n  - match: {type: Conv2d}\n    granularity: filter\n    sparsity: 50\n  - match: "6"\n    sparsity: 75\n'
REMOVE = 'remove: true\nlayers:\n  - match: {type: Conv2d}\n    sparsity: 50\n'


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, 'tinynet', raising=False)
    Path('tinynet.py').write_text(NET)
    Path('mask.yaml').write_text(MASK)
    Path('remove.yaml').write_text(REMOVE)
    torch.manual_seed(0)
    torch.save(net().state_dict(), 'net.pt')
    yield tmp_path
    sys.modules.pop('tinynet', None)


def net():
    import tinynet
    return tinynet.make()

def loaded():
    m = net()
    m.load_state_dict(torch.load('net.pt', weights_only=True))
    return m

def cli(line): return main(line.split())

def complaint(line, capsys):
    before = sorted(p.name for p in Path('.').iterdir())
    capsys.readouterr()
    assert cli(line) == 2
    said = capsys.readouterr()
    assert not said.out and len(said.err.splitlines()) == 1 and said.err.startswith('fasterai_lib') and 'Traceback' not in said.err
    assert sorted(p.name for p in Path('.').iterdir() if p.name != '__pycache__') == [n for n in before if n != '__pycache__'] # nothing half-written
    return said.err


@pytest.mark.parametrize('out', ['small.pt', 'small.pth', 'small.safetensors'])
def test_masks(out, capsys):
    assert cli(f'compress mask.yaml net.pt -o {out} --model tinynet:make') == 0
    want = loaded()
    Sparsifier(want, 'filter', 'local', 'large_final').sparsify_model(50)
    Sparsifier(want, 'weight', 'local', 'large_final', nn.Linear).sparsify_model(75)
    got = load_file(out) if out.endswith('s') else torch.load(out, weights_only=True)
    assert got.keys() == want.state_dict().keys() and all(torch.equal(v, got[k]) for k, v in want.state_dict().items())
    assert '75' in capsys.readouterr().out
    assert cli(f'report {out} --model tinynet:make') == 0 # what was written can be read again
    assert '48' in capsys.readouterr().out


def test_removal(capsys):
    assert cli('compress remove.yaml net.pt -o small.safetensors --model tinynet:make --input 1,3,8,8') == 0
    x, want, got = torch.randn(2, 3, 8, 8), loaded(), load_pruned(net(), 'small.safetensors').eval()
    Pruner(want.eval(), torch.randn(1, 3, 8, 8)).prune_model(50)
    assert got[3].out_channels == 8 and torch.equal(got(x), want(x))
    capsys.readouterr()
    assert cli('report small.safetensors') == 0
    out = capsys.readouterr().out
    assert 'removed before' in out and '8×4×3×3' in out
    assert cli('report small.safetensors --model tinynet:make --input 1,3,8,8') == 0
    assert '8×4×3×3' in capsys.readouterr().out


def test_other_inputs_and_arguments(capsys):
    torch.save(__import__('tinynet').words().state_dict(), 'words.pt')
    Path('r.yaml').write_text('remove: true\nlayers: [{match: "2", sparsity: 50}]\n')
    assert cli('compress r.yaml words.pt -o w.safetensors --model tinynet:words --input 1,3:int') == 0
    torch.save(__import__('tinynet').make(4).state_dict(), 'narrow.pt')
    assert main(['report', 'narrow.pt', '--model', 'tinynet:make', '--model-args', '{"width": 4}', '--input', '1,3,8,8']) == 0
    assert 'MACs' in capsys.readouterr().out
    assert cli('report net.pt --model tinynet:make --input 1,3,8,8 --latency') == 0 and 'latency' in capsys.readouterr().out
    save_model(__import__('tinynet').tied(), 'tied.safetensors') # holds the weight once
    assert cli('report tied.safetensors --model tinynet:tied') == 0


def test_report_of_weights_alone(capsys):
    m = loaded()
    with torch.no_grad(): m[0].weight[:2] = 0
    torch.save({'model': m.state_dict(), 'opt': {}}, 'fastai.pth')
    assert cli('report fastai.pth') == 0
    rows = [l.split() for l in capsys.readouterr().out.splitlines()]
    assert ['0.weight', '8×3×3×3', '216', '54', '25.00', '%'] in rows
    assert rows[-1][:3] == ['total', f'{sum(v.numel() for v in m.state_dict().values()):,}', f'{sum(int((v == 0).sum()) for v in m.state_dict().values()):,}']


def test_draw(capsys):
    assert cli('draw kernel') == 0 and cli('draw row --linear -o r.svg --sparsity 25') == 0
    assert Path('kernel.png').read_bytes()[:4] == b'\x89PNG' and '<svg' in Path('r.svg').read_text()


class Bomb:
    def __reduce__(self): return Path.mkdir, (Path('exploded'),)


def test_no_pickle_is_opened_unasked(capsys):
    torch.save({'weight': Bomb()}, 'bomb.pt')
    torch.save(loaded(), 'whole.pt')
    for name in ('bomb.pt', 'whole.pt'): assert '--trust-pickle' in complaint(f'report {name}', capsys)
    assert not Path('exploded').exists()
    assert cli('report whole.pt --trust-pickle') == 0 and '16×8×3×3' in capsys.readouterr().out
    assert cli('compress mask.yaml whole.pt -o small.pt --trust-pickle') == 0
    torch.save(SimpleNamespace(model=loaded()), 'learner.pkl') # as learn.export writes them: it has a model
    capsys.readouterr()
    assert cli('report learner.pkl --trust-pickle') == 0 and '16×8×3×3' in capsys.readouterr().out
    assert 'leave one out' in complaint('report whole.pt --trust-pickle --model tinynet:make', capsys)


WRONG = {
    'nothing.pt': ('report nothing.pt', 'nothing.pt: no such file'),
    'no recipe': ('compress nothing.yaml net.pt -o small.pt --model tinynet:make', 'nothing.yaml: no such file'),
    'not torch': ('report mask.yaml', 'mask.yaml: not a file'),
    'not safetensors': ('report junk.safetensors', 'junk.safetensors: not a safetensors file'),
    'no architecture': ('compress mask.yaml net.pt -o small.pt', 'holds weights alone: say what builds the model'),
    'input without model': ('report net.pt --input 1,3,8,8', '--input and --latency need --model'),
    'no colon': ('report net.pt --model tinynet', '--model tinynet: write package.module:function'),
    'no module': ('report net.pt --model tinynett:make', "--model tinynett:make: No module named 'tinynett'"),
    'no function': ('report net.pt --model tinynet:maek', "tinynet has no 'maek'; did you mean 'make'?"),
    'it fails': ('report net.pt --model tinynet:broken', "--model tinynet:broken: KeyError: 'oh'"),
    'no model': ('report net.pt --model tinynet:none', 'made int, not an nn.Module'),
    'no json': ('report net.pt --model tinynet:make --model-args width=4', 'write a JSON object'),
    'wrong argument': ('report net.pt --model tinynet:make --model-args {"wide":4}', "unexpected keyword argument 'wide'"),
    'another shape': ('report net.pt --model tinynet:make --model-args {"width":4}', '0.weight has shape (8, 3, 3, 3), in tinynet:make (4, 3, 3, 3)'),
    'another net': ('report more.pt --model tinynet:make', "more.pt: has '0.biass', which tinynet:make has not; did you mean '0.bias'?"),
    'part of the net': ('report less.pt --model tinynet:make', "less.pt: has no '0.weight', which tinynet:make has"),
    'not only tensors': ('report list.pt', 'list.pt: holds list, not a dict of weights'),
    'recipe': ('compress bad.yaml net.pt -o small.pt --model tinynet:make', "bad.yaml:2: layers[0].sparisty: unknown key 'sparisty'; did you mean 'sparsity'?"),
    'layer': ('compress layer.yaml net.pt -o small.pt --model tinynet:make', "layer.yaml:2: layers[0].match: no prunable layer matches 'conv'"),
    'no inputs': ('compress remove.yaml net.pt -o small.safetensors --model tinynet:make', '--input 1,3,224,224'),
    'bad sizes': ('compress remove.yaml net.pt -o small.safetensors --model tinynet:make --input 1x3', '--input 1x3: write the sizes'),
    'bad kind': ('compress remove.yaml net.pt -o small.safetensors --model tinynet:make --input 1,3:char', '--input 1,3:char: write the sizes'),
    'removal as pt': ('compress remove.yaml net.pt -o small.pt --model tinynet:make --input 1,3,8,8', '-o small.pt: the name must end in .safetensors'),
    'masks as txt': ('compress mask.yaml net.pt -o small.txt --model tinynet:make', '-o small.txt: the name must end in .pt, .pth, .safetensors'),
    'over itself': ('compress mask.yaml net.pt -o net.pt --model tinynet:make', 'is the file that is read'),
    'no folder': ('compress mask.yaml net.pt -o no/small.pt --model tinynet:make', "there is no folder 'no'"),
    'granularity': ('draw kernle', "'kernle' is not available for Conv2d; did you mean 'kernel'?"),
    'drawn as txt': ('draw kernel -o k.txt', 'must end in .png, .svg, .pdf'),
    'draws too much': ('draw kernel --sparsity 150', 'between 0 and 100'),
    'no command': ('', 'command'),
    'wrong command': ('shrink x', 'invalid choice'),
    'wrong option': ('report net.pt --modell x', 'unrecognized arguments'),
    'no output': ('compress mask.yaml net.pt', '-o'),
    'no number': ('draw kernel --sparsity half', 'half'),
}

@pytest.mark.parametrize('line, message', WRONG.values(), ids=WRONG)
def test_wrong_use(line, message, capsys):
    Path('junk.safetensors').write_text('not at all')
    Path('bad.yaml').write_text('layers:\n  - {match: x, sparisty: 5}\n')
    Path('layer.yaml').write_text('layers:\n  - {match: conv, sparsity: 5}\n')
    Path('__pycache__').mkdir(exist_ok=True)
    weights = loaded().state_dict()
    torch.save({**weights, '0.biass': weights['0.bias']}, 'more.pt')
    torch.save({k: v for k, v in weights.items() if k != '0.weight'}, 'less.pt')
    torch.save([1], 'list.pt')
    assert message in complaint(line, capsys)


def test_several_mistakes_are_lines(capsys):
    Path('bad.yaml').write_text('layers:\n  - {match: x, sparisty: 5}\n  - {match: y, sparsity: 500}\n')
    assert cli('compress bad.yaml net.pt -o small.pt --model tinynet:make') == 2
    err = capsys.readouterr().err.splitlines()
    assert [l.split(': ')[1] for l in err] == ['bad.yaml:2', 'bad.yaml:3']


def test_as_a_process(tmp_path):
    def run(*args): return subprocess.run([sys.executable, '-m', 'fasterai_lib.cli', *args], text=True, capture_output=True, cwd=tmp_path)
    done = run('compress', 'mask.yaml', 'net.pt', '-o', 'small.pt', '--model', 'tinynet:make')
    assert done.returncode == 0 and '50' in done.stdout, done.stderr
    wrong = run('draw', 'kernle', '-o', 'k.txt')
    assert wrong.returncode == 2 and wrong.stdout == '' and 'Traceback' not in wrong.stderr and wrong.stderr.count('\n') == 1
    told = run('compress', '--help')
    assert told.returncode == 0 and '--trust-pickle' in told.stdout and max(map(len, told.stdout.splitlines())) <= 100
