"""Models to prune, every weight random: `models()` gives name -> factory of (model, example inputs), `build(name)` the
randomised model. torchvision: all but the quantised; timm: the smallest of every architecture module; transformers: small
configurations. Inputs are as small as the architecture allows, two of a batch, since a batch of one hides mistakes."""
import fnmatch, functools, importlib.util, unittest.mock, warnings
import torch, torch.nn as nn

# ------------------------------------------------------------------------------------------------------- torchvision
SIZES = dict(inception_v3=299, maxvit_t=224)  # default 64; auxiliary heads and window partitions that need more
VIDEO = dict(s3d=(16, 224))  # default (8, 64): frames and pixels
BOXES = dict(min_size=128, max_size=160)
RCNN = dict(BOXES, rpn_pre_nms_top_n_test=60, rpn_post_nms_top_n_test=30, box_score_thresh=0., box_detections_per_img=10)
DENSE = dict(BOXES, score_thresh=0., detections_per_img=10, topk_candidates=30)
DETECTION = dict(fcos=DENSE, retinanet=DENSE, ssd300=dict(score_thresh=0., detections_per_img=10, topk_candidates=30),
                 ssdlite320=dict(score_thresh=0., detections_per_img=10, topk_candidates=30))


def small_mvit(cls, **settings): return cls(**{**settings, 'spatial_size': (64, 64), 'temporal_size': 8})


def torchvision_model(name, kind):
    from torchvision import models
    make = lambda **kw: models.get_model(name, weights=None, **kw)
    if kind == 'detection':
        settings = next((kw for prefix, kw in DETECTION.items() if name.startswith(prefix)), RCNN)
        return make(weights_backbone=None, **settings), ([torch.rand(3, 128, 128), torch.rand(3, 128, 144)],)
    if kind == 'segmentation':
        aux = {} if name.startswith('lraspp') else dict(aux_loss=True)
        return make(weights_backbone=None, **aux), (torch.randn(2, 3, 96, 96),)
    if kind == 'video':
        frames, size = VIDEO.get(name, (8, 64))
        if name.startswith('mvit'):  # its sizes are fixed by the builders, not by the class
            from torchvision.models.video import mvit
            with unittest.mock.patch.object(mvit, 'MViT', functools.partial(small_mvit, mvit.MViT)): model = make()
        else: model = make()
        return model, (torch.randn(2, 3, frames, size, size),)
    if kind == 'optical_flow': return make(), (torch.rand(2, 3, 128, 128)*2 - 1, torch.rand(2, 3, 128, 128)*2 - 1)
    size = 56 if name == 'vit_h_14' else SIZES.get(name, 64)
    settings = dict(image_size=size) if name.startswith('vit_') else dict(init_weights=True) if name in ('googlenet', 'inception_v3') else {}
    return make(**settings), (torch.randn(2, 3, size, size),)


def torchvision_models():
    from torchvision import models
    kinds = dict(classification=models, segmentation=models.segmentation, detection=models.detection, video=models.video,
                 optical_flow=models.optical_flow)
    return {name: lambda args=(name, kind): torchvision_model(*args) for kind, module in kinds.items() for name in models.list_models(module=module)}


# -------------------------------------------------------------------------------------------------------------- timm
# The model with the fewest parameters of each of the 98 modules of timm.models (1.0.31), built on the meta device once.
TIMM = tuple('''beit_base_patch16_224 halonet_h1 test_byobnet cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 test_convnext
cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny deepseek_vit_412m deit_tiny_patch16_224 densenet121
dla46x_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 test_efficientnet efficientvim_m1 efficientvit_b0
efficientvit_m0 vit_tiny_patch16_dinov3_qkvb fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m ghostnet_050
hardcorenas_b hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2
inception_v3 inception_v4 lcnetv2_small levit_128s lowformer_b0 test_mambaout test_coatnet poolformerv2_s12 gmlp_ti16_224
mobilenetv3_small_050 mobilenetv5_base mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny
nextvit_small test_nfnet pit_ti_224 pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050 repvit_m1
res2next50 resnest14d test_resnet resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18
starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224
tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny test_vit vit_tiny_r_s16_p8_224 test_vit_relpos
samvit_base_patch16_224 vitamin_small_224 volo_d1_224 ese_vovnet19b_slim_dw legacy_xception xception41p xcit_nano_12_p8_224'''.split())
PIXELS = {}  # where neither 96 nor the fixed size fits


def timm_model(name):
    import timm
    model = timm.create_model(name, pretrained=False)
    cfg = model.default_cfg
    size = PIXELS.get(name) or (cfg['input_size'][-1] if cfg.get('fixed_input_size') else (cfg.get('min_input_size') or [96])[-1])
    return model, (torch.randn(2, 3, size, size),)


# --------------------------------------------------------------------------------------------------------------- all
def models(only='*'):
    "name -> factory of (model, example inputs), for the families whose library is installed"
    families = {}
    if importlib.util.find_spec('torchvision'): families['torchvision'] = torchvision_models()
    if importlib.util.find_spec('timm'): families['timm'] = {name: lambda name=name: timm_model(name) for name in TIMM}
    if importlib.util.find_spec('transformers'):
        import zoo_transformers
        families['transformers'] = zoo_transformers.models()
    names = {f'{family}/{name}': factory for family, members in families.items() for name, factory in members.items()}
    return {name: factory for name, factory in names.items() if any(fnmatch.fnmatch(name, part) for part in only.split(','))}


@torch.no_grad()
def randomise(model):
    "Biases, norms, their statistics and whatever starts out constant (layer scale, zero gammas, tables) get values that show mistakes"
    for module in model.modules():
        norm = 'Norm' in type(module).__name__
        for name, p in [*module.named_parameters(recurse=False), *(module.named_buffers(recurse=False) if norm else ())]:
            if not p.is_floating_point() or p.numel() == 0: continue
            constant = bool((p == p.flatten()[0]).all())
            if name.startswith('running_'): continue
            if 'bias' in name and p.dim() <= 1: p.normal_(0, .2)
            elif not constant or p.numel() == 1 and p.item(): continue
            elif norm and name == 'weight' or p.flatten()[0] != 0: p.normal_(1, .1)
            else: p.normal_(0, .2)
    return model


@torch.no_grad()
def calibrate(model, inputs):
    """BatchNorm statistics near the real ones (the variance times .5 to 1.5, the mean .2 deviations off): with any others the signal
    of a deep network dies out or blows up, and mistakes with it"""
    def near(module, args):
        x, axes = args[0], [d for d in range(args[0].dim()) if d != 1]
        var = x.var(axes, correction=0)
        var = .5*(var + var.mean()) + 1e-6
        module.running_mean.copy_(x.mean(axes) + .2*var.sqrt()*torch.randn_like(var))
        module.running_var.copy_(var*torch.empty_like(var).uniform_(.5, 1.5))
    norms = [m for m in model.modules() if getattr(m, 'running_mean', None) is not None]
    hooks = [m.register_forward_pre_hook(near) for m in norms]
    if norms: model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    for hook in hooks: hook.remove()


def build(name, factory=None, seed=0):
    "The model in eval mode and its example inputs, the same at every call"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.manual_seed(seed)
        model, inputs = (factory or models(name)[name])()
        calibrate(randomise(model).eval(), inputs)
    return model, inputs


def tree(f, x):
    "x with f applied to its tensors"
    if isinstance(x, torch.Tensor): return f(x)
    if isinstance(x, dict): return {k: tree(f, v) for k, v in x.items()}
    return type(x)(tree(f, v) for v in x) if isinstance(x, (list, tuple)) else x


def fresh(inputs, seed=1):
    "Other inputs of the same shapes: new noise, the same integers in another order along the sequence, masks as they are"
    generator = torch.Generator().manual_seed(seed)
    def other(x):
        if x.is_floating_point():
            like = torch.rand if x.min() >= 0 else torch.randn
            return like(x.shape, generator=generator).to(x.dtype)
        if x.dtype == torch.bool or x.max() <= 1: return x.clone()
        axis = min(1, x.dim() - 1)
        return x.index_select(axis, torch.randperm(x.shape[axis], generator=generator))
    return tree(other, inputs)


def call(model, inputs):
    torch.manual_seed(2)  # the few models that draw numbers in eval draw the same
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def leaves(out):
    "The floating point tensors of an output, whatever it is made of"
    if isinstance(out, torch.Tensor): return [out] if out.is_floating_point() or out.is_complex() else []
    if isinstance(out, dict): out = out.values()
    elif not isinstance(out, (list, tuple)): return []
    return [leaf for part in out for leaf in leaves(part)]
