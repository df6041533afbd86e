"""An exception in the middle of a removal, or of its proof: the model is afterwards what it was, bit for bit."""
import copy

import pytest
import torch
from test_prune_bad_input import X, net, picture, recurrent, residual, rng, trained

import fasterai_lib.prune.optimizer
import fasterai_lib.prune.plan
import fasterai_lib.prune.pruner
from fasterai_lib.prune.pruner import Pruner

class Fails:
    "Stands for a function: raises at its n-th call, or from then on"
    def __init__(self, f, n, error, on=False): self.f, self.n, self.error, self.on, self.calls = f, n, error, on, 0
    def __call__(self, *args, **kw):
        self.calls += 1
        if self.calls == self.n or self.on and self.calls > self.n: raise self.error
        return self.f(*args, **kw)

PLACES = [(fasterai_lib.prune.plan, '_sliced'), (fasterai_lib.prune.plan, 'restate'), (fasterai_lib.prune.plan, 'state'), (fasterai_lib.prune.plan, 'caches'), (fasterai_lib.prune.optimizer, '_sliced')]
ERRORS = [RuntimeError('broken'), torch.OutOfMemoryError('out of memory'), KeyboardInterrupt()]

@pytest.mark.parametrize('make', [net, residual, recurrent])
@pytest.mark.parametrize('place', PLACES, ids=lambda p: f'{p[0].__name__.split(".")[-1]}-{p[1]}')
def test_an_exception_in_a_removal_is_rolled_back(make, place, monkeypatch):
    model, x = make(), X if make is not recurrent else torch.randn(2, 5, 3)
    if make is residual: model.memory['table'] = torch.ones(3)
    opt = trained(model, x)
    plan = Pruner(model, x).plan(50)
    snap, before, twin = picture(model, opt), rng(), copy.deepcopy(model)
    count = Fails(getattr(*place), 0, None)
    monkeypatch.setattr(*place, count); plan.remove(*copy.deepcopy((model, opt))); monkeypatch.undo()
    calls = count.calls
    for n in sorted({1, 2, calls//2, calls} - {0}):
        if n > calls: continue
        for error in ERRORS:
            monkeypatch.setattr(*place, Fails(getattr(*place), n, error))
            with pytest.raises(type(error)) as caught: plan.remove(model, opt)
            monkeypatch.undo()
            assert caught.value is error and picture(model, opt) == snap and rng() == before
    plan.remove(model, opt); plan.remove(twin)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values()))

@pytest.mark.parametrize('error', ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize('place', [*PLACES[:3], (fasterai_lib.prune.pruner, '_sliced')], ids=lambda p: f'{p[0].__name__.split(".")[-1]}-{p[1]}')
def test_an_exception_in_prune_model(place, error, monkeypatch): # in its proof, in the removal, or in what is remembered for the criterion
    for n in (1, 2, 3, 5, 8, 13, 21):
        for on in (False, True):
            model = net()
            opt = trained(model)
            p = Pruner(model, X, criteria='movement')
            snap, before = picture(model, opt), rng()
            monkeypatch.setattr(*place, f := Fails(getattr(*place), n, error, on))
            try: p.prune_model(50, opt)
            except BaseException as e:
                assert picture(model, opt) == snap and rng() == before
                assert e is error or str(error) in str(e) and str(error), f'{e!r} hides {error!r}'
                failed = True
            else: failed = False
            finally: monkeypatch.undo()
            assert failed or f.calls < n or isinstance(error, RuntimeError) and not on
            if failed: p.prune_model(50, opt) # goes on as if nothing had been
            model(X).sum().backward(); opt.step()
            if failed or f.calls < n: assert model.conv1.out_channels == 4 and p.refs['conv1.weight'].shape == model.conv1.weight.shape
