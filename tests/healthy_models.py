"""Models that are right, each with an input: `diagnose` must raise no alarm above a note about any of them.

`HEALTHY` maps a name, whose first word is a package, to a function that returns (model, input). The weights are
random, and the models are cut down in depth and width, so that all of them together take a quarter of a minute.
"""
import importlib.util

import torch
from torch import nn

def images(size, channels=3): return torch.randn(4, channels, size, size, generator=torch.Generator().manual_seed(1))
def labels(x): return torch.tensor([0, 3, 1, 2]) if torch.is_tensor(x) and x.ndim == 4 else None   # for images

def torchvision_model(name, *args, **kw):
    from torchvision import models
    return getattr(models, name)(*args, **kw), images(64)

def torchvision_vit():
    "vit_b_16's own class, a quarter of its width, three layers deep, for 64 pixels"
    from torchvision.models import VisionTransformer
    return VisionTransformer(64, 16, 3, 12, 192, 768), images(64)

def torchvision_convnext():
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt
    widths = 24, 48, 96, 192, None
    return ConvNeXt([CNBlockConfig(a, b, 2) for a, b in zip(widths, widths[1:])]), images(64)

def torchvision_resnet():
    from torchvision.models.resnet import BasicBlock, ResNet
    return ResNet(BasicBlock, [1, 1, 1, 1]), images(64)

def timm_model(name, size=64, **kw):
    import timm
    return timm.create_model(name, pretrained=False, **kw), images(size)

def timm_davit(name):
    return timm_model(name, depths=(1, 1, 1, 1), embed_dims=(16, 32, 64, 128), num_heads=(1, 2, 4, 8), window_size=4)

def transformers_deberta():
    from transformers import DebertaV2Config, DebertaV2Model
    config = DebertaV2Config(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                             intermediate_size=32, max_position_embeddings=32, type_vocab_size=0,
                             relative_attention=True, pos_att_type=['c2p', 'p2c'], position_buckets=4)
    return DebertaV2Model(config), torch.randint(3, 20, (4, 9), generator=torch.Generator().manual_seed(1))

def transformers_vit():
    from transformers import ViTConfig, ViTForImageClassification
    config = ViTConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, image_size=32,
                       patch_size=8, num_labels=10)
    return ViTForImageClassification(config), images(32)

def vit_pytorch_model(name):
    import vit_pytorch
    model = getattr(vit_pytorch, name)
    return model(image_size=32, patch_size=8, num_classes=10, dim=64, depth=3, heads=4, mlp_dim=128), images(32)

def torch_encoder():
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    return nn.TransformerEncoder(layer, 3), torch.randn(4, 9, 64, generator=torch.Generator().manual_seed(1))

def our_vit(**kw):
    from vit_nbdev.vit import ViT, ViTConfig
    return ViT(ViTConfig(img_size=32, patch_size=8, n_classes=10, dim=64, depth=3, n_heads=4, **kw)), images(32)

def our_transformer():
    from vit_nbdev.transformer import Transformer
    ids = torch.randint(3, 11, (2, 4, 9), generator=torch.Generator().manual_seed(1))
    return Transformer(11, 11, dim=32, depth=2, n_heads=4), tuple(ids)

SWIN = dict(img_size=64, window_size=4, depths=(2, 2, 2, 2), embed_dim=24, num_heads=(1, 2, 4, 8))
HEALTHY = {
    'torch TransformerEncoder': torch_encoder,
    'torchvision vit_b_16': torchvision_vit,
    'torchvision swin_t': lambda: torchvision_model('SwinTransformer', [4, 4], 24, [2, 2, 2, 2], [1, 2, 4, 8], [7, 7]),
    'torchvision convnext_tiny': torchvision_convnext,
    'torchvision resnet18': torchvision_resnet,
    'timm vit': lambda: timm_model('vit_tiny_patch16_224', img_size=64, depth=3),
    'timm deit, distilled': lambda: timm_model('deit_tiny_distilled_patch16_224', img_size=64, depth=3),
    'timm deit3': lambda: timm_model('deit3_small_patch16_224', img_size=64, depth=3),
    'timm cait': lambda: timm_model('cait_xxs24_224', img_size=64, depth=3),
    'timm swin': lambda: timm_model('swin_tiny_patch4_window7_224', **SWIN),
    'timm swinv2': lambda: timm_model('swinv2_tiny_window8_256', **SWIN),
    'timm mixer': lambda: timm_model('mixer_s32_224', img_size=64),
    'timm xcit': lambda: timm_model('xcit_nano_12_p16_224', img_size=64, depth=3),
    'timm beit': lambda: timm_model('beit_base_patch16_224', img_size=64, depth=2, embed_dim=192, num_heads=3),
    'timm eva02': lambda: timm_model('eva02_tiny_patch14_224', size=56, img_size=56, depth=3),
    'timm convnext': lambda: timm_model('convnext_atto'),
    'timm davit, channels scaled by the tokens': lambda: timm_davit('davit_base_fl'),
    'transformers ViT': transformers_vit,
    'transformers DeBERTa-v2': transformers_deberta,
    'vit-pytorch ViT': lambda: vit_pytorch_model('ViT'),
    'vit-pytorch SimpleViT': lambda: vit_pytorch_model('SimpleViT'),
    'vit_nbdev ViT': our_vit,
    'vit_nbdev ViT, mean pool': lambda: our_vit(pool='mean', dropout=.1, drop_path=.1),
    'vit_nbdev Transformer': our_transformer,
}
def missing(name):
    "The package that this model needs and that is not installed, or None"
    package = name.split()[0].replace('-', '_')
    return None if importlib.util.find_spec(package) else package
