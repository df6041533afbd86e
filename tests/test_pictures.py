"""Pictures show what the masks say, count for count."""
import random

import matplotlib

matplotlib.use('Agg')

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from fasterai_lib.core.criteria import criteria
from fasterai_lib.core.granularity import Granularities, Tile
from fasterai_lib.core.masks import Masks
from fasterai_lib.show.granularities import get_pruned_conv, get_pruned_linear, plot_criteria, plot_granularities, plot_masks, plot_sparsity
from fasterai_lib.sparse.sparsifier import Sparsifier
from fasterai_lib.sparse.sparsify_callback import SparsifyCallback

CONVS, LINEARS = Granularities.available(nn.Conv2d), Granularities.available(nn.Linear)
SMALL = nn.Linear(4, 3)


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close('all')


def drawn(ax, gid):
    "A boolean picture, one per cell of the mesh"
    mesh, = [c for c in [*ax.collections, *ax.images] if c.get_gid() == gid]
    return ~np.ma.getmaskarray(mesh.get_array())


def check(ax, mask):
    "The Axes shows exactly `mask`, and says so in its title"
    removed, kept = (int(drawn(ax, g).sum()) for g in ('removed', 'kept'))
    assert removed == mask.dead() and kept == mask.grid.numel - mask.dead()
    assert ax.get_title().endswith(f"\n{100*mask.dead()/mask.grid.numel:.4g} % removed")


@pytest.mark.parametrize('name', CONVS)
@pytest.mark.parametrize('sparsity', [30, 100])
def test_conv(name, sparsity):
    conv = nn.Conv2d(3, 5, (3, 2))
    ax = get_pruned_conv(name, sparsity, conv)
    assert isinstance(ax, Axes) and ax.get_title().startswith(name)
    check(ax, Sparsifier(conv, name, 'local', 'large_final').plan(sparsity)['weight'])


@pytest.mark.parametrize('name', LINEARS)
@pytest.mark.parametrize('sparsity', [30, 100])
def test_linear(name, sparsity):
    linear = nn.Linear(7, 5)
    ax = get_pruned_linear(name, sparsity, linear)
    assert isinstance(ax, Axes) and ax.get_title().startswith(name)
    mask = Sparsifier(linear, name, 'local', 'large_final', nn.Linear).plan(sparsity)['weight']
    check(ax, mask)
    assert (drawn(ax, 'kept') == mask.full((5, 7)).numpy()).all() # no gaps: the picture is the matrix


def test_one_row_per_filter_one_column_per_channel():
    conv = nn.Conv2d(3, 4, 2)
    keep = torch.rand(conv.weight.shape) > .5
    ax = get_pruned_conv('weight', conv=conv, masks=keep)
    at = lambda n: [3*k + j for k in range(n) for j in range(2)] # two cells, one gap
    picture = drawn(ax, 'kept')[np.ix_(at(4), at(3))]
    assert (picture == keep.permute(0, 2, 1, 3).reshape(8, 6).numpy()).all()
    values = next(c for c in ax.collections if c.get_gid() == 'kept').get_array()[np.ix_(at(4), at(3))]
    assert np.allclose(values[picture], conv.weight.detach().abs().permute(0, 2, 1, 3).reshape(8, 6).numpy()[picture])


def test_transposed_convolutions_have_their_filters_in_rows_too():
    conv = nn.ConvTranspose2d(4, 6, 1, groups=2) # weight: [2 groups of 2 inputs, 3 outputs, 1, 1]
    keep = torch.rand(conv.weight.shape) > .5
    picture = drawn(get_pruned_conv('weight', conv=conv, masks=keep), 'kept')[::2, ::2]
    assert (picture == keep.view(2, 2, 3).transpose(1, 2).reshape(6, 2).numpy()).all()


def test_shared_units_run_through_the_gaps():
    def bridged(ax): return int(drawn(ax, 'gap kept').sum() + drawn(ax, 'gap removed').sum())
    assert bridged(get_pruned_conv('kernel')) == 0
    assert bridged(get_pruned_conv('filter')) == 4*3*3 # 4 filters, 3 gaps, 3 cells high
    assert bridged(get_pruned_conv('shared_kernel')) == 4*3*3
    assert bridged(get_pruned_conv('layer')) == 2*3*12 + 9


@pytest.mark.parametrize('conv', [nn.Conv1d(3, 4, 5), nn.Conv3d(2, 4, (2, 3, 2)), nn.ConvTranspose1d(3, 4, 2), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.ConvTranspose3d(3, 2, 2),
                                  nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(6, 4, 1, groups=2), nn.Conv2d(1, 1, 1), nn.Conv2d(24, 40, 3).half(),
                                  nn.Conv2d(4, 8, 3, bias=False).requires_grad_(False)], ids=str)
def test_own_layer(conv):
    before = conv.weight.detach().clone()
    ax = plt.subplots()[1]
    for name in Granularities.available(conv):
        check(get_pruned_conv(name, 60, conv, ax=ax), Sparsifier(conv, name, 'local', 'large_final', type(conv), frozen=True).plan(60)['weight'])
        ax.clear()
    assert torch.equal(conv.weight, before)


def test_own_mask():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.Linear(8, 4))
    masks = Sparsifier(model, 'filter', 'global', 'large_final').plan(40)
    check(get_pruned_conv('filter', conv=model[1], masks=masks['1.weight']), masks['1.weight'])
    check(get_pruned_conv('weight', conv=model[1], masks=masks['1.weight']), masks['1.weight']) # finer lines, same weights
    alone = Sparsifier(model[0], 'filter', 'local', 'large_final').plan(50)
    check(get_pruned_conv('filter', conv=model[0], masks=alone), alone['weight'])
    rows = Sparsifier(model, 'row', 'local', 'large_final', nn.Linear).plan(25)
    check(get_pruned_linear('row', linear=model[2], masks=rows), rows['2.weight'])
    with pytest.raises(ValueError, match=r"masks\['0.weight'\]"): get_pruned_conv('filter', conv=model[0], masks=masks)
    with pytest.raises(ValueError, match='the mask is for'): get_pruned_conv('filter', conv=model[0], masks=masks['1.weight'])
    with pytest.raises(ValueError, match='has shape'): get_pruned_linear('row', masks=torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match='parts of units'): get_pruned_linear('row', masks=torch.eye(8, 12).bool())
    with pytest.raises(ValueError, match='empty'): get_pruned_linear('row', masks=Masks())
    with pytest.raises(TypeError, match='torch.float32'): get_pruned_linear('row', masks=torch.ones(8, 12))


def test_tile_and_context():
    linear, tile = nn.Linear(12, 8), Tile(o=2, i=5) # the last block of a row is smaller
    check(get_pruned_linear(tile, 50, linear), Sparsifier(linear, tile, 'local', 'large_final', nn.Linear).plan(50)['weight'])
    assert get_pruned_linear(Tile(o=2, i=4)).get_title() == 'Tile(o=2, i=4)\n50 % removed'
    kept = drawn(get_pruned_linear('weight', context='2:4'), 'kept')
    assert (kept.reshape(8, 3, 4).sum(-1) == 2).all()


@pytest.mark.parametrize('draw', [lambda: get_pruned_conv('kernel', criteria='random'), lambda: get_pruned_linear('row', criteria='random'),
                                  lambda: plot_criteria('random'), lambda: plot_granularities(SMALL, criteria='random')],
                         ids=['conv', 'linear', 'criteria', 'all'])
def test_random_state_untouched_and_seeded(draw):
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    pictures = []
    for _ in range(2):
        fig = draw()
        fig = fig if isinstance(fig, Figure) else fig.figure
        fig.canvas.draw()
        pictures.append(np.asarray(fig.canvas.buffer_rgba()).copy())
    assert (pictures[0] == pictures[1]).all()
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all() and random.getstate() == states[2]


def test_seed_matters():
    one, two = (drawn(get_pruned_conv('weight', seed=s), 'removed') for s in (0, 1))
    assert (one != two).any()


@pytest.mark.parametrize('layer', [None, nn.Linear(6, 4), nn.Conv1d(2, 3, 3), nn.ConvTranspose2d(2, 3, 2)], ids=str)
def test_all_granularities(layer):
    fig = plot_granularities(layer)
    assert [a.get_title().split('\n')[0] for a in fig.axes if a.get_visible()] == Granularities.available(layer or nn.Conv2d)


def test_drawn_on_given_axes():
    fig, axs = plt.subplots(1, 3)
    assert get_pruned_conv('filter', ax=axs[0]) is axs[0] and get_pruned_linear('row', ax=axs[1]) is axs[1] and plot_criteria('movement', ax=axs[2]) is axs[2]
    assert plt.get_fignums() == [fig.number] and not fig.legends


@pytest.mark.parametrize('name', criteria)
def test_criteria(name):
    ax = plot_criteria(name, n=40, sparsity=30)
    removed, kept = ax.collections
    assert len(removed.get_offsets()) == 12 and len(kept.get_offsets()) == 28
    assert ax.get_title() == f'{name}\n30 % removed'


def test_criteria_of_own_weights():
    before, after = torch.arange(1., 7), torch.tensor([6., 5, 4, 3, 2, 1])
    points = lambda ax: sorted(ax.collections[0].get_offsets()[:, 0].tolist())
    assert points(plot_criteria('large_final', before=before, after=after)) == [4, 5, 6]
    assert points(plot_criteria('large_init', before=before, after=after)) == [1, 2, 3]


def test_masks_of_a_model():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 3, groups=2), nn.Linear(300, 200), nn.Embedding(10, 4), nn.LSTM(4, 6), nn.MultiheadAttention(8, 2))
    masks = Sparsifier(model, 'weight', 'local', 'large_final', layer_type=tuple(Granularities.kinds)).sparsify_model(40)
    for fig in (plot_masks(masks), plot_masks(model)):
        panels = [a for a in fig.axes if a.get_visible() and a.images]
        assert len(panels) == sum(not masks[n].follows for n in masks)
        for ax, name in zip(panels, (n for n in masks if not masks[n].follows)):
            assert ax.get_title().endswith(f"{100*masks[name].dead()/masks[name].grid.numel:.4g} % removed")
            assert abs(1 - ax.images[0].get_array().mean() - masks[name].dead()/masks[name].grid.numel) < .02
        assert fig.get_suptitle() == f'{masks.sparsity:.4g} % removed'
    small = plot_masks(masks, n_max=3, pixels=16)
    shown = [a for a in small.axes if a.get_visible() and a.images]
    assert len(shown) == 3 and max(max(a.images[0].get_array().shape) for a in shown) <= 16


@pytest.mark.parametrize('call, error, says', [
    (lambda: get_pruned_conv('kernal'), ValueError, "did you mean 'kernel'"),
    (lambda: get_pruned_conv('kernel', 101), ValueError, 'between 0 and 100'),
    (lambda: get_pruned_conv('kernel', '50'), TypeError, 'percentage'),
    (lambda: get_pruned_conv('kernel', conv=nn.Linear(2, 2)), TypeError, 'must be a convolution such as nn.Conv2d, got Linear'),
    (lambda: get_pruned_conv('kernel', conv=3), TypeError, 'got 3'),
    (lambda: get_pruned_conv('kernel', criteria='larg_final'), ValueError, 'large_final'),
    (lambda: get_pruned_conv('filter', context='2:4'), ValueError, '2:4'),
    (lambda: get_pruned_conv('filter', seed='a'), TypeError, 'seed'),
    (lambda: get_pruned_linear('filter'), ValueError, 'not available for Linear'),
    (lambda: get_pruned_linear('row', linear=nn.Conv2d(1, 1, 1)), TypeError, 'got Conv2d'),
    (lambda: plot_granularities(nn.ReLU()), TypeError, 'got ReLU'),
    (lambda: plot_granularities(n_cols=0), ValueError, 'n_cols'),
    (lambda: plot_criteria('movemen'), ValueError, 'movement'),
    (lambda: plot_criteria('movement', n=1), ValueError, 'n must be'),
    (lambda: plot_criteria('movement', before=torch.ones(3)), ValueError, 'both or neither'),
    (lambda: plot_criteria('movement', before=torch.ones(3), after=torch.ones(4)), ValueError, 'differ in shape'),
    (lambda: plot_masks(Masks()), ValueError, 'nothing has been sparsified'),
    (lambda: plot_masks(3), TypeError, 'got int'),
    (lambda: plot_sparsity(3), TypeError, 'got int'),
    (lambda: plot_sparsity(SparsifyCallback(50, 'weight', 'local', 'large_final', 'lin')), ValueError, 'train with a SparsifyCallback'),
])
def test_wrong_input(call, error, says):
    with pytest.raises(error) as e: call()
    assert says in str(e.value)
